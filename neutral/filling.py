"""Into a template: pairs its layers with an archive's, and gives its tensors the archive's weights.

The template's own tensors say shapes and dtypes, its graph says what crosses a Flatten; all that does not fit is
collected and refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neutral.archive import Contents
from neutral.canon import Binding, Known, bind, compatible, native_tensors, read_layers, recognise
from neutral.canonical import CanonicalLayer
from neutral.conventions.forms import Convention, Form
from neutral.errors import NeutralError, Problem, Refused, raise_all
from neutral.frameworks import FRAMEWORKS, Framework
from neutral.journey import Journey
from neutral.match import Pairing, Side, differing_settings, pair_layers
from neutral.native import NativeLayer, NativeModel, NativeTensor
from neutral.origin import origin_of, stored_form
from neutral.surroundings import Wiring, differing_surroundings


def fill_template(
    contents: Contents,
    template: NativeModel,
    framework: Framework,
    mapping: Mapping[str, str] | None,
    allow_unused: Sequence[str],
    allow_missing: Sequence[str],
    cast: bool,
    journey: Journey,
) -> None:
    """Pair an archive with a template and collect, by native name, the template's tensors with the archive's weights."""
    convention = framework.convention()
    origin = origin_of(contents).convention()
    known = read_layers(template, convention)
    theirs = [layer for _, layers in known for layer in layers]
    alike = same_family(origin, convention)
    pairing = pair_layers(
        Side(contents.layers, is_chain(contents.ordered, contents.source.settings, origin), contents.graph),
        Side(theirs, is_chain(template.ordered, template.metadata, convention), template.graph),
        mapping=mapping,
        allow_unused=allow_unused,
        allow_missing=allow_missing,
        alike=alike,
    )
    journey.pairs.extend(pairing.pairs)
    sources = {layer.path: layer for layer in contents.layers}
    partner = {pair.target: sources[pair.source] for pair in pairing.pairs}
    told = ("config" in contents.source.settings, template.metadata.get("config") is not None)
    for item, layers in known:
        _fill_layer(contents, item, layers, partner, convention, origin, alike, told, template.splits, cast, journey)
    _compare_surroundings(contents, template, pairing, origin, convention, journey)
    raise_all(Refused, journey.problems)


def _compare_surroundings(
    contents: Contents,
    template: NativeModel,
    pairing: Pairing,
    origin: Convention,
    convention: Convention,
    journey: Journey,
) -> None:
    """Where both models say how they are wired, what is around paired layers must be the same."""
    if contents.graph is None or template.graph is None:
        return
    problems, remarks = differing_surroundings(
        Wiring(contents.graph, origin.flatten == "position channel"),
        Wiring(template.graph, convention.flatten == "position channel"),
        {pair.source: pair.target for pair in pairing.pairs},
        same_family(origin, convention),
    )
    told = {problem.where for problem in journey.problems}
    journey.problems += [problem for problem in problems if problem.where not in told]
    journey.warnings += remarks


def is_chain(ordered: bool, settings: Mapping[str, Any], convention: Convention) -> bool:
    """True if the order of the layers is that of computation and no two of them stand side by side.

    That is so in a Sequential. Another Keras model may branch; then its graph tells which layers follow each other.
    """
    if convention is FRAMEWORKS["torch"].convention():
        return ordered
    config = settings.get("config")
    return ordered and isinstance(config, Mapping) and _sequential(config)


def _sequential(config: Mapping[str, Any]) -> bool:
    if config.get("class_name") != "Sequential":
        return False
    inner = config.get("config")
    layers = inner.get("layers", ()) if isinstance(inner, Mapping) else inner or ()
    models = [each for each in layers if isinstance(each, Mapping) and "layers" in (each.get("config") or {})]
    return all(_sequential(each) for each in models)


def same_family(a: Convention, b: Convention) -> bool:
    return a.forms is b.forms


def _fill_layer(
    contents: Contents,
    item: Known,
    layers: Sequence[CanonicalLayer],
    partner: Mapping[str, CanonicalLayer],
    convention: Convention,
    origin: Convention,
    alike: bool,
    told: tuple[bool, bool],
    splits: Mapping[str, Mapping[str, int]],
    cast: bool,
    journey: Journey,
) -> None:
    native = item.layer
    wanted = [layer for layer in layers if layer.weights]
    mine = [partner[layer.path] for layer in wanted if layer.path in partner]
    if not mine:
        return
    if len(mine) < len(wanted):
        journey.problems.append(
            Problem(
                native.path,
                f"partners for {len(mine)} of the {len(wanted)} layers it stores",
                "all or none",
                "pair the others, too",
            )
        )
        return
    binding = item.binding
    if binding is None and mine[0].kind == "unknown":
        journey.problems += differing_settings(mine[0], wanted[0], alike)[0]
        _fill_unknown(native, mine[0], alike, journey)
        return
    try:
        if binding is None:
            form = stored_form(contents, mine[0]) if alike else None
            binding = _recognised(native, mine[0].kind, convention, form)
        if not alike:
            journey.warnings += _turned(native.path, (*item.candidates, *mine[0].candidates), binding)
        kinds = [bound.part.kind for bound in binding.parts]
        form = binding.form if alike else None
        mine = [
            _as_known(layer, kind, origin, form) if layer.kind == "unknown" else layer
            for layer, kind in zip(mine, kinds, strict=True)
        ]
        ready = []
        for layer, goal in zip(mine, layers, strict=True):
            problems, remarks = differing_settings(layer, goal, alike)
            journey.problems += problems
            journey.warnings += remarks
            goal_told = native.path in splits or goal.path in splits
            ready.append(_reconciled(layer, goal, origin, convention, told, goal_told, source_told(contents)))
            if not goal_told:
                journey.warnings += flatten_remark(contents, layer, origin, convention)
            if ready[-1].channels and (layer.undecided or goal.undecided) and origin.flatten != convention.flatten:
                whose, which = ("source", origin) if layer.undecided else ("template", convention)
                journey.warnings.append(
                    f"{layer.path}: the {whose} does not say how it flattens; taken to be as {which.framework} does by itself, ({which.flatten})"
                )
    except NeutralError as error:
        journey.problems += [
            replace(p, where=p.where if p.where.startswith(native.path) else f"{native.path}: {p.where}")
            for p in error.problems
        ]
        return
    written = native_tensors(binding, ready, convention, where=native.path, want=native.tensors, cast=cast)
    journey.take(written)
    for local, tensor in written.tensors.items():
        journey.tensors[native.tensors[local].name] = tensor
    _fill_state(native, mine, journey)


def _fill_state(native: NativeLayer, layers: Sequence[CanonicalLayer], journey: Journey) -> None:
    """State of the same name, shape and dtype goes along; other state stays as the template has it."""
    for layer in layers:
        for role, tensor in layer.tensors.items():
            goal = native.tensors.get(role)
            if (
                tensor.state
                and goal is not None
                and goal.state
                and (goal.data.shape, goal.data.dtype) == (tensor.data.shape, tensor.data.dtype)
            ):
                journey.tensors[goal.name] = tensor.data


def _fill_unknown(native: NativeLayer, layer: CanonicalLayer, alike: bool, journey: Journey) -> None:
    """A layer that neither side knows: the same tensors under the same names, if both frameworks store layers alike."""
    if not alike:
        journey.problems.append(
            Problem(
                layer.path,
                "a layer of unknown kind on both sides",
                "its kind, to bring it to another framework",
                f"export again with --kind '{layer.path}=KIND'",
            )
        )
        return
    for role, tensor in layer.weights.items():
        goal = native.tensors.get(role)
        if goal is None or goal.data.shape != tensor.data.shape or goal.data.dtype != tensor.data.dtype:
            found = "nothing" if goal is None else f"{goal.data.dtype} {goal.data.shape}"
            journey.problems.append(
                Problem(
                    f"{native.path}.{role}",
                    found,
                    f"{tensor.data.dtype} {tensor.data.shape}",
                    "use a template with the same layer",
                )
            )
        else:
            journey.tensors[goal.name] = tensor.data


def _recognised(layer: NativeLayer, kind: str, convention: Convention, form: Form | None) -> Binding:
    """A layer without class as one of a kind: in the form of its partner of the same family, if it has that."""
    shapes = {local: tensor.data.shape for local, tensor in layer.tensors.items() if not tensor.state}
    bound = bind(form, shapes) if form is not None else ""
    found = recognise(layer, convention, kind).binding if isinstance(bound, str) else bound
    assert found is not None
    return found


def _turned(path: str, candidates: Sequence[str], binding: Binding) -> list[str]:
    """What to say of a kernel that only a class would tell from one stored the other way round."""
    if not {"dense", "einsum_dense"} <= set(candidates) or binding.parts[0].part.kind != "dense":
        return []
    return [f"{path}: a kernel without a class; taken to be a Dense, for an EinsumDense may store it turned"]


def _as_known(layer: CanonicalLayer, kind: str, origin: Convention, form: Form | None) -> CanonicalLayer:
    """A layer of unknown kind, read as what its partner is; in the form of one of the same family, if it has that."""
    if not any(compatible(kind, candidate) for candidate in layer.candidates):
        raise Refused(
            Problem(
                layer.path,
                f"tensors of a {' or '.join(layer.candidates) or 'custom layer'}",
                f"those of a {kind}",
                "pair it with another layer",
            )
        )
    native = _raw_native(layer)
    shapes = {local: tensor.data.shape for local, tensor in native.tensors.items() if not tensor.state}
    if form is not None and not isinstance(bind(form, shapes), str):
        origin = replace(origin, forms=(form,))
    model = NativeModel(origin.framework, "", (native,), splits={native.path: layer.channels})
    found = [c for _, layers in read_layers(model, origin, kinds={_escaped(native.path): kind}) for c in layers]
    if len(found) > 1:
        raise Refused(
            Problem(
                layer.path,
                f"{len(found)} layers in one",
                f"one {kind}",
                f"export again with --kind '{layer.path}={kind}'",
            )
        )
    axes = {axis for tensor in found[0].weights.values() for axis in tensor.axes}
    return replace(found[0], undecided=tuple(a for a in layer.undecided if a in axes))


def _escaped(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _raw_native(layer: CanonicalLayer) -> NativeLayer:
    """A layer of unknown kind as the native layer that it came from."""
    tensors = {
        role: NativeTensor(next(iter(tensor.native.values()), role), tensor.data, tensor.identity, tensor.state)
        for role, tensor in layer.tensors.items()
    }
    return NativeLayer(layer.path, layer.native, tensors, {}, layer.evidence)


def _reconciled(
    layer: CanonicalLayer,
    goal: CanonicalLayer,
    origin: Convention,
    convention: Convention,
    told: tuple[bool, bool],
    goal_told: bool,
    source_told: bool,
) -> CanonicalLayer:
    """The layer with its Flatten axes as the template's graph has them (`goal_told`), else as the source has them.

    A side without a config is taken to flatten as its framework does by itself; one whose config (`told`, of source
    and template) leaves the layer open flattens in a way of its own. What neither side knows is `Refused`.
    """
    differ = origin.flatten != convention.flatten
    if differ and ((layer.undecided and told[0]) or (goal.undecided and told[1])):
        raise Refused(undecided_problem(layer if layer.undecided else goal))
    if goal_told:
        guessed = not source_told and not layer.channels
        open_yet = layer.undecided or (guessed and goal.channels)
        return _decided(layer, dict(goal.channels), origin) if open_yet else replace(layer, channels=goal.channels)
    if layer.undecided and differ:
        raise Refused(undecided_problem(layer))
    return layer


def source_told(contents: Contents) -> bool:
    """True if a graph or the user said which layers cross a Flatten, so that nothing was concluded from sizes."""
    return contents.graph is not None or contents.source.settings.get("flatten") is not None


def flatten_remark(contents: Contents, layer: CanonicalLayer, origin: Convention, convention: Convention) -> list[str]:
    """What to say of a dense layer of which nothing tells whether it follows a Flatten, not even a convolution."""
    if (
        layer.kind != "dense"
        or layer.channels
        or layer.undecided
        or source_told(contents)
        or origin.flatten == convention.flatten
    ):
        return []
    return [
        "nothing says whether a dense layer follows a Flatten; taken to follow none (--flatten LAYER=CHANNELS, if one does)"
    ]


def _decided(layer: CanonicalLayer, channels: dict[str, int], origin: Convention) -> CanonicalLayer:
    """A layer in its source's order, now that the channels of its Flatten axes are known."""
    if origin.flatten != "channel position":
        layer = _read_again(layer, channels)
    return replace(layer, channels=channels, undecided=())


def _read_again(layer: CanonicalLayer, channels: Mapping[str, int]) -> CanonicalLayer:
    """The axes that cross a Flatten from (position channel) to (channel position)."""
    if layer.kind == "unknown":
        raise Refused(undecided_problem(layer))
    tensors = dict(layer.tensors)
    for role, tensor in layer.weights.items():
        data = tensor.data
        for i, axis in enumerate(tensor.axes):
            if axis in channels:
                order = [*range(i), i + 1, i, *range(i + 2, len(data.shape) + 1)]
                split = data.split(i, (data.shape[i] // channels[axis], channels[axis]))
                data = split.permute(order).merge(i, 2)
        tensors[role] = replace(tensor, data=data)
    return replace(layer, tensors=tensors)


def undecided_problem(layer: CanonicalLayer) -> Problem:
    """What to say of a layer that may follow a Flatten."""
    sizes = ", ".join(
        f"{axis} of {tensor.data.shape[tensor.axes.index(axis)]}"
        for axis in layer.undecided
        for tensor in (next((t for t in layer.weights.values() if axis in t.axes), None),)
        if tensor is not None
    )
    return Problem(
        layer.path,
        f"{sizes or 'an axis'} that may cross a Flatten (or Reshape)",
        "to know its channels, for frameworks flatten in different orders",
        f"export again with --flatten {layer.path}=CHANNELS if it is behind a Flatten, --flatten {layer.path}=none if not; --flatten none if no layer is",
    )
