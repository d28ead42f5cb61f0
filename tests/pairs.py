"""Every layer kind, every ordered pair of ten frameworks: the file of one into the model of the other, judged by a forward pass.

The framework of the source saves a model with weights of seed 1, the target's own framework a model with weights of seed 2.
neutral converts the first into the second; the target's framework loads what came out and computes the source's inputs.

    exact     within 1e-5, nothing lost
    close     within 1e-5, but some weights had to be recomputed (two biases added to one)
    refused   with the reason
    wrong     anything else: there must be none

Help is given only where a refusal asks for it, and only what files of weights cannot say: kinds, what follows a Flatten, which
layers of a stack are which. What was told is recorded beside the result.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import neutral
from neutral.errors import NeutralError, Problem
from tests import columns
from tests.columns.flax import transposes_kernel
from tests.measure import CLOSE, KINDS, flatten_hints, layers_of, unwritable
from tests.oracle.process import Built, OracleError, Worker, difference
from tests.zoo import Case, Layer, cases, lettered

COLUMNS = ("torch", "keras", "tensorflow", "flax_linen", "flax_nnx", "onnx", "paddle", "mlx", "tfjs", "numpy")
TITLES = {
    "torch": "PyTorch",
    "keras": "Keras",
    "tensorflow": "TensorFlow",
    "flax_linen": "Flax Linen",
    "flax_nnx": "Flax NNX",
    "onnx": "ONNX",
    "paddle": "Paddle",
    "mlx": "MLX",
    "tfjs": "TF.js",
    "numpy": "NumPy",
}
USUAL = {"torch": ("module", "state"), "keras": ("keras",), "tensorflow": ("checkpoint", "saved_model")}
"""The formats of the columns that the zoo itself has; those of others stand in their own modules, the usual first."""

ROWS: Mapping[str, tuple[str, ...]] = {
    "Dense": ("dense", "dense_no_bias", "mlp"),
    "Einsum dense": ("einsum_dense",),
    "Bilinear": ("bilinear",),
    "Convolution 1-D": ("conv1d", "conv1d_causal"),
    "Convolution 2-D": ("conv2d", "conv2d_same_even", "conv2d_stride", "conv2d_dilation"),
    "Convolution 3-D": ("conv3d",),
    "Grouped convolution": ("conv2d_groups",),
    "Depthwise": ("depthwise_conv2d",),
    "Separable": ("separable_conv2d",),
    "Transposed convolution": (
        "conv_transpose1d",
        "conv_transpose2d_stride",
        "conv_transpose2d_same",
        "conv_transpose3d",
    ),
    "Grouped transposed convolution": ("conv_transpose2d_groups",),
    "Dense after Flatten": ("conv2d_flatten_dense", "conv1d_flatten_dense", "conv2d_flatten_norm_dense"),
    "Dense before Reshape": ("dense_reshape_conv2d",),
    "Embedding": ("embedding",),
    "Batch norm": ("batch_norm1d", "batch_norm2d"),
    "Layer norm": ("layer_norm",),
    "Group norm": ("group_norm",),
    "Instance norm": ("instance_norm2d",),
    "RMS norm": ("rms_norm",),
    "PReLU": ("prelu",),
    "Simple RNN": ("rnn",),
    "LSTM": ("lstm", "lstm_last_dense"),
    "LSTM with a projection": ("lstm_projection",),
    "GRU": ("gru",),
    "GRU with reset before": ("gru_reset_before",),
    "Stacked": ("lstm_stack2",),
    "Bidirectional": ("lstm_bidirectional", "gru_bidirectional"),
    "Attention": ("attention", "attention_no_bias"),
    "Weight norm": ("weight_norm_dense",),
    "Spectral norm": ("spectral_norm_dense",),
    "Branches": ("branches_concat", "shared_layer"),
}
"""Layer kinds in plain words, and the cases that stand for them: the first in every pair, the others in some of them."""

EQUAL = ("dense", "conv2d", "conv_transpose2d_stride", "lstm", "gru", "attention", "conv2d_flatten_dense", "embedding")
"""Cases that are measured with all sizes equal, too: there shapes catch nothing."""

SPLIT = {"onnx": ("attention", "attention_no_bias")}
"""Cases that a framework has as several layers: its arrays are no arrays of one."""

ORDER = ("exact", "close", "refused", "wrong")


@dataclass(frozen=True)
class Cell:
    """What became of one pair in one case; `told` is what a user would have had to say."""

    status: str
    reason: str = ""
    told: tuple[str, ...] = ()


def row_of(name: str) -> str:
    return next(title for title, names in ROWS.items() if name in names)


@cache
def formats(column: str) -> tuple[str, ...]:
    if column in USUAL:
        return USUAL[column]
    found: tuple[str, ...] = importlib.import_module(f"tests.columns.{column}").FORMATS
    return found


def usual_format(case: Case, column: str) -> str:
    return next(fmt for fmt in formats(column) if fmt not in unwritable(case) or column not in USUAL)


def has(case: Case, column: str) -> bool:
    return not isinstance(columns.model_of(case, column), str)


def pairs(name: str, among: Sequence[str] = COLUMNS) -> list[tuple[str, str]]:
    """The ordered pairs of a case. The first case of a row has all; of the others each pair has one in turn."""
    names = ROWS[row_of(name)]
    turn = names.index(name)
    present = {column for column in among if has(cases()[name], column)}
    return [
        (a, b)
        for i, (a, b) in enumerate((a, b) for a in COLUMNS for b in COLUMNS)
        if {a, b} <= present
        and not (b == "numpy" and name in SPLIT.get(a, ()))
        and (turn == 0 or i % (len(names) - 1) == turn - 1)
    ]


class Bench:
    """The files of one case, each built once by its own framework."""

    def __init__(self, case: Case, equal: bool, workers: Mapping[str, Worker], folder: Path) -> None:
        self.case, self.equal, self.workers, self.folder = case, equal, workers, folder
        self.built: dict[tuple[str, int], Built] = {}
        self.busy = {name: Lock() for name in workers}

    def model(self, column: str, seed: int) -> Built:
        with self.busy[column]:
            if (column, seed) not in self.built:
                fmt = usual_format(self.case, column)
                folder = self.folder / f"{column}{seed}"
                self.built[column, seed] = self.workers[column].build(
                    self.case.name, seed, folder, equal=self.equal, formats=[fmt]
                )
            return self.built[column, seed]

    def file(self, column: str, seed: int) -> Path:
        return self.model(column, seed).files[usual_format(self.case, column)]

    def measure(self, source: str, target: str) -> Cell:
        built = self.model(source, 1)
        # Arrays are no model: a file of them is always new, and what its arrays are is always told.
        template = None if target == "numpy" else self.file(target, 2)
        out = Path(tempfile.mkdtemp(dir=self.folder)) / (template.name if template else "arrays.npz")
        given: dict[str, Any] = {}
        if source == "numpy" or (target == "numpy" and says_no_kinds(self.file(source, 1))):
            given["kinds"] = kind_hints(self.case, source)
        try:
            report = convert(self.case, source, target, self.file(source, 1), template, out, given)
        except NeutralError as error:
            return Cell("refused", reason(error.problems[0]), tuple(sorted(given)))
        try:
            with self.busy[target]:
                output = self.workers[target].forward(self.case.name, out, built.inputs, equal=self.equal)
        except OracleError as error:
            return Cell("wrong", f"{target} cannot load it: {str(error)[:1500]}", tuple(sorted(given)))
        apart = difference(output, built.output)
        if not apart < CLOSE:
            return Cell("wrong", f"{apart:.3g} apart, given {given}", tuple(sorted(given)))
        return Cell("close" if report.losses else "exact", "", tuple(sorted(given)))


def says_no_kinds(file: Path) -> bool:
    """True for a file with a layer of unknown kind: as arrays it would keep its own names."""
    with neutral.export_model(file) as archive:
        return any(layer.kind == "unknown" and layer.parameters for layer in archive.manifest.layers)


def reason(problem: Problem) -> str:
    """Why a pair is refused, without what differs from run to run and from size to size."""
    found = re.sub(r"\S*/tmp\S*", "FILE", f"{problem.found}, expected {problem.expected}")
    return re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)", "", found)[:200]


def convert(
    case: Case, source: str, target: str, file: Path, template: Path | None, out: Path, given: dict[str, Any]
) -> neutral.Report:
    """Convert, telling what a refusal asks for; each thing once."""
    while True:
        try:
            return neutral.convert(file, out, into=template, **given)
        except NeutralError as error:
            more = dict(asked_for(case, source, target, str(error)))
            if not more.keys() - given.keys():
                raise
            given |= more


def asked_for(case: Case, source: str, target: str, message: str) -> Iterator[tuple[str, Any]]:
    if "--flatten" in message:
        yield "flatten", flatten_hints(case)
    elif "--into-kind" in message:
        yield "into_kinds", kind_hints(case, target)
    elif "--kind" in message:
        yield "kinds", kind_hints(case, source)
    elif "--map" in message:
        ours, theirs = (stacked_paths(case, column) for column in (source, target))
        if ours != theirs and len(ours) == len(theirs):
            yield "mapping", dict(zip(ours, theirs, strict=True))


KIND_OF = {**KINDS, "RNN": "simple_rnn", "DenseGeneral": "dense"}


def kind_hints(case: Case, column: str) -> dict[str, str]:
    """The kinds of a case's layers by path, as its torch or Keras rows tell them; and the setting that no file of Flax has."""
    if case.parts:
        each = ((letter, kind_hints(part, column)) for letter, part in lettered(list(case.parts)))
        return {f"{letter}_{path}": kind for letter, kinds in each for path, kind in kinds.items()}
    as_keras = column in ("keras", "tensorflow", "tfjs") or (
        column not in ("torch", "paddle") and stacked_paths(case, column)
    )
    like = case.models.get("keras" if as_keras else "torch")
    rows = like or next(iter(case.models.values()))
    kinds = {path: kind_of(row) for path, row in layers_of(rows.layers) if row.cls in KIND_OF}
    told = f"conv_transpose(transpose_kernel={str(transposes_kernel(case)).lower()})"
    return {
        path: told if kind == "conv_transpose" and column.startswith("flax") else kind for path, kind in kinds.items()
    }


def kind_of(row: Layer) -> str:
    """Keras has instance norms as group norms of one channel a group, torch depthwise convolutions as grouped ones."""
    groups = row.args.get("groups", 1)
    if groups > 1 and groups == row.args.get("in_channels"):
        return "depthwise"
    return "instance_norm" if groups == -1 else KIND_OF[row.cls]


def stacked_paths(case: Case, column: str) -> list[str]:
    """The paths of the layers that torch and Paddle keep in one stack."""
    stacks = [(path, names) for path, names in case.stacks.items() if len(names) > 1]
    if column in ("torch", "paddle"):
        return [f"{path}.{i}" for path, names in stacks for i in range(len(names))]
    return [name for _, names in stacks for name in names]


def measure(
    name: str, workers: Mapping[str, Worker], folder: Path, *, equal: bool = False, only: Sequence[tuple[str, str]] = ()
) -> dict[str, Cell]:
    """Every pair of a case, `source-target` -> what became of it."""
    case = cases(equal)[name]
    bench = Bench(case, equal, workers, folder)
    wanted = [pair for pair in pairs(name, tuple(workers)) if not only or pair in only]
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda pair: bench.measure(*pair), wanted))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {f"{source}-{target}": cell for (source, target), cell in zip(wanted, found, strict=True)}


RESULTS = Path(__file__).with_name("pairs_results.json")
Found = Mapping[str, Mapping[str, str]]


@cache
def results() -> dict[str, dict[str, dict[str, str]]]:
    """What was measured: zoo -> case -> what became of it -> pairs."""
    found: dict[str, dict[str, dict[str, str]]] = json.loads(RESULTS.read_text("utf-8"))
    return found


def summary(cells: Mapping[str, Cell]) -> dict[str, str]:
    """The pairs of a case by what became of them: `exact`, `exact, told kinds`, `refused: the reason`."""
    found: dict[str, list[str]] = {}
    for pair, cell in sorted(cells.items()):
        told = f", told {' and '.join(cell.told)}" if cell.told and cell.status in ("exact", "close") else ""
        reason = f": {cell.reason}" if cell.status in ("refused", "wrong") else ""
        found.setdefault(f"{cell.status}{told}{reason}", []).append(pair)
    return {status: " ".join(pairs) for status, pairs in sorted(found.items())}


def wrong(cells: Mapping[str, Cell]) -> list[str]:
    return [f"{pair}: {cell.reason}" for pair, cell in cells.items() if cell.status == "wrong"]


def every() -> list[tuple[str, str]]:
    """(zoo, case) of all that is measured."""
    return [("distinct", name) for names in ROWS.values() for name in names] + [("equal", name) for name in EQUAL]
