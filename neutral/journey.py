"""What is collected on the way from an archive to one output."""

from __future__ import annotations

from dataclasses import dataclass, field

from neutral.canon import Written
from neutral.errors import Problem, named
from neutral.match import Pair
from neutral.native import Tensor
from neutral.schema.manifest import Loss


@dataclass
class Journey:
    """What is collected on the way to one output."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    losses: list[Loss] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def take(self, written: Written) -> None:
        self.losses += [Loss(rule=rule, layer=layer, detail=detail) for rule, layer, detail in written.losses]
        self.notes += [f"{named(where)}: {says}" for _, where, says in written.applied]
        self.problems += written.problems
