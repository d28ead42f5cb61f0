"""Splits: which layers of a chain of torch modules cross a Flatten or an Unflatten.

>>> linear = Module("1", "Linear", {"in_features": 12, "out_features": 2}, ())
>>> chain_splits([Module("0", "Flatten", {}, ()), linear], Seen("image", 3, 4), whole=True)
{'1': {'in': 3}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neutral.exporters.torch_activations import ACTIVATIONS
from neutral.exporters.torch_description import ODD, Config, Module, chain_of, ints

Splits = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Seen:
    """What is known of the value between two modules.

    `order`: `plain` (no axis of it is a joined image), `image` (channels, then space), `flat` (a joined image), or
    `unknown`. `channels` counts the features of a plain value, or the channels of an image, joined or not.
    """

    order: str
    channels: int | None = None
    rank: int | None = None


UNKNOWN = Seen("unknown")


def inner_splits(modules: Sequence[Module]) -> Splits:
    """Splits inside the Sequentials of modules whose own wiring is not known."""
    found: Splits = {}
    for module in modules:
        if module.cls == "Sequential":
            chain = list(chain_of(module))
            found |= inner_splits(chain)
            found |= chain_splits(chain, Seen("unknown"), whole=False)
        else:
            found |= inner_splits(module.children)
    return found


def chain_splits(chain: Sequence[Module], seen: Seen, whole: bool) -> Splits:
    """The splits of a chain. `whole`: nothing comes after it that could divide an axis."""
    found: Splits = {}
    pending: list[Module] = []
    for i, module in enumerate(chain):
        try:
            seen, pending = _stepped(module, chain[i + 1 :], seen, pending, found)
        except ODD:
            _forget(found, [*pending, module])
            seen, pending = UNKNOWN, []
    if not whole and seen.order != "image":
        # What follows outside may divide the axis that these layers made.
        _forget(found, pending)
    return found


def _stepped(
    module: Module, rest: Sequence[Module], seen: Seen, pending: list[Module], found: Splits
) -> tuple[Seen, list[Module]]:
    """What is known after a module, and the layers since the last Linear, whose axis may yet be divided."""
    cls, config = module.cls, module.config
    if cls == "Linear":
        _name(found, module, _crossing(seen, int(config["in_features"]), "in"))
        return _after_linear(seen, config), [module]
    if cls in _VECTOR_NORMS or cls == "PReLU":
        features = _features(module)
        _name(found, module, {} if features == 1 else _crossing(seen, features, "feature"))
        return seen, [*pending, module]
    if cls in ACTIVATIONS:
        return seen, pending
    after = _unflattened(seen, config, rest) if cls == "Unflatten" else _moved(seen, module, rest)
    if cls in _CHANNEL_NORMS:
        found[module.path] = {}
    if cls == "Unflatten":
        _divide(found, pending, seen, after)
    elif after == UNKNOWN:
        _forget(found, pending)
    return after, []


def _name(found: Splits, module: Module, crossing: dict[str, int] | None) -> None:
    if crossing is not None:
        found[module.path] = crossing


def _forget(found: Splits, layers: Sequence[Module]) -> None:
    for module in layers:
        found.pop(module.path, None)


def _divide(found: Splits, pending: Sequence[Module], before: Seen, after: Seen) -> None:
    """Record that the axis which the pending layers made is divided into channels and space."""
    if after == UNKNOWN:
        _forget(found, pending)
        return
    for module in pending:
        if module.path in found and _features(module) == before.channels and _divides(before, after):
            axis = "out" if module.cls == "Linear" else "feature"
            found[module.path] = {**found[module.path], axis: after.channels or 1}


def _divides(before: Seen, after: Seen) -> bool:
    return before.channels is not None and after.channels is not None and 1 < after.channels < before.channels


def _crossing(seen: Seen, features: int, axis: str) -> dict[str, int] | None:
    if seen.order == "unknown" or (seen.order == "flat" and seen.channels is None):
        return None
    if seen.order == "flat" and 1 < (seen.channels or 1) < features:
        return {axis: seen.channels or 1}
    return {}


def _features(module: Module) -> int:
    names = {"Linear": "out_features", "PReLU": "num_parameters", "BatchNorm1d": "num_features"}
    return math.prod(ints(module.config[names.get(module.cls, "normalized_shape")]))


def _after_linear(seen: Seen, config: Config) -> Seen:
    return seen if seen.order == "image" else Seen("plain", int(config["out_features"]), seen.rank)


def _unflattened(seen: Seen, config: Config, rest: Sequence[Module]) -> Seen:
    sizes = ints(config.get("unflattened_size", ()))
    # A chain of Linears takes any number of axes, and `rank` is the fewest: the last axis of more is no feature map.
    vector = (seen.rank == 2 and config.get("dim") == 1) or _next_rank(rest) == len(sizes) + 1
    if seen.order != "plain" or not vector or config.get("dim") not in (1, -1):
        return UNKNOWN
    if len(sizes) < 2 or seen.channels != math.prod(sizes):
        return UNKNOWN
    return Seen("image", sizes[0], len(sizes) + 1)


def _next_rank(rest: Sequence[Module]) -> int | None:
    """How many axes the next module takes that takes no other number."""
    following = next((m for m in rest if m.cls not in ACTIVATIONS), None)
    return _MAKES_CHANNELS[following.cls][1] if following and following.cls in _MAKES_CHANNELS else None


def _moved(seen: Seen, module: Module, rest: Sequence[Module]) -> Seen:
    """What is known after a module that is neither a Linear nor treats every feature alike."""
    cls, config = module.cls, module.config
    if cls in _MAKES_CHANNELS:
        name, rank = _MAKES_CHANNELS[cls]
        return Seen("image", int(config[name]), rank)
    if cls == "Embedding":
        return Seen("plain", int(config["embedding_dim"]), 3)
    if cls == "Flatten":
        return _flattened(seen, config, rest)
    if cls == "PixelShuffle" and seen.order == "image" and seen.channels is not None:
        return Seen("image", seen.channels // int(config["upscale_factor"]) ** 2, 4)
    if cls in _KEEPS_CHANNELS:
        return seen if seen.order == "image" else UNKNOWN
    return seen if cls == "GroupNorm" else UNKNOWN


def _flattened(seen: Seen, config: Config, rest: Sequence[Module]) -> Seen:
    start, end = int(config.get("start_dim", 1)), int(config.get("end_dim", -1))
    if seen.rank is None:
        # The input of a whole model, taken as the vector that this Flatten makes of it.
        return seen if seen.order == "plain" and seen.channels is None and (start, end) == (1, -1) else UNKNOWN
    last = seen.rank - 1
    if start == 1 and end % seen.rank == last:
        # Axes that all frameworks have in one order (batch, time, feature) keep it when they are joined.
        moves = seen.order == "image" and _ends_in_linear(rest)
        if seen.order == "plain" and seen.rank == 2:
            return seen
        return Seen("flat", seen.channels if moves else 1, 2)
    if seen.order == "image" and start >= 2:
        return Seen("image", seen.channels, seen.rank - (end % seen.rank) + start)
    return UNKNOWN


def _ends_in_linear(rest: Sequence[Module]) -> bool:
    """True if all modules up to the next Linear treat every feature alike, so that the order can move into weights."""
    for module in rest:
        if module.cls == "Linear":
            return True
        if module.cls not in ACTIVATIONS and module.cls not in _VECTOR_NORMS and module.cls != "PReLU":
            return False
    return False


_VECTOR_NORMS = ("BatchNorm1d", "LayerNorm", "RMSNorm")
_CHANNEL_NORMS = ("BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
_MAKES_CHANNELS = {
    **{f"Conv{n}d": ("out_channels", n + 2) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": ("out_channels", n + 2) for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": ("num_features", n + 2) for n in (2, 3)},
    **{f"InstanceNorm{n}d": ("num_features", n + 2) for n in (1, 2, 3)},
}
_KEEPS_CHANNELS = (
    *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")),
    *(f"{kind}Pad{n}d" for n in (1, 2, 3) for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")),
    "Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d", "LocalResponseNorm",
)  # fmt: skip
