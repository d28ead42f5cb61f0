"""Measures what the zoo proves: every case, every ordered pair of frameworks, every format, judged by a forward pass.

A run takes the file of one framework (weights of seed 1) into a template of another (weights of seed 2), lets the
target's own framework compute the source's inputs, and compares with what the source computed:

    exact     within 1e-5, nothing lost, and both files have the same digest
    close     within 1e-5, but some weights had to be recomputed (two biases added, a normalised kernel multiplied out)
    warned    both files are silent and the case is not as usual: the report says what was assumed
    refused   with the reason

Help is given only where it is asked for, and only what the two files cannot say: kinds where neither names a class,
channels of a Flatten where neither has the wiring, a map where one does not know the order of its layers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import neutral
from neutral.errors import NeutralError
from tests.oracle.process import Built, OracleError, Worker, difference
from tests.zoo import FORMATS, FRAMEWORKS, Case, Layer, cases, lettered

CLOSE = 1e-5
ORDER = ("exact", "close", "warned", "refused", "wrong")
RARE = ("saved_model", "plain_saved_model")
TELLING = {"torch": "module", "keras": "keras", "tensorflow": "checkpoint"}
NO_CLASSES = ("state", "safetensors", "legacy_state", "weights_h5", "checkpoint", *RARE, "npz")
NO_ORDER = ("weights_h5", "checkpoint", *RARE, "npz")
NEW = {"torch": ("model.pt", "model.safetensors"), "keras": ("model.weights.h5",), "tensorflow": ("model",)}
OWN_FLATTEN = {
    "conv2d_permute_flatten_dense": "Permute before Flatten",
    "conv2d_channels_first_plain_flatten_dense": "channels_first maps flattened as they are",
    "conv2d_channels_first_flatten_dense": "channels_first maps, put in order on their way into the Flatten",
    "branches_flattened_concat": "two flattened maps side by side",
}
"""Cases whose Flatten is in no framework's own order: a file without the wiring cannot tell, and must not be silent."""

ASSUMED = ("does not say how it flattens", "taken to be a Dense")
"""Words of the warnings about what is assumed where both files are silent."""

UNTOLD: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("einsum_dense*", NO_CLASSES, "a kernel without the equation that says what its axes are"),
    ("batch_norm2d_*_only", ("weights_h5",), "numbers for names: scale or offset?"),
    ("layer_norm_no_bias", ("weights_h5",), "numbers for names: scale or offset?"),
    ("*_cell", ("weights_h5",), "numbers for names, in a group named after RNN"),
    ("time_distributed_conv2d", ("weights_h5",), "numbers for names, in a group named after the wrapper"),
    ("spectral_norm_*_wrapped", ("weights_h5",), "numbers for names, in a group named after the wrapper"),
    ("legacy_spectral_norm_*_wrapped", ("weights_h5",), "numbers for names, in a group named after the wrapper"),
)
"""Cases of which these formats hold too little to name the layer: a refusal is right, a result must be right."""

UNTOLD_FOR_NEW = {"group_norm": "groups", "instance_norm": "groups", "multi_head_attention": "heads"}
"""Kinds whose settings no file without classes holds; without a template nobody else says them."""

KINDS = {
    "Linear": "dense",
    "Dense": "dense",
    "EinsumDense": "einsum_dense",
    "Bilinear": "bilinear",
    "Embedding": "embedding",
    "PReLU": "prelu",
    "LayerNorm": "layer_norm",
    "LayerNormalization": "layer_norm",
    "GroupNorm": "group_norm",
    "GroupNormalization": "group_norm",
    "BatchNormalization": "batch_norm",
    "RMSNorm": "rms_norm",
    "RMSNormalization": "rms_norm",
    "MultiheadAttention": "attention",
    "MultiHeadAttention": "attention",
    **{f"Conv{n}{d}": "conv" for n in (1, 2, 3) for d in "dD"},
    **{f"DepthwiseConv{n}D": "depthwise" for n in (1, 2)},
    **{f"ConvTranspose{n}d": "conv_transpose" for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": "conv_transpose" for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": "batch_norm" for n in (1, 2)},
    **{f"InstanceNorm{n}d": "instance_norm" for n in (1, 2)},
    **{f"{cls}{cell}": kind for cls, kind in (("RNN", "simple_rnn"), ("SimpleRNN", "simple_rnn"), ("LSTM", "lstm"), ("GRU", "gru")) for cell in ("", "Cell")},
}  # fmt: skip


OTHER_WITHOUT_TEMPLATE = (
    "EinsumDense",
    "PReLU",
    "SeparableConv1D",
    "SeparableConv2D",
    "InstanceNorm1d",
    "InstanceNorm2d",
)
"""Layers that a new file has in another form than the case's model: slopes of another rank, two layers for one."""


@dataclass(frozen=True)
class Run:
    """One conversion: from a format of the source into a template (`target_format`) or a new file of the target."""

    source: str
    source_format: str
    target: str
    target_format: str
    route: str = "template"
    origin: tuple[str, str] = ("", "")

    @property
    def pair(self) -> str:
        return {"template": "{0}-{1}", "numpy": "{0}-numpy-{1}", "new": "{0}-new-{1}"}[self.route].format(
            self.source, self.target
        )

    def __str__(self) -> str:
        return f"{self.source}/{self.source_format} -> {self.target}/{self.target_format} ({self.route})"


@dataclass
class Outcome:
    """What became of a run."""

    run: Run
    status: str
    reason: str = ""
    help: tuple[str, ...] = ()


@dataclass
class Plan:
    """The runs of one case, and the formats that its source and template builds need."""

    runs: list[Run] = field(default_factory=list)

    def formats(self, framework: str, seed: int) -> list[str]:
        found: list[str] = []
        for run in self.runs:
            sides = [(run.source, run.source_format)] if seed == 1 else [(run.target, run.target_format)]
            if seed == 2 and run.route == "new":
                continue
            found += [name for side, name in sides if side == framework and name not in found]
        return found


@cache
def plans(equal: bool) -> dict[str, Plan]:
    """Runs of every case, the formats rotating over the pairs: each is source and template of each kind at least once."""
    used: Counter[tuple[str, str, str]] = Counter()
    seen: Counter[tuple[str, str, str]] = Counter()
    writable = {name: unwritable(case) for name, case in cases(equal).items()}

    def pick(case: Case, framework: str, role: str) -> str:
        usual = [f for f in FORMATS[framework] if f not in RARE and f not in writable[case.name]]
        usual = usual or list(RARE)
        usual.sort(key=lambda f: seen[(case.kind, f, role)])
        seen[(case.kind, usual[0], role)] += 1
        return usual[0]

    made: dict[str, Plan] = {}
    kinds: set[str] = set()
    for name, case in cases(equal).items():
        plan = made[name] = Plan()
        for source, target in case.pairs():
            plan.runs.append(Run(source, pick(case, source, "source"), target, pick(case, target, "template")))
        for source, target in zip(rotated(case.frameworks, len(made)), case.frameworks, strict=True):
            if (source, target) not in case.refusals:
                plan.runs.append(
                    Run(source, pick(case, source, "source"), target, pick(case, target, "template"), "numpy")
                )
        plan.runs += [
            Run(source, pick(case, source, "source"), target, NEW[target][len(made) % len(NEW[target])], "new")
            for source, target in case.pairs()
            if source != target and same_layers(case, source, target)
        ]
        if not equal and case.kind not in kinds and "tensorflow" in case.frameworks:
            other = rotated(FRAMEWORKS, len(kinds))[0]
            other = other if other in case.frameworks and other != "tensorflow" else "keras"
            for rare in RARE:
                plan.runs.append(Run("tensorflow", rare, other, pick(case, other, "template")))
                plan.runs.append(Run(other, pick(case, other, "source"), "tensorflow", rare))
        kinds.add(case.kind)
    for name, case in cases(equal).items():
        for run in made[name].runs:
            used[(case.kind, run.source_format, "source")] += 1
            used[(case.kind, run.target_format, "template")] += 1
    for name, case in cases(equal).items():
        for framework in case.frameworks:
            for fmt in FORMATS[framework]:
                if fmt in RARE or fmt in writable[name]:
                    continue
                if not used[(case.kind, fmt, "source")] or not used[(case.kind, fmt, "template")]:
                    made[name].runs.append(Run(framework, fmt, framework, fmt))
                    used[(case.kind, fmt, "source")] += 1
                    used[(case.kind, fmt, "template")] += 1
    return made


def same_layers(case: Case, source: str, target: str) -> bool:
    """True if the layers of one framework, as they are, make the other's model: then it can load a new file."""
    ours, theirs = (
        [(name, row) for name, row in layers_of(case.models[side].layers) if row.cls in KINDS]
        for side in (source, target)
    )
    rows = case.models[target].layers + case.models[source].layers
    plain = not any(row.inside or row.cls in OTHER_WITHOUT_TEMPLATE for row in rows)
    wrapped = target == "torch" and any(row.wrap for row in rows)
    turned = (
        case.name in OWN_FLATTEN
        or case.name.startswith("depthwise")
        or case.name.endswith("_only")
        or case.kind == "graph"
    )
    return [name for name, _ in ours] == [name for name, _ in theirs] and plain and not wrapped and not turned


def rotated(names: tuple[str, ...], by: int) -> tuple[str, ...]:
    by %= len(names)
    return names[by:] + names[:by]


def unwritable(case: Case) -> tuple[str, ...]:
    """Formats that a framework itself cannot write: parametrized modules as pickles, cells that a checkpoint leaves out."""
    found: tuple[str, ...] = ()
    if "torch" in case.models and any(row.wrap and "legacy" not in row.wrap[0] for row in case.models["torch"].layers):
        found += ("module", "legacy_module")
    if case.name.endswith("_cells_stacked") or case.name == "subclassed":
        found += ("checkpoint",)
    return found


# --- hints: what the files of a pair cannot say ---


def no_wiring(case: Case, framework: str, fmt: str) -> bool:
    """True for a file from which nobody can read how values flow."""
    if fmt in NO_CLASSES or framework == "numpy":
        return True
    return framework == "torch" and case.models["torch"].builder == "graph"


def layers_of(rows: tuple[Layer, ...], prefix: str = "") -> Iterator[tuple[str, Layer]]:
    for row in rows:
        if row.cls == "Sequential":
            yield from layers_of(row.inside, f"{prefix}{row.name}.")
        elif len(row.inside) > 1:
            yield f"{prefix}{row.name}.*", row.inside[0]
        else:
            yield f"{prefix}{row.name}", row.inside[0] if row.inside else row


def kind_hints(case: Case, framework: str) -> dict[str, str]:
    if case.name == "subclassed":
        return {"*": "dense"}
    return {path: KINDS[row.cls] for path, row in layers_of(case.models[framework].layers) if row.cls in KINDS}


def flatten_hints(case: Case) -> dict[str, str]:
    """What crosses a Flatten or a Reshape; of cases put together, if any does, also that the dense layers of the others do not."""
    if case.parts and (case.flatten or case.unflatten):
        each = [(letter, part, flatten_hints(part)) for letter, part in lettered(list(case.parts))]
        rows = {letter: layers_of(next(iter(part.models.values())).layers) for letter, part, _ in each}
        crossing = {f"{letter}_{path}": hint for letter, _, hints in each for path, hint in hints.items()}
        dense = (f"{letter}_{path}" for letter in rows for path, row in rows[letter] if KINDS.get(row.cls) == "dense")
        return {**dict.fromkeys(dense, "none"), **crossing}
    hints = {path: str(channels) for path, channels in case.flatten.items()}
    for path, channels in case.unflatten.items():
        hints[path] = f"{hints.get(path, '')}:{channels}"
    return hints


def paths(case: Case, framework: str, fmt: str) -> list[str]:
    """The paths of layers that the frameworks name differently, in the order of computation."""
    if case.name.endswith("_cells_stacked"):
        names = {"weights_h5": "layer.{}", "saved_model": "layer.stacked_rnn_cells.{}"}
        return [names[fmt].format(name) for name in ("one", "two")] if fmt in names else ["layer.0", "layer.1"]
    if case.name == "subclassed" and framework != "torch":
        if fmt == "saved_model":
            return ["zoo", "zoo_1", "zoo_2", "zoo_3"]
        inner = ["blocks.0", "blocks.1"] if fmt == "plain_saved_model" else ["blocks.dense_1", "blocks.dense_2"]
        return ["hidden", *inner, "head"]
    if case.name == "subclassed":
        return ["hidden", "blocks.0", "blocks.1", "head"]
    stacks = [(path, names) for path, names in case.stacks.items() if len(names) > 1]
    if framework == "torch":
        return [f"{path}.{i}" for path, names in stacks for i in range(len(names))]
    return [name for _, names in stacks for name in names]


def mapping(case: Case, run: Run) -> dict[str, str]:
    source = run.origin if run.source == "numpy" else (run.source, run.source_format)
    pairs = zip(paths(case, *source), paths(case, run.target, run.target_format), strict=True)
    return {ours: theirs for ours, theirs in pairs if ours != theirs}


def wanted_help(case: Case, run: Run, message: str) -> dict[str, Any]:
    """The help that a refusal asks for, if the two files cannot know it."""
    sides = ((run.source, run.source_format), (run.target, run.target_format))
    formats = (run.source_format, run.target_format)
    new = run.route == "new"
    bare = all(no_wiring(case, *side) for side in sides) or case.name in OWN_FLATTEN
    if "--flatten" in message and case.name != "branches_flattened_concat" and (new or bare):
        return {"flatten": flatten_hints(case)}
    if "--kind" in message and (new or all(fmt in NO_CLASSES for fmt in formats)):
        return {"kinds": kind_hints(case, run.source) if run.source != "numpy" else {}}
    if "--map" in message and not new and any(fmt in NO_ORDER for fmt in formats) and (pairs := mapping(case, run)):
        return {"mapping": pairs}
    return {}


def helped(
    case: Case,
    run: Run,
    convert: Callable[..., neutral.Report],
    given: dict[str, Any],
    kinds: dict[str, str] | None = None,
) -> neutral.Report:
    """Convert, adding to `given` what a refusal asks for. `kinds` are the kinds to be told, if not those of the source's rows."""
    while True:
        try:
            return convert(**given)
        except NeutralError as error:
            more = wanted_help(case, run, str(error))
            if not more or more.keys() <= given.keys():
                raise
            if "kinds" in more and kinds is not None:
                more = {"kinds": kinds}
            given |= more


# --- one run ---


class Bench:
    """The files of one case, built once, and what is measured with them."""

    def __init__(self, case: Case, equal: bool, workers: Mapping[str, Worker], folder: Path) -> None:
        self.case, self.equal, self.workers, self.folder = case, equal, workers, folder
        self.built: dict[tuple[str, int], Built] = {}
        self.busy = {name: Lock() for name in workers}

    def model(self, framework: str, seed: int, plan: Plan) -> Built:
        key = (framework, seed)
        with self.busy[framework]:
            if key not in self.built:
                folder, formats = self.folder / f"{framework}{seed}", plan.formats(framework, seed)
                worker = self.workers[framework]
                self.built[key] = worker.build(self.case.name, seed, folder, equal=self.equal, formats=formats)
            return self.built[key]

    def measure(self, run: Run, plan: Plan) -> Outcome:
        source = self.model(run.source, 1, plan)
        work = Path(tempfile.mkdtemp(dir=self.folder))
        given: dict[str, Any] = {}
        try:
            out, report = self.convert(run, source.files[run.source_format], work, plan, given)
        except NeutralError as error:
            return Outcome(run, "refused", str(error), tuple(given))
        try:
            with self.busy[run.target]:
                output = self.workers[run.target].forward(self.case.name, out, source.inputs, equal=self.equal)
        except OracleError as error:
            return Outcome(run, "wrong", f"{run.target} cannot load it: {str(error)[:1500]}", tuple(given))
        apart = difference(output, source.output)
        status = "close" if report.losses else "exact"
        if not apart < CLOSE:
            own = any(words in warning for words in ASSUMED for warning in report.warnings)
            status = "warned" if own else "wrong"
        elif not (report.losses or report.notes) and self.unlike(run, source.files[run.source_format], out):
            return Outcome(run, "wrong", "computes the same and has another digest", tuple(given))
        shutil.rmtree(work)
        return Outcome(run, status, f"{apart:.3g} apart" if apart >= CLOSE else "; ".join(report.losses), tuple(given))

    def unlike(self, run: Run, source: Path, out: Path) -> bool:
        """True if two files that say all about their layers hold other weights or states, seen by an output or not."""
        if run.source_format in NO_CLASSES or run.route == "new" or run.target_format in NO_CLASSES:
            return False
        with neutral.export_model(source) as before, neutral.export_model(out) as after:
            if any(layer.undecided or layer.kind == "unknown" for layer in (*before.layers, *after.layers)):
                return False
            ours, theirs = (states_of(archive) for archive in (before, after))
            states = run.source == run.target and any(
                ours[name] != theirs[name] for name in ours.keys() & theirs.keys()
            )
            return states or before.manifest.weights_digest != after.manifest.weights_digest

    def convert(
        self, run: Run, source: Path, work: Path, plan: Plan, given: dict[str, Any]
    ) -> tuple[Path, neutral.Report]:
        if run.route == "new":
            out = work / run.target_format
            return out, helped(self.case, run, lambda **h: neutral.convert(source, out, to=run.target, **h), given)
        template = self.model(run.target, 2, plan).files[run.target_format]
        out = work / template.name
        if run.route == "template":
            return out, helped(self.case, run, lambda **h: neutral.convert(source, out, into=template, **h), given)
        arrays = work / "arrays.npz"
        hop = Run(run.source, run.source_format, "numpy", "npz", "new")
        first: dict[str, Any] = {}
        if run.source_format in NO_CLASSES:
            first["kinds"] = kind_hints(self.case, run.source)
        helped(self.case, hop, lambda **h: neutral.convert(source, arrays, **h), first)
        with neutral.export_model(source, **first) as archive:
            kinds = {layer.path: layer.kind for layer in archive.manifest.layers if layer.parameters}
        again = Run("numpy", "npz", run.target, run.target_format, origin=(run.source, run.source_format))
        report = helped(self.case, again, lambda **h: neutral.convert(arrays, out, into=template, **h), given, kinds)
        return out, report


def states_of(archive: neutral.Archive) -> dict[str, str | None]:
    return {name: p.sha256 for name, p in archive.manifest.parameters() if p.state}


def measure(case: Case, equal: bool, workers: Mapping[str, Worker], folder: Path) -> list[Outcome]:
    """Every run of a case."""
    plan = plans(equal)[case.name]
    bench = Bench(case, equal, workers, folder)
    try:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda run: bench.measure(run, plan), plan.runs))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- what was measured, and what may be ---


def untold(case: Case, run: Run) -> bool:
    """True if a file of this run says too little about the layers of this case."""
    formats = (run.source_format, run.target_format)
    if run.route == "new" and run.source_format in NO_CLASSES and case.kind in UNTOLD_FOR_NEW:
        return True
    return any(fnmatchcase(case.name, names) and set(formats) & set(few) for names, few, _ in UNTOLD)


def excused(case: Case, outcome: Outcome) -> bool:
    """True for a right result, and for a refusal or a warning that has its reason in the case or in the files."""
    run = outcome.run
    if outcome.status in ("exact", "close"):
        return True
    bare = any(no_wiring(case, *side) for side in ((run.source, run.source_format), (run.target, run.target_format)))
    if outcome.status == "warned":
        return bare and (case.name in OWN_FLATTEN or untold(case, run))
    reasons = (run.source, run.target) in case.may_refuse or untold(case, run) or case.name in OWN_FLATTEN
    return outcome.status == "refused" and reasons


def summary(case: Case, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The pairs by what became of them: the worst over all formats, files that say too little left out."""
    worst: dict[str, str] = {f"{source}-{target}": "refused" for source, target in case.refusals}
    for outcome in outcomes:
        if outcome.status == "refused" and untold(case, outcome.run):
            continue
        before = worst.get(outcome.run.pair, "exact")
        worst[outcome.run.pair] = max(before, outcome.status, key=ORDER.index)
    found = {status: " ".join(sorted(pair for pair in worst if worst[pair] == status)) for status in ORDER}
    return {status: pairs for status, pairs in found.items() if pairs}


RESULTS = Path(__file__).with_name("zoo_results.json")


@cache
def results() -> dict[str, dict[str, dict[str, str]]]:
    """What was measured: by zoo and case; of the equal zoo only what differs from the distinct one."""
    found: dict[str, dict[str, dict[str, str]]] = json.loads(RESULTS.read_text("utf-8"))
    return found


def known(name: str, zoo: str) -> dict[str, str] | None:
    return results()[zoo].get(name, results()["distinct"].get(name))


def commonly(case: Case, framework: str) -> str:
    """The format of a framework that says most, of those that it can write."""
    fmt = TELLING[framework]
    return fmt if fmt not in unwritable(case) else "state" if framework == "torch" else RARE[0]
