"""A package of somebody else adds a framework and a layer kind; nothing of neutral's is touched for it.

The package stands in tests/plugin_package as it is installed: its modules, and the entry points beside them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

PACKAGE = Path(__file__).with_name("plugin_package")
ENTRY_POINTS = {
    "neutral.exporters": "acme_neutral.reader",
    "neutral.importers": "acme_neutral.writer",
    "neutral.conventions": "acme_neutral.convention:ACME",
}
RNG = np.random.default_rng(5)
FULL = {"w": RNG.standard_normal((3, 5)).astype("float32"), "b": RNG.standard_normal(5).astype("float32")}
THIN = {
    "d": RNG.standard_normal((5, 2)).astype("float32"),
    "u": RNG.standard_normal((2, 7)).astype("float32"),
    "b": RNG.standard_normal(7).astype("float32"),
}

Neutral = Callable[..., subprocess.CompletedProcess[str]]


def installed(site: Path, names: tuple[str, ...] = ("acme",), distribution: str = "acme-neutral") -> Path:
    """The package's entry points, as an installer leaves them in a folder of installed packages."""
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", "utf-8")
    lines = [
        line
        for group, value in ENTRY_POINTS.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name in names))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return site


def acme_file(path: Path, seed: float = 1.0, *, thin: bool = True) -> Path:
    layers = {"first": {"class": "Full", "config": {}, "arrays": {n: (seed * a).tolist() for n, a in FULL.items()}}}
    if thin:
        arrays = {n: (seed * a).tolist() for n, a in THIN.items()}
        layers["second"] = {"class": "Thin", "config": {"alpha": 0.5}, "arrays": arrays}
    path.write_text(json.dumps({"acme": 1, "layers": layers}), "utf-8")
    return path


@pytest.fixture
def neutral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Neutral:
    """The command, with the package installed."""
    site = installed(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", f"{site}:{PACKAGE}:{Path(__file__).parents[1]}")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "neutral", *arguments], capture_output=True, text=True, check=False
        )

    return run


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


def test_a_kind_and_a_framework_of_a_plug_in_go_through_the_archive(neutral: Neutral, tmp_path: Path) -> None:
    acme_file(tmp_path / "a.acme")
    for command in (
        ("export", "a.acme", "a.nwt"),
        ("check", "a.nwt"),
        ("import", "a.nwt", "--to", "acme", "-o", "b.acme"),
    ):
        done = neutral(*command)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b.acme").read_text()) == json.loads((tmp_path / "a.acme").read_text())
    shown = neutral("show", "a.nwt", "--json").stdout
    kinds = {layer["path"]: layer["kind"] for layer in json.loads(shown)["layers"]}
    assert kinds == {"first": "dense", "second": "low_rank"}
    assert neutral("digest", "a.acme").stdout == neutral("digest", "a.nwt").stdout != ""


def test_into_a_template_and_through_arrays(neutral: Neutral, tmp_path: Path) -> None:
    acme_file(tmp_path / "a.acme")
    acme_file(tmp_path / "t.acme", seed=-3.0)
    assert neutral("convert", "a.acme", "filled.acme", "--into", "t.acme").returncode == 0
    assert json.loads((tmp_path / "filled.acme").read_text()) == json.loads((tmp_path / "a.acme").read_text())
    assert neutral("convert", "a.acme", "a.npz").returncode == 0
    found = arrays(tmp_path / "a.npz")
    np.testing.assert_array_equal(found["first/kernel"], FULL["w"].T)
    np.testing.assert_array_equal(found["second/down"], THIN["d"].T)
    assert neutral("convert", "a.npz", "again.acme", "--to", "acme").returncode == 0
    assert json.loads((tmp_path / "again.acme").read_text()) == json.loads((tmp_path / "a.acme").read_text())


def test_to_a_framework_of_neutral_s_own(neutral: Neutral, tmp_path: Path) -> None:
    acme_file(tmp_path / "plain.acme", thin=False)
    done = neutral("convert", "plain.acme", "plain.safetensors")
    assert done.returncode == 0, done.stderr
    back = neutral("convert", "plain.safetensors", "back.acme", "--to", "acme", "--kind", "first=dense")
    assert back.returncode == 0, back.stderr
    there = json.loads((tmp_path / "back.acme").read_text())["layers"]["first"]["arrays"]
    np.testing.assert_array_equal(np.array(there["w"], "float32"), FULL["w"])
    acme_file(tmp_path / "a.acme")
    refused = neutral("convert", "a.acme", "a.safetensors")
    assert refused.returncode != 0 and "second" in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "a.safetensors").exists()


def test_it_is_listed(neutral: Neutral) -> None:
    assert "acme" in neutral("formats").stdout


def test_without_the_package_its_archives_are_refused(
    neutral: Neutral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme_file(tmp_path / "a.acme")
    assert neutral("export", "a.acme", "a.nwt").returncode == 0
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    done = neutral("show", "a.nwt")
    assert done.returncode != 0 and "low_rank" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["torch", "npz", "archive"])
def test_a_name_of_neutral_s_own_is_refused(name: str, neutral: Neutral, tmp_path: Path) -> None:
    installed(tmp_path / "site", (name,), "rival")
    done = neutral("formats")
    assert done.returncode == 2 and name in done.stderr and "rival" in done.stderr and done.stderr.count("\n") == 1


def test_two_packages_of_one_name_are_refused(neutral: Neutral, tmp_path: Path) -> None:
    installed(tmp_path / "site", ("acme",), "other-acme")
    done = neutral("formats")
    assert done.returncode == 2 and "'acme'" in done.stderr and done.stderr.count("\n") == 1


def test_a_kind_of_two_packages_is_refused(neutral: Neutral, tmp_path: Path) -> None:
    """The same convention under a second name brings the same kind a second time."""
    info = tmp_path / "site" / "second-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: second\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text("[neutral.conventions]\nbis = acme_neutral.convention:ACME\n", "utf-8")
    acme_file(tmp_path / "a.acme")
    done = neutral("export", "a.acme", "a.nwt")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_package_that_does_not_load_is_named(neutral: Neutral, tmp_path: Path) -> None:
    info = tmp_path / "site" / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n", "utf-8")
    lines = [line for group in ENTRY_POINTS for line in (f"[{group}]", "broken = nowhere_to_be_found")]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")
    done = neutral("formats")
    assert done.returncode == 2 and "broken" in done.stderr and done.stderr.count("\n") == 1
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    done = neutral("convert", "x.npz", "y.npz")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "place"), [("reader", "def read("), ("writer", "def fill("), ("reader", "def signature(")]
)
def test_a_bug_of_a_plug_in_is_not_neutral_s(
    module: str, place: str, neutral: Neutral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PACKAGE / "acme_neutral", tmp_path / "broken" / "acme_neutral")
    broken = tmp_path / "broken" / "acme_neutral" / f"{module}.py"
    before, after = broken.read_text("utf-8").split(place)
    line, rest = after.split(":\n", 1)
    broken.write_text(f"{before}{place}{line}:\n    json.loads('{{')\n{rest}", "utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{tmp_path / 'broken'}:{Path(__file__).parents[1]}")
    done = neutral(
        "convert", str(acme_file(tmp_path / "a.acme")), "b.acme", "--into", str(acme_file(tmp_path / "t.acme"))
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not (tmp_path / "b.acme").exists()
    assert done.stderr.startswith("neutral: error: plug-in acme-neutral: found JSONDecodeError")
    assert "a bug in the plug-in acme-neutral" in done.stderr


def test_a_failure_over_what_a_plug_in_gave_names_it(
    neutral: Neutral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PACKAGE / "acme_neutral", tmp_path / "broken" / "acme_neutral")
    broken = tmp_path / "broken" / "acme_neutral" / "reader.py"
    broken.write_text(broken.read_text("utf-8").replace("return NativeModel(", "return ("), "utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{tmp_path / 'broken'}:{Path(__file__).parents[1]}")
    done = neutral("show", str(acme_file(tmp_path / "a.acme")))
    assert done.returncode == 1 and "a bug in neutral, or in the plug-in acme-neutral" in done.stderr


def test_nothing_of_it_is_loaded_for_neutral_s_own_files(neutral: Neutral, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    (tmp_path / "site" / "sitecustomize.py").write_text("", "utf-8")
    script = "import sys; from neutral.cli import main; main(['show', 'x.npz']); print('acme_neutral' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
