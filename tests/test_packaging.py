"""What is shipped: the packages, the pins, the promises of pyproject.toml."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import neutral
from neutral import schema
from neutral.frameworks import FRAMEWORKS
from neutral.schema.manifest import json_schema

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def normalized(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines), lines
    return {normalized(name): pinned for name, _, pinned in (line.partition("==") for line in lines)}


def test_every_package_is_listed() -> None:
    """The `packages` list is explicit, so a folder that is forgotten there is forgotten in the wheel."""
    package = Path(neutral.__path__[0])
    found = {"neutral", *(f"neutral.{path.parent.name}" for path in package.glob("*/__init__.py"))}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found
    assert not list(package.glob("*/*/*.py"))


def test_the_package_is_typed_and_brings_its_schema() -> None:
    assert (Path(neutral.__path__[0]) / "py.typed").is_file()
    published = Path(schema.__path__[0]) / "manifest.schema.json"
    assert json.loads(published.read_text("utf-8")) == json_schema(), "run `make schema`"


def test_every_direct_dependency_is_pinned() -> None:
    wanted = [*PROJECT["project"]["dependencies"], *(line for lines in EXTRAS.values() for line in lines), "tf_keras"]
    missing = {normalized(line) for line in wanted} - {"neutral-weights"} - set(pins())
    assert missing == set()


def test_what_is_installed_is_what_is_pinned() -> None:
    """What the tests prove, they prove for the versions in constraints.txt."""
    pinned = pins()
    for name in (
        "torch",
        "keras",
        "tensorflow-cpu",
        "tf-keras",
        "numpy",
        "h5py",
        "safetensors",
        "pydantic",
        "ml-dtypes",
    ):
        if name == "tensorflow-cpu" and sys.platform != "linux":
            name = "tensorflow"
        assert version(name).partition("+")[0] == pinned[name]


def test_the_base_install_needs_no_framework() -> None:
    names = {normalized(line) for line in PROJECT["project"]["dependencies"]}
    assert names == {"numpy", "ml-dtypes", "safetensors", "pydantic", "h5py", "typer", "rich"}
    assert set(EXTRAS) == {*FRAMEWORKS.own} - {"numpy", "safetensors"} | {"all", "dev"}


def test_version_and_changelog_agree() -> None:
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == PROJECT["project"]["version"] == version("neutral-weights")


def test_licence_and_readme_are_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme.count("<!-- table:begin -->") == readme.count("<!-- table:end -->") == 1
    assert "make demo" in readme and "make test" in readme


def test_the_command_is_installed() -> None:
    scripts = {
        point.name: point.value
        for point in distribution("neutral-weights").entry_points.select(group="console_scripts")
    }
    assert scripts == {"neutral": "neutral.cli:main"}


@pytest.mark.parametrize(
    "module", ["neutral", "neutral.cli", "neutral.exporters", "neutral.importers", "neutral.verify"]
)
def test_no_module_imports_a_framework(module: str) -> None:
    script = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({module!r})\n"
        "for found in pkgutil.iter_modules(getattr(package, '__path__', []), package.__name__ + '.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "print(sorted({'torch', 'keras', 'tensorflow', 'tf_keras'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
