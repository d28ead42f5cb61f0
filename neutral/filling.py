"""Into a template: pairs its layers with an archive's, and gives its tensors the archive's weights.

The template's own tensors say shapes and dtypes, its graph says what crosses a Flatten; all that does not fit is
collected and refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neutral.archive import Contents
from neutral.canon import Binding, Known, bind, native_tensors, read_layers, recognise
from neutral.canonical import CanonicalLayer
from neutral.conventions.forms import Convention, same_family
from neutral.directions import directed
from neutral.doubts import (
    as_known,
    flatten_remark,
    reconciled,
    source_told,
    tells_wiring,
    unknown_problem,
    unnamed_problem,
)
from neutral.errors import NeutralError, Problem, Refused, named, printable, raise_all, reworded
from neutral.exporters.wiring import behind_moved_images
from neutral.framework import Framework
from neutral.journey import Asked, Journey
from neutral.match import Pairing, Side, differing_settings, idle_patterns, pair_layers
from neutral.native import NativeLayer, NativeModel
from neutral.origin import origin_of, stored_form
from neutral.surroundings import Wiring, differing_surroundings


def fill_template(
    contents: Contents, template: NativeModel, framework: Framework, asked: Asked, journey: Journey
) -> None:
    """Pair an archive with a template and collect, by native name, the template's tensors with the archive's weights."""
    convention = framework.convention()
    source = origin_of(contents)
    origin = source.convention()
    with reworded("--kind", "--into-kind"):
        known = read_layers(template, convention, kinds=asked.kinds)
    theirs = [layer for _, layers in known for layer in layers]
    alike = same_family(origin, convention)
    if not alike:
        raise_all(Refused, unnamed_problem(theirs, framework, template=True))
        raise_all(Refused, [] if framework.canonical else unnamed_problem(contents.layers, source))
    layers, mapping = directed(contents.layers, [layer.path for layer in theirs], asked.mapping or {})
    contents = replace(contents, layers=layers)
    pairing = pair_layers(
        Side(contents.layers, is_chain(contents.ordered, contents.source.settings, source), contents.graph),
        Side(theirs, is_chain(template.ordered, template.metadata, framework), template.graph),
        mapping=mapping,
        allow_unused=asked.allow_unused,
        allow_missing=asked.allow_missing,
        alike=alike,
    )
    journey.pairs.extend(pairing.pairs)
    journey.unused, journey.missing = pairing.unused, pairing.missing
    journey.warnings += idle_patterns("--allow-unused", asked.allow_unused, contents.layers)
    journey.warnings += idle_patterns("--allow-missing", asked.allow_missing, theirs)
    sources = {layer.path: layer for layer in contents.layers}
    partner = {pair.target: sources[pair.source] for pair in pairing.pairs}
    told = (tells_wiring(contents.source.settings), tells_wiring(template.metadata))
    moved = (frozenset(behind_moved_images(contents.graph)), frozenset(behind_moved_images(template.graph)))
    ends = _Ends(contents, template, origin, convention, alike, told, moved)
    for item, layers in known:
        _fill_layer(ends, item, layers, partner, asked.cast, journey)
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


def is_chain(ordered: bool, settings: Mapping[str, Any], framework: Framework) -> bool:
    """True if the order of the layers is that of computation and no two of them stand side by side."""
    return ordered and framework.chain(settings)


@dataclass(frozen=True)
class _Ends:
    """Both ends of an import: the archive and the template, how each stores layers (`alike`, if they are of one family), and
    whether a config of each (`told`) says how it is wired."""

    contents: Contents
    template: NativeModel
    origin: Convention
    convention: Convention
    alike: bool
    told: tuple[bool, bool]
    moved: tuple[frozenset[str], frozenset[str]]
    """The layers of each that take an image in an order of its own."""

    @property
    def advice(self) -> Mapping[str, str]:
        """What either framework says of settings that differ from all others'."""
        return {**self.origin.advice, **self.convention.advice}

    @property
    def wired(self) -> bool:
        return self.contents.graph is not None and self.template.graph is not None


def _fill_layer(
    ends: _Ends,
    item: Known,
    layers: Sequence[CanonicalLayer],
    partner: Mapping[str, CanonicalLayer],
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
    if item.binding is None and mine[0].kind == "unknown":
        journey.problems += differing_settings(mine[0], wanted[0], ends.alike, advice=ends.advice)[0]
        _fill_unknown(native, mine[0], ends.origin, ends.alike, journey)
        return
    try:
        binding = item.binding or _recognised(ends, native, mine[0])
        if not ends.alike:
            journey.warnings += _turned(native.path, (*item.candidates, *mine[0].candidates), binding)
        form = binding.form if ends.alike else None
        mine = [
            as_known(layer, bound.part.kind, ends.origin, form) if layer.kind == "unknown" else layer
            for layer, bound in zip(mine, binding.parts, strict=True)
        ]
        ready = [_ready(ends, native, binding, layer, goal, journey) for layer, goal in zip(mine, layers, strict=True)]
    except NeutralError as error:
        journey.problems += [
            replace(p, where=p.where if p.where.startswith(native.path) else f"{named(native.path)}: {p.where}")
            for p in error.problems
        ]
        return
    written = native_tensors(binding, ready, ends.convention, where=native.path, want=native.tensors, cast=cast)
    journey.take(written)
    for local, tensor in written.tensors.items():
        journey.tensors[native.tensors[local].name] = tensor
    _fill_state(native, mine, journey)


def _ready(
    ends: _Ends,
    native: NativeLayer,
    binding: Binding,
    layer: CanonicalLayer,
    goal: CanonicalLayer,
    journey: Journey,
) -> CanonicalLayer:
    """A layer of the source with its settings compared with its goal's and its order that of the goal, and what to say of both."""
    contents, origin, convention = ends.contents, ends.origin, ends.convention
    problems, remarks = differing_settings(layer, _as_bound(goal, binding, native), ends.alike, ends.wired, ends.advice)
    journey.problems += problems
    journey.warnings += [*remarks, *_reordered(ends, layer, goal), *_remarks(ends, layer)]
    goal_told = native.path in ends.template.splits or goal.path in ends.template.splits
    own = (ends.told[0] or layer.path in ends.moved[0], ends.told[1] or goal.path in ends.moved[1])
    ready = reconciled(layer, goal, origin, convention, own, goal_told, source_told(contents))
    if not goal_told:
        journey.warnings += flatten_remark(contents, layer, origin, convention)
    if not goal_told and ready.channels and convention.flatten == "channel position":
        journey.warnings += _permuted(contents, layer)
    if ready.channels and (layer.undecided or goal.undecided) and origin.flatten != convention.flatten:
        whose, which = ("source", origin) if layer.undecided else ("template", convention)
        journey.warnings.append(
            f"{layer.path}: the {whose} does not say how it flattens; taken to be as {which.framework} does by itself ({which.flatten})"
        )
    return ready


def _as_bound(goal: CanonicalLayer, binding: Binding, native: NativeLayer) -> CanonicalLayer:
    """A layer of the template, if its partner told what it is with what its framework says of such a layer."""
    if goal.kind != "unknown" or len(binding.parts) > 1:
        return goal
    bound = binding.parts[0]
    told = {k: v for k, v in bound.part.attributes(native.config, bound.sizes).items() if v is not None}
    return replace(goal, attributes={**told, **goal.attributes})


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


def _fill_unknown(
    native: NativeLayer, layer: CanonicalLayer, origin: Convention, alike: bool, journey: Journey
) -> None:
    """A layer that neither side knows: the same tensors under the same names, if both frameworks store layers alike."""
    if not alike:
        journey.problems.append(unknown_problem(layer, origin))
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


def _recognised(ends: _Ends, layer: NativeLayer, partner: CanonicalLayer) -> Binding:
    """A layer without class as one of its partner's kind: in its form, if it is of the same family and has that."""
    form = stored_form(ends.contents, partner) if ends.alike else None
    shapes = {local: tensor.data.shape for local, tensor in layer.tensors.items() if not tensor.state}
    bound = bind(form, shapes) if form is not None else ""
    if not isinstance(bound, str):
        return bound
    with reworded("--kind", "--into-kind"):
        found = recognise(layer, ends.convention, partner.kind).binding
    assert found is not None
    return found


def _permuted(contents: Contents, layer: CanonicalLayer) -> list[str]:
    """What to say of a layer behind a Flatten that the source's own graph, of channels-first operators, made channels-last."""
    if layer.path not in contents.source.settings.get("turned", ()):
        return []
    return [
        f"{layer.path}: the source puts channels last before it flattens; the template is taken to flatten with channels first, without a permutation of its own"
    ]


def _remarks(ends: _Ends, layer: CanonicalLayer) -> list[str]:
    """What the source's reader says of the weights of a layer, for a model of another framework."""
    told = ends.contents.source.settings.get("remarks")
    said = told.get(layer.path) if isinstance(told, Mapping) and not ends.alike else None
    return [f"{layer.path}: {printable(said, 200)}"] if isinstance(said, str) else []


def _reordered(ends: _Ends, layer: CanonicalLayer, goal: CanonicalLayer) -> list[str]:
    """What to say of a layer that takes an image in an unusual order, of which the template does not say the same."""
    if ends.alike or not layer.undecided or layer.path not in ends.moved[0]:
        return []
    found = "an image whose axes the source puts in an unusual order before it flattens them"
    if ends.origin.flatten != ends.convention.flatten:
        raise Refused(
            Problem(layer.path, found, "channels and positions in one of two orders", "permute its weights by hand")
        )
    return [] if goal.path in ends.moved[1] else [f"{layer.path}: {found}; the template is taken to do the same"]


def _turned(path: str, candidates: Sequence[str], binding: Binding) -> list[str]:
    """What to say of a kernel that only a class would tell from one stored the other way round."""
    if not {"dense", "einsum_dense"} <= set(candidates) or binding.parts[0].part.kind != "dense":
        return []
    return [f"{path}: a kernel without a class; taken to be a Dense, for an EinsumDense may store it turned"]
