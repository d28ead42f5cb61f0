"""The command line: names, exit statuses, one line per error, nothing left behind."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import neutral
from neutral.cli import Screen, main, read_map
from neutral.errors import BadFile
from neutral.frameworks import FRAMEWORKS
from tests.foreground import usual_signals

COMMANDS = ("export", "import", "convert", "show", "check", "diff", "digest", "verify", "formats")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small state dict whose kinds are plain from class names: an nn.Sequential, pickled whole."""
    import torch

    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)), path)
    return path


def one_line(text: str) -> str:
    """The error, which is one line."""
    assert text.startswith("neutral: error: ") and text.endswith("\n") and text.count("\n") == 1, text
    assert "Traceback" not in text
    return text.removeprefix("neutral: error: ").strip()


def failing(arguments: Sequence[object], capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    return one_line(captured.err)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Usage: neutral {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    version = capsys.readouterr().out
    assert main(["show", "--version"]) == 0
    assert capsys.readouterr().out == version
    assert version.startswith("neutral 0.")


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Usage: neutral" in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["show"], "FILE"),
        (["show", "a", "b"], "unexpected extra argument"),
        (["show", "a", "--nonsense"], "--nonsense"),
        (["show", "a", "--key"], "--key"),
        (["verify", "a", "b", "--seed", "x\ny"], "--seed"),
        (["verify", "a", "b", "--input-shape", "1,-2"], "1,1,28,28"),
        (["export", "a", "--kind", "x=nonsense"], "dense"),
        (["export", "a", "--kind", "dense"], "PATTERN=KIND"),
        (["export", "a", "--kind", "x=dense", "--kind", "x=conv"], "twice"),
        (["export", "a", "--from", "nonsense"], "keras"),
        (["export", "a", "--flatten", "fc1"], "LAYER=CHANNELS"),
        (["export", "a", "--flatten", "fc1=0"], "fc1=16"),
        (["export", "a", "--flatten", "fc1=x"], "fc1=16"),
        (["import", "a", "--to", "caffe"], "torch"),
        (["import", "a"], "--to"),
        (["convert", "a", "b", "--to", "caffe"], "torch"),
    ],
)
def test_wrong_usage_is_two_and_names_what_is_right(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in failing(arguments, capsys, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "missing.pt"],
        ["import", "missing.nwt", "--to", "keras"],
        ["convert", "missing.pt", "out.npz"],
        ["show", "missing.pt"],
        ["check", "missing.nwt"],
        ["digest", "missing.pt"],
        ["verify", "missing.pt", "missing.keras"],
    ],
)
def test_a_file_that_is_not_there(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "missing" in failing(arguments, capsys, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["check"], ["import", "--to", "torch"]])
def test_a_folder_in_the_place_of_an_archive(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    assert ".nwt.index.json" in failing([name, tmp_path, *options], capsys, 1)
    (tmp_path / "model.json").write_text('{"modelTopology": null, "weightsManifest": []}')
    said = failing([name, tmp_path, *options], capsys, 1)
    assert "a tfjs folder (layers-model)" in said and "neutral export" in said


@pytest.mark.parametrize("framework", ["flax", "tfjs", "torch"])
def test_a_suffix_that_a_framework_does_not_write(
    framework: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failing(["convert", model, tmp_path / "out.caffe", "--to", framework], capsys, 2)
    assert ".caffe" in said and said.endswith("choose another suffix")


def test_a_suffix_of_copies_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in (".weights.json", ".safetensors.index.json"):
        assert "--into" in failing(["convert", model, tmp_path / f"out{suffix}"], capsys, 2)


def test_export_import_and_back(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "model.nwt"
    assert main(["export", str(model)]) == 0
    assert "model.nwt: torch " in (said := capsys.readouterr().out) and "2 layers, 32 parameters" in said
    assert main(["import", str(archive), "--to", "torch", "-o", str(tmp_path / "back.pt")]) == 0
    assert "back.pt: 2 layers" in capsys.readouterr().out
    assert main(["diff", str(archive), str(tmp_path / "back.pt")]) == 0
    assert main(["check", str(archive)]) == 0


def test_import_takes_the_stem_and_the_usual_suffix(model: Path, tmp_path: Path) -> None:
    assert main(["export", str(model), str(tmp_path / "x.nwt")]) == 0
    assert main(["import", str(tmp_path / "x.nwt"), "--to", "numpy"]) == 0
    assert main(["import", str(tmp_path / "x.nwt"), "--to", "keras"]) == 0
    assert main(["import", str(tmp_path / "x.nwt"), "--to", "safetensors"]) == 0
    assert {"x.npz", "x.keras", "x.safetensors"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("command", ["export", "import", "convert"])
def test_an_output_that_exists_is_refused(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, out = tmp_path / "model.nwt", tmp_path / ("out.nwt" if command == "export" else "out.npz")
    assert main(["-q", "export", str(model), str(archive)]) == 0
    arguments = {
        "export": ["export", str(model), str(out)],
        "import": ["import", str(archive), "--to", "numpy", "-o", str(out)],
        "convert": ["convert", str(model), str(out)],
    }[command]
    out.write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    assert "--force" in failing(arguments, capsys, 1)
    assert out.read_bytes() == b"mine" and sorted(tmp_path.iterdir()) == before
    assert main([*arguments, "--force", "-q"]) == 0
    assert out.read_bytes() != b"mine" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["x.keras", "x.PT", "x.weights.h5", "x.safetensors"])
def test_an_archive_under_a_frameworks_suffix_is_wrong_usage(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"mine")
    assert ".nwt" in failing(["export", model, tmp_path / name, "--force"], capsys, 2)
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("source", [".", "", "/", ".."])
def test_a_folder_without_a_name_is_no_bug(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status = main(["export", source])
    said = one_line(capsys.readouterr().err)
    assert status in (1, 2) and "bug" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["check"], ["import", "--to", "keras"]])
def test_a_model_in_the_place_of_an_archive_is_named(
    arguments: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failing([*arguments, model], capsys, 1)
    assert "a torch file" in said and "neutral export" in said


def test_a_whole_model_without_a_graph_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    path = tmp_path / "model.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Unfold(2)), path)
    said = failing(["convert", path, tmp_path / "x.keras"], capsys, 1)
    assert "no graph" in said and "1: " in said and "Unfold" in said


def test_a_program_needs_torch(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    said = failing(["convert", model, tmp_path / "x.pt2"], capsys, 1)
    assert "torch missing" in said and "neutral-weights[torch]" in said and "bug" not in said


def test_verify_without_a_framework_says_how_to_get_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "x.nwt"
    assert main(["-q", "export", str(model), str(archive)]) == 0
    for package in ("torch", "keras"):
        monkeypatch.setitem(sys.modules, package, None)
    for file in (model, archive):
        said = failing(["verify", file, file], capsys, 1)
        assert "install neutral-weights[torch]" in said and "install neutral-weights[keras]" in said


def test_diff_answers_same_different_trouble(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    other = tmp_path / "other.pt"
    changed = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    torch.save(changed, other)
    assert main(["diff", str(model), str(model)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "same weights"
    assert main(["diff", str(model), str(other)]) == 1
    assert capsys.readouterr().out != ""
    failing(["diff", model, tmp_path / "missing.pt"], capsys, 2)


def test_digest_prints_the_digest_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digest", str(model)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and len(captured.out) == 65 and set(captured.out.strip()) <= set("0123456789abcdef")
    assert main(["-q", "digest", str(model)]) == 0
    assert capsys.readouterr().out == captured.out


def test_show_is_a_table_or_the_manifest(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model)]) == 0
    text = capsys.readouterr().out
    assert "layer" in text and "dense" in text and "out in" in text and "5×3" in text and "float32" in text
    assert main(["show", str(model), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert [layer["kind"] for layer in manifest["layers"]] == ["dense", "dense"]
    assert manifest["weights_digest"] in text


def test_names_from_files_cannot_write_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.safetensors"
    names = ("\x1b[31mred\nforged.weight", "[bold]x[/bold].weight", "\x9b2J.weight")
    safetensors.numpy.save_file({name: np.ones((2, 3), np.float32) for name in names}, file)
    assert main(["show", str(file)]) == 0
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "\x1b" not in said and "\x9b" not in said and "\nforged" not in said
    assert "\\x1b[31mred\\nforged" in said and "[bold]x[/bold]" in said
    assert main(["show", str(file), "--json"]) == 0
    assert capsys.readouterr().out.isascii()


def test_formats_lists_every_framework(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    text = capsys.readouterr().out
    assert all(
        name in text
        for name in (
            "pt-legacy",
            "weights.h5",
            "savedmodel",
            "--from",
            "torch",
            "keras",
            "tensorflow",
            "numpy",
            "safetensors",
            ".npz",
            np.__version__,
        )
    )


def test_formats_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {(f.name, form.name): form for f in FRAMEWORKS.values() for form in f.files if form.reads}
    for framework, form in rows:
        assert any(f" {form} " in f" {line} " for line in lines), (framework, form)
    (legacy,) = (line for line in lines if "pt-legacy" in line)
    assert legacy.endswith("with --into")
    (orbax,) = (line for line in lines if " orbax " in line)
    assert orbax.endswith(".orbax (or none)")


def test_help_tells_hints_with_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("export", "convert", "digest"):
        assert main([command, "--help"]) == 0
        assert "'up=conv_transpose(transpose_kernel=false)'" in capsys.readouterr().out


def test_common_options_stand_anywhere(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a.nwt")
    for arguments in (["-q", "export", str(model), out], ["export", str(model), out, "--force", "--quiet"]):
        assert main(arguments) == 0
        assert capsys.readouterr() == ("", "")
    assert main(["show", "missing.pt", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_explain_prints_pairs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), str(tmp_path / "b.pt"), "--into", str(model), "--explain"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("source") and "why" in text.splitlines()[0] and "b.pt: 2 layers" in text


def test_explain_without_a_template_prints_no_empty_table(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(model), str(tmp_path / "b.npz"), "--explain", "--verbose"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'b.npz'}: 2 layers")


@pytest.mark.parametrize("command", ["show", "digest"])
def test_what_content_does_not_tell_is_told_with_from(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(b"what is this")
    for arguments in ([command, file], ["diff", file, file], ["verify", file, file]):
        said = failing(arguments, capsys, 2 if arguments[0] == "diff" else 1)
        assert "--from (of export, convert, show, digest)" in said
    assert "no reader knows" not in failing([command, file, "--from", "keras"], capsys, 1)
    failing([command, file, "--from", "nonsense"], capsys, 2)


def test_a_bug_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> str:
        raise ValueError("two\nlines \x1b[0m")

    monkeypatch.setattr(neutral, "export_model", broken)
    assert "ValueError (two\\nlines \\x1b[0m)" in failing(["digest", "x"], capsys, 1)
    assert main(["digest", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), 1),
        (RecursionError(), 1),
        (PermissionError(13, "Permission denied", "f"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_other_failures_are_one_line(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing_digest(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(neutral, "export_model", failing_digest)
    failing(["digest", "x"], capsys, status)


SLOW = """
import sys, time
import neutral
from neutral.cli import main
from neutral.containers.files import new_file, new_folder

def slow(source, out, **_):
    with new_folder(str(out) + "d") as folder, new_file(out) as file:
        (folder / "part").write_bytes(b"x")
        file.write(b"x")
        print("ready", flush=True)
        time.sleep(60)

neutral.export_model = slow
sys.exit(main(["export", "x.pt", "out.nwt"]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=usual_signals,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert "nothing was left behind" in one_line(errors)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, **{f"layer{n}": np.ones(1, np.float32) for n in range(2000)})
    process = subprocess.Popen(
        [sys.executable, "-m", "neutral", "show", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(20) == 141
    process.stderr.close()


def _on_a_terminal(seconds_a_step: float, *options: str) -> bytes:
    """What `export` writes on a stderr that is a terminal."""
    script = f"""
import time
import neutral
from neutral.cli import main
from neutral.errors import Refused, Problem

def working(source, out, *, progress, **_):
    for step in range(10):
        if progress is not None:
            progress(step, 10)
        time.sleep({seconds_a_step})
    raise Refused(Problem("x", "y"))

neutral.export_model = working
main(["export", "big.pt", *{options!r}])
"""
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", script], stdin=secondary, stderr=secondary, env=environment)
    os.close(secondary)
    written = b""
    with os.fdopen(primary, "rb", buffering=0) as terminal:
        while True:
            try:
                piece = terminal.read(4096)
            except OSError:
                break
            if not piece:
                break
            written += piece
    assert process.wait(20) == 0
    return written


def test_a_bar_after_a_second_on_a_terminal_only() -> None:
    assert b"export big.pt" in _on_a_terminal(0.15)
    assert b"export big.pt" not in _on_a_terminal(0.15, "--quiet")
    assert b"export big.pt" not in _on_a_terminal(0.001)


def test_python_m_neutral_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "neutral", "nonsense"], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "nonsense" in one_line(run.stderr)


def test_map_files(tmp_path: Path) -> None:
    file = tmp_path / "map.toml"
    file.write_text('[layers]\n"encoder.rnn" = "lstm_1"\n0 = "dense"\n')
    assert read_map(file) == {"encoder.rnn": "lstm_1", "0": "dense"}
    file.write_text('"encoder.rnn" = "lstm_1"\nlayers = "tiers"\n')
    assert read_map(file) == {"encoder.rnn": "lstm_1", "layers": "tiers"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"= 3", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (b"a = 3", "quotation marks"),
        (b'encoder.rnn = "x"', "quotation marks"),
        (b"[layers]\na.b = 'x'", "quotation marks"),
    ],
)
def test_map_files_that_say_nothing(text: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "map.toml"
    file.write_bytes(text)
    with pytest.raises(BadFile, match=said):
        read_map(file)


FRAMEWORKS_LOADED = """
import sys
from neutral.cli import main
assert main(sys.argv[1:]) == 0
print(sorted({"torch", "keras", "tensorflow", "tf_keras", "scipy", "sklearn"} & set(sys.modules)))
"""


def test_files_are_converted_without_their_frameworks(model: Path, tmp_path: Path) -> None:
    keras, archive, back = tmp_path / "model.keras", tmp_path / "model.nwt", tmp_path / "back.pt"
    for arguments in (
        ["convert", model, keras],
        ["show", keras],
        ["export", keras, archive],
        ["import", archive, "--to", "torch", "-o", back],
        ["diff", back, model],
        ["formats"],
    ):
        command = [sys.executable, "-c", FRAMEWORKS_LOADED, *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == "[]", arguments


def test_a_damaged_archive_is_found(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "model.nwt"
    assert main(["-q", "export", str(model), str(archive)]) == 0
    content = bytearray(archive.read_bytes())
    content[-3] ^= 1
    archive.write_bytes(content)
    assert "digest" in failing(["check", archive], capsys, 1)
    assert "digest" in failing(["import", archive, "--to", "numpy"], capsys, 1)
    archive.write_bytes(content[:-1])
    failing(["show", archive], capsys, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "model.nwt"}


def test_what_is_refused_writes_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    template = tmp_path / "template.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), template)
    archive = tmp_path / "model.nwt"
    assert main(["-q", "export", str(model), str(archive)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "out.pt"
    failing(["import", archive, "--into", template, "-o", out], capsys, 1)
    failing(["convert", model, out, "--into", template], capsys, 1)
    failing(["convert", model, out, "--into", tmp_path / "missing.pt"], capsys, 1)
    failing(["convert", model, model, "--force"], capsys, 1)
    failing(["export", model, model, "--force"], capsys, 1)
    failing(["export", model, tmp_path / "no" / "folder.nwt"], capsys, 1)
    failing(["export", model, tmp_path, "--force"], capsys, 1)
    failing(["import", archive, "--to", "keras", "-o", out], capsys, 2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from neutral.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("out", ["out.nwt", "out.pt", "out.safetensors", "out.npz", "out.weights.h5", "out.keras"])
def test_a_disk_that_is_full(out: str, model: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, "convert", str(model), str(tmp_path / out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1 and "File too large" in one_line(run.stderr)
    assert "bug" not in run.stderr and set(tmp_path.iterdir()) == before


def test_remarks_are_few_unless_all_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"layer{n}\n" for n in range(25)]
    Screen().remark("note", lines)
    short = capsys.readouterr().err.splitlines()
    assert short[0] == "neutral: note: layer0\\n" and short[-1] == "neutral: note: 15 more; --verbose lists them"
    Screen(verbose=True).remark("note", lines)
    assert len(capsys.readouterr().err.splitlines()) == 25
    Screen(quiet=True).remark("note", lines)
    assert capsys.readouterr().err == ""
