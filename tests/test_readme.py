"""What the README says can be typed, and does what it says."""

import re
import shlex
from collections import OrderedDict
from pathlib import Path

import pytest
import typer

import neutral
from neutral.cli import Screen, app

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
COMMANDS = [line.partition("#")[0].strip() for line in re.findall(r"^    (neutral .*)$", README, re.MULTILINE)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str) -> None:
    """Parsing a command gives the work to do and does not do it."""
    parser = typer.main.get_command(app)
    work = parser.main(shlex.split(line)[1:], prog_name="neutral", standalone_mode=False, obj=Screen())
    assert callable(work)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def mlp() -> torch.nn.Module:
        return torch.nn.Sequential(
            OrderedDict(fc1=torch.nn.Linear(3, 5), act=torch.nn.ReLU(), fc2=torch.nn.Linear(5, 2))
        )

    monkeypatch.chdir(tmp_path)
    model, module = mlp(), mlp()
    torch.save(model, "model.pt")
    torch.save(mlp(), "template.pt")
    neutral.convert("model.pt", "model.h5")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(
        example.replace('"model.h5", "model.pt", into=', '"model.h5", "filled.pt", into='), {"my_torch_module": module}
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(module.state_dict()[name], weight)
    assert neutral.diff("filled.pt", "model.pt").same
