"""The frameworks that come with neutral: a line each, its fields told in `framework.py`. Nothing is imported for it."""

from __future__ import annotations

from neutral import signatures
from neutral.conventions.config_order import is_sequential
from neutral.framework import Format, Framework, any_chain
from neutral.signatures import instance_of

_TORCH = (".pt", ".pth", ".ckpt", ".bin")
_KERAS_FIRST = ("keras", "torch")

BUILT_IN: tuple[Framework, ...] = (
    Framework(
        name="torch",
        exporter="neutral.exporters.torch",
        importer="neutral.importers.torch",
        convention_at="neutral.conventions.torch:TORCH",
        files=(
            Format("pt", ".pt .pth .ckpt .bin (zip)", _TORCH),
            Format("pt-legacy", "before torch 1.6", _TORCH, new=False),
            Format("bin-shards", "folder or index of .bin shards", (".bin.index.json",), new=False, folder=True),
            Format("pt2", ".pt2 (weights of a torch.export program)", (".pt2",), whole=True, rebuilt=True),
        ),
        target="neutral.importers.torch_classes",
        packages=("torch",),
        extra="torch",
        signature=signatures.torch,
        live=signatures.live_torch,
        chain=any_chain,
        runners={
            **dict.fromkeys(("pt", "pt-legacy"), "neutral.running:torch_module"),
            "pt2": "neutral.running:torch_program",
        },
        rebuilds=("model.pt2", "neutral.running:torch_program"),
        also=("safetensors",),
    ),
    Framework(
        name="keras",
        exporter="neutral.exporters.keras",
        importer="neutral.importers.keras",
        convention_at="neutral.conventions.keras:KERAS",
        files=(
            Format("keras", ".keras", (".keras",), whole=True),
            Format("weights.h5", ".weights.h5 (Keras 2 and 3)", (".weights.h5",)),
            Format("h5", ".h5 (whole model, Keras 1 to 3)", (".h5", ".hdf5"), whole=True),
            Format("keras-folder", ".keras unzipped", (), new=False, whole=True, folder=True),
        ),
        target="neutral.importers.keras_config",
        rewriter="neutral.importers.keras_rewriting",
        packages=("keras",),
        extra="keras",
        signature=signatures.keras,
        live=instance_of(("keras", "Layer"), ("tf_keras", "Layer")),
        chain=is_sequential,
        runners=dict.fromkeys(("keras", "h5"), "neutral.running:keras_model"),
        rebuilds=("model.keras", "neutral.running:keras_model"),
        rebuilt_in=_KERAS_FIRST,
        separator="/",
        classes=True,
        by_place=True,
    ),
    Framework(
        name="tensorflow",
        exporter="neutral.exporters.tensorflow",
        importer="neutral.importers.tensorflow",
        convention_at="neutral.conventions.tensorflow:TENSORFLOW",
        files=(
            Format("checkpoint", "checkpoint (TF 1 and 2)", (".ckpt",), bare=True, beside=(".index",)),
            Format("savedmodel", "SavedModel folder", (".savedmodel",), whole=True, folder=True),
        ),
        target="neutral.importers.keras_config",
        packages=("tensorflow", "keras"),
        extra="tensorflow",
        signature=signatures.tensorflow,
        live=instance_of(("tensorflow", "Module"), ("tensorflow", "AutoTrackable")),
        chain=is_sequential,
        runners={"savedmodel": "neutral.running:saved_model"},
        rebuilt_in=_KERAS_FIRST,
        separator="/",
        by_place=True,
    ),
    Framework(
        name="flax",
        exporter="neutral.exporters.flax",
        importer="neutral.importers.flax",
        convention_at="neutral.conventions.flax:FLAX",
        files=(
            Format("msgpack", ".msgpack (flax.serialization)", (".msgpack",)),
            Format("orbax", "folder of Orbax", (".orbax",), folder=True, bare=True),
            Format("flax-safetensors", ".safetensors (flattened tree)", (".safetensors",), shared=True),
        ),
        target="neutral.importers.flax_classes",
        packages=("flax",),
        extra="flax",
        signature=signatures.flax,
        live=signatures.live_flax,
    ),
    Framework(
        name="numpy",
        exporter="neutral.exporters.numpy",
        importer="neutral.importers.numpy",
        convention_at="neutral.conventions.numpy:NUMPY",
        files=(Format("npz", ".npz", (".npz",)),),
        packages=("numpy",),
        signature=signatures.numpy,
        live=signatures.live_arrays,
        separator="/",
        canonical=True,
    ),
    Framework(
        name="safetensors",
        exporter="neutral.exporters.safetensors",
        importer="neutral.importers.safetensors",
        convention_at="neutral.conventions.torch:TORCH",
        files=(
            Format("safetensors", ".safetensors (names of torch)", (".safetensors",)),
            Format("shards", "shards with an index", (".safetensors.index.json",), new=False, folder=True),
        ),
        target="neutral.importers.torch_classes",
        packages=("safetensors",),
        signature=signatures.safetensors,
        chain=any_chain,
    ),
    Framework(
        name="paddle",
        exporter="neutral.exporters.paddle",
        importer="neutral.importers.paddle",
        convention_at="neutral.conventions.paddle:PADDLE",
        files=(
            Format("pdparams", ".pdparams", (".pdparams",)),
            Format("paddle-safetensors", ".safetensors (names of paddle)", (".safetensors",), shared=True),
        ),
        target="neutral.importers.paddle_classes",
        packages=("paddle",),
        extra="paddle",
        signature=signatures.paddle,
        live=instance_of(("paddle", "Layer")),
        chain=any_chain,
    ),
)
