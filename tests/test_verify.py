"""`verify`: real models in their own frameworks, and files that would do more than compute."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

import neutral
from neutral.cli import main
from neutral.convert import verify
from neutral.errors import Refused, Unsupported, WrongUsage
from neutral.running import Port, Runnable
from neutral.verify import Verification, compare


def lenet5() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 7))


def randomized(model: Any) -> Any:
    rng = np.random.default_rng(3)
    for weight in model.weights:
        weight.assign(rng.uniform(0.1, 1, weight.shape))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every form, made from its pickled module."""
    folder = tmp_path_factory.mktemp("small")
    source = folder / "small.pt"
    torch.save(small(), source)
    found = {"pt": source}
    for suffix, to in (
        ("nwt", None), ("keras", None), ("h5", "keras"), ("pt2", "torch"), ("savedmodel", "tensorflow"),
        ("weights.h5", "keras"), ("npz", None), ("safetensors", None), ("ckpt", "tensorflow"),
    ):  # fmt: skip
        found[suffix] = folder / f"small.{suffix}"
        neutral.convert(source, found[suffix], to=to)
    found["state"] = folder / "state.pt"
    torch.save(small().state_dict(), found["state"])
    return found


def test_lenet5_and_what_neutral_made_of_it(tmp_path: Path) -> None:
    source, made = tmp_path / "lenet5.pt", tmp_path / "lenet5.keras"
    torch.save(lenet5(), source)
    neutral.convert(source, made)
    outcome = verify(source, made)
    assert outcome.same and outcome.max_difference < 1e-6
    assert outcome.lines[0].startswith(f"A: {source}, run by torch {torch.__version__}")
    assert outcome.lines[1].startswith(f"B: {made}, run by keras {keras.__version__}")
    assert outcome.lines[2] == "input input: normal float32 (16, 1, 28, 28)"
    assert outcome.lines[3].startswith("output 0: (16, 10), values -")

    changed = lenet5()
    with torch.no_grad():
        changed[3].bias[7] += 0.01
    torch.save(changed, tmp_path / "changed.pt")
    outcome = verify(tmp_path / "changed.pt", made)
    assert not outcome.same and 1e-5 < outcome.max_difference < 0.1


PAIRS = [("pt", "nwt"), ("nwt", "keras"), ("h5", "pt2"), ("savedmodel", "pt"), ("savedmodel", "keras"), ("pt2", "nwt")]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_every_form_of_a_model_computes_the_same(a: str, b: str, files: dict[str, Path]) -> None:
    outcome = verify(files[a], files[b])
    assert outcome.same and outcome.max_difference < 1e-6
    assert "(16, 3, 5, 5)" in outcome.lines[2]


def test_a_wrong_flatten_order_is_different(files: dict[str, Path], tmp_path: Path) -> None:
    model = keras.models.load_model(files["keras"], compile=False)
    dense = model.layers[-1]
    kernel, bias = dense.get_weights()
    dense.set_weights([kernel.reshape(4, 9, 7).swapaxes(0, 1).reshape(36, 7), bias])
    model.save(tmp_path / "wrong.keras")
    outcome = verify(files["pt"], tmp_path / "wrong.keras")
    assert not outcome.same and outcome.max_difference > 1e-2


def test_the_seed_and_the_tolerance_count(files: dict[str, Path]) -> None:
    first, again, other = (verify(files["pt"], files["h5"], seed=seed) for seed in (5, 5, 6))
    assert first == again and first.lines[3] != other.lines[3]
    assert not verify(files["pt"], files["h5"], tolerance=0.0).same


def text_model() -> Any:
    layers = keras.layers
    return randomized(
        keras.Sequential(
            [keras.Input((6,), name="words"), layers.Embedding(11, 5), layers.LSTM(4), layers.Dense(3)], name="text"
        )
    )


def signal_model() -> Any:
    layers = keras.layers
    head = [layers.Conv1D(4, 3), layers.Flatten(), layers.Dense(5)]
    return randomized(keras.Sequential([keras.Input((8, 3)), *head]))


def sequence_model() -> Any:
    return randomized(keras.Sequential([keras.Input((8, 3)), keras.layers.Conv1D(4, 3)]))


def pixel_model() -> Any:
    layers = keras.layers
    return randomized(keras.Sequential([keras.Input((4, 5, 3)), layers.Flatten(), layers.Dense(6)]))


def image_model() -> Any:
    return randomized(keras.Sequential([keras.Input((6, 7, 3)), keras.layers.Conv2D(4, 3, padding="same")]))


def two_inputs() -> Any:
    layers = keras.layers
    x, y = keras.Input((4,), name="z"), keras.Input((4,), name="a")
    made = layers.Concatenate()([layers.Dense(3)(y), layers.Dense(5)(x)])
    return randomized(keras.Model([x, y], [layers.Dense(2)(made), made]))


MODELS = (text_model, signal_model, sequence_model, pixel_model, image_model, two_inputs)


@pytest.mark.parametrize("make", MODELS, ids=[make.__name__ for make in MODELS])
def test_a_keras_model_and_its_torch_program(make: Callable[[], Any], tmp_path: Path) -> None:
    source = tmp_path / "model.keras"
    make().save(source)
    neutral.convert(source, tmp_path / "model.pt2", to="torch")
    neutral.export_model(source, tmp_path / "model.nwt").close()
    outcome = verify(source, tmp_path / "model.pt2")
    assert outcome.same, outcome.lines
    assert verify(tmp_path / "model.nwt", tmp_path / "model.pt2").same


def test_words_are_numbers_of_rows(tmp_path: Path) -> None:
    text_model().save(tmp_path / "text.keras")
    neutral.convert(tmp_path / "text.keras", tmp_path / "text.nwt")
    outcome = verify(tmp_path / "text.keras", tmp_path / "text.nwt")
    assert outcome.same and "int64 below 11 (16, 6)" in outcome.lines[2]


def test_words_of_a_model_without_a_graph(tmp_path: Path) -> None:
    layers = keras.layers
    given = [keras.Input((None,)), layers.Embedding(9, 4, mask_zero=True), layers.GRU(3)]
    model = randomized(keras.Sequential(given))
    model.save(tmp_path / "a.keras")
    model.export(tmp_path / "b", verbose=False)
    with pytest.raises(Refused, match=r"of which no graph tells the sizes, .*--input-shape"):
        verify(tmp_path / "a.keras", tmp_path / "b")
    outcome = verify(tmp_path / "a.keras", tmp_path / "b", input_shape=(3, 7))
    assert outcome.same and outcome.lines[2].endswith("int64 below 9 (3, 7)")


def test_a_file_that_keras_cannot_load_any_more_is_rebuilt(tmp_path: Path) -> None:
    import tf_keras

    layers = tf_keras.layers
    given = [tf_keras.Input((6, 7, 3)), layers.Conv2DTranspose(4, 3), layers.Flatten(), layers.Dense(2)]
    tf_keras.Sequential(given).save(tmp_path / "old.h5")
    neutral.convert(tmp_path / "old.h5", tmp_path / "new.pt2", to="torch")
    outcome = verify(tmp_path / "old.h5", tmp_path / "new.pt2")
    assert outcome.same and "rebuilt from its graph (TypeError" in outcome.lines[0]


def test_double_precision_is_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    torch.save(model, tmp_path / "a.pt")
    neutral.convert(tmp_path / "a.pt", tmp_path / "b.pt2", to="torch")
    with torch.no_grad():
        model[0].bias += 1e-9
    torch.save(model, tmp_path / "c.pt")
    assert verify(tmp_path / "a.pt", tmp_path / "b.pt2", tolerance=1e-12).same
    assert 1e-10 < verify(tmp_path / "a.pt", tmp_path / "c.pt").max_difference < 1e-8


def test_a_module_that_torch_will_not_load_is_rebuilt(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 3)))
    torch.save(model, tmp_path / "a.pt")
    neutral.convert(tmp_path / "a.pt", tmp_path / "a.keras")
    outcome = verify(tmp_path / "a.pt", tmp_path / "a.keras")
    assert outcome.same and "rebuilt from its graph" in outcome.lines[0]


def test_a_size_that_is_given(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    torch.save(model, tmp_path / "a.pt")
    neutral.convert(tmp_path / "a.pt", tmp_path / "a.keras")
    outcome = verify(tmp_path / "a.pt", tmp_path / "a.keras", input_shape=(5, 3, 9, 6))
    assert outcome.same and outcome.lines[2].endswith("(5, 3, 9, 6)")
    with pytest.raises(Refused, match=r"--input-shape: found \(5, 2, 9, 6\), expected \(\?, 3, \?, \?\)"):
        verify(tmp_path / "a.pt", tmp_path / "a.keras", input_shape=(5, 2, 9, 6))


def test_a_program_of_open_sizes_is_run_on_the_input_it_was_made_with(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(96, 2)), tmp_path / "a.pt")
    neutral.convert(tmp_path / "a.pt", tmp_path / "a.pt2")
    for other in ("a.pt", "a.pt2"):
        outcome = verify(tmp_path / "a.pt2", tmp_path / other)
        assert outcome.same and outcome.lines[2].endswith("normal float32 (16, 3, 6, 8)")
        assert verify(tmp_path / "a.pt2", tmp_path / other, input_shape=(3, 3, 4, 14)).same


def test_a_module_without_a_graph_needs_the_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(nn.LSTM(4, 3, batch_first=True), tmp_path / "lstm.pt")
    with pytest.raises(Refused, match="name it with --input-shape"):
        verify(tmp_path / "lstm.pt", tmp_path / "lstm.pt")
    assert verify(tmp_path / "lstm.pt", tmp_path / "lstm.pt", input_shape=(2, 5, 4)).same
    with pytest.raises(Refused, match="while running it"):
        verify(tmp_path / "lstm.pt", tmp_path / "lstm.pt", input_shape=(2, 5, 9))


def test_models_of_other_shapes_are_different(files: dict[str, Path], tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(2, 4, 3)), tmp_path / "other.pt")
    outcome = verify(files["pt"], tmp_path / "other.pt")
    assert outcome == Verification(False, math.inf, outcome.lines)
    assert outcome.lines[-1] == "input input: A takes (?, 3, ?, ?), B takes (?, 2, ?, ?)"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "shorter.pt")
    outcome = verify(files["pt"], tmp_path / "shorter.pt")
    assert not outcome.same and outcome.lines[-1] == "output 0: A gives (16, 7), B gives (16, 4, 3, 3)"


def runnable(run: Callable[[Any], Any], shape: tuple[int | None, ...] = (None, 3), **more: Any) -> Runnable:
    named = more.pop("names", ("x",))
    ports = tuple(Port(name, shape, "float32", more.get("axes")) for name in named)
    return Runnable("model", more.get("last", False), ports, more.get("outputs"), run)


@pytest.mark.parametrize(
    ("left", "right"),
    [(np.nan, np.nan), (1.0, np.nan), (np.inf, -np.inf), (1.0, np.inf)],
)
def test_outputs_that_are_no_numbers_prove_nothing(left: float, right: float) -> None:
    a, b = (runnable(lambda x, value=value: [x[0] * 0 + value]) for value in (left, right))
    assert compare(a, b).max_difference == math.inf


def test_enough_rows_are_run_to_wake_a_relu() -> None:
    def half(factor: float) -> Runnable:
        return runnable(lambda x: [np.maximum(x[0][:, :1], 0) * factor])

    assert not any(compare(half(1), half(2), seed=seed).same for seed in range(20))


def rows_of(shape: tuple[int | None, ...], **more: Any) -> tuple[int, ...]:
    seen: list[tuple[int, ...]] = []
    compare(*[runnable(lambda x: [seen.append(x[0].shape), x[0]][1:], shape)] * 2, **more)
    return seen[0]


def test_a_batch_that_a_model_fixes_is_kept_and_one_of_large_images_is_small() -> None:
    assert rows_of((None, 3)) == (16, 3)
    assert rows_of((3, 3)) == (3, 3)
    assert rows_of((None, 3), input_shape=(5, 3)) == (5, 3)
    assert rows_of((None, 3, 224, 224)) == (6, 3, 224, 224)
    assert rows_of((None, 3, 600, 600)) == (2, 3, 600, 600)


def dead(arrays: Any) -> Any:
    return [arrays[0][:, :2] * 0]


def saturated(arrays: Any) -> Any:
    return [arrays[0][:, :2] * 1e-9 + 1]


@pytest.mark.parametrize("run", [dead, saturated])
def test_outputs_that_no_input_changes_are_said_to_tell_little(run: Callable[[Any], Any]) -> None:
    outcome = compare(runnable(run), runnable(run))
    assert outcome.same and "alike in every row" in outcome.lines[-2]
    assert outcome.lines[-1].startswith("warning: no output varies with the input")
    other = compare(runnable(run), runnable(lambda x: [run(x)[0] + 0.5]))
    assert not other.same and not any("warning" in line for line in other.lines)


def test_one_row_tells_little_only_if_it_is_zero() -> None:
    assert "warning" in compare(runnable(dead, (1, 3)), runnable(dead, (1, 3))).lines[-1]
    assert "warning" not in compare(runnable(saturated, (1, 3)), runnable(saturated, (1, 3))).lines[-1]


def test_one_dead_output_of_two_is_named() -> None:
    def both(arrays: Any) -> Any:
        return [*dead(arrays), arrays[0], arrays[0] > 0]

    outcome = compare(runnable(both), runnable(both))
    alike = ["alike in every row" in line for line in outcome.lines if line.startswith("output")]
    assert outcome.same and alike == [True, False, False] and "warning" not in outcome.lines[-1]


def test_a_flag_is_both_true_and_false() -> None:
    def run(arrays: Any) -> Any:
        return [arrays[0].astype(bool)]

    flags = Runnable("model", False, (Port("mask", (None, 3), "bool"),), None, run)
    outcome = compare(flags, flags)
    assert outcome.lines[2:] == (
        "input mask: int64 below 2 (16, 3)",
        "output 0: (16, 3), values 0 to 1, largest difference 0",
    )


def test_dead_models_are_the_same_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.pt", "b.pt"):
        model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        nn.init.constant_(model[0].bias, -100)
        torch.save(model, tmp_path / name)
    assert main(["verify", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 0
    *_, warning, verdict = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: no output varies") and verdict.startswith("same: ")


def test_a_nan_in_the_same_place_is_the_same() -> None:
    def run(arrays: Any) -> Any:
        y = arrays[0].copy()
        y[0, 0] = np.nan
        return [y]

    assert compare(runnable(run), runnable(run)).same


def test_inputs_are_paired_by_name_else_by_order() -> None:
    def first(arrays: Any) -> Any:
        return [arrays[0]]

    def second(arrays: Any) -> Any:
        return [arrays[1]]

    assert compare(runnable(first, names=("a", "b")), runnable(second, names=("b", "a"))).same
    assert not compare(runnable(first, names=("a", "b")), runnable(second, names=("c", "d"))).same
    assert compare(runnable(first, names=("a", "b")), runnable(first, names=("c", "d"))).same
    with pytest.raises(WrongUsage, match="--input-shape"):
        compare(runnable(first, names=("a", "b")), runnable(first, names=("c", "d")), input_shape=(2, 3))
    outcome = compare(runnable(first, names=("a", "b")), runnable(first))
    assert outcome.lines[-1] == "A takes 2 inputs, B takes 1"


def test_channels_move_only_where_they_are_last() -> None:
    def same(arrays: Any) -> Any:
        return list(arrays)

    image = runnable(same, (2, 3, 5, 4))
    assert compare(image, runnable(same, (2, 5, 4, 3), last=True)).same
    signal = ("batch", "channel", "width")
    first = runnable(same, (2, 3, 5), axes=signal, outputs=(signal,))
    assert compare(first, runnable(same, (2, 5, 3), last=True)).same
    plain = runnable(same, (2, 3, 5), axes=("batch", "time", "feature"), outputs=(("batch", "time", "feature"),))
    assert compare(plain, runnable(same, (2, 3, 5), last=True)).same
    assert compare(plain, runnable(same, (2, 5, 3), last=True)).lines[-1].startswith("input x: A takes (2, 3, 5)")


# What is not run.


@pytest.mark.parametrize("form", ["state", "weights.h5", "npz", "safetensors", "ckpt"])
def test_weights_alone_are_refused(form: str, files: dict[str, Path]) -> None:
    with pytest.raises(Refused, match=r"expected a model that can be run, pass a .keras or whole-model"):
        verify(files[form], files["pt"])


class Custom(nn.Module):
    """Marks that it was run."""

    marker: Path

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Custom.marker.write_text("loaded")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Custom.marker.write_text("run")
        return self.fc(x)


def test_a_class_of_somebodys_own_never_runs(tmp_path: Path, files: dict[str, Path]) -> None:
    Custom.marker = tmp_path / "marker"
    for name, model in (("whole.pt", Custom()), ("inside.pt", nn.Sequential(Custom()))):
        torch.save(model, tmp_path / name)
        with pytest.raises(
            Refused, match=r"test_verify.Custom, expected classes of torch.nn's own, .* pass a .keras or"
        ):
            verify(tmp_path / name, files["pt"])
    assert not Custom.marker.exists()


def doubled(module: nn.Module, given: Any, made: torch.Tensor) -> torch.Tensor:
    return made * 2


def test_an_altered_module_is_not_run_as_if_it_were_none(tmp_path: Path, files: dict[str, Path]) -> None:
    model = small()
    model[0].register_forward_hook(doubled)
    torch.save(model, tmp_path / "hook.pt")
    with pytest.raises(Refused, match=r"test_verify.doubled, expected classes of torch.nn's own"):
        verify(tmp_path / "hook.pt", files["pt"])
    for suffix in ("keras", "pt2", "savedmodel"):
        with pytest.raises(Refused, match=r"without a graph \(0: no graph, because it has a forward hook\)"):
            neutral.convert(tmp_path / "hook.pt", tmp_path / f"hook.{suffix}")
    neutral.convert(tmp_path / "hook.pt", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert torch.equal(state["0.weight"], model[0].weight)


class Call:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_that_calls_never_runs(tmp_path: Path, files: dict[str, Path]) -> None:
    model = small()
    model.extra = Call(tmp_path / "marker")
    torch.save(model, tmp_path / "hostile.pt")
    outcome = verify(tmp_path / "hostile.pt", files["keras"])
    assert outcome.same and "rebuilt from its graph" in outcome.lines[0]
    assert not (tmp_path / "marker").exists()


def test_torchscript_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    torch.jit.trace(small(), torch.zeros(1, 3, 5, 5)).save(str(tmp_path / "script.pt"))
    with pytest.raises(Refused, match="TorchScript, which is code"):
        verify(tmp_path / "script.pt", files["pt"])


@keras.saving.register_keras_serializable(package="verify")
class Own(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("layer", [keras.layers.Lambda(lambda x: x + 1), Own()], ids=["lambda", "own"])
def test_keras_models_with_code_of_their_own_are_refused(layer: Any, suffix: str, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(2)])
    model.save(tmp_path / f"model.{suffix}")
    with pytest.raises(Refused, match=r"Lambda: code of its own|Own: a class of"):
        verify(tmp_path / f"model.{suffix}", tmp_path / f"model.{suffix}")


def rewritten(source: Path, out: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


def replaced(before: str, after: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        return data.replace(before.encode(), after.encode()) if name.endswith(".json") else data

    return change


HOSTILE = {
    "torch.ops.aten.relu.default": ("torch.os.system", "the operator torch.os.system"),
    "torch.ops.aten.linear.default": ("torch.ops.load_library", "the operator torch.ops.load_library"),
    "torch.ops.aten.conv2d.default": ("torch.ops.aten.from_file.default", "the operator torch.ops.aten.from_file"),
    "torch.ops.aten.flatten.using_ints": ("_operator.call", "the operator _operator.call"),
    "Symbol(": ("exec(", "the size"),
    '"use_pickle": false': ('"use_pickle": true', "inside a pickle"),
}


@pytest.mark.parametrize("part", HOSTILE)
def test_programs_that_do_more_than_compute_are_refused(part: str, files: dict[str, Path], tmp_path: Path) -> None:
    after, found = HOSTILE[part]
    hostile = rewritten(files["pt2"], tmp_path / "hostile.pt2", replaced(part, after))
    with pytest.raises((Refused, Unsupported), match=found):
        verify(hostile, files["pt"])


def test_pickles_and_guards_in_a_program_never_run(files: dict[str, Path], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    attack = io.BytesIO()
    torch.save({"x": Call(marker)}, attack)

    def inputs(name: str, data: bytes) -> bytes:
        return attack.getvalue() if "sample_inputs" in name else data

    def guards(name: str, data: bytes) -> bytes:
        if not name.endswith("model.json"):
            return data
        return json.dumps({**json.loads(data), "guards_code": [f"open({str(marker)!r}, 'w')"]}).encode()

    with pytest.raises(Refused, match="while loading it"):
        verify(rewritten(files["pt2"], tmp_path / "inputs.pt2", inputs), files["pt"])
    assert verify(rewritten(files["pt2"], tmp_path / "guards.pt2", guards), files["pt"]).same
    assert not marker.exists()


def test_a_saved_model_that_reads_files_is_refused(tmp_path: Path) -> None:
    import tensorflow as tf

    class Reads(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.w = tf.Variable([1.0, 2.0])

        @tf.function(input_signature=[tf.TensorSpec([None, 2])])
        def __call__(self, x: Any) -> Any:
            return x * self.w + tf.strings.to_number(tf.io.read_file("/proc/sys/kernel/pid_max"))

    model = Reads()
    tf.saved_model.save(model, str(tmp_path / "model"), signatures=model.__call__)
    with pytest.raises(Refused, match="the operator ReadFile"):
        verify(tmp_path / "model", tmp_path / "model")


def test_the_command(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(files["pt"]), str(files["keras"]), "--input-shape", "1,3,5,5"]) == 0
    said = capsys.readouterr().out
    assert "input input: normal float32 (1, 3, 5, 5)" in said and "same: the largest difference is" in said
    changed = small()
    with torch.no_grad():
        changed[0].bias[0] += 1
    torch.save(changed, tmp_path / "changed.pt")
    assert main(["verify", str(tmp_path / "changed.pt"), str(files["keras"])]) == 1
    assert "different: the largest difference is" in capsys.readouterr().out
    assert main(["verify", str(files["pt"]), str(files["keras"]), "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "neutral: error: verify: found the seed -1, expected 0 or more, choose another\n"
    assert main(["verify", str(files["state"]), str(files["keras"])]) == 1
    assert capsys.readouterr().err.count("\n") == 1
