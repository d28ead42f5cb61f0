"""The promise itself: every layer kind, every ordered pair of frameworks, every format, judged by a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

import neutral
from neutral.errors import NeutralError
from tests.measure import NEW, RARE, Outcome, commonly, excused, known, measure, plans, summary, unwritable
from tests.oracle.process import Worker
from tests.zoo import FORMATS, cases

ZOOS = {"distinct": False, "equal": True}
EVERY = [pytest.param(name, zoo, id=f"{name}-{zoo}") for zoo, equal in ZOOS.items() for name in cases(equal)]
REFUSALS = [
    pytest.param(name, source, target, word, id=f"{name}-{source}-{target}")
    for name, case in cases().items()
    for (source, target), word in case.refusals.items()
]


def failure(outcome: Outcome) -> str:
    return f"{outcome.run}: {outcome.status}, given {', '.join(outcome.help) or 'nothing'}: {outcome.reason}"


@pytest.mark.parametrize(("name", "zoo"), EVERY)
def test_every_pair_computes_the_same(name: str, zoo: str, workers: Mapping[str, Worker], tmp_path: Path) -> None:
    """Refused only where the case says so or a file says too little; never silently wrong; and as measured before."""
    case = cases(ZOOS[zoo])[name]
    outcomes = measure(case, ZOOS[zoo], workers, tmp_path / "case")
    bad = [failure(outcome) for outcome in outcomes if not excused(case, outcome)]
    assert not bad, "\n".join(bad)
    assert summary(case, outcomes) == known(name, zoo), "not as in tests/zoo_results.json: see python -m tests.table"


@pytest.mark.parametrize(("name", "source", "target", "word"), REFUSALS)
def test_what_the_target_cannot_compute_is_refused(
    name: str, source: str, target: str, word: str, workers: Mapping[str, Worker], tmp_path: Path
) -> None:
    """With the reason; into a template where the target has the layer, else into a new file. Nothing is left behind."""
    case = cases()[name]
    fmt = commonly(case, source)
    file = workers[source].build(name, 1, formats=[fmt]).files[fmt]
    template = None
    if target in case.models:
        template = workers[target].build(name, 2, formats=[commonly(case, target)]).files[commonly(case, target)]
    out = tmp_path / (template.name if template else NEW[target][0])
    assert word, "a refusal has a reason"
    with pytest.raises(NeutralError, match=word) as caught:
        neutral.convert(file, out, to=target, into=template)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_every_format_is_source_and_template_of_every_kind() -> None:
    """But for what a framework itself cannot write; SavedModels in one case of each kind."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for name, plan in plans(equal=False).items():
        for run in plan.runs:
            seen[(cases()[name].kind, run.source_format, "source")] += 1
            seen[(cases()[name].kind, run.target_format, "template")] += run.route != "new"
    for case in cases().values():
        for framework in case.frameworks:
            for fmt in FORMATS[framework]:
                if all(fmt in unwritable(other) for other in cases().values() if other.kind == case.kind):
                    continue
                assert fmt in RARE or (seen[(case.kind, fmt, "source")] and seen[(case.kind, fmt, "template")])
        for fmt in RARE if "tensorflow" in case.frameworks else ():
            assert seen[(case.kind, fmt, "source")] and seen[(case.kind, fmt, "template")], (case.kind, fmt)
