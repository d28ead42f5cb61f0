"""Models of Hugging Face in Flax, and what Hugging Face's own conversion made of them for torch.

`versions/make_transformers.py` made both; their sizes differ wherever the models allow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

import neutral
from neutral.archive import layer_digests
from neutral.errors import Refused

HERE = Path(__file__).with_name("versions") / "transformers-4.57.1"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Model:
    """The kinds of a model's layers, of which files of weights do not say them; `own` are Hugging Face's own layers."""

    kinds: Mapping[str, str]
    own: tuple[str, ...] = ()
    why: str = ""
    layers: int = 0


MODELS: Mapping[str, Model] = {
    "bert": Model(
        {"*LayerNorm": "layer_norm", "*_embeddings": "embedding", "*.dense": "dense", "*.self.*": "dense"}, layers=21
    ),
    # Conv1D: its kernel is (in, out) in torch and (out, in) in Flax, the other way round than anything else there.
    "gpt2": Model({"*.ln_*": "layer_norm", "*.w?e": "embedding"}, ("*.c_*",), "c_attn", 7),
    # cls_token and position_embeddings are arrays of no layer.
    "vit": Model(
        {"*.projection": "conv", "*layernorm*": "layer_norm", "*.dense": "dense", "*.attention.attention.*": "dense"},
        ("embeddings",),
        "embeddings: ",
        19,
    ),
    # Norms of a class of its own, whose scale Flax's file calls `weight`.
    "t5": Model(
        {"*.[qkvo]": "dense", "*.w[io]": "dense", "shared": "embedding", "*relative_attention_bias": "embedding"},
        ("*layer_norm",),
        "layer_norm: ",
        35,
    ),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def flax_arrays(path: Path) -> Arrays:
    found: Arrays = flatten_dict(msgpack_restore(path.read_bytes()), sep="/")
    return found


def save_flax(arrays: Arrays, path: Path) -> None:
    path.write_bytes(msgpack_serialize(unflatten_dict(dict(arrays), sep="/")))


def save_torch(arrays: Arrays, path: Path) -> None:
    save_file(dict(arrays), path, metadata={"format": "pt"})


def is_own(path: str, model: Model) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in model.own)


@EVERY
def test_both_have_the_same_weights(name: str) -> None:
    model = MODELS[name]
    with (
        neutral.export_model(HERE / f"{name}.msgpack", kinds=model.kinds) as a,
        neutral.export_model(HERE / f"{name}.safetensors", kinds=model.kinds) as b,
    ):
        known = [
            {p: digest for p, digest in layer_digests(each.manifest.layers).items() if not is_own(p, model)}
            for each in (a, b)
        ]
        assert known[0] == known[1] and len(known[0]) == model.layers
        if not model.own:
            assert neutral.diff(a, b).same
            assert a.manifest.weights_digest == b.manifest.weights_digest


@EVERY
@pytest.mark.parametrize("target", ["torch", "flax"])
def test_one_becomes_the_other(name: str, target: str, tmp_path: Path) -> None:
    """Tensor by tensor what Hugging Face made of it; a model with layers of its own is refused."""
    model = MODELS[name]
    forms = {"torch": (".safetensors", load_file, save_torch), "flax": (".msgpack", flax_arrays, save_flax)}
    to, read, save = forms.pop(target)
    ((suffix, read_source, save_source),) = forms.values()
    expected = read(HERE / (name + to))
    save({key: np.asarray(array) + 1 for key, array in expected.items()}, tmp_path / f"all{to}")
    told: dict[str, Any] = {"kinds": model.kinds, "into_kinds": model.kinds, "flatten": {}}
    if model.own:
        with pytest.raises(Refused, match=model.why):
            neutral.convert(HERE / (name + suffix), tmp_path / f"no{to}", into=tmp_path / f"all{to}", **told)
        assert not (tmp_path / f"no{to}").exists()
    common = {key: array for key, array in expected.items() if not is_own(layer_of(key), model)}
    assert (len(common) < len(expected)) == bool(model.own)
    source = {key: x for key, x in read_source(HERE / (name + suffix)).items() if not is_own(layer_of(key), model)}
    save_source(source, tmp_path / f"source{suffix}")
    save({key: np.asarray(array) + 1 for key, array in common.items()}, tmp_path / f"template{to}")
    neutral.convert(tmp_path / f"source{suffix}", tmp_path / f"out{to}", into=tmp_path / f"template{to}", **told)
    found = read(tmp_path / f"out{to}")
    assert found.keys() == common.keys()
    assert [key for key in found if not np.array_equal(found[key], common[key])] == []


def layer_of(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[0]
