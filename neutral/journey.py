"""What is collected on the way from an archive to one output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from neutral.canon import Written
from neutral.errors import Problem, named
from neutral.match import Pair
from neutral.native import Tensor
from neutral.schema.manifest import Loss


@dataclass(frozen=True)
class Asked:
    """What the user says of an import into a template: which layers belong together, and what may differ.

    `mapping`: source path -> template path. `allow_unused` and `allow_missing`: globs on layer paths of the archive and the
    template. `cast`: a narrower dtype is meant. `kinds`: globs on the template's layers -> kinds.
    """

    mapping: Mapping[str, str] | None = None
    allow_unused: Sequence[str] = ()
    allow_missing: Sequence[str] = ()
    cast: bool = False
    kinds: Mapping[str, str] | None = None

    def about_template(self) -> bool:
        """True if something is said that only a template gives a meaning."""
        return bool(self.mapping or self.allow_unused or self.allow_missing or self.kinds)


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
