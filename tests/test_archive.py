"""The archive is what its half page says, always in the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import neutral
from neutral import native
from neutral.archive import Contents, describe, file_digest, is_archive, open_archive, write_archive
from neutral.canon import canonical_layers
from neutral.canonical import CanonicalLayer, CanonicalTensor
from neutral.containers.safetensors import header_bytes
from neutral.conventions.keras import KERAS
from neutral.conventions.torch import TORCH
from neutral.errors import BadFile, Refused
from neutral.native import NativeLayer, NativeModel, NativeTensor, Stored, from_array
from neutral.schema.manifest import Manifest, Source
from tests.golden.make import HERE as GOLDEN
from tests.golden.make import golden
from tests.test_native import Counting

SOURCE = Source(framework="torch", format="pt")


def contents(*layers: CanonicalLayer, **more: Any) -> Contents:
    return Contents(layers, SOURCE, **more)


def layer(path: str, kind: str = "dense", **arrays: np.ndarray) -> CanonicalLayer:
    axes = {"kernel": ("out", "in"), "bias": ("out",)} if kind == "dense" else {}
    tensors = {
        role: CanonicalTensor(from_array(a), axes.get(role, tuple(f"d{i}" for i in range(a.ndim))))
        for role, a in arrays.items()
    }
    return CanonicalLayer(path, kind, tensors, native_path=path)


def array(*shape: int, dtype: object = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def written(path: Path, *layers: CanonicalLayer, **more: Any) -> bytes:
    write_archive(contents(*layers, **more), path, force=True)
    return path.read_bytes()


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], str, bytes]:
    """(header without metadata, manifest, its text, data) by the README alone."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert list(metadata) == ["neutral"]
    return header, json.loads(metadata["neutral"]), metadata["neutral"], content[8 + length :]


@pytest.mark.parametrize("name", [name for name, _ in golden()])
def test_it_is_what_the_half_page_says(name: str) -> None:
    content = (GOLDEN / name).read_bytes()
    header, manifest, text, data = parts(content)
    assert text == json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    named = {f"{one['path']}/{role}": p for one in manifest["layers"] for role, p in one["parameters"].items()}
    named |= {f"@{c}/{n}": p for c, found in manifest["collections"].items() for n, p in found.items()}
    assert header.keys() == {name for name, p in named.items() if "tied_to" not in p}
    position, sizes = 0, []
    for entry_name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert begin == position, "no gap, in the order of the header"
        position = end
        sizes.append((end - begin) // max(int(np.prod(entry["shape"])), 1))
        assert hashlib.sha256(data[begin:end]).hexdigest() == named[entry_name]["sha256"]
        assert entry["shape"] == named[entry_name]["shape"]
        assert len(named[entry_name]["axes"]) == len(entry["shape"])
    assert position == len(data) and sizes == sorted(sizes, reverse=True), "larger dtypes first"


def digest_of_the_page(manifest: dict[str, Any]) -> str:
    """weights_digest as the README tells it, with nothing of neutral. Fused axes are those of the kind."""
    fused = {
        ("channel", "position"): "in", ("out_channel", "out_position"): "out", ("head", "dim"): None,
    }  # fmt: skip
    heads = {"query": "query", "key": "key", "value": "value", "output": "attended"}
    layers = []
    for one in manifest["layers"]:
        roles = {}
        for role, p in one["parameters"].items():
            axes, shape = list(p["axes"]), list(p["shape"])
            for i in reversed(range(len(axes) - 1)):
                if tuple(axes[i : i + 2]) in fused:
                    axes[i : i + 2] = [fused[tuple(axes[i : i + 2])] or heads[role.split("_")[0]]]
                    shape[i : i + 2] = [shape[i] * shape[i + 1]]
            if not p["state"]:
                roles[role] = [axes, shape, p["dtype"], p["sha256"]]
        if roles:
            line = json.dumps([one["kind"], roles], sort_keys=True, separators=(",", ":"))
            layers.append(hashlib.sha256(line.encode()).hexdigest())
    return hashlib.sha256("\n".join(sorted(layers)).encode()).hexdigest()


@pytest.mark.parametrize("name", [name for name, _ in golden()])
def test_the_digest_is_computed_by_the_page_alone(name: str) -> None:
    _, manifest, text, _ = parts((GOLDEN / name).read_bytes())
    assert manifest["weights_digest"] == digest_of_the_page(manifest)
    blank = text.replace(f'"manifest_digest":"{manifest["manifest_digest"]}"', f'"manifest_digest":"{"0" * 64}"')
    assert manifest["manifest_digest"] == hashlib.sha256(blank.encode()).hexdigest()


def test_a_safetensors_library_reads_it(tmp_path: Path) -> None:
    kernel, bias = array(3, 2), array(3, dtype=np.float16)
    written(tmp_path / "x.nwt", layer("fc", kernel=kernel, bias=bias), layer("big", kernel=array(2, 2, dtype=np.int64)))
    found = safetensors.numpy.load_file(tmp_path / "x.nwt")
    assert sorted(found) == ["big/kernel", "fc/bias", "fc/kernel"]
    assert found["fc/kernel"].tobytes() == kernel.tobytes() and found["fc/bias"].tobytes() == bias.tobytes()
    with safetensors.safe_open(tmp_path / "x.nwt", "np") as file:
        assert list(file.metadata()) == ["neutral"]
        assert Manifest.from_json(file.metadata()["neutral"]).layers[0].path == "fc"
    assert is_archive(tmp_path / "x.nwt")


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "uint8",
        "bool",
        "complex64",
        "float8_e4m3fn",
        "float8_e5m2",
    ],
)
def test_every_dtype_goes_round(dtype: str, tmp_path: Path) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    arrays = {"a": array(2, 3, dtype=kind), "b": array(dtype=kind), "c": array(0, 4, dtype=kind)}
    written(tmp_path / "x.nwt", layer("x", "unknown", **arrays))
    with open_archive(tmp_path / "x.nwt") as archive:
        archive.check()
        for role, wanted in arrays.items():
            found = archive.tensor(f"x/{role}").read()
            assert found.dtype == kind and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


def test_a_dtype_that_cannot_be_held_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for dtype in (np.complex128, ml_dtypes.int4):
        with pytest.raises(Refused, match="x/a"):
            written(tmp_path / "x.nwt", layer("x", "unknown", a=array(2, dtype=dtype)))
    assert not list(tmp_path.iterdir())


def test_the_same_input_gives_the_same_bytes_wherever(tmp_path: Path) -> None:
    """Other names, another folder, another process, another hash seed."""
    np.savez(tmp_path / "source.npz", **{"fc/kernel": array(3, 2), "fc/bias": array(3), "b/kernel": array(2, 2)})
    (tmp_path / "sub").mkdir()
    script = "import sys, neutral; neutral.export_model(sys.argv[1], sys.argv[2]).close()"
    outs = []
    for seed, folder, source in (("0", tmp_path, "source.npz"), ("7", tmp_path / "sub", "../source.npz")):
        out = folder / f"out{seed}.nwt"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", script, source, out.name], cwd=folder, env=environment, check=True)
        outs.append(out.read_bytes())
    (tmp_path / "renamed.npz").write_bytes((tmp_path / "source.npz").read_bytes())
    neutral.export_model(tmp_path / "renamed.npz", tmp_path / "x.nwt").close()
    assert outs[0] == outs[1] == (tmp_path / "x.nwt").read_bytes()


def test_created_only_when_asked(tmp_path: Path) -> None:
    for created in (None, "2024-01-01"):
        with neutral.export_model({"a/kernel": array(2, 2)}, tmp_path / f"{created}.nwt", created=created) as archive:
            assert archive.manifest.created == created
    assert "created" not in parts((tmp_path / "None.nwt").read_bytes())[1]


def test_shared_elements_are_stored_once(tmp_path: Path) -> None:
    data = from_array(array(4, 2))
    a, b = (
        replace(layer(path), tensors={"kernel": CanonicalTensor(data, ("out", "in"), identity="one")}) for path in "ab"
    )
    half = CanonicalTensor(data.take(0, (0, 1)), ("out", "in"), identity="one")
    other = CanonicalTensor(from_array(array(4, 2) + 1), ("out", "in"), identity="one")
    more = [replace(layer(path), tensors={"kernel": each}) for path, each in (("half", half), ("other", other))]
    header, manifest, _, _ = parts(written(tmp_path / "x.nwt", a, b, *more))
    assert list(header) == ["a/kernel", "half/kernel", "other/kernel"], "what differs is no tie, whatever it says"
    assert [one["parameters"]["kernel"].get("tied_to") for one in manifest["layers"]] == [None, "a/kernel", None, None]
    with open_archive(tmp_path / "x.nwt") as archive:
        archive.check()
        assert archive.tensor("b/kernel").read().tobytes() == array(4, 2).tobytes()
        assert archive.layers[0].tensors["kernel"].identity == archive.layers[1].tensors["kernel"].identity
    assert written(tmp_path / "y.nwt", *(a, b), *more) == (tmp_path / "x.nwt").read_bytes()


def test_the_weights_digest_is_of_the_weights_alone() -> None:
    def digest(*layers: CanonicalLayer, **more: Any) -> str:
        return describe(contents(*layers, **more), lambda: None).manifest.weights_digest

    a, b = layer("a", kernel=array(3, 2), bias=array(3)), layer("b", kernel=array(2, 2))
    same = digest(a, b)
    assert digest(b, a) == digest(replace(a, path="z"), b) == digest(a, b, notes=("x",), ordered=True) == same
    assert digest(replace(a, attributes={"activation": "relu"}, evidence="hint"), b) == same
    behind = replace(layer("a", kernel=array(3, 6)), channels={"in": 2})
    assert digest(behind) == digest(replace(behind, channels={})), "known to follow a Flatten, or not"
    others = (
        layer("a", kernel=array(2, 3), bias=array(3)),
        layer("a", kernel=array(3, 2) + 1, bias=array(3)),
        layer("a", kernel=array(3, 2).astype("f8"), bias=array(3)),
        layer("a", kernel=array(3, 2)),
        layer("a", "unknown", kernel=array(3, 2), bias=array(3)),
    )
    assert len({digest(other, b) for other in others} | {same}) == 6


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """Layer a with role b/c, and layer a/b with role c: one of them would be lost."""
    layers = (layer("a", "unknown", **{"b/c": array(2)}), layer("a/b", "unknown", c=array(2) + 1))
    with pytest.raises(Refused, match="a/b/c"):
        written(tmp_path / "x.nwt", *layers)
    moment = {"moment": (NativeTensor("w", from_array(array(2))),)}
    with pytest.raises(Refused, match="@moment/w"):
        describe(contents(layer("@moment", "unknown", w=array(2)), collections=moment), lambda: None)
    assert not list(tmp_path.iterdir())


def test_collections_stand_beside_the_weights(tmp_path: Path) -> None:
    weights = layer("a", kernel=array(2, 2))
    moments = {
        "optimizer": (NativeTensor("m.w", from_array(array(2, 2) * 3)), NativeTensor("step", from_array(array())))
    }
    written(tmp_path / "x.nwt", weights, collections=moments)
    with open_archive(tmp_path / "x.nwt") as archive:
        archive.check()
        assert archive.names() == ("a/kernel",)
        assert np.array_equal(archive.tensor("@optimizer/m.w").read(), array(2, 2) * 3)
        assert archive.manifest.weights_digest == describe(contents(weights), lambda: None).manifest.weights_digest


# --- damage, and manifests that lie ---


def test_check_finds_any_changed_byte_of_the_elements(tmp_path: Path) -> None:
    content = written(tmp_path / "x.nwt", layer("a", kernel=array(3, 2), bias=array(3, dtype=np.float16)))
    start = len(content) - (24 + 6)
    for position in range(start, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        (tmp_path / "d.nwt").write_bytes(damaged)
        with open_archive(tmp_path / "d.nwt") as archive, pytest.raises(BadFile, match="a/"):
            archive.check()


def forged(path: Path, change: Any) -> Path:
    """An archive whose manifest was changed and then signed again by its own digests."""
    header, manifest, _, data = parts(path.read_bytes())
    change(manifest)
    manifest["weights_digest"] = digest_of_the_page(manifest)
    text = Manifest.from_json(json.dumps(manifest)).to_json()
    entries = [(name, np.dtype({"F32": "f4"}[entry["dtype"]]), tuple(entry["shape"])) for name, entry in header.items()]
    out = path.with_name("forged.nwt")
    out.write_bytes(header_bytes(entries, {"neutral": text}) + data)
    return out


def lstm_and_dense(path: Path) -> None:
    arrays = {"weight_ih_l0": (8, 3), "weight_hh_l0": (8, 2), "bias_ih_l0": (8,), "bias_hh_l0": (8,)}
    lstm = {name: NativeTensor(f"l.{name}", from_array(array(*shape))) for name, shape in arrays.items()}
    fc = {"weight": NativeTensor("fc.weight", from_array(array(3, 12)))}
    model = NativeModel(
        "torch", "pt", (NativeLayer("l", "LSTM", lstm, {}, "class"), NativeLayer("fc", "Linear", fc, {}, "class")), splits={"fc": {"in": 2}}
    )  # fmt: skip
    write_archive(Contents(canonical_layers(model, TORCH), SOURCE), path)


FORGERIES = {
    "gates in another order": lambda m: m["layers"][0]["parameters"]["input_kernel"]["labels"].update(
        gate=["forget", "input", "cell", "output"]
    ),
    "no labels": lambda m: m["layers"][0]["parameters"]["input_kernel"].update(labels={}),
    "other channels": lambda m: m["layers"][1].update(channels={"in": 3}),
    "no channels": lambda m: m["layers"][1].update(channels={}),
    "axes the other way": lambda m: m["layers"][1]["parameters"]["kernel"].update(axes=["out", "position", "channel"]),
    "axes of another kind": lambda m: m["layers"][1].update(kind="embedding"),
    "a shape that is not that of the header": lambda m: m["layers"][1]["parameters"]["kernel"].update(shape=[3, 6, 2]),
    "a dtype that is not that of the header": lambda m: m["layers"][1]["parameters"]["kernel"].update(dtype="int32"),
    "a tensor that is not there": lambda m: m["layers"][1]["parameters"].update(
        bias={**m["layers"][1]["parameters"]["kernel"], "axes": ["out"], "shape": [3]}
    ),
    "a tensor that nobody lists": lambda m: m["layers"][1]["parameters"].clear(),
    "a tie to nothing": lambda m: m["layers"][1]["parameters"]["kernel"].update(tied_to="nobody/kernel"),
    "a tie to another shape": lambda m: m["layers"][1]["parameters"]["kernel"].update(tied_to="l/bias"),
    "a version to come": lambda m: m.update(format_version="2.0"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_manifest_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    lstm_and_dense(tmp_path / "x.nwt")
    with open_archive(forged(tmp_path / "x.nwt", lambda manifest: None)) as archive:
        archive.check()
    with pytest.raises(BadFile):
        open_archive(forged(tmp_path / "x.nwt", FORGERIES[name]))


def test_a_minor_version_to_come_is_read(tmp_path: Path) -> None:
    lstm_and_dense(tmp_path / "x.nwt")
    open_archive(forged(tmp_path / "x.nwt", lambda manifest: manifest.update(format_version="1.9"))).close()


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": array(2)}, tmp_path / "plain.safetensors", {"format": "np"})
    two = {"neutral": "{}", "more": ""}
    safetensors.numpy.save_file({"a": array(2)}, tmp_path / "two.nwt", two)
    assert not is_archive(tmp_path / "plain.safetensors")
    for name in ("plain.safetensors", "two.nwt"):
        with pytest.raises(BadFile):
            open_archive(tmp_path / name)


# --- sizes ---


def test_a_model_larger_than_the_limits_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No reading takes more than the limits allow, though the tensors are many times as large, and transposed."""
    monkeypatch.setattr(native, "WHOLE", 1 << 14)
    monkeypatch.setattr(native, "TILE", 1 << 12)
    monkeypatch.setattr(native.Tensor.tiles, "__defaults__", (1 << 12,))
    kernel = np.random.RandomState(0).rand(300, 200).astype("f4")
    storage = Counting(kernel.tobytes())
    tensors = {"kernel": NativeTensor("k", Stored(storage, kernel.shape, "f4"))}
    model = NativeModel("keras", "h5", (NativeLayer("fc", "Dense", tensors, {}, "class"),))
    write_archive(Contents(canonical_layers(model, KERAS), SOURCE), tmp_path / "x.nwt")
    assert storage.largest <= 1 << 15 < kernel.nbytes // 4
    with open_archive(tmp_path / "x.nwt") as archive:
        archive.check()
        assert np.array_equal(archive.tensor("fc/kernel").read(), kernel.T)


def test_a_folder_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "b").write_bytes(b"2")
    (tmp_path / "m" / "a").write_bytes(b"1")
    lines = "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in (("a", b"1"), ("b", b"2")))
    assert file_digest(tmp_path / "m") == hashlib.sha256(lines.encode()).hexdigest()
    assert file_digest(tmp_path / "m" / "a") == hashlib.sha256(b"1").hexdigest()


# --- the form of a layer is remembered ---


def test_layers_go_back_in_their_own_axes(tmp_path: Path) -> None:
    """Without a template nothing but the archive says how the source stored a kernel that several forms could have."""
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4, 5, 3)),
            layers.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise"),
            layers.PReLU(shared_axes=[1, 2], name="shared_slope"),
            layers.Reshape((12, 6)),
            layers.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d", name="square"),
            layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", name="heads"),
        ]
    )
    weights = [np.random.RandomState(i).rand(*w.shape).astype("f4") for i, w in enumerate(model.get_weights())]
    model.set_weights(weights)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    for source, out in (("model.keras", "out.keras"), ("model.keras", "out.h5"), ("model.keras", "a.weights.h5")):
        neutral.export_model(tmp_path / source, tmp_path / "x.nwt", force=True).close()
        neutral.import_model(tmp_path / "x.nwt", "keras", out=tmp_path / out)
    neutral.convert(tmp_path / "model.weights.h5", tmp_path / "b.weights.h5")
    for name in ("out.keras", "out.h5", "a.weights.h5", "b.weights.h5"):
        model.set_weights([w * 0 for w in weights])
        again = model
        if name.endswith(".weights.h5"):
            model.load_weights(tmp_path / name)
        else:
            again = keras.models.load_model(tmp_path / name)
        for found, wanted in zip(again.get_weights(), weights, strict=True):
            assert found.shape == wanted.shape and np.array_equal(found, wanted), name
