"""Native layers to canonical ones and back, by applying a convention.

>>> import numpy as np
>>> from neutral.conventions.keras import KERAS
>>> from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
>>> kernel = NativeTensor("fc/kernel", from_array(np.zeros((3, 5))))
>>> model = NativeModel("keras", "h5", (NativeLayer("fc", "Dense", {"kernel": kernel}, evidence="class"),))
>>> [(l.path, l.kind, l.tensors["kernel"].data.shape) for l in canonical_layers(model, KERAS)]
[('fc', 'dense', (5, 3))]

A `Binding` says which form of a convention a native layer has, and which of its tensors is which row: it is found once
and serves both directions. Tensors are views: nothing is read here but small ones that a rule must look at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from neutral import rules
from neutral.canonical import CROSSING, SPATIAL, CanonicalLayer, CanonicalTensor
from neutral.conventions.forms import (
    INPUT_RANK,
    Convention,
    Form,
    Name,
    Part,
    Row,
    brace_axes,
    expand,
    from_last,
    role_expression,
)
from neutral.conventions.hints import kind_hint, settings_known, ways
from neutral.crossing import WITH_SPACE, Crossing, Seen, Told, flattened
from neutral.errors import BadFile, BadLayout, Problem, Refused, an, named, raise_all
from neutral.layout import Layout, layout
from neutral.native import NativeLayer, NativeModel, NativeTensor, Tensor, from_array, stack
from neutral.schema.kinds import KINDS, LABELS, Evidence


@dataclass(frozen=True)
class BoundPart:
    """One part of a form, bound to the tensors of a native layer: the rows present, and the size of each axis."""

    part: Part
    level: int
    rows: tuple[Row, ...]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Binding:
    """A form that fits a native layer."""

    form: Form
    parts: tuple[BoundPart, ...]

    def path(self, path: str, bound: BoundPart) -> str:
        """The canonical path of one part of the native layer at `path`."""
        if self.form.levels and len(self.parts) > 1:
            return f"{path}.{bound.level}"
        return f"{path}.{bound.part.suffix}" if bound.part.suffix else path

    def part_name(self, bound: BoundPart) -> str | None:
        """What tells this part from its sisters: the level of a stack, or the part's suffix."""
        return str(bound.level) if self.form.levels else (bound.part.suffix or None)


def row_layout(
    row: Row, kind: str, channels: Mapping[str, int] | None = None, flatten: str = "channel position"
) -> Layout:
    """The layout of a row, its braces as leading axes; axes that cross a Flatten as (channel position)."""
    known = row.role in KINDS[kind].parameters_of or "{" in row.role
    canonical = row.canonical or (role_expression(kind, row.role) if known else "")
    native = row.native
    for name, _ in reversed(brace_axes(row.name)):
        labelled = next((word for word in canonical.split() if word.startswith(f"{name}:")), name)
        native = f"{labelled} {native}"
        if name == "direction":
            canonical = f"direction {canonical}"
    for axis in channels or {}:
        channel, position = CROSSING[axis]
        joined = flatten.replace("channel", channel).replace("position", position)
        canonical = " ".join(f"({channel} {position})" if word == axis else word for word in canonical.split())
        native = " ".join(f"({joined})" if word == axis else word for word in native.split())
    return layout(canonical, native)


def row_channels(row: Row, kind: str, channels: Mapping[str, int]) -> dict[str, int]:
    """Those of a layer's Flatten axes that this row has."""
    known = row.role in KINDS[kind].parameters_of
    words = (row.canonical or (role_expression(kind, row.role) if known else "")).split()
    return {axis: n for axis, n in channels.items() if axis in words}


def bind(form: Form, shapes: Mapping[str, tuple[int, ...]]) -> Binding | str:
    """The form bound to tensors of these local names and shapes, or why it does not fit."""
    used: set[str] = set()
    parts: list[BoundPart] = []
    level = 0
    while True:
        for part in form.parts:
            bound = _bind_part(part, level, shapes, used)
            if isinstance(bound, str):
                return bound
            parts.append(bound)
        level += 1
        if not form.levels or not any(
            name.text in shapes for part in form.parts for row in part.rows for name in expand(row.name, level)
        ):
            break
    rest = sorted(shapes.keys() - used)
    return f"no place for {', '.join(rest[:5])}" if rest else Binding(form, tuple(parts))


def _bind_part(part: Part, level: int, shapes: Mapping[str, tuple[int, ...]], used: set[str]) -> BoundPart | str:
    sizes: dict[str, int] = dict(part.sizes)
    rows = []
    for row in part.rows:
        names = [name.text for name in expand(row.name, level)]
        present = [name for name in names if name in shapes]
        if len(present) < len(names):
            if row.required or present:
                return f"{next(name for name in names if name not in shapes)} is missing"
            continue
        used.update(names)
        rows.append(row)
        if row.raw:
            continue
        first = shapes[names[0]]
        if any(shapes[name] != first for name in names):
            return f"{' and '.join(names)} differ in shape"
        braces = brace_axes(row.name)
        known = {**sizes, **dict(brace_axes(row.role))}
        try:
            bound = row_layout(row, part.kind).bind((*(n for _, n in braces), *first), known)
        except BadLayout as error:
            return f"{names[0]}: {error.problems[0].found} does not fit {error.problems[0].where}"
        sizes.update(bound)
    if not rows:
        return "no tensor of it is there"
    return BoundPart(part, level, tuple(rows), sizes) if part.check(sizes) else "its sizes contradict each other"


def _bindings(layer: NativeLayer, convention: Convention, hint: str | None) -> tuple[list[Binding], list[str]]:
    shapes = {local: tensor.data.shape for local, tensor in layer.tensors.items() if not tensor.state}
    named = [f for f in convention.forms if layer.cls in f.classes and f.applies(layer.config)]
    forms: Iterable[Form]
    if layer.cls is not None and hint is None:
        forms = (*convention.build(layer.cls, layer.config), *named)
    else:
        built = _built(convention, None, layer.config) if hint is not None else ()
        forms = [*built, *(f for f in convention.forms if f.guessable or hint is not None)]
    found, reasons = [], []
    for form in forms:
        if hint is not None and not any(compatible(part.kind, hint) for part in form.parts):
            continue
        binding = bind(form, shapes)
        if isinstance(binding, str):
            reasons.append(binding)
        else:
            found.append(binding)
    return found, reasons


def _built(convention: Convention, cls: str | None, config: Mapping[str, Any]) -> tuple[Form, ...]:
    """The forms that a class's settings make; where only the settings are known, those of all classes."""
    if cls is not None:
        return convention.build(cls, config)
    classes = dict.fromkeys(name for form in convention.forms for name in form.classes if config)
    return tuple(form for name in classes for form in convention.build(name, config))


_ALIKE = ({"conv", "depthwise"}, {"group_norm", "instance_norm"}, {"dense", "einsum_dense"})


def compatible(a: str, b: str) -> bool:
    """True if two kinds may be one layer seen with and without its settings."""
    return a == b or any(a in pair and b in pair for pair in _ALIKE)


@dataclass(frozen=True)
class Known:
    """A native layer and what is known of it before its tensors are touched."""

    layer: NativeLayer
    binding: Binding | None
    evidence: Evidence
    candidates: tuple[str, ...] = ()


def recognise(layer: NativeLayer, convention: Convention, hint: str | None = None) -> Known:
    """Which form of the convention a native layer has: by its class, by a hint, or by being the only one that fits.

    Where several kinds fit, none is chosen: they become candidates. A hint that the class contradicts is `Refused`. A hint
    may tell settings of the class, too (`conv_transpose(transpose_kernel=false)`).
    """
    settings: Mapping[str, Any] = {}
    if hint is not None:
        hint, settings = kind_hint(hint)
        layer = _with_settings(layer, settings, convention)
    if hint is not None and layer.cls is not None:
        known = recognise(layer, convention)
        if known.binding is not None:
            _check_hint(known, hint)
            return known
    found, reasons = _bindings(layer, convention, hint)
    if hint is not None and not found:
        raise Refused(
            Problem(layer.path, f"tensors {_shapes(layer)}", f"those of {an(hint)} as {convention.framework} stores it ({'; '.join(dict.fromkeys(reasons)) or 'it has none'})", _other_kind(layer, convention))
        )  # fmt: skip
    kinds = list(dict.fromkeys(_kind_of(binding) for binding in found))
    if hint is None and len(kinds) > 1 and layer.cls is None:
        auto = convention.auto_names.get(re.sub(r"_\d+$", "", re.split(r"[./]", layer.path)[-1]))
        named = [b for b in found if auto in b.form.classes]
        if named:
            applying = [b for b in named if b.form.applies(layer.config)]
            found = applying or [b for b in found if any(compatible(_kind_of(b), _kind_of(a)) for a in named)]
            kinds = list(dict.fromkeys(_kind_of(binding) for binding in found))
            if applying:
                return Known(layer, applying[0], "name")
    if hint is not None:
        of_kind = [binding for binding in found if _kind_of(binding) == hint] or found
        exact = _settled([*of_kind, *(found if settings else ())], layer.config, alone=len(found) == 1 and not settings)
        if exact is None:
            raise Refused(_unsettled_problem(layer, hint, settings, of_kind, found))
        return Known(layer, exact, "hint")
    if found and layer.cls is not None:
        return Known(layer, found[0], layer.evidence)  # type: ignore[arg-type]
    exact = _settled(found, layer.config, alone=len(found) == 1) if len(kinds) == 1 else None
    if exact is not None:
        return Known(layer, exact, "name")
    return Known(layer, None, "none", tuple(kinds))


def _settled(found: Sequence[Binding], config: Mapping[str, Any], alone: bool) -> Binding | None:
    """The first form that what is known of the settings allows for; one that they leave open only if it is `alone`."""
    applying = [binding for binding in found if binding.form.applies(config)]
    if applying:
        return applying[0]
    return found[0] if alone and not found[0].form.vague else None


def _unsettled_problem(
    layer: NativeLayer, hint: str, settings: Mapping[str, Any], of_kind: Sequence[Binding], found: Sequence[Binding]
) -> Problem:
    """What to say where a kind is stored in several ways and nothing tells in which, or a hint tells an impossible one."""
    if settings:
        told = ", ".join(f"{name}={value}" for name, value in settings.items())
        return Problem(layer.path, f"tensors {_shapes(layer)}", f"those of {an(hint)} with {told}", "correct the hint")
    hints = ways(_kind_of(of_kind[0]), (binding.form.says for binding in of_kind))
    others = [_kind_of(binding) for binding in found if binding.form.applies(layer.config)][:1]
    do = " or ".join(f"--kind '{layer.path}={way}'" for way in hints) or "".join(
        f"--kind {kind} if they are stored so" for kind in others
    )
    return Problem(
        layer.path,
        f"tensors {_shapes(layer)} of {hint}, without the setting that says what their axes are",
        "to know it",
        "import into a template that says it" + (f", or give {do}" if do else ""),
    )


def _with_settings(layer: NativeLayer, settings: Mapping[str, Any], convention: Convention) -> NativeLayer:
    """The layer with what a hint tells of its class; `Refused` if that decides nothing, or the class says otherwise."""
    known = settings_known(convention) if settings else frozenset()
    problems = []
    for name, value in settings.items():
        if name not in known:
            choice = f"one of {', '.join(sorted(known))}" if known else "none, for kinds alone tell the form"
            problems.append(Problem(named(layer.path), f"the setting {name} in a hint", choice, "correct the hint"))
        elif layer.config.get(name, value) != value:
            found = f"the hint that {name} is {value}"
            problems.append(
                Problem(named(layer.path), found, f"{layer.config[name]}, as its class says", "leave it out")
            )
    raise_all(Refused, problems)
    return replace(layer, config={**layer.config, **settings}) if settings else layer


def _check_hint(known: Known, hint: str) -> None:
    assert known.binding is not None
    if not any(compatible(bound.part.kind, hint) for bound in known.binding.parts):
        raise Refused(
            Problem(
                named(known.layer.path),
                f"the hint that it is {an(hint)}",
                f"{an(_kind_of(known.binding))}, which its class {known.layer.cls} says",
                "leave the hint out",
            )
        )


def hintable(shapes: Mapping[str, tuple[int, ...]], convention: Convention) -> tuple[str, ...]:
    """The kinds that a hint can make of a layer with tensors of these local names and shapes."""
    bindings = (bind(form, shapes) for form in convention.forms)
    return tuple(dict.fromkeys(_kind_of(binding) for binding in bindings if not isinstance(binding, str)))


def foreign_names(convention: Convention) -> str:
    """What helps with a layer whose tensors are named as those of no kind: no hint does."""
    framework = convention.framework
    return (
        f"no kind has tensors of these names: rename them as layers of {framework} have them, "
        f"or fill a template of {framework} with the same names"
    )


def kind_advice(layer: CanonicalLayer, convention: Convention) -> str:
    """What helps with a layer of unknown kind."""
    if hintable({role: tensor.data.shape for role, tensor in layer.weights.items()}, convention):
        return f"export again with --kind '{layer.path}=KIND'"
    told = (convention.advice[role] for role in layer.weights if role in convention.advice)
    return next(told, foreign_names(convention))


def _other_kind(layer: NativeLayer, convention: Convention) -> str:
    shapes = {local: tensor.data.shape for local, tensor in layer.tensors.items() if not tensor.state}
    kinds = hintable(shapes, convention)
    return f"give another --kind: {', '.join(kinds)}" if kinds else foreign_names(convention)


def _kind_of(binding: Binding) -> str:
    if len(binding.parts) > 1 and not binding.form.levels:
        return "separable"
    part = binding.parts[0]
    kind = part.part.kind
    return "conv" if kind == "depthwise" and part.sizes.get("group") == 1 else kind


def _shapes(layer: NativeLayer) -> str:
    return ", ".join(f"{name} {tensor.data.shape}" for name, tensor in layer.tensors.items())


def canonical_layers(
    model: NativeModel,
    convention: Convention,
    *,
    kinds: Mapping[str, str] | None = None,
    flatten: Mapping[str, Mapping[str, int]] | None = None,
) -> list[CanonicalLayer]:
    """Every layer of a native model in canonical form, its tensors unread. See `read_layers`."""
    return [layer for _, layers in read_layers(model, convention, kinds=kinds, flatten=flatten) for layer in layers]


def read_layers(
    model: NativeModel,
    convention: Convention,
    *,
    kinds: Mapping[str, str] | None = None,
    flatten: Mapping[str, Mapping[str, int]] | None = None,
    certain: bool = True,
) -> list[tuple[Known, list[CanonicalLayer]]]:
    """Every native layer with what is known of it and the canonical layers in it.

    `kinds` maps globs on layer paths to kinds. `flatten` names every layer that crosses a Flatten or Reshape, with the
    channels of its axes ({"fc1": {"in": 16}}); empty, it says that none does. A layer that it leaves out crosses none if it
    takes what the layer before it makes; else it stays undecided. `Refused` where a class or, if it is `certain`, what the
    model itself says of its Flattens contradicts a hint.
    """
    hints = kinds or {}
    known: list[Known] = []
    problems: list[Problem] = []
    for layer in model.layers:
        try:
            known.append(recognise(layer, convention, _hint(layer.path, hints)))
        except Refused as error:
            problems.extend(error.problems)
    raise_all(Refused, problems)
    unmatched = [pattern for pattern in hints if not any(fnmatchcase(k.layer.path, pattern) for k in known)]
    unmatched += [path for path in flatten or {} if not any(k.layer.path == path for k in known)]
    raise_all(
        Refused,
        (
            Problem(
                name,
                "no such layer",
                f"one of {', '.join(named(k.layer.path) for k in known[:20])}",
                "correct the option",
            )
            for name in unmatched
        ),
    )
    crossing = Crossing.of([_seen(item) for item in known], convention.flatten, model.unsettled | model.orderless)
    told = Told(model.splits, flatten, certain, model.graph is not None, model.unsettled)
    layers: list[tuple[Known, list[CanonicalLayer]]] = []
    for item in known:
        try:
            layers.append((item, _canonical(item, convention, told, crossing)))
        except (BadLayout, Refused) as error:
            problems.extend(replace(p, where=f"{named(item.layer.path)}: {p.where}") for p in error.problems)
    raise_all(Refused, problems)
    return layers


def _seen(item: Known) -> Seen:
    shapes = tuple(tensor.data.shape for tensor in item.layer.tensors.values() if not tensor.state)
    parts = item.binding.parts if item.binding is not None else ()
    return Seen(item.layer.path, shapes, tuple((bound.part.kind, bound.sizes) for bound in parts))


def _hint(path: str, hints: Mapping[str, str]) -> str | None:
    return next((kind for pattern, kind in hints.items() if fnmatchcase(path, pattern)), None)


def _told_attributes(bound: BoundPart, layer: NativeLayer) -> dict[str, Any]:
    """The attributes that a layer's config tells; one that comes out of a file may be of any type."""
    try:
        found = bound.part.attributes(layer.config, bound.sizes)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"settings of {an(layer.cls or bound.part.kind)} that make no sense ({type(error).__name__})"
        raise BadFile(Problem(layer.path, what, "settings as its framework writes them")) from None
    return {name: value for name, value in found.items() if value is not None}


def _canonical(
    known: Known,
    convention: Convention,
    told: Told,
    crossing: Crossing,
) -> list[CanonicalLayer]:
    layer = known.layer
    state = {local: _raw(local, tensor) for local, tensor in layer.tensors.items() if tensor.state}
    if known.binding is None:
        tensors = {local: _raw(local, tensor) for local, tensor in layer.tensors.items()}
        given = told.of(layer.path, layer.path)
        sizes = {n for t in layer.tensors.values() for n in t.data.shape if len(t.data.shape) <= 2}
        doubts = () if given is not None else crossing.doubts(layer.path, known.candidates, sizes, told)
        return [
            CanonicalLayer(
                path=layer.path,
                kind="unknown",
                tensors=tensors,
                native=layer.cls,
                attributes=_unknown_axis(layer),
                native_path=layer.path,
                candidates=known.candidates,
                channels=dict(given or {}),
                undecided=doubts,
            )
        ]
    layers = []
    for bound in known.binding.parts:
        kind = bound.part.kind
        path = known.binding.path(layer.path, bound)
        channels, undecided = flattened(path, layer.path, kind, bound.sizes, told, crossing)
        tensors = _part_tensors(bound, layer, convention, channels)
        attributes = _told_attributes(bound, layer)
        kind, attributes = _normal_kind(kind, attributes, tensors)
        attributes = {k: v for k, v in attributes.items() if k in KINDS[kind].model_fields}
        part = known.binding.part_name(bound)
        layers.append(
            CanonicalLayer(
                path,
                kind,
                {**tensors, **state},
                attributes,
                known.evidence,
                layer.cls,
                layer.path,
                part,
                (),
                channels,
                undecided,
            )
        )
        state = {}
    return layers


def _unknown_axis(layer: NativeLayer) -> dict[str, Any]:
    """The axis that a class without a kind counts, where it is certain which one that is."""
    axis = from_last(layer.config.get("axis"), layer.config[INPUT_RANK]) if INPUT_RANK in layer.config else None
    return {} if axis is None else {"axis": axis}


def _part_tensors(
    bound: BoundPart, layer: NativeLayer, convention: Convention, channels: Mapping[str, int]
) -> dict[str, CanonicalTensor]:
    tensors: dict[str, CanonicalTensor] = {}
    for row in bound.rows:
        names = expand(row.name, bound.level)
        natives = [layer.tensors[name.text] for name in names]
        origin = {name.text: tensor.name for name, tensor in zip(names, natives, strict=True)}
        identity = natives[0].identity if len(natives) == 1 and not brace_axes(row.role) else None
        if row.raw:
            tensors[row.role] = _raw(names[0].text, natives[0])
            continue
        if any(t.data.dtype != natives[0].data.dtype for t in natives):
            raise Refused(
                Problem(
                    names[0].text,
                    "tensors of one parameter in several dtypes",
                    "one dtype",
                    "convert them to one dtype first",
                )
            )
        data = _gather([t.data for t in natives], names, row)
        crossed = row_channels(row, bound.part.kind, channels)
        way = row_layout(row, bound.part.kind, crossed, convention.flatten)
        sizes = _sizes(bound.sizes, row, crossed)
        if identity is not None and _moves(way, data, sizes):
            # One tensor of the file in two layouts is two parameters: a kernel, and its transpose in another layer.
            identity = (identity, way)
        data = way.to_canonical(data, sizes)
        if row.rule in rules.BIAS_RULES:
            data = rules.two_sides(row.rule, data, _side_axis(row))
        for role in expand(row.role):
            view = data.take(0, (role.place[0],)).split(0, ()) if role.place else data
            axes, labels = canonical_axes(bound.part.kind, role.text, len(view.shape), bool(_directed(row)))
            tensors[role.text] = CanonicalTensor(view, axes, labels, origin, identity)
    return tensors


def _moves(way: Layout, data: Tensor, sizes: Mapping[str, int]) -> bool:
    """True if a layout stores the elements in another order than the canonical one."""
    same = from_array(np.broadcast_to(np.zeros((), data.dtype), data.shape))
    return not way.to_canonical(same, sizes).streams


def _gather(parts: Sequence[Tensor], names: Sequence[Name], row: Row) -> Tensor:
    braces = brace_axes(row.name)
    return stack(parts, 0).split(0, [n for _, n in braces]) if braces else parts[0]


def _sizes(sizes: Mapping[str, int], row: Row, crossed: Mapping[str, int]) -> dict[str, int]:
    """The axis sizes of a row's layout; an axis that crosses a Flatten is known by its channels alone."""
    known = {axis: n for axis, n in sizes.items() if axis not in crossed}
    return {**known, **dict(brace_axes(row.role)), **{CROSSING[axis][0]: n for axis, n in crossed.items()}}


def _directed(row: Row) -> bool:
    return any(name == "direction" for name, _ in brace_axes(row.name)) or row.canonical.startswith("direction ")


def _side_axis(row: Row) -> int:
    return 1 if _directed(row) else 0


def _raw(local: str, tensor: NativeTensor) -> CanonicalTensor:
    axes = tuple(f"d{i}" for i in range(len(tensor.data.shape)))
    return CanonicalTensor(tensor.data, axes, {}, {local: tensor.name}, tensor.identity, tensor.state)


_KERNELS = ("kernel_direction", "kernel_raw")
"""Roles of a reparametrized kernel that have its axes."""


def canonical_axes(
    kind: str, role: str, rank: int, directed: bool
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The axis names and labels of a parameter of this rank."""
    spec = KINDS[kind].parameters_of.get("kernel" if role in _KERNELS else role)
    if spec is None:
        return tuple(f"d{i}" for i in range(rank)), {}
    front = ("direction",) if directed else ()
    spatial = rank - len(front) - sum(1 for axis in spec.axes if axis != "...")
    space = (
        SPATIAL.get(spatial, tuple(f"x{i}" for i in range(spatial)))
        if kind in (*WITH_SPACE, "prelu")
        else tuple(f"x{i}" for i in range(spatial))
    )
    if spec.axes == ("...",) and rank == 1:
        space = ("feature",)
    axes = [*front]
    for axis in spec.axes:
        axes.extend(space if axis == "..." else (axis,))
    labels = {**spec.labels, **({"direction": LABELS["direction"]} if directed else {})}
    return tuple(axes), {axis: labels[axis] for axis in axes if axis in labels}


def _normal_kind(
    kind: str, attributes: dict[str, Any], tensors: Mapping[str, CanonicalTensor]
) -> tuple[str, dict[str, Any]]:
    """One kind for one computation: a convolution of one channel per group is depthwise, whoever says otherwise."""
    if kind in ("conv", "depthwise"):
        kernel = next((t for role, t in tensors.items() if role in ("kernel", "kernel_direction", "kernel_raw")), None)
        groups = attributes.get("groups")
        if kernel is not None and groups is not None:
            kind = "depthwise" if kernel.data.shape[1] == 1 and groups > 1 else "conv"
    if kind == "group_norm" and "groups" in attributes:
        size = next(iter(tensors.values())).data.shape[0] if tensors else None
        if attributes["groups"] in (-1, size):
            kind = "instance_norm"
    return kind, attributes


@dataclass
class Written:
    """What became of canonical layers on their way into one native layer."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: list[tuple[str, str, str]] = field(default_factory=list)
    applied: list[tuple[str, str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def apply(self, rule: str, where: str, says: str) -> None:
        """Record that a rule of the closed list was used."""
        (self.applied if rules.RULES[rule].exact else self.losses).append((rule, where, says))


def native_tensors(
    binding: Binding,
    layers: Sequence[CanonicalLayer],
    convention: Convention,
    *,
    where: str,
    want: Mapping[str, NativeTensor] | None = None,
    cast: bool = False,
) -> Written:
    """Canonical layers, one per part of the binding, as the tensors of one native layer, by local name.

    With `want` (a template's tensors) shapes must be equal and dtypes are converted: wider freely, narrower only with
    `cast`. All that does not fit is collected in `problems`.
    """
    out = Written()
    for bound, layer in zip(binding.parts, layers, strict=True):
        _write_part(bound, layer, convention, where, want, cast, out)
    return out


def _write_part(
    bound: BoundPart,
    layer: CanonicalLayer,
    convention: Convention,
    where: str,
    want: Mapping[str, NativeTensor] | None,
    cast: bool,
    out: Written,
) -> None:
    have = dict(layer.weights)
    rows = {role.text for row in bound.rows for role in expand(row.role)}
    have = _reparametrized(layer, have, rows, bound, want, out)
    for row in bound.rows:
        roles = expand(row.role)
        missing = [role.text for role in roles if role.text not in have]
        tensors = [have.pop(role.text).data for role in roles if role.text in have]
        if missing:
            tensors = _defaults(missing, roles, tensors, row, bound, want, where, layer, out)
            if not tensors:
                continue
        data = stack(tensors, 0) if brace_axes(row.role) else tensors[0]
        try:
            pieces = _row_native(row, bound, layer, data, convention, where, want, out)
        except BadLayout as error:
            found = f"{row.role} {data.shape} of {an(layer.kind)}"
            out.problems.append(
                Problem(
                    where,
                    found,
                    f"what fits {error.problems[0].where} ({error.problems[0].expected})",
                    _why_not(layer, data),
                )
            )
            continue
        for name, piece in pieces.items():
            fitted = _fitted(piece, name, where, want, cast, out)
            if fitted is not None:
                out.tensors[name] = fitted
    for role, tensor in have.items():
        _dropped(role, tensor, layer, where, out)


def _why_not(layer: CanonicalLayer, data: Tensor) -> str:
    if layer.kind == "prelu" and len(data.shape) > 1:
        return "a slope per position has no form there: retrain with shared axes"
    alike = "check that both models have the same layers and sizes"
    if layer.kind == "layer_norm":
        sizes = ",".join(map(str, data.shape)) if len(data.shape) > 1 else "A,B"
        told = f"'{layer.path}=layer_norm(normalized_shape=[{sizes}])'"
        return f"{alike}, or, where a file has all its axes as one, say them with --kind or --into-kind: {told}"
    return alike


def _reparametrized(
    layer: CanonicalLayer,
    have: dict[str, CanonicalTensor],
    rows: set[str],
    bound: BoundPart,
    want: Mapping[str, NativeTensor] | None,
    out: Written,
) -> dict[str, CanonicalTensor]:
    """Kernels as the target stores them: effective where the source has magnitude and direction, and the reverse."""
    if "kernel" in rows and "kernel_direction" in have:
        v, g = have.pop("kernel_direction"), have.pop("kernel_magnitude")
        have["kernel"] = replace(v, data=rules.weight_norm_kernel(g.data, v.data))
        out.apply("effective_kernel", layer.path, "weight norm: magnitude and direction became one kernel")
    elif "kernel" in rows and "kernel_raw" in have:
        raw, u, v = (have.pop(role) for role in ("kernel_raw", "kernel_u", "kernel_v"))
        axis = 1 if layer.kind == "conv_transpose" else 0
        have["kernel"] = replace(raw, data=rules.spectral_norm_kernel(raw.data, u.data, v.data, axis))
        out.apply("effective_kernel", layer.path, "spectral norm: the kernel was divided by its norm")
    elif "kernel_direction" in rows and "kernel" in have and want is not None:
        kernel = have.pop("kernel")
        row = next(row for row in bound.rows if row.role == "kernel_magnitude")
        there = want[expand(row.name)[0].text].data
        shape = (there if row.raw else row_layout(row, layer.kind).to_canonical(there)).shape
        have["kernel_direction"] = kernel
        have["kernel_magnitude"] = replace(kernel, data=rules.weight_norm_magnitude(kernel.data, shape))
        out.apply("magnitude", layer.path, "a plain kernel was split into magnitude and direction")
    return have


def _defaults(
    missing: Sequence[str],
    roles: Sequence[Name],
    tensors: list[Tensor],
    row: Row,
    bound: BoundPart,
    want: Mapping[str, NativeTensor] | None,
    where: str,
    layer: CanonicalLayer,
    out: Written,
) -> list[Tensor]:
    """The neutral values of parameters that the target has and the source does without."""
    if want is None:
        if row.required:
            out.problems.append(
                Problem(
                    where,
                    f"no {', '.join(missing)} in {layer.path}",
                    f"one, for {an(layer.kind)} cannot be written without",
                    "export the whole model",
                )
            )
        return []
    value = rules.default_value(missing[0])
    names = expand(row.name, bound.level)
    if value is None or tensors or layer.kind == "unknown":
        out.problems.append(
            Problem(
                where,
                f"no {', '.join(missing)} in {layer.path}",
                f"a value for {names[0].text}",
                "use a template without it, or map another layer",
            )
        )
        return []
    native = want[names[0].text].data
    for name in names:
        out.tensors[name.text] = rules.filled(value, want[name.text].data.shape, native.dtype)
    out.apply("default", where, f"{', '.join(n.text for n in names)} set to {value:g}: the source has none")
    return []


def _row_native(
    row: Row,
    bound: BoundPart,
    layer: CanonicalLayer,
    data: Tensor,
    convention: Convention,
    where: str,
    want: Mapping[str, NativeTensor] | None,
    out: Written,
) -> dict[str, Tensor]:
    names = expand(row.name, bound.level)
    if row.raw:
        return {names[0].text: data}
    kind = bound.part.kind
    if row.rule in rules.BIAS_RULES:
        merged = rules.as_stored(row.rule, data, _side_axis(row))
        data = merged.tensor
        if merged.lost:
            expected = f"none, for {convention.framework} has no place for one in this layer"
            out.problems.append(Problem(where, merged.lost, expected, "use a layer that has one, or another framework"))
        if not merged.exact:
            out.apply("merge_biases", layer.path, "input and recurrent bias were added to one")
    crossed = row_channels(row, kind, layer.channels)
    way = row_layout(row, kind, crossed, convention.flatten)
    sizes = _sizes(bound.sizes, row, crossed)
    if kind == "prelu" and data.shape == (1,) and bound.sizes.get("feature", 1) > 1:
        data = data.take(0, (0,) * bound.sizes["feature"])
        out.apply("broadcast", where, "one slope written once per channel")
    native = way.to_native(data, sizes)
    braces = brace_axes(row.name)
    if not braces:
        return {names[0].text: native}
    flat = native.merge(0, len(braces))
    return {name.text: flat.take(0, (i,)).split(0, ()) for i, name in enumerate(names)}


def _fitted(
    piece: Tensor, name: str, where: str, want: Mapping[str, NativeTensor] | None, cast: bool, out: Written
) -> Tensor | None:
    if want is None:
        return piece
    goal = want[name].data
    if piece.shape != goal.shape:
        out.problems.append(
            Problem(
                f"{where}.{name}",
                f"shape {piece.shape}",
                f"the template's {goal.shape}",
                "check that both models have the same sizes",
            )
        )
        return None
    if piece.dtype == goal.dtype:
        return piece
    if rules.widens(piece.dtype, goal.dtype):
        out.apply("widen", where, f"{name} from {piece.dtype} to {goal.dtype}")
    elif cast:
        out.apply("narrow", where, f"{name} from {piece.dtype} to {goal.dtype}")
    else:
        out.problems.append(
            Problem(
                f"{where}.{name}",
                f"{piece.dtype} elements",
                f"the template's {goal.dtype} without loss",
                "pass --cast to convert all the same",
            )
        )
        return None
    return piece.cast(goal.dtype)


def _dropped(role: str, tensor: CanonicalTensor, layer: CanonicalLayer, where: str, out: Written) -> None:
    value = rules.default_value(role)
    if value is not None and math.prod(tensor.data.shape) <= 1 << 24 and rules.is_all(tensor.data, value):
        out.apply("drop_default", where, f"{role} of {layer.path} left out: all {value:g}")
        return
    out.problems.append(
        Problem(
            where,
            f"{role} in {layer.path}",
            f"a place for it in the {layer.kind} it goes to",
            "use a template that has it",
        )
    )


def binding_for(
    layer_parts: Sequence[CanonicalLayer], classes: str, convention: Convention, config: Mapping[str, Any]
) -> Binding | str:
    """The first form of a native class into which these canonical layers fit, bound by their canonical shapes."""
    reasons = []
    forms = (
        *convention.build(classes, config),
        *(f for f in convention.forms if classes in f.classes and f.applies(config)),
    )
    for form in forms:
        bound = _bind_canonical(form, layer_parts)
        if not isinstance(bound, str):
            return bound
        reasons.append(bound)
    return "; ".join(dict.fromkeys(reasons)) or f"{convention.framework} has no {classes} that neutral knows"


def _bind_canonical(
    form: Form, layers: Sequence[CanonicalLayer], sizes: Mapping[str, int] | None = None
) -> Binding | str:
    if not form.levels and len(form.parts) != len(layers):
        return f"it stores {len(form.parts)} layers as one"
    parts = []
    for i, layer in enumerate(layers):
        part, level = (form.parts[0], i) if form.levels else (form.parts[i], 0)
        bound = _bind_canonical_part(part, level, layer, sizes or {})
        if isinstance(bound, str):
            return bound
        parts.append(bound)
    return Binding(form, tuple(parts))


def _bind_canonical_part(part: Part, level: int, layer: CanonicalLayer, told: Mapping[str, int]) -> BoundPart | str:
    if not compatible(part.kind, layer.kind):
        return f"it stores {an(part.kind)}, not {an(layer.kind)}"
    roles = dict(layer.weights)
    if "kernel_direction" in roles or "kernel_raw" in roles:
        stored = next(role for role in ("kernel_direction", "kernel_raw") if role in roles)
        if not any(row.role == stored for row in part.rows):
            roles["kernel"] = roles.pop(stored)
            for role in ("kernel_magnitude", "kernel_u", "kernel_v"):
                roles.pop(role, None)
    after = layer.attributes.get("reset_after")
    one_bias = any(row.rule == "one_bias" for row in part.rows)
    if layer.kind == "gru" and after is not None and "bias" in roles and after == one_bias and not part.any_reset:
        return "its reset gate acts elsewhere (reset_after differs)"
    sizes: dict[str, int] = {**part.sizes, **told} | {
        axis: layer.attributes[name]
        for axis, name in (("head", "heads"), ("kv_head", "kv_heads"))
        if name in layer.attributes
    }
    if "groups" in layer.attributes and part.kind == "depthwise":
        sizes["group"] = layer.attributes["groups"]
    rows = []
    for row in part.rows:
        names = [name.text for name in expand(row.role)]
        if not all(name in roles for name in names):
            if row.required:
                return f"{names[0]} is missing"
            continue
        rows.append(row)
        tensors = [roles.pop(name) for name in names]
        if row.raw:
            continue
        directed = "direction" in tensors[0].axes
        if directed != _directed(row):
            return "it has another number of directions"
        shape = tensors[0].data.shape
        if any(t.data.shape != shape for t in tensors):
            return f"{' and '.join(names)} differ in shape"
        if row.rule in rules.BIAS_RULES:
            shape = rules.stored_shape(row.rule, shape, _side_axis(row))
        full = (*((len(names),) if brace_axes(row.role) else ()), *shape)
        try:
            sizes.update(row_layout(row, part.kind).bind_canonical(full, sizes))
        except BadLayout as error:
            return f"{row.role} {shape} does not fit {error.problems[0].where}"
    if roles:
        return f"no place for {', '.join(sorted(roles))}"
    if not part.check(sizes):
        return "its sizes contradict each other"
    return BoundPart(part, level, tuple(rows), sizes)


def deciding(known: Known, convention: Convention) -> dict[str, Any]:
    """What `source_binding` must be told of a layer beside its tensors: the config that decides its form, axis sizes."""
    if known.binding is None:
        return {}
    shapes = {local: tensor.data.shape for local, tensor in known.layer.tensors.items() if not tensor.state}
    config = convention.deciding(known.layer.config, shapes)
    config = {**kind_hint(f"kind({known.binding.form.says})")[1], **config}
    return {"config": config, "sizes": dict(known.binding.parts[0].sizes)} if config else {}


def source_binding(
    layers: Sequence[CanonicalLayer],
    convention: Convention,
    config: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Binding | None:
    """The form that layers had in their own framework, from the local names recorded when they were read.

    `config` and `sizes` are what `deciding` told.
    """
    first = layers[0]
    told = config or {}
    names = {local for layer in layers for t in layer.weights.values() for local in t.native}
    built = _built(convention, first.native, told)
    for form in (*built, *convention.forms):
        if (first.native is not None and first.native not in form.classes) or not form.applies(told):
            continue
        bound = _bind_canonical(form, layers, sizes)
        if isinstance(bound, str):
            continue
        mine = {n.text for part in bound.parts for row in part.rows for n in expand(row.name, part.level)}
        if mine == names:
            return bound
    return None
