"""One node of a graph at work in torch: what each operator is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neutral.errors import Problem, Refused
from neutral.schema.graph import Node


@dataclass(frozen=True)
class Call:
    """One node at work: torch itself, the node, its layer and module if it has them, and its inputs."""

    torch: Any
    node: Node
    layer: Any
    module: Any
    ins: Sequence[Any]
    made: tuple[int | None, ...] | None

    @property
    def x(self) -> Any:
        return self.ins[0]

    @property
    def functional(self) -> Any:
        return self.torch.nn.functional

    @property
    def space(self) -> int:
        return int(self.x.ndim) - 2

    def number(self, name: str, default: float) -> float:
        value = self.node.attributes.get(name)
        return default if value is None else float(value)  # type: ignore[arg-type]

    def flag(self, name: str) -> bool:
        return bool(self.node.attributes.get(name))

    def refuse(self, found: str, expected: str) -> Refused:
        return Refused(Problem(self.node.name, found, expected, f"{self.node.op} has no torch form for it"))


Operator = Callable[[Call], Any]
