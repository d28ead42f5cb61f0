"""What the README says can be typed, and does what it says."""

import json
import re
import shlex
import struct
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path

import numpy as np
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
    exec(example, {"my_torch_module": module})
    for name, weight in model.state_dict().items():
        assert torch.equal(module.state_dict()[name], weight)
    assert neutral.diff("filled.pt", "model.pt").same


def test_an_archive_is_what_the_specification_says(tmp_path: Path) -> None:
    """Read by the README alone: nothing of neutral, not even safetensors."""
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, (4, 5)), torch.nn.LSTM(6, 7), torch.nn.BatchNorm1d(8))
    torch.save(module, tmp_path / "model.pt")
    neutral.export_model(tmp_path / "model.pt", tmp_path / "model.nwt").close()

    content = (tmp_path / "model.nwt").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    (text,) = header.pop("__metadata__").values()
    manifest = json.loads(text)
    assert text == json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert manifest["source"]["sha256"] == sha256((tmp_path / "model.pt").read_bytes()).hexdigest()

    digests = []
    for layer in manifest["layers"]:
        roles = {}
        for role, parameter in layer["parameters"].items():
            entry = header.pop(f"{layer['path']}/{role}")
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            assert sha256(content[begin:end]).hexdigest() == parameter["sha256"]
            assert entry["shape"] == parameter["shape"] and len(parameter["axes"]) == len(parameter["shape"])
            if not parameter["state"]:
                roles[role] = [parameter[field] for field in ("axes", "shape", "dtype", "sha256")]
            if (layer["path"], role) == ("0", "kernel"):
                kernel = np.frombuffer(content[begin:end], "<f4").reshape(entry["shape"])
                assert np.array_equal(kernel, module[0].weight.detach().numpy())
        layer_text = json.dumps([layer["kind"], roles], sort_keys=True, separators=(",", ":"))
        digests.append(sha256(layer_text.encode()).hexdigest())
    assert not header
    assert manifest["weights_digest"] == sha256("\n".join(sorted(digests)).encode()).hexdigest()
    (lstm,) = (layer for layer in manifest["layers"] if layer["kind"] == "lstm")
    assert lstm["parameters"]["input_kernel"]["axes"] == ["gate", "unit", "in"]
    assert lstm["parameters"]["input_kernel"]["labels"] == {"gate": ["input", "forget", "cell", "output"]}
