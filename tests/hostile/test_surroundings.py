"""Whatever the file holds: pipes and devices, outputs that must not be written, full disks, signals, files that shrink."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neutral.cli import main
from tests.foreground import usual_signals
from tests.hostile.commands import Commands, Outcome, listing, one_line, refused
from tests.hostile.making import copied, entry, safetensors_bytes

FORMATS = ("model.pt", "legacy.pt", "scripted.pt", "model.safetensors", "shards", "model.npz", "model.keras", "model.h5",
           "model.weights.h5", "ckpt", "saved", "model.nwt")  # fmt: skip
OUTPUTS = {"torch": "out.pt", "keras": "out.keras", "tensorflow": "out.ckpt", "numpy": "out.npz", "safetensors": "out.safetensors"}  # fmt: skip
TEMPLATES = ("model.pt", "legacy.pt", "model.safetensors", "shards", "model.npz", "model.keras", "model.h5",
             "model.weights.h5", "ckpt", "saved")  # fmt: skip


# --- what is read ---


def reading(run: Commands, folder: Path, source: object, good: Path, says: str = "") -> None:
    refused(run, folder, ["export", source, "out.nwt"], says)
    refused(run, folder, ["export", source, "out.nwt", "--from", "torch"], says)
    refused(run, folder, ["show", source], says)
    refused(run, folder, ["check", source], says)
    refused(run, folder, ["digest", source], says)
    refused(run, folder, ["diff", source, good / "model.nwt"], says, status=2)
    refused(run, folder, ["convert", source, "out.npz"], says)
    refused(run, folder, ["import", source, "--to", "torch", "-o", "out.pt"], says)
    refused(run, folder, ["import", good / "model.nwt", "--into", source, "-o", "out.pt"], says)


@pytest.mark.parametrize(
    "source", ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/full", "/dev/stdin", "fifo", "socket"]
)
def test_pipes_and_devices(source: str, run: Commands, good: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        reading(run, tmp_path, source, good)


@pytest.mark.parametrize(
    "source", ["empty", "missing", "text", "zeros", "folder", "loop", "name\nof two lines\x1b[31m"]
)
def test_what_is_no_model(source: str, run: Commands, good: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello\n" * 100)
    (tmp_path / "zeros").write_bytes(bytes(10_000))
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    reading(run, tmp_path, source, good, "two lines\\x1b[31m" if "\n" in source else source)


@pytest.mark.parametrize("format", ["checkpoint", "keras", "h5", "savedmodel", "safetensors", "npz", "pt-legacy"])
def test_pipes_inside_of_folders(format: str, run: Commands, good: Path, tmp_path: Path) -> None:
    """Whatever name a reader looks for, it is a pipe that nobody writes to."""
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("checkpoint", "x.index", "saved_model.pb", "keras_metadata.pb", "config.json", "metadata.json", "model.weights.h5",
                 "model.safetensors.index.json", "model.safetensors"):  # fmt: skip
        os.mkfifo(folder / name)
    refused(run, tmp_path, ["export", "x", "out.nwt", "--from", format])
    for name in ("checkpoint", "x", "x.index", "model.safetensors.index.json"):
        refused(run, tmp_path, ["export", f"x/{name}", "out.nwt", "--from", format])


@pytest.mark.parametrize("source", ["fifo", "/dev/zero", "folder", "missing", "binary"])
def test_maps_that_are_none(source: str, run: Commands, good: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    arguments = ["import", good / "model.nwt", "--into", good / "model.keras", "-o", "out.keras", "--map", source]
    refused(run, tmp_path, arguments, source)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_shrinks_while_it_is_read(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut when all is known of it but its elements."""
    import neutral.archive

    source = copied(good / name, tmp_path / name)
    digests = neutral.archive.digests

    def cut(*arguments: object, **settings: object) -> object:
        for path in [source] if source.is_file() else [*tmp_path.rglob("*data*"), *tmp_path.rglob("*.safetensors")]:
            os.truncate(path, 100)
        return digests(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(neutral.archive, "digests", cut)
    monkeypatch.chdir(tmp_path)
    before = sorted(listing(tmp_path))
    assert main(["export", name, "out.nwt"]) == 1
    assert "end of the file" in one_line(capsys.readouterr().err)
    assert sorted(listing(tmp_path)) == before


# --- what is written ---


@pytest.fixture
def inputs(good: Path, tmp_path: Path) -> Path:
    """A folder with copies of the good files."""
    for name in FORMATS:
        copied(good / name, tmp_path / name)
    return tmp_path


def writing(out: str) -> Iterator[list[str]]:
    """Every way to write a file of this name from the files in the folder."""
    if out.endswith(".nwt"):
        yield ["export", "model.pt", out]
        yield ["convert", "model.pt", out]
        return
    framework = next(
        framework for framework, name in OUTPUTS.items() if name == out or (framework == "keras" and "h5" in out)
    )
    template = next(
        name for name in TEMPLATES if out in (f"out{Path(name).suffix}", name.replace("model", "out"), f"out.{name}")
    )
    yield ["convert", "model.pt", out, "--to", framework]
    yield ["import", "model.nwt", "-o", out, "--to", framework]
    yield ["import", "model.nwt", "--into", template, "-o", out]


def all_writing() -> list[str]:
    return ["out.nwt", *OUTPUTS.values(), "out.weights.h5", "out.h5"]


@pytest.mark.parametrize("out", all_writing())
def test_outputs_that_must_not_be_written(out: str, run: Commands, inputs: Path) -> None:
    """One that exists; with --force a link, a pipe, a folder; and one in a folder that is not there."""
    path = inputs / out
    for arguments in writing(out):
        path.write_bytes(b"mine")
        refused(run, inputs, arguments, "--force")
        path.unlink()
        for make in (lambda: path.symlink_to("model.pt"), lambda: path.symlink_to("nothing"), lambda: os.mkfifo(path)):
            make()
            refused(run, inputs, [*arguments, "--force"], out)
            path.unlink()
        path.mkdir()
        (path / "mine").write_bytes(b"mine")
        refused(run, inputs, arguments, out)
        refused(run, inputs, [*arguments, "--force"], out)
        shutil.rmtree(path)
        elsewhere = [f"no/such/{out}" if argument == out else argument for argument in arguments]
        refused(run, inputs, elsewhere, "no/such")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("shards", "saved", "ckpt")])
def test_the_input_as_the_output(name: str, run: Commands, inputs: Path) -> None:
    for force in ([], ["--force"]):
        refused(run, inputs, ["convert", name, name, *force])
        refused(run, inputs, ["export", name, name, *force])
        (inputs / "hard").unlink(missing_ok=True)
        os.link(inputs / name, inputs / "hard")
        refused(run, inputs, ["export", name, "hard", *force])
        if name in TEMPLATES:
            refused(run, inputs, ["import", "model.nwt", "--into", name, "-o", name, *force])
            refused(run, inputs, ["convert", "model.nwt", name, "--into", name, *force])


@pytest.mark.parametrize("name", ["shards", "saved", "ckpt"])
def test_the_template_as_the_output(name: str, run: Commands, inputs: Path) -> None:
    for force in ([], ["--force"]):
        refused(run, inputs, ["import", "model.nwt", "--into", name, "-o", name, *force])


@pytest.mark.parametrize("out", all_writing())
def test_a_full_disk(out: str, run: Commands, inputs: Path) -> None:
    for arguments in writing(out):
        refused(run, inputs, arguments, "File too large", limits={"RLIMIT_FSIZE": 64})


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_full_disk_under_a_template(template: str, run: Commands, inputs: Path) -> None:
    suffix = "".join(Path(template).suffixes)
    arguments = ["import", "model.nwt", "--into", template, "-o", f"out{suffix}"]
    refused(run, inputs, arguments, "File too large", limits={"RLIMIT_FSIZE": 64})


@pytest.mark.parametrize("framework", OUTPUTS)
def test_too_many_open_files(framework: str, run: Commands, inputs: Path) -> None:
    for limit in (4, 5, 6):
        outcome = run(
            inputs, "import", "model.nwt", "--to", framework, "-o", OUTPUTS[framework], limits={"RLIMIT_NOFILE": limit}
        )
        if outcome.status != 0:
            one_line(outcome.err)
        assert not [name for name in listing(inputs) if name.startswith(".")]


# --- signals ---

_LARGE = 256 << 20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A sparse safetensors file of one kernel of a quarter of a gigabyte."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(safetensors_bytes({"fc.weight": entry("F32", (8192, 8192), (0, _LARGE))}))
    os.truncate(path, path.stat().st_size + _LARGE)
    return path


def stopped(arguments: list[str], folder: Path, number: signal.Signals, begun: Callable[[int], bool]) -> Outcome:
    """A command that gets a signal as soon as `begun` says of its process that it writes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "neutral", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=usual_signals,
    )
    while process.poll() is None and not begun(process.pid):
        time.sleep(0.001)
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    return Outcome(process.returncode, out, err, time.monotonic() - started, 0)


def writes_unnamed(process: int) -> bool:
    """Whether the process has a file without a name open that is not empty."""
    try:
        for link in Path(f"/proc/{process}/fd").iterdir():
            if "(deleted)" in str(link.readlink()) and link.stat().st_size > 1 << 20:
                return True
    except OSError:
        return False
    return False


EXPORT = ["export", "large.safetensors", "out.nwt"]
CONVERT = ["convert", "large.safetensors", "out.npz", "--kind", "*=dense"]


@pytest.mark.parametrize("arguments", [EXPORT, CONVERT], ids=["export", "convert"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: signal.Signals, arguments: list[str], large: Path, tmp_path: Path) -> None:
    (tmp_path / arguments[2]).write_bytes(b"mine")
    before = listing(tmp_path)
    outcome = stopped([*arguments, "--force"], tmp_path, number, writes_unnamed)
    assert outcome.status == 128 + number and outcome.out == "" and outcome.seconds < 10, outcome
    one_line(outcome.err)
    assert listing(tmp_path) == before


def test_a_killed_export_leaves_nothing(large: Path, tmp_path: Path) -> None:
    (tmp_path / "out.nwt").write_bytes(b"mine")
    before = listing(tmp_path)
    assert stopped([*EXPORT, "--force"], tmp_path, signal.SIGKILL, writes_unnamed).status == -signal.SIGKILL
    assert listing(tmp_path) == before


def test_a_killed_conversion_tears_nothing(large: Path, tmp_path: Path) -> None:
    """A hidden folder may stay, for nobody is left to remove it; the output is what it was."""
    (tmp_path / "out.npz").write_bytes(b"mine")
    before = listing(tmp_path)
    assert stopped([*CONVERT, "--force"], tmp_path, signal.SIGKILL, writes_unnamed).status == -signal.SIGKILL
    after = {name: what for name, what in listing(tmp_path).items() if not name.startswith(".out.npz.")}
    assert after == before


# --- what is asked for ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["import", "model.nwt", "--to", "caffe"], "caffe"),
        (["import", "model.nwt", "--to", ""], "framework"),
        (["import", "model.nwt", "--to", "torch", "-o", "out.keras"], "suffix"),
        (["import", "model.nwt", "-o", "out.xyz"], "suffix"),
        (["import", "model.nwt", "--to", "keras", "--into", "model.pt", "-o", "out.pt"], "template"),
        (["import", "model.nwt", "--into", "model.nwt", "-o", "out.pt"], "archive as the template"),
        (["import", "model.nwt", "--to", "torch", "--map", "map.toml"], "template"),
        (["import", "model.nwt", "--to", "torch", "--allow-unused", "*"], "template"),
        (["export", "model.pt", "out.nwt", "--from", "\x1b[31m\n"], "format"),
        (["export", "model.pt", "out.nwt", "--kind", "0=../x"], "kind"),
        (["export", "model.pt", "out.nwt", "--kind", "0="], "PATTERN=KIND"),
        (["export", "model.pt", "out.nwt", "--flatten", "0=16:"], "--flatten"),
        (["export", "model.pt", "out.nwt", "--flatten", "0=:"], "--flatten"),
        (["import", "model.nwt", "--to", "torch", "--into-key", "x"], "template"),
        (["export", "model.nwt", "out.nwt", "--key", "x"], "key"),
        (["export", "model.pt", "out.nwt", "--kind", "0=unknown"], "kind"),
        (["export", "model.pt", "out.nwt", "--flatten", "0=-3"], "--flatten"),
        (["export", "model.pt", "out.nwt", "--flatten", "0=1e3"], "--flatten"),
        (["export", "model.pt", "out.nwt", "--flatten", f"0={'9' * 5000}"], "--flatten"),
        (["export", "model.pt", "out.nwt", "--flatten", "0=3", "--flatten", "0=1"], "--flatten"),
        (["export", "model.npz", "out.nwt", "--key", "x"], "key"),
        (["export", "model.pt", "out.nwt", "--shard-size", "-1"], "shard-size"),
        (["convert", "model.pt", "out"], "suffix"),
        (["convert", "model.pt", "out.h5", "--to", "torch"], "suffix"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], says: str, run: Commands, inputs: Path) -> None:
    (inputs / "map.toml").write_text('"0" = "dense"\n')
    assert says in refused(run, inputs, arguments, status=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "model.pt", "out.nwt", "--kind", "0=lstm"], "0"),
        (["export", "model.pt", "out.nwt", "--kind", "nonsense=dense"], "nonsense"),
        (["export", "model.pt", "out.nwt", "--kind", "=dense"], "the model itself"),
        (["export", "model.pt", "out.nwt", "--flatten", "nonsense=3"], "nonsense"),
        (["export", "model.pt", "out.nwt", "--flatten", "0=2"], "0"),
        (["export", "model.pt", "out.nwt", "--from", "npz"], ""),
        (["export", "model.npz", "out.nwt", "--from", "keras"], ""),
        (["export", "model.keras", "out.nwt", "--from", "torch"], ""),
        (["export", "ckpt", "out.nwt", "--from", "safetensors"], ""),
        (["export", "model.pt", "out.nwt", "--key", "nonsense"], "nonsense"),
        (["convert", "other.safetensors", "out.keras"], "unknown kind"),
        (["import", "model.nwt", "--into", "other.safetensors", "-o", "out.safetensors"], "partner"),
        (["import", "model.nwt", "--into", "less.safetensors", "-o", "out.safetensors"], "partner"),
        (["convert", "less.safetensors", "out.pt", "--into", "model.pt"], "partner"),
        (["import", "model.nwt", "--into", "model.keras", "-o", "out.keras", "--map", "map.toml"], "nonsense"),
        (["check", "model.pt"], ""),
        (["import", "model.pt", "--to", "keras"], ""),
    ],
)
def test_what_does_not_fit(arguments: list[str], says: str, run: Commands, inputs: Path) -> None:
    floats = entry("F32", (5, 3), (0, 60))
    (inputs / "other.safetensors").write_bytes(safetensors_bytes({"fc.gamma": floats}, bytes(60)))
    (inputs / "less.safetensors").write_bytes(
        safetensors_bytes({"0.weight": floats, "0.bias": entry("F32", (5,), (60, 80))}, bytes(80))
    )
    (inputs / "map.toml").write_text('[layers]\n"0" = "nonsense"\n')
    refused(run, inputs, arguments, says)
