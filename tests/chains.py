"""Walks from framework to framework: what was not declared lossy is bit-identical at the end, with one digest at every stop.

python -m tests.chains 200 20        200 random models of the zoo's layers, 20 random walks of five frameworks each

A model is put together from one to three cases of the zoo. A walk begins with the file that a framework itself saved and goes
through files of four others, each filled into a model of that framework's own, and back to the first, whose framework then
computes what it computed in the beginning. A step to a file that an earlier walk has made of the same bytes is taken once.

What these layers can lose by a declaration is one thing: two biases of an RNN become their sum. So the sums stay, and all else.
A bias that a framework cannot leave out is zero there, which is said, too.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import neutral
from neutral.errors import NeutralError
from tests.measure import CLOSE, flatten_hints
from tests.oracle.process import Worker, difference
from tests.pairs import convert, has, kind_hints, usual_format
from tests.zoo import cases

COLUMNS = ("torch", "keras", "tensorflow", "flax_linen", "flax_nnx", "onnx", "paddle", "mlx", "tfjs")
STOPS = 5
PARTS = (
    "dense", "dense_no_bias", "einsum_dense", "conv1d", "conv1d_no_bias", "conv2d", "conv2d_stride", "conv2d_same_even",
    "conv2d_dilation", "conv2d_groups", "conv3d", "depthwise_conv2d", "separable_conv2d", "conv_transpose1d",
    "conv_transpose2d_stride", "conv_transpose2d_no_bias", "conv_transpose3d", "embedding", "batch_norm1d", "batch_norm2d",
    "layer_norm", "group_norm", "instance_norm2d", "rms_norm", "prelu", "rnn", "rnn_relu", "rnn_bidirectional", "lstm",
    "lstm_no_bias", "lstm_stack2", "lstm_bidirectional", "gru", "gru_bidirectional", "attention", "conv2d_flatten_dense",
    "conv2d_flatten_norm_dense", "conv1d_flatten_dense", "dense_reshape_conv2d", "lstm_last_dense",
)  # fmt: skip
FILLED = re.compile(r".*: the source has none|.* left out: all .*")
UNTOLD = ("depthwise", "separable")
"""Layers of which weights alone do not say how many groups they have, so that they are depthwise."""


@dataclass(frozen=True)
class Stop:
    """A file on the way: the digest of its weights, that of each layer, and that of what no declared change may alter."""

    file: Path
    sha256: str
    digest: str
    layers: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """Where a conversion led to, what it declared lost, and whether it said that zeros were filled in or left out."""

    to: Stop
    losses: tuple[str, ...]
    filled: bool

    def wrong(self, at: Stop) -> str:
        """What has changed that was not declared."""
        if not self.losses and not self.filled:
            return "another digest, and nothing declared" if self.to.digest != at.digest else ""
        changed = len(set(at.layers) ^ set(self.to.layers)) / 2
        declared = len({loss.partition(":")[0] for loss in self.losses})
        if self.to.kept != at.kept or (changed > declared and not self.filled):
            return f"more has changed than {self.losses}"
        return ""


@dataclass
class Walked:
    """What a model's walks came to: steps taken, how many of them were declared lossy, how many refused, what was wrong."""

    steps: int = 0
    lossy: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


class Model:
    """A random model, its files by the frameworks themselves, and the steps made so far."""

    def __init__(self, name: str, workers: Mapping[str, Worker], folder: Path) -> None:
        self.case, self.workers, self.folder = cases()[name], workers, folder
        # A checkpoint of TensorFlow does not say how many groups a norm has.
        unsaid = ("tensorflow",) if "instance_norm2d" in name else ()
        self.columns = [column for column in workers if column not in unsaid and has(self.case, column)]
        self.built: dict[tuple[str, int], Any] = {}
        self.made: dict[tuple[str, str], Step | None] = {}
        self.outputs: dict[tuple[str, str], bool] = {}

    def start(self, column: str, seed: int) -> Path:
        fmt = usual_format(self.case, column)
        if (column, seed) not in self.built:
            place = self.folder / f"{column}{seed}"
            self.built[column, seed] = self.workers[column].build(self.case.name, seed, place, formats=[fmt])
        file: Path = self.built[column, seed].files[fmt]
        return file

    def stop(self, column: str, file: Path) -> Stop:
        """A file's digests; files of weights alone are told what their layers are."""
        told: dict[str, Any] = {}
        with neutral.export_model(file) as archive:
            layers = [layer for layer in archive.manifest.layers if layer.parameters]
            if any(layer.kind == "unknown" for layer in layers):
                told["kinds"] = kind_hints(self.case, column)
            if archive.manifest.graph is None and flatten_hints(self.case):
                told["flatten"] = flatten_hints(self.case)
        with neutral.export_model(file, **told) as archive:
            exact, kept = digests(archive)
            untold = any(name in self.case.name for name in UNTOLD)
            digest = "".join(exact) if untold else archive.manifest.weights_digest
        return Stop(file, bytes_of(file), digest, exact, kept)

    def step(self, source: str, at: Stop, target: str) -> Step | None:
        """The next stop; None if it is refused."""
        key = (f"{source} {at.sha256}", target)
        if key not in self.made:
            template = self.start(target, 2)
            out = Path(tempfile.mkdtemp(dir=self.folder)) / template.name
            try:
                report = convert(self.case, source, target, at.file, template, out, {})
                filled = any(FILLED.fullmatch(note) for note in report.notes)
                self.made[key] = Step(self.stop(target, out), report.losses, filled)
            except NeutralError:
                self.made[key] = None
        return self.made[key]

    def walk(self, way: Sequence[str], walked: Walked) -> None:
        first = at = self.stop(way[0], self.start(way[0], 1))
        lost = False
        named = f"{self.case.name}: {' -> '.join(way)}"
        for source, target in zip(way, (*way[1:], way[0]), strict=True):
            step = self.step(source, at, target)
            walked.steps += 1
            if step is None:
                walked.refused += 1
                return
            if wrong := step.wrong(at):
                walked.wrong.append(f"{named}, {source} -> {target}: {wrong}")
            walked.lossy += bool(step.losses)
            lost, at = lost or bool(step.losses), step.to
        if not lost and (at.digest, at.layers) != (first.digest, first.layers):
            walked.wrong.append(f"{named}: not what it was")
        if not self.computes(way[0], at):
            walked.wrong.append(f"{named}: computes something else")

    def computes(self, column: str, at: Stop) -> bool:
        """Whether the framework of the first file computes with the last one what it computed with the first."""
        key = (column, at.sha256)
        if key not in self.outputs:
            built = self.built[column, 1]
            output = self.workers[column].forward(self.case.name, at.file, built.inputs)
            self.outputs[key] = difference(output, built.output) < CLOSE
        return self.outputs[key]


def digests(archive: neutral.Archive) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Digests of all layers with weights, sorted: of the kind (a depthwise convolution is one) and the parameters.

    Then those of what every step keeps: a recurrent bias is the sum of both sides, and one of zeros is none.
    """
    exact, kept = [], []
    for layer in archive.manifest.layers:
        weights = {role: p for role, p in sorted(layer.parameters.items()) if not p.state}
        if weights:
            kind = "conv" if layer.kind == "depthwise" else layer.kind
            # Not the shape: not every file says how many heads an attention has.
            whole = {role: (math.prod(p.shape), p.dtype, p.sha256) for role, p in weights.items()}
            some = dict(whole)
            for role in weights:
                if role.endswith("bias"):
                    values = archive.tensor(f"{layer.path}/{role}").read()
                    if "side" in weights[role].axes:
                        values = values.sum(weights[role].axes.index("side"))
                    some[role] = hashlib.sha256(values.tobytes()).hexdigest()
                    if not values.any():
                        del some[role]
            exact.append(hashlib.sha256(repr((kind, whole)).encode()).hexdigest())
            kept.append(hashlib.sha256(repr((kind, some)).encode()).hexdigest())
    return tuple(sorted(exact)), tuple(sorted(kept))


def bytes_of(path: Path) -> str:
    """A digest of a file, a folder, or all the files of a checkpoint or a model with shards."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
    else:
        beside = path.parent.iterdir() if path.suffix in (".json", ".onnx") else path.parent.glob(f"{path.name}*")
        files = sorted(p for p in beside if p.is_file())
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.name.encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()


def random_models(count: int, seed: int = 0) -> list[str]:
    """Names of cases put together: one to three, each model another."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        parts = rng.sample(PARTS, rng.randint(1, 3))
        found["+".join(parts if len(parts) > 1 else [*parts, "dense"])] = None
    return list(found)


def walks(name: str, count: int, workers: Mapping[str, Worker], folder: Path) -> Walked:
    """Random walks of one model."""
    model = Model(name, workers, folder)
    walked = Walked()
    rng = random.Random(name)
    try:
        for _ in range(count):
            length = min(STOPS, len(model.columns))
            model.walk(rng.sample(model.columns, length), walked)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return walked


def main() -> int:
    models, count = int(sys.argv[1]), int(sys.argv[2])
    total = Walked()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, Path(folder, name))) for name in COLUMNS}
        for number, name in enumerate(random_models(models), 1):
            place = Path(folder, "model")
            place.mkdir()
            found = walks(name, count, workers, place)
            total = Walked(
                total.steps + found.steps,
                total.lossy + found.lossy,
                total.refused + found.refused,
                total.wrong + found.wrong,
            )
            print(
                f"{number}/{models} {name}: {found.steps} steps, {len(found.wrong)} wrong", file=sys.stderr, flush=True
            )
    print(
        f"{models} models, {models * count} walks, {total.steps} steps: {total.lossy} declared lossy, {total.refused} refused, {len(total.wrong)} wrong"
    )
    print("\n".join(total.wrong))
    return bool(total.wrong)


if __name__ == "__main__":
    sys.exit(main())
