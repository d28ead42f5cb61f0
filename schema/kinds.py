"""The layer kinds: their parameters with canonical axes, their attributes.

>>> KINDS["dense"].parameters_of["kernel"].axes
('out', 'in')
>>> KINDS["lstm"].parameters_of["input_kernel"].axes
('gate', 'unit', 'in')

A kind is one pydantic class. Its fields beside those of `Layer` are the attributes; None means that the source did not
say. `...` stands for the spatial axes. An axis of PARTS may be recorded in finer axes: `in` of a dense kernel that
follows a Flatten as `channel position`, `out` of an attention kernel as `head dim`. Labels name the blocks of an axis.
A layer of two directions has the axis `direction` in front of all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PlainSerializer, PlainValidator, Tag
from pydantic.json_schema import SkipJsonSchema

from neutral.errors import Problem, WrongUsage, raise_all
from neutral.schema.base import Strict

Evidence = Literal["class", "graph", "hint", "name", "none"]
Pairs = tuple[tuple[int, int], ...]
Padding = Pairs | Literal["same", "same_lower", "causal"]
"""Explicit (before, after) per spatial axis; `same` where they depend on the input's size (the rule of TensorFlow)."""
Ints = tuple[int, ...]
Axes = int | Ints
"""One axis or several, counted from the last one (-1) where the source says how many its input has."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

LABELS: dict[str, tuple[str, ...]] = {
    "direction": ("forward", "backward"),
    "side": ("input", "recurrent"),
}
"""Blocks of axes that mean the same in every kind. Gates are named per kind."""


HARD_SIGMOIDS: dict[str, str] = {
    "hard_sigmoid": "x/6 + 0.5, as in Keras 3",
    "hard_sigmoid_0.2": "0.2x + 0.5, as in Keras 2",
}
"""Activations that Keras 2 and Keras 3 call by one name. All others are named as Keras 3 names them."""


class Parameter(Strict):
    """One tensor of a layer: its axes with labelled blocks, shape, dtype, digest, and what its source called it.

    `native` maps the local names of the source's tensors that it was made of to their full names. `tied_to` names the parameter
    (`<layer>/<role>`) that holds its elements if the source shares them. A `state` parameter is no weight.
    """

    axes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]] = {}
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    dtype: str
    sha256: Sha256
    native: dict[str, str] = {}
    tied_to: str | None = None
    state: bool = False


@dataclass(frozen=True)
class Role:
    """What a kind expects of one of its parameters."""

    axes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    required: bool = False


class Layer(Strict):
    """What every layer has.

    `native` is the source's class name. `part` says which computation of a native layer this one is, where the
    source packs several in one (level `2` of a stacked LSTM, the `depthwise` half of a separable convolution).
    `channels` counts the channels of each axis that crosses a Flatten or Reshape. `undecided` lists axes whose order is
    that of the source because nobody said whether they cross one.
    """

    parameters_of: ClassVar[dict[str, Role]] = {}

    path: str
    native: str | None = None
    native_path: str | None = None
    part: str | None = None
    evidence: Evidence = "none"
    parameters: dict[str, Parameter] = {}
    channels: dict[str, int] = {}
    undecided: tuple[str, ...] = ()


class Reparametrized(Layer):
    """A layer whose kernel may be stored as a magnitude and a direction, or with singular vectors."""

    reparametrization: Literal["weight_norm", "spectral_norm"] | None = None
    reparametrization_axis: int | None = None


class Dense(Reparametrized):
    """y = kernel · x + bias over the last axis."""

    kind: Literal["dense"] = "dense"
    activation: str | None = None
    parameters_of = {"kernel": Role(("out", "in"), required=True), "bias": Role(("out",))}


class _Windowed(Reparametrized):
    strides: Ints | None = None
    padding: Padding | None = None
    dilation: Ints | None = None
    groups: int | None = None
    activation: str | None = None


class Conv(_Windowed):
    """Cross-correlation over one to three spatial axes. `in` counts the channels of one group."""

    kind: Literal["conv"] = "conv"
    padding_mode: str | None = None
    parameters_of = {"kernel": Role(("out", "in", "..."), required=True), "bias": Role(("out",))}


class Depthwise(_Windowed):
    """A convolution with as many groups as channels: `out` is (channel multiplier), `in` is 1."""

    kind: Literal["depthwise"] = "depthwise"
    padding_mode: str | None = None
    parameters_of = {"kernel": Role(("out", "in", "..."), required=True), "bias": Role(("out",))}


class ConvTranspose(_Windowed):
    """The gradient of a convolution. `padding` is what is cropped; `out` counts the channels of one group."""

    kind: Literal["conv_transpose"] = "conv_transpose"
    output_padding: Ints | None = None
    parameters_of = {"kernel": Role(("in", "out", "..."), required=True), "bias": Role(("channel",))}


class Embedding(Layer):
    """A table of rows, looked up by number."""

    kind: Literal["embedding"] = "embedding"
    padding_idx: int | None = None
    mask_zero: bool | None = None
    parameters_of = {"embedding": Role(("token", "feature"), required=True)}


class BatchNorm(Layer):
    """`decay` is the share of the old statistics that one training step keeps (torch's 1 - momentum)."""

    kind: Literal["batch_norm"] = "batch_norm"
    eps: float | None = None
    decay: float | None = None
    axis: Axes | None = None
    parameters_of = {
        "scale": Role(("feature",)),
        "bias": Role(("feature",)),
        "mean": Role(("feature",)),
        "variance": Role(("feature",)),
    }


class LayerNorm(Layer):
    """Normalises over the axes of its scale (the last ones)."""

    kind: Literal["layer_norm"] = "layer_norm"
    eps: float | None = None
    axis: Axes | None = None
    normalized_axes: int | None = None
    parameters_of = {"scale": Role(("...",)), "bias": Role(("...",))}


class GroupNorm(Layer):
    """The channels of a group lie side by side; `interleaved`, channel c belongs to group c modulo the groups, and `unsaid`
    means that the source may be either (MLX)."""

    kind: Literal["group_norm"] = "group_norm"
    eps: float | None = None
    axis: Axes | None = None
    groups: int | None = None
    grouping: Literal["interleaved", "unsaid"] | None = None
    parameters_of = {"scale": Role(("feature",)), "bias": Role(("feature",))}


class InstanceNorm(Layer):
    kind: Literal["instance_norm"] = "instance_norm"
    eps: float | None = None
    axis: Axes | None = None
    decay: float | None = None
    parameters_of = {
        "scale": Role(("feature",)),
        "bias": Role(("feature",)),
        "mean": Role(("feature",)),
        "variance": Role(("feature",)),
    }


class RMSNorm(Layer):
    kind: Literal["rms_norm"] = "rms_norm"
    eps: float | None = None
    axis: Axes | None = None
    parameters_of = {"scale": Role(("...",), required=True), "bias": Role(("...",))}


class PReLU(Layer):
    """`slope` has one element, one per channel, or one per element of the input (channels first)."""

    kind: Literal["prelu"] = "prelu"
    parameters_of = {"slope": Role(("feature", "..."), required=True)}


class _Recurrent(Layer):
    units: int | None = None
    activation: str | None = None
    go_backwards: bool | None = None
    merge_mode: str | None = None


def _recurrent(gates: tuple[str, ...]) -> dict[str, Role]:
    gate = ("gate",) if gates else ()
    labels = {"gate": gates} if gates else {}
    return {
        "input_kernel": Role((*gate, "unit", "in"), labels, required=True),
        "recurrent_kernel": Role((*gate, "unit", "hidden"), labels, required=True),
        "bias": Role(("side", *gate, "unit"), {**labels, "side": LABELS["side"]}),
    }


class SimpleRNN(_Recurrent):
    """h' = activation(input_kernel · x + recurrent_kernel · h + both biases)."""

    kind: Literal["simple_rnn"] = "simple_rnn"
    bias_convention: Literal["one", "two", "none"] | None = None
    parameters_of = _recurrent(())


class LSTM(_Recurrent):
    """Gates: input, forget, cell, output. A projected LSTM has `projection` (hidden size, unit)."""

    kind: Literal["lstm"] = "lstm"
    recurrent_activation: str | None = None
    bias_convention: Literal["one", "two", "none"] | None = None
    parameters_of = {**_recurrent(("input", "forget", "cell", "output")), "projection": Role(("hidden", "unit"))}


class GRU(_Recurrent):
    """Gates: reset, update, new. `reset_after`: the reset gate acts on the product with recurrent_kernel."""

    kind: Literal["gru"] = "gru"
    recurrent_activation: str | None = None
    reset_after: bool | None = None
    bias_convention: Literal["one", "two", "none"] | None = None
    parameters_of = _recurrent(("reset", "update", "new"))


class Attention(Layer):
    """Multi-head attention. The projected axes hold (head dim); those of key and value may have fewer heads."""

    kind: Literal["attention"] = "attention"
    heads: int | None = None
    kv_heads: int | None = None
    attention_axes: Axes | None = None
    parameters_of = {
        "query_kernel": Role(("query", "in"), required=True),
        "query_bias": Role(("query",)),
        "key_kernel": Role(("key", "in_key"), required=True),
        "key_bias": Role(("key",)),
        "value_kernel": Role(("value", "in_value"), required=True),
        "value_bias": Role(("value",)),
        "output_kernel": Role(("out", "attended"), required=True),
        "output_bias": Role(("out",)),
        "extra_key": Role(("key",)),
        "extra_value": Role(("value",)),
    }


class EinsumDense(Layer):
    """y = einsum(equation, x, kernel) + bias; the kernel's axes are the equation's letters, made ones first."""

    kind: Literal["einsum_dense"] = "einsum_dense"
    equation: str | None = None
    activation: str | None = None
    parameters_of = {"kernel": Role(("...",), required=True), "bias": Role(("...",))}


class Bilinear(Layer):
    kind: Literal["bilinear"] = "bilinear"
    parameters_of = {"kernel": Role(("out", "in1", "in2"), required=True), "bias": Role(("out",))}


class Unknown(Layer):
    """Tensors whose layer is not known: kept in the source's own names and axes. `candidates` could be it."""

    kind: Literal["unknown"] = "unknown"
    axis: Axes | None = None
    candidates: tuple[str, ...] = ()


AnyLayer = Annotated[
    Dense
    | Conv
    | Depthwise
    | ConvTranspose
    | Embedding
    | BatchNorm
    | LayerNorm
    | GroupNorm
    | InstanceNorm
    | RMSNorm
    | PReLU
    | SimpleRNN
    | LSTM
    | GRU
    | Attention
    | EinsumDense
    | Bilinear
    | Unknown,
    Field(discriminator="kind"),
]


class Kinds(Mapping[str, type[Layer]]):
    """Layer classes by kind: neutral's own, then those that the conventions of plug-ins bring along (see plugins.py)."""

    def __init__(self, own: tuple[type[Layer], ...]) -> None:
        self.own = {_kind(cls): cls for cls in own}

    @cached_property
    def added(self) -> Mapping[str, type[Layer]]:
        """The kinds of plug-ins. Looked for once, when a kind is asked for that is not neutral's own."""
        found: dict[str, type[Layer]] = {}
        problems = []
        for entry in entry_points(group="neutral.conventions"):
            for cls in getattr(entry.load(), "kinds", ()):
                kind = _kind(cls)
                if kind in self.own or kind in found:
                    problems.append(
                        Problem(f"plug-in {entry.name}", f"the kind {kind!r}, which is there", "a name of its own")
                    )
                found[kind] = cls
        raise_all(WrongUsage, problems)
        return found

    def __getitem__(self, kind: str) -> type[Layer]:
        return self.own[kind] if kind in self.own else self.added[kind]

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from self.added

    def __len__(self) -> int:
        return len(self.own) + len(self.added)


def _kind(cls: type[Layer]) -> str:
    return str(cls.model_fields["kind"].default)


KINDS = Kinds((
    Dense, Conv, Depthwise, ConvTranspose, Embedding, BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm,
    PReLU, SimpleRNN, LSTM, GRU, Attention, EinsumDense, Bilinear, Unknown,
))  # fmt: skip


def _whose(layer: Any) -> str:
    kind = layer.get("kind") if isinstance(layer, dict) else getattr(layer, "kind", None)
    return "added" if isinstance(kind, str) and kind not in KINDS.own and kind in KINDS else "own"


def _as_its_kind(layer: Any) -> Layer:
    """A layer by the class of its kind. Lists stand for tuples here: this is JSON that pydantic has parsed."""
    return layer if isinstance(layer, Layer) else KINDS[layer["kind"]].model_validate_json(json.dumps(layer))


def _by_its_class(layer: Layer) -> dict[str, Any]:
    return layer.model_dump(mode="json")


if TYPE_CHECKING:
    # To a type checker a plug-in's layer is one of neutral's kinds: what is done with all of them may be done with it.
    StoredLayer = AnyLayer
else:
    _AddedLayer = Annotated[Layer, PlainValidator(_as_its_kind), PlainSerializer(_by_its_class), Tag("added")]
    StoredLayer = Annotated[Annotated[AnyLayer, Tag("own")] | SkipJsonSchema[_AddedLayer], Discriminator(_whose)]
