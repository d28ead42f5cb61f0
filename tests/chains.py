"""Walks from framework to framework: what was not declared lossy is bit-identical at the end, with one digest at every stop.

python -m tests.chains 200 20        200 random models of the zoo's layers, 20 random walks of five frameworks each

A model is put together from one to three cases of the zoo. A walk begins with the file that a framework itself saved and goes
through files of four others, each filled into a model of that framework's own, and back to the first, whose framework then
computes what it computed in the beginning. A step to a file that an earlier walk has made of the same bytes is taken once.

What these layers can lose by a declaration is one thing: two biases of an RNN become their sum. So the sums stay, and all else.
"""

from __future__ import annotations

import hashlib
import random
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
    "dense", "dense_no_bias", "conv1d", "conv2d", "conv2d_stride", "conv2d_groups", "conv3d", "depthwise_conv2d",
    "conv_transpose1d", "conv_transpose2d_stride", "embedding", "batch_norm1d", "batch_norm2d", "layer_norm", "group_norm",
    "instance_norm2d", "rms_norm", "prelu", "rnn", "lstm", "gru", "lstm_bidirectional", "conv2d_flatten_dense",
)  # fmt: skip


@dataclass(frozen=True)
class Stop:
    """A file on the way: the digest of its weights, that of each layer, and those with the two biases of an RNN as their sum."""

    file: Path
    sha256: str
    digest: str
    layers: tuple[str, ...]
    summed: tuple[str, ...]


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
        unsaid = (
            ("tensorflow",) if "instance_norm2d" in name else ()
        )  # a checkpoint does not say how many groups a norm has
        self.columns = [column for column in workers if column not in unsaid and has(self.case, column)]
        self.built: dict[tuple[str, int], Any] = {}
        self.made: dict[tuple[str, str], tuple[Stop, tuple[str, ...]] | None] = {}
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
        with neutral.export_model(file) as archive:
            layers = archive.manifest.layers
            told = any(layer.kind == "unknown" or layer.undecided for layer in layers if layer.parameters)
            found = (archive.manifest.weights_digest, *digests(archive))
        if told:
            given: dict[str, Any] = {"kinds": kind_hints(self.case, column)}
            if flatten := flatten_hints(self.case):
                given["flatten"] = flatten
            with neutral.export_model(file, **given) as archive:
                found = (archive.manifest.weights_digest, *digests(archive))
        digest, layers, summed = found
        if "depthwise" in self.case.name:
            # Weights alone do not say how many groups a convolution has, so that it is a depthwise one: but for that, one digest.
            digest = hashlib.sha256("".join(sorted(layers)).encode()).hexdigest()
        return Stop(file, bytes_of(file), digest, layers, summed)

    def step(self, source: str, at: Stop, target: str) -> tuple[Stop, tuple[str, ...]] | None:
        """The next stop and what was declared lost; None if it is refused."""
        key = (f"{source} {at.sha256}", target)
        if key not in self.made:
            template = self.start(target, 2)
            out = Path(tempfile.mkdtemp(dir=self.folder)) / template.name
            try:
                report = convert(self.case, source, target, at.file, template, out, {})
                self.made[key] = self.stop(target, out), report.losses
            except NeutralError:
                self.made[key] = None
        return self.made[key]

    def walk(self, way: Sequence[str], walked: Walked) -> None:
        first = at = self.stop(way[0], self.start(way[0], 1))
        lost = False
        for source, target in zip(way, (*way[1:], way[0]), strict=True):
            after = self.step(source, at, target)
            walked.steps += 1
            if after is None:
                walked.refused += 1
                return
            then, losses = after
            where = f"{self.case.name}: {' -> '.join(way)}, {source} -> {target}"
            if losses:
                lost = True
                walked.lossy += 1
                changed = len(set(at.layers) ^ set(then.layers)) / 2
                if changed > len({loss.partition(":")[0] for loss in losses}) or then.summed != at.summed:
                    walked.wrong.append(f"{where}: more has changed than {losses}")
            elif then.digest != at.digest:
                walked.wrong.append(f"{where}: another digest, and nothing declared")
            at = then
        if not lost and (at.digest, at.layers) != (first.digest, first.layers):
            walked.wrong.append(f"{self.case.name}: {' -> '.join(way)}: not what it was")
        if not self.computes(way[0], at):
            walked.wrong.append(f"{self.case.name}: {' -> '.join(way)}: computes something else")

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

    Then once more, with the sum of both sides in place of a recurrent bias.
    """
    exact, summed = [], []
    for layer in archive.manifest.layers:
        weights = {role: p for role, p in sorted(layer.parameters.items()) if not p.state}
        if weights:
            kind = "conv" if layer.kind == "depthwise" else layer.kind
            whole = {role: (p.shape, p.dtype, p.sha256) for role, p in weights.items()}
            sums = {
                role: hashlib.sha256(
                    archive.tensor(f"{layer.path}/{role}").read().sum(p.axes.index("side")).tobytes()
                ).hexdigest()
                for role, p in weights.items()
                if "side" in p.axes
            }
            exact.append(hashlib.sha256(repr((kind, whole)).encode()).hexdigest())
            summed.append(hashlib.sha256(repr((kind, whole | sums)).encode()).hexdigest())
    return tuple(sorted(exact)), tuple(sorted(summed))


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
        found["+".join(["", *rng.sample(PARTS, rng.randint(1, 3))])[1:]] = None
    return [name if "+" in name else f"{name}+dense" for name in found]


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
        for name in random_models(models):
            place = Path(folder, "model")
            place.mkdir()
            found = walks(name, count, workers, place)
            total.steps, total.lossy, total.refused = (
                total.steps + found.steps,
                total.lossy + found.lossy,
                total.refused + found.refused,
            )
            total.wrong += found.wrong
    print(
        f"{models} models, {models * count} walks, {total.steps} steps: {total.lossy} declared lossy, {total.refused} refused, {len(total.wrong)} wrong"
    )
    print("\n".join(total.wrong))
    return bool(total.wrong)


if __name__ == "__main__":
    sys.exit(main())
