"""docs/table.md, written from what the pairs measured.

python -m tests.pairs_table            measure everything (minutes), write tests/pairs_results.json and docs/table.md
python -m tests.pairs_table --check    is docs/table.md what tests/pairs_results.json gives?
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests import columns
from tests.oracle.process import Worker
from tests.pairs import COLUMNS, RESULTS, ROWS, TITLES, Found, every, measure, results, summary, wrong
from tests.zoo import cases

TABLE = Path(__file__).parents[1] / "docs" / "table.md"
MARKS = {"exact": "●", "close": "◐", "refused": "○", "wrong": "✗"}

HEAD = """# What converts into what

Each cell was measured: the framework on the left saved a model with random weights, neutral converted the file into a model of
the framework above, and that framework computed the same inputs. A layer kind is a row; of several cases the worst counts.

| | |
|---|---|
| ● | exact: outputs within 1e-5, and no weight was changed |
| ◐ | outputs within 1e-5; some weights had to be computed, such as two biases added to one, which is reported |
| ○ | refused, with the reason below |
| · | one of the two has no such layer |

*k*: files of weights alone do not say the kind, and were told (`--kind`, `--into-kind`). *f*: the channels in front of a Flatten
were told (`--flatten`). *m*: which layers of a stack are which was told (`--map`).
A file of the whole model, or a template, needs neither. Wrong: {wrong}.

Equinox has no column: its files hold no names, so that only live models convert. Its layers are proved against torch in
`tests/importers/test_equinox.py`.

"""

WORDS = {
    "an attention of the": "an ONNX model has an attention as products of matrices, which are dense layers to neutral; import it into a model that has them so",
    "no kernel_raw": "torch and Paddle divide by a stored estimate of the norm, which a plain kernel does not have",
    "a recurrent bias of the new gate": "NNX's GRUCell has no recurrent bias, and that of the source is not zero",
}
"""Reasons as a reader of the table needs them, by the beginning of what the refusal says."""

TOLD = {"kinds": "k", "into_kinds": "k", "flatten": "f", "mapping": "m"}


class Notes:
    """Reasons, numbered in the order in which they are first given."""

    def __init__(self) -> None:
        self.listed: list[str] = []

    def number(self, reason: str) -> int:
        reason = next((words for start, words in WORDS.items() if reason.startswith(start)), reason)
        if reason not in self.listed:
            self.listed.append(reason)
        return self.listed.index(reason) + 1


def cells_of(found: Found, title: str, pair: str) -> list[str]:
    """What became of a pair in the cases of a row."""
    return [status for name in ROWS[title] for status, listed in found.get(name, {}).items() if pair in listed.split()]


def cell(found: Found, title: str, pair: str, notes: Notes) -> str:
    statuses = cells_of(found, title, pair)
    if not statuses:
        return "·"
    words = [status.split(",")[0].split(":")[0] for status in statuses]
    mark = MARKS[max(words, key=list(MARKS).index)]
    signs = (
        sign
        for name, sign in TOLD.items()
        if any(f"told {name}" in s or f"and {name}" in s for s in statuses if s[0] in "ec")
    )
    told = "".join(dict.fromkeys(signs))
    numbers = sorted({notes.number(s.partition(": ")[2]) for s in statuses if s.startswith(("refused", "wrong"))})
    return mark + "".join(f"<sup>{one}</sup>" for one in (*([told] if told else []), *numbers))


def counts(found: Found, source: str, target: str) -> str:
    """How many rows of a pair are of each kind."""
    notes = Notes()
    marks = [cell(found, title, f"{source}-{target}", notes)[0] for title in ROWS]
    shown = [f"{mark} {marks.count(mark)}" for mark in MARKS.values() if mark in marks]
    return "<br>".join(shown) or "·"


def table(found: Found) -> str:
    notes = Notes()
    heads = " | ".join(TITLES[column] for column in COLUMNS)
    lines = [
        "## At a glance",
        "",
        "Layer kinds by what becomes of them, from the framework on the left into the one above.",
        "",
    ]
    lines += [f"| from \\ into | {heads} |", "|---|" + ":-:|" * len(COLUMNS)]
    for source in COLUMNS:
        lines.append(
            f"| **{TITLES[source]}** | " + " | ".join(counts(found, source, target) for target in COLUMNS) + " |"
        )
    for source in COLUMNS:
        lines += ["", f"## From {TITLES[source]}", "", f"| | {heads} |", "|---|" + ":-:|" * len(COLUMNS)]
        for title in ROWS:
            if any(cells_of(found, title, f"{source}-{target}") for target in COLUMNS):
                marks = " | ".join(cell(found, title, f"{source}-{target}", notes) for target in COLUMNS)
                lines.append(f"| {title} | {marks} |")
    lines += ["", "## Why it is refused", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(notes.listed, 1)]
    lines += ["", "## What a framework does not have", ""]
    lines += absent()
    bad = sum(
        len(pairs.split())
        for each in results().values()
        for case in each.values()
        for status, pairs in case.items()
        if status.startswith("wrong")
    )
    return HEAD.format(wrong=bad) + "\n".join(lines) + "\n"


def absent() -> list[str]:
    """The rows that a framework has no layer for, with the reason that its column gives."""
    lines = []
    for column in COLUMNS:
        reasons = {}
        for title, names in ROWS.items():
            models = [columns.model_of(cases()[name], column) for name in names]
            if all(isinstance(model, str) for model in models):
                reasons[title] = str(models[0])
        if reasons:
            lines.append(
                f"- **{TITLES[column]}**: " + "; ".join(f"{title.lower()} ({why})" for title, why in reasons.items())
            )
    return lines


def remeasure() -> list[str]:
    """Run every pair and write down what became of it; what went wrong is returned."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, Path(folder, name))) for name in COLUMNS}
        for zoo, name in every():
            cells = measure(name, workers, Path(folder, "case"), equal=zoo == "equal")
            found.setdefault(zoo, {})[name] = summary(cells)
            bad += [f"{name} {zoo} {one}" for one in wrong(cells)]
    write(found)
    return bad


def write(found: Mapping[str, Mapping[str, Mapping[str, str]]]) -> None:
    lines = ",\n".join(
        f' "{zoo}": {{\n' + ",\n".join(f"  {json.dumps(name)}: {json.dumps(it)}" for name, it in each.items()) + "\n }"
        for zoo, each in found.items()
    )
    RESULTS.write_text(f"{{\n{lines}\n}}\n", "utf-8")
    results.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pairs_table")
    parser.add_argument("--check", action="store_true", help="only compare, and fail if docs/table.md differs")
    parser.add_argument("--render", action="store_true", help="write docs/table.md from tests/pairs_results.json")
    asked = parser.parse_args()
    if asked.check:
        if TABLE.read_text("utf-8") == table(results()["distinct"]):
            return 0
        print("docs/table.md is not what tests/pairs_results.json says; run `make table`", file=sys.stderr)
        return 1
    bad = [] if asked.render else remeasure()
    TABLE.write_text(table(results()["distinct"]), "utf-8")
    print("\n".join(bad), file=sys.stderr, end="\n" if bad else "")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
