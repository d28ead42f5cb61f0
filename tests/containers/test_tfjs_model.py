"""TensorFlow.js models as bytes: shards, groups, quantization, copies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neutral.containers import tfjs_model
from neutral.containers.tfjs_model import open_tfjs, replace, write, write_again
from neutral.errors import BadFile, NeutralError, Refused, Unsupported
from neutral.native import from_array

TOPOLOGY = {"class_name": "Sequential", "config": {"name": "m", "layers": []}}
RNG = np.random.default_rng(0)


def weight(name: str, shape: Sequence[int], dtype: str = "float32", **more: object) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "dtype": dtype, **more}


def make(folder: Path, groups: Sequence[tuple[Sequence[dict[str, Any]], Mapping[str, bytes]]], **more: object) -> Path:
    """A model of groups: the weights, and the shards with what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = []
    for weights, shards in groups:
        for name, data in shards.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        manifest.append({"paths": list(shards), "weights": list(weights)})
    document = {"format": "layers-model", "modelTopology": TOPOLOGY, "weightsManifest": manifest, **more}
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.normal(size=shape).astype("<f4")


def test_a_weight_may_span_shards_and_groups_follow_each_other(tmp_path: Path) -> None:
    a, b, c = f32(3, 2), f32(5), np.array([7, -8], "<i4")
    data = a.tobytes() + b.tobytes()
    first = ([weight("a", (3, 2)), weight("b", (5,))], {"x/1.bin": data[:7], "x/2.bin": data[7:30], "3.bin": data[30:]})
    second = ([weight("c", (2,), "int32"), weight("empty", (0, 4))], {"c.bin": c.tobytes()})
    opened = open_tfjs(make(tmp_path / "m", [first, second]))
    for name, wanted in (("a", a), ("b", b), ("c", c), ("empty", np.zeros((0, 4), "f4"))):
        found = opened.weights[name].data.read()
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted)
    assert opened.weights["b"].data.block([(1, 4)]).tolist() == b[1:4].tolist()
    opened.close()


@pytest.mark.parametrize("width", ["uint8", "uint16"])
def test_quantized_weights_are_what_tensorflow_js_computes(tmp_path: Path, width: str) -> None:
    stored = RNG.integers(0, np.iinfo(width).max, 7, dtype=width)
    scale, low = 0.1, -3.7
    entry = weight("w", (7,), quantization={"dtype": width, "min": low, "scale": scale, "original_dtype": "float32"})
    opened = open_tfjs(make(tmp_path / "m", [([entry], {"w.bin": stored.tobytes()})]))
    # one after the other in double precision, as JavaScript does it, then into a Float32Array
    wanted = [np.float32(float(n) * scale + low) for n in stored]
    assert opened.weights["w"].data.read().tolist() == wanted
    opened.close()


def test_half_precision_and_quantized_integers(tmp_path: Path) -> None:
    half = np.array([1.5, -0.1, 65504, 6e-8, np.inf, -0.0], "<f2")
    steps = np.array([0, 1, 3], "u1")
    entries = [
        weight("h", (6,), quantization={"dtype": "float16"}),
        weight("i", (3,), "int32", quantization={"dtype": "uint8", "min": -1.0, "scale": 0.5}),
    ]
    opened = open_tfjs(make(tmp_path / "m", [(entries, {"w.bin": half.tobytes() + steps.tobytes()})]))
    assert opened.weights["h"].data.read().tobytes() == half.astype("f4").tobytes()
    # Math.round rounds halves up: -1, -0.5 -> 0, 0.5 -> 1
    assert opened.weights["i"].data.read().tolist() == [-1, 0, 1]
    opened.close()


def test_a_copy_has_other_weights_and_all_else(tmp_path: Path) -> None:
    a, b = f32(3, 2), f32(5)
    data = a.tobytes() + b.tobytes()
    good = make(tmp_path / "m", [([weight("a", (3, 2)), weight("b", (5,))], {"1.bin": data[:9], "2.bin": data[9:]})])
    opened = open_tfjs(good)
    new = f32(3, 2)
    (tmp_path / "n").mkdir()
    replace(opened, {"a": from_array(new)}, tmp_path / "n" / "model.json")
    opened.close()
    assert (tmp_path / "n/model.json").read_bytes() == (good / "model.json").read_bytes()
    assert [(tmp_path / "n" / name).stat().st_size for name in ("1.bin", "2.bin")] == [9, 35]
    again = open_tfjs(tmp_path / "n")
    assert np.array_equal(again.weights["a"].data.read(), new) and np.array_equal(again.weights["b"].data.read(), b)
    again.close()


def test_a_quantized_weight_takes_only_values_of_its_own(tmp_path: Path) -> None:
    stored = np.array([3, 200], "u1")
    entry = weight("w", (2,), quantization={"dtype": "uint8", "min": -1.0, "scale": 0.25})
    good = make(tmp_path / "m", [([entry], {"w.bin": stored.tobytes()})])
    opened = open_tfjs(good)
    out = tmp_path / "n"
    out.mkdir()
    with pytest.raises(Refused, match="uint8 quantization cannot hold"):
        replace(opened, {"w": from_array(np.array([0.25, 0.3], "f4"))}, out / "model.json")
    for kept in (62.75 + 0.25, np.nan, -1.25):  # beyond 255 steps, no number, below the first
        with pytest.raises(Refused):
            replace(opened, {"w": from_array(np.array([0.25, kept], "f4"))}, out / "model.json")
    assert not list(out.iterdir())
    replace(opened, {"w": from_array(np.array([0.25, 62.75], "f4"))}, out / "model.json")
    opened.close()
    assert (out / "w.bin").read_bytes() == bytes([5, 255])


def test_new_models_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfjs_model, "SHARD", 16)
    a, b = f32(3, 2), f32(2)
    write(tmp_path / "model.json", TOPOLOGY, [("a", from_array(a.T)), ("b", from_array(b))], {"generatedBy": "x"})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["group1-shard1of2.bin", "group1-shard2of2.bin", "model.json"]
    document = json.loads((tmp_path / "model.json").read_text())
    assert document["format"] == "layers-model" and document["generatedBy"] == "x"
    opened = open_tfjs(tmp_path)
    assert np.array_equal(opened.weights["a"].data.read(), a.T)
    assert np.array_equal(opened.weights["b"].data.read(), b)
    opened.close()


def test_the_text_that_was_kept_gives_the_same_files(tmp_path: Path) -> None:
    a = f32(3, 2)
    steps = np.array([0, 9, 255], "<u2")
    entries = [weight("a", (3, 2)), weight("q", (3,), quantization={"dtype": "uint16", "min": 0.5, "scale": 0.01})]
    data = a.tobytes() + steps.tobytes()
    good = make(tmp_path / "m", [(entries, {"1.bin": data[:5], "s/2.bin": data[5:]})])
    opened = open_tfjs(good)
    tensors = {name: each.data for name, each in opened.weights.items()}
    (tmp_path / "n").mkdir()
    write_again(tmp_path / "n/model.json", opened.text, [[5, 25]], tensors)
    for name in ("model.json", "1.bin", "s/2.bin"):
        assert (tmp_path / "n" / name).read_bytes() == (good / name).read_bytes()
    for wrong in ({"a": tensors["a"]}, {**tensors, "b": tensors["a"]}):
        with pytest.raises(Refused):
            write_again(tmp_path / "other.json", opened.text, [], wrong)
    outside = opened.text.replace(b"1.bin", b"../1.bin")
    with pytest.raises(BadFile, match="a file beside"):
        write_again(tmp_path / "n/other.json", outside, [], tensors)
    opened.close()


ONE = [weight("w", (2,))]
EIGHT = {"w.bin": bytes(8)}


def quantized(**settings: object) -> list[tuple[list[dict[str, Any]], dict[str, bytes]]]:
    return [([weight("w", (2,), quantization=settings)], {"w.bin": bytes(2)})]


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([(ONE, {"w.bin": bytes(7)})], "cut short"),
        ([(ONE, {"w.bin": bytes(9)})], "forged"),
        ([([weight("w", (1 << 40,))], EIGHT)], "shards"),
        ([([weight("w", (1 << 62, 0))], {"w.bin": b""})], "shards"),
        ([([weight("w", (-2,))], EIGHT)], "the shape"),
        ([([weight("w", (2.0,))], EIGHT)], "the shape"),  # type: ignore[arg-type]
        ([([weight("w", (True,))], {"w.bin": bytes(4)})], "the shape"),
        ([([weight("w", (1,) * 33)], {"w.bin": bytes(4)})], "the shape"),
        ([([weight("w", (2,)), weight("w", (2,))], {"w.bin": bytes(16)})], "two weights"),
        ([([weight("", (2,))], EIGHT)], "name"),
        ([([weight("a\0", (2,))], EIGHT)], "name"),
        ([([weight("\ud800", (2,))], EIGHT)], "name"),
        ([([weight("w", (2,), "float64")], {"w.bin": bytes(16)})], "float64"),
        ([([weight("w", (2,), "uint8")], {"w.bin": bytes(2)})], "uint8"),
        ([(ONE, EIGHT), ([weight("v", (2,))], EIGHT)], "twice"),
        (quantized(dtype="uint8", min=0.0, scale=float("nan")), "finite"),
        (quantized(dtype="uint8", min=float("inf"), scale=1.0), "finite"),
        (quantized(dtype="uint8", min=0.0, scale=1e38), "float32"),
        (quantized(dtype="uint8", min=0.0, scale=10**400), "finite"),
        (quantized(dtype="uint8", min="0", scale=1.0), "finite"),
        (quantized(dtype="uint8"), "finite"),
        (quantized(dtype="int8", min=0.0, scale=1.0), "int8"),
        (quantized(), "quantized as None"),
    ],
)  # fmt: skip
def test_what_is_forged_is_refused(tmp_path: Path, groups: Any, says: str) -> None:
    with pytest.raises(BadFile, match=says):
        open_tfjs(make(tmp_path / "m", groups))


@pytest.mark.parametrize(
    "shard",
    [
        "../w.bin",
        "/etc/passwd",
        "a/../../w.bin",
        "..\\w.bin",
        "",
        "model.json",
        "gone.bin",
        "link.bin",
        "in/w.bin",
        ".",
        3,
        None,
    ],
)
def test_shards_lie_beside_the_json(tmp_path: Path, shard: object) -> None:
    folder = make(tmp_path / "m", [(ONE, EIGHT)])
    (tmp_path / "w.bin").write_bytes(bytes(8))
    (folder / "link.bin").symlink_to("w.bin")
    (folder / "in").symlink_to(tmp_path)
    text = json.loads((folder / "model.json").read_text())
    text["weightsManifest"][0]["paths"] = [shard]
    (folder / "model.json").write_text(json.dumps(text))
    with pytest.raises(BadFile):
        open_tfjs(folder)


def test_pipes_are_no_shards(tmp_path: Path) -> None:
    import os

    folder = make(tmp_path / "m", [(ONE, EIGHT)])
    (folder / "w.bin").unlink()
    os.mkfifo(folder / "w.bin")
    with pytest.raises(BadFile, match="pipe"):
        open_tfjs(folder)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("[" * 1_000_000, BadFile, "no JSON"),
        ("[]", BadFile, "list"),
        ("{", BadFile, "no JSON"),
        ("{}", BadFile, "modelTopology"),
        ('{"modelTopology": {}}', BadFile, "weightsManifest"),
        ('{"modelTopology": {}, "weightsManifest": {}}', BadFile, "weightsManifest"),
        ('{"modelTopology": {}, "weightsManifest": [3]}', BadFile, "paths"),
        ('{"modelTopology": {}, "weightsManifest": [{"paths": []}]}', BadFile, "paths"),
        ('{"modelTopology": [], "weightsManifest": []}', BadFile, "modelTopology"),
        ('{"format": "graph-model", "modelTopology": {}, "weightsManifest": []}', Unsupported, "graph model"),
        ('{"modelTopology": {"node": []}, "weightsManifest": []}', Unsupported, "graph model"),
        ('{"format": "x", "modelTopology": {}, "weightsManifest": []}', BadFile, "format"),
        (
            '{"modelTopology": {}, "weightsManifest": [{"paths": [], "weights": [{"name": "s", "shape": [], "dtype": "string"}]}]}',
            Unsupported,
            "texts",
        ),
    ],
)
def test_other_json_is_refused(tmp_path: Path, text: str, kind: type[NeutralError], says: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(kind, match=says):
        open_tfjs(tmp_path)


def test_a_shard_that_shrinks_is_an_error(tmp_path: Path) -> None:
    opened = open_tfjs(make(tmp_path / "m", [(ONE, EIGHT)]))
    (tmp_path / "m/w.bin").write_bytes(bytes(4))
    with pytest.raises(BadFile, match="cut short"):
        opened.weights["w"].data.read()
    opened.close()
