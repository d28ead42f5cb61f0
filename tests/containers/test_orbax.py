"""Orbax's folders: what Orbax writes, read; what neutral writes, restored by Orbax; copies with other arrays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from neutral.containers.orbax import checkpoints
from neutral.containers.pytree import read_orbax, replace_orbax, split_key, write_orbax
from neutral.errors import BadFile, Refused, Unsupported
from neutral.native import Stored, from_array

RANDOM = np.random.default_rng(0)

ARRAYS: dict[tuple[str, ...], np.ndarray] = {
    ("params", "fc", "kernel"): RANDOM.normal(size=(4, 6)).astype("f4"),
    ("params", "fc", "bias"): RANDOM.normal(size=6).astype("f2"),
    ("params", "bf16"): RANDOM.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    ("params", "e4m3"): RANDOM.normal(size=(2, 3)).astype(ml_dtypes.float8_e4m3fn),
    ("params", "int4"): np.array([1, -2, 3], ml_dtypes.int4),
    ("params", "flags"): np.array([True, False]),
    ("params", "complex"): (RANDOM.normal(size=3) * 1j).astype("c8"),
    ("params", "mlp/~/linear_0", "w"): RANDOM.normal(size=(3, 1)).astype("f4"),
    ("params", "zero"): np.zeros((5, 3), "f4"),
    ("stack", "0"): RANDOM.normal(size=(3, 2, 2)).astype("f4"),
    ("stack", "1"): np.array(7, np.int32),
}
OTHERS: dict[tuple[str, ...], object] = {("none",): None, ("empty",): {}, ("list",): [], ("text",): "abc"}


def _nested() -> dict[str, Any]:
    params: dict[str, Any] = {
        path[1]: jnp.asarray(a) for path, a in ARRAYS.items() if len(path) == 2 and path[0] == "params"
    }
    params["fc"] = {name: jnp.asarray(ARRAYS["params", "fc", name]) for name in ("kernel", "bias")}
    params["mlp/~/linear_0"] = {"w": ARRAYS["params", "mlp/~/linear_0", "w"]}
    return {
        "params": params, "stack": [ARRAYS["stack", "0"], jnp.asarray(ARRAYS["stack", "1"])], "step": 3, "rate": 0.5,
        "none": None, "empty": {}, "list": [], "text": "abc",
    }  # fmt: skip


def _save(folder: Path, tree: object, *, chunk_bytes: int | None = None, **options: Any) -> Path:
    handler = ocp.PyTreeCheckpointHandler(**options)
    arguments = None
    if chunk_bytes:
        arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=arguments))
    return folder


FORMS: Mapping[str, dict[str, Any]] = {
    "zarr": {"use_ocdbt": False},
    "zarr in chunks": {"use_ocdbt": False, "chunk_bytes": 16},
    "ocdbt": {"use_ocdbt": True},
    "ocdbt in chunks": {"use_ocdbt": True, "chunk_bytes": 16},
    "zarr 3": {"use_ocdbt": False, "use_zarr3": True},
    "zarr 3 in chunks": {"use_ocdbt": False, "use_zarr3": True, "chunk_bytes": 16},
    "zarr 3 in ocdbt": {"use_ocdbt": True, "use_zarr3": True},
}


@pytest.fixture(scope="module", params=FORMS, ids=[form.replace(" ", "-") for form in FORMS])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield _save(tmp_path_factory.mktemp("saved") / "checkpoint", _nested(), **FORMS[request.param])


def _assert_same(found: Any, meant: np.ndarray) -> None:
    array = np.asarray(found)
    assert (array.dtype, array.shape) == (meant.dtype, meant.shape)
    assert array.tobytes() == meant.tobytes()


def test_reads_what_orbax_writes(saved: Path) -> None:
    tree = read_orbax(saved)
    numbers = {("step",): np.array(3), ("rate",): np.array(0.5, tree.leaves["rate",].dtype)}
    assert tree.leaves.keys() == {*ARRAYS, *numbers}
    assert tree.others == OTHERS
    for path, array in (ARRAYS | numbers).items():
        _assert_same(tree.leaves[path].read(), array)
    assert tree.metadata["lists"] == [["stack"]] and tree.metadata["scalars"] == [["rate"], ["step"]]
    np.testing.assert_array_equal(
        tree.leaves["params", "fc", "kernel"].block([(1, 4), (2, 5)]), ARRAYS["params", "fc", "kernel"][1:4, 2:5]
    )
    tree.close()


def test_replaces_arrays(saved: Path, tmp_path: Path) -> None:
    new = {path: RANDOM.permutation(array.reshape(-1)).reshape(array.shape) for path, array in ARRAYS.items()}
    new.pop(("params", "fc", "bias"))
    tensors = {path: from_array(array.T).permute(range(array.ndim)[::-1]) for path, array in new.items()}
    replace_orbax(saved, tensors, tmp_path / "new")
    back = read_orbax(tmp_path / "new")
    for path, array in ARRAYS.items():
        _assert_same(back.leaves[path].read(), new.get(path, array))
    assert back.others == OTHERS
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "new")
    _assert_same(restored["params"]["fc"]["kernel"], new["params", "fc", "kernel"])
    _assert_same(restored["params"]["fc"]["bias"], ARRAYS["params", "fc", "bias"])
    _assert_same(restored["stack"][0], new["stack", "0"])
    assert (restored["step"], restored["text"], restored["list"]) == (3, "abc", [])


@pytest.mark.parametrize("form", FORMS)
def test_a_note_says_that_arrays_lie_otherwise(form: str, tmp_path: Path) -> None:
    saved = _save(tmp_path / "saved", _nested(), **FORMS[form])
    notes = replace_orbax(saved, {}, tmp_path / "new")
    assert bool(notes) is (form not in ("zarr", "zarr in chunks"))
    assert all(
        (f"zarr {3 if '3' in form else 2}" in note, "OCDBT" in note) == (True, "ocdbt" in form) for note in notes
    )


def test_a_copy_with_nothing_replaced_is_the_same(tmp_path: Path) -> None:
    saved = _save(tmp_path / "saved", _nested(), use_ocdbt=False, chunk_bytes=16)
    replace_orbax(saved, {}, tmp_path / "new")
    before = {str(p.relative_to(saved)): p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    after = {str(p.relative_to(tmp_path / "new")): p.read_bytes() for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert before == after


def test_what_is_written_is_restored_by_orbax(tmp_path: Path) -> None:
    others = OTHERS | {("step",): 3, ("rate",): 0.5, ("yes",): True}
    write_orbax({p: from_array(a) for p, a in ARRAYS.items()}, others, tmp_path / "new", {"lists": [["stack"]]})
    for checkpointer in (ocp.PyTreeCheckpointer(), ocp.StandardCheckpointer()):
        if isinstance(checkpointer, ocp.StandardCheckpointer):
            # StandardCheckpointer has no handler for text.
            metadata = json.loads((tmp_path / "new" / "_METADATA").read_text())
            del metadata["tree_metadata"]["('text',)"]
            (tmp_path / "new" / "_METADATA").write_text(json.dumps(metadata))
        with checkpointer:
            restored = checkpointer.restore(tmp_path / "new")
        for path, array in ARRAYS.items():
            found = restored
            for part in path:
                found = found[int(part) if isinstance(found, list) else part]
            _assert_same(found, array)
        assert (restored["step"], restored["rate"], restored["yes"], restored["none"]) == (3, 0.5, True, None)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    tree = read_orbax(_save(tmp_path / "saved", _nested()))
    write_orbax(tree.leaves, tree.others, tmp_path / "new", tree.metadata)
    back = read_orbax(tmp_path / "new")
    assert (back.others, back.metadata, list(back.leaves)) == (tree.others, tree.metadata, list(tree.leaves))
    assert all(isinstance(leaf, Stored) for leaf in back.leaves.values())
    for path, leaf in tree.leaves.items():
        _assert_same(back.leaves[path].read(), leaf.read())
    write_orbax(back.leaves, back.others, tmp_path / "again", back.metadata)
    for file in (tmp_path / "new").rglob("*"):
        twin = tmp_path / "again" / file.relative_to(tmp_path / "new")
        assert twin.is_dir() if file.is_dir() else twin.read_bytes() == file.read_bytes()


def test_arrays_of_several_devices(tmp_path: Path) -> None:
    """Chunks that do not divide the array: the last ones stick out."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(tmp_path / "saved" / "w")},
        "metadata": {"shape": [7, 5], "chunks": [3, 2], "dtype": "<f4", "compressor": {"id": "zstd", "level": 1}},
    }
    array = RANDOM.normal(size=(7, 5)).astype("f4")
    _write_tensorstore(spec, array)
    _describe(tmp_path / "saved")
    tree = read_orbax(tmp_path / "saved")
    _assert_same(tree.leaves["w",].read(), array)
    np.testing.assert_array_equal(
        np.concatenate(list(tree.leaves["w",].permute((1, 0)).tiles(16))), array.T.reshape(-1)
    )
    replace_orbax(tmp_path / "saved", {("w",): from_array(array[::-1])}, tmp_path / "new")
    spec["kvstore"]["path"] = str(tmp_path / "new" / "w")
    _assert_same(tensorstore.open(spec, open=True).result().read().result(), array[::-1].copy())


@pytest.mark.parametrize(
    "metadata",
    [
        {"compressor": None},
        {"compressor": {"id": "zlib", "level": 3}},
        {"compressor": {"id": "gzip", "level": 3}},
        {"compressor": None, "order": "F"},
        {"compressor": {"id": "zstd", "level": 3}, "order": "F", "chunks": [4, 4]},
        {"compressor": None, "dtype": ">f4"},
        {"compressor": {"id": "zstd", "level": 3}, "dtype": ">f4", "chunks": [2, 5], "dimension_separator": "/"},
    ],
    ids=str,
)
def test_other_forms_of_zarr_2(metadata: dict[str, Any], tmp_path: Path) -> None:
    whole = {"shape": [7, 5], "chunks": [7, 5], "dtype": "<f4", "compressor": None} | metadata
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(tmp_path / "saved" / "w")}, "metadata": whole}
    array = RANDOM.normal(size=(7, 5)).astype("f4")
    _write_tensorstore(spec, array)
    _describe(tmp_path / "saved")
    _assert_same(read_orbax(tmp_path / "saved").leaves["w",].read(), array)
    replace_orbax(tmp_path / "saved", {("w",): from_array(array[::-1])}, tmp_path / "new")
    spec["kvstore"]["path"] = str(tmp_path / "new" / "w")
    _assert_same(
        np.asarray(tensorstore.open(spec, open=True).result().read().result()).astype("f4"), array[::-1].copy()
    )


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "bytes", "configuration": {"endian": "little"}}],
        [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "gzip", "configuration": {"level": 5}}],
        [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [2, 1],
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                    "index_location": "start",
                },
            }
        ],
    ],
    ids=["plain", "big-endian", "shards"],
)
def test_other_forms_of_zarr_3(codecs: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = {
        "shape": [7, 5], "data_type": "float32", "codecs": codecs,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 3]}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}, "fill_value": 0.0,
    }  # fmt: skip
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "saved" / "w")}, "metadata": whole}
    array = RANDOM.normal(size=(7, 5)).astype("f4")
    array[:4, :3] = 0
    _write_tensorstore(spec, array)
    _describe(tmp_path / "saved", complete=False, zarr3=True)
    _assert_same(read_orbax(tmp_path / "saved").leaves["w",].read(), array)


def test_chunks_left_out_because_they_equal_the_fill_value(tmp_path: Path) -> None:
    array = np.zeros((6, 4), "f4")
    array[0] = 1
    for name, fill in (("zero", 0.0), ("nan", "NaN"), ("two", 2.0)):
        values = np.where(array == 0, float(fill), array).astype("f4")
        whole = {"shape": [6, 4], "chunks": [2, 4], "dtype": "<f4", "compressor": None, "fill_value": fill}
        path = str(tmp_path / name / "w")
        _write_tensorstore({"driver": "zarr", "kvstore": {"driver": "file", "path": path}, "metadata": whole}, values)
        assert len(list((tmp_path / name / "w").iterdir())) == 2
        _describe(tmp_path / name)
        with pytest.raises(BadFile, match="no such chunk"):
            read_orbax(tmp_path / name)
        _describe(tmp_path / name, complete=False)
        _assert_same(read_orbax(tmp_path / name).leaves["w",].read(), values)
        without = json.loads((tmp_path / name / "w" / ".zarray").read_text()) | {"fill_value": None}
        (tmp_path / name / "w" / ".zarray").write_text(json.dumps(without))
        with pytest.raises(BadFile, match="no such chunk"):
            read_orbax(tmp_path / name)


def _write_tensorstore(spec: dict[str, Any], array: np.ndarray) -> None:
    tensorstore.open(spec, create=True).result().write(array).result()


def _describe(folder: Path, *, complete: bool = True, zarr3: bool = False) -> None:
    """An Orbax folder around arrays that TensorStore wrote."""
    tree = {"('w',)": {"key_metadata": [{"key": "w", "key_type": 2}], "value_metadata": {"value_type": "np.ndarray"}}}
    settings = {"use_ocdbt": False, "use_zarr3": zarr3, "store_array_data_equal_to_fill_value": complete}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": tree, **settings}))


def test_one_step_is_taken_and_several_are_not(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 100):
            manager.save(step, args=ocp.args.StandardSave({"w": jnp.full(3, step, jnp.float32)}))
            manager.wait_until_finished()
            if step == 9:
                _assert_same(read_orbax(tmp_path / "run").leaves["w",].read(), np.full(3, 9, "f4"))
    with pytest.raises(Refused, match="2 checkpoints: 9, 100"):
        read_orbax(tmp_path / "run")
    for key in ("100", "100/default"):
        _assert_same(read_orbax(tmp_path / "run", key).leaves["w",].read(), np.full(3, 100, "f4"))
    with pytest.raises(Refused, match="'7'"):
        read_orbax(tmp_path / "run", "7")
    new = {("w",): from_array(np.ones(3, "f4"))}
    replace_orbax(tmp_path / "run", new, tmp_path / "copy", "100")
    assert checkpoints(tmp_path / "copy") == ["9/default", "100/default"]
    _assert_same(read_orbax(tmp_path / "copy", "9").leaves["w",].read(), np.full(3, 9, "f4"))
    with ocp.CheckpointManager(tmp_path / "copy") as manager:
        restored = manager.restore(100, args=ocp.args.StandardRestore())
        _assert_same(restored["w"], np.ones(3, "f4"))


def test_items_of_a_step(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = {name: ocp.args.StandardSave({"w": jnp.full(2, i)}) for i, name in enumerate(("params", "state"))}
        manager.save(1, args=ocp.args.Composite(**items, notes=ocp.args.JsonSave({"a": 1})))
    with pytest.raises(Refused, match="1/params, 1/state"):
        read_orbax(tmp_path / "run")
    for key in ("state", "1/state"):
        assert read_orbax(tmp_path / "run", key).leaves["w",].read()[0] == 1
    assert read_orbax(tmp_path / "run" / "1", "params").leaves["w",].read()[0] == 0


def test_a_key_names_a_checkpoint_and_what_is_in_it(tmp_path: Path) -> None:
    one = {("params", "w"): from_array(np.ones(1))}
    (tmp_path / "run" / "100").mkdir(parents=True)
    write_orbax(one, {}, tmp_path / "run" / "100" / "default")
    assert split_key(tmp_path / "run", None) == (None, None)
    assert split_key(tmp_path / "run", "100") == ("100", None)
    assert split_key(tmp_path / "run", "100/ema") == ("100", "ema")
    assert split_key(tmp_path / "run", "100/default/ema") == ("100/default", "ema")
    assert split_key(tmp_path / "run", "ema") == (None, "ema")
    (tmp_path / "run" / "200").mkdir()
    write_orbax(one, {}, tmp_path / "run" / "200" / "default")
    assert split_key(tmp_path / "run", "ema") == ("ema", None)


def test_values_in_a_file_of_their_own_are_not_read(tmp_path: Path) -> None:
    """Orbax of 2023 kept small values in a msgpack file, beside which nothing is there of them."""
    write_orbax({("a",): from_array(np.ones(2)), ("b",): from_array(np.ones(2))}, {}, tmp_path / "x")
    tree = {"a": np.ones(2), "b": "PLACEHOLDER://b"}
    shutil.rmtree(tmp_path / "x" / "a")
    with pytest.raises(BadFile, match="no array"):
        read_orbax(tmp_path / "x")
    (tmp_path / "x" / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    with pytest.raises(Unsupported, match="2023"):
        read_orbax(tmp_path / "x")


def _of_2023(folder: Path) -> Path:
    """A checkpoint with its tree in msgpack: one array beside it, one in it, and a number."""
    write_orbax({("params", "w"): from_array(np.arange(6.0).reshape(2, 3))}, {}, folder)
    (folder / "_METADATA").unlink()
    tree = {"params": {"b": np.arange(3.0), "w": "PLACEHOLDER://params.w"}, "step": 7}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    return folder


def test_a_tree_in_msgpack(tmp_path: Path) -> None:
    """Orbax of 2023 had no metadata; `tests/golden` has files of its own."""
    tree = read_orbax(_of_2023(tmp_path / "x"))
    assert {path: leaf.read().tolist() for path, leaf in tree.leaves.items()} == {
        ("params", "w"): [[0, 1, 2], [3, 4, 5]],
        ("params", "b"): [0, 1, 2],
    }
    assert tree.others == {("step",): 7}
    tree.close()


def test_a_tree_in_msgpack_with_other_elements(tmp_path: Path) -> None:
    new = {("params", "w"): from_array(np.full((2, 3), 8.0)), ("params", "b"): from_array(np.full(3, 9.0))}
    replace_orbax(_of_2023(tmp_path / "x"), new, tmp_path / "y")
    tree = read_orbax(tmp_path / "y")
    assert {path: set(leaf.read().ravel().tolist()) for path, leaf in tree.leaves.items()} == {
        ("params", "w"): {8},
        ("params", "b"): {9},
    }
    assert tree.others == {("step",): 7}
    tree.close()
    only = {("params", "w"): from_array(np.full((2, 3), 8.0))}
    replace_orbax(tmp_path / "x", only, tmp_path / "z")
    assert (tmp_path / "z" / "checkpoint").read_bytes() == (tmp_path / "x" / "checkpoint").read_bytes()


def test_writing_refuses(tmp_path: Path) -> None:
    one = from_array(np.ones(1))
    for leaves, others in (
        ({("a", "b"): one, ("a.b",): one}, {}),
        ({("..",): one}, {}),
        ({("/etc", "x"): one}, {}),
        ({("a", ""): one, ("x//y",): one}, {}),
        ({("a\0",): one}, {}),
        ({("a",): one, ("a/0",): one}, {}),
        ({("_METADATA",): one}, {}),
        ({("x" * 300,): one}, {}),
        ({("a",): from_array(np.ones((0, 3)))}, {}),
        ({("a",): from_array(np.array(["x"]))}, {}),
        ({("a",): one}, {("a",): 1}),
        ({("a",): one}, {("b",): b"bytes"}),
        ({("a",): one}, {("b",): 1 << 63}),
        ({("a",): one, ("a", "b"): one}, {}),
    ):
        with pytest.raises(Refused):
            write_orbax(leaves, others, tmp_path / "x")
        assert not list(tmp_path.iterdir())


def test_replacing_refuses(tmp_path: Path) -> None:
    write_orbax({("a",): from_array(np.ones(2))}, {}, tmp_path / "x")
    with pytest.raises(Refused) as caught:
        replace_orbax(tmp_path / "x", {("a",): from_array(np.ones(3)), ("b",): from_array(np.ones(2))}, tmp_path / "y")
    assert len(caught.value.problems) == 2
    for out in (tmp_path / "x", tmp_path / "x" / "inside"):
        with pytest.raises(Refused):
            replace_orbax(tmp_path / "x", {}, out, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
