"""The README's support table, written from what the zoo measured.

python -m tests.table            measure everything (minutes), write tests/zoo_results.json and the README's table
python -m tests.table --check    is the README's table the one that tests/zoo_results.json gives?
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

from tests.measure import ORDER, RESULTS, excused, measure, results, summary
from tests.oracle.process import Worker
from tests.zoo import FRAMEWORKS, cases

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"
WORDS = {"exact": "exact", "close": "≤ 1e-5", "warned": "warned", "refused": "refused"}

LEGEND = (
    "*exact*: not a bit differs. *≤ 1e-5*: some weights are computed, such as two biases of an RNN added to one. "
    "*new file*: without a template. –: there is no such layer, or a new file has it in another form."
)

COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("torch → Keras", ("torch-keras",)),
    ("Keras → torch", ("keras-torch",)),
    ("torch → TensorFlow", ("torch-tensorflow",)),
    ("TensorFlow → torch", ("tensorflow-torch",)),
    ("Keras ↔ TensorFlow", ("keras-tensorflow", "tensorflow-keras")),
    ("through .npz", ("*-numpy-*",)),
    ("new file", ("*-new-*",)),
)

ROWS: tuple[tuple[str, str], ...] = (
    ("Dense", "dense dense_no_bias mlp time_distributed_dense nested subclassed shared_layer"),
    ("Einsum dense", "einsum_dense*"),
    ("Bilinear", "bilinear"),
    ("Convolution 1-D", "conv1d conv1d_[!f]*"),
    ("Convolution 2-D", "conv2d conv2d_no_bias conv2d_s* conv2d_di* conv2d_gr* conv2d_e* conv2d_z* conv2d_channels_first branches_concat time_distributed_conv2d"),
    ("Convolution 3-D", "conv3d conv3d_[!f]*"),
    ("Depthwise", "depthwise_*"),
    ("Separable", "separable_*"),
    ("Transposed convolution", "conv_transpose*"),
    ("Dense or norm after Flatten", "conv?d_*flatten*dense conv2d_reshape_dense conv2d_global_pool_dense branches_add"),
    ("Two maps flattened side by side", "branches_flattened_concat"),
    ("Dense before Reshape", "dense_*reshape_*"),
    ("Embedding", "embedding*"),
    ("Batch norm", "batch_norm*"),
    ("Layer norm", "layer_norm*"),
    ("Group norm", "group_norm"),
    ("Instance norm", "instance_norm*"),
    ("RMS norm", "rms_norm"),
    ("PReLU", "prelu*"),
    ("Simple RNN", "rnn rnn_no_bias rnn_relu rnn_cell"),
    ("LSTM", "lstm lstm_no_bias lstm_cell lstm_projection lstm_last_dense lstm_flatten_dense"),
    ("GRU", "gru gru_no_bias gru_cell gru_reset_before text_classifier"),
    ("RNN, LSTM, GRU stacked", "*_stack? *_cells_stacked lstm_dropout_dense"),
    ("RNN, LSTM, GRU bidirectional", "*_bidirectional *_bidirectional_stack2"),
    ("Attention", "attention*"),
    ("Weight norm", "*weight_norm_*"),
    ("Spectral norm", "*spectral_norm_*"),
)  # fmt: skip
"""Layer kinds in plain words, and the cases that prove them; the last row that fits counts."""

NOTES: tuple[tuple[str, str], ...] = (
    ("bilinear", "Keras has no such layer"),
    ("einsum_dense*", "between files without an equation: taken to be a plain Dense, with a warning"),
    ("conv_transpose2d_groups", "groups of a transposed convolution: Keras has none"),
    ("batch_norm2d_*_only", "a scale or offset other than one or zero, where Keras's layer has none"),
    ("instance_norm2d_statistics", "running statistics of an instance norm: Keras's keeps none"),
    ("prelu_unshared", "a slope per position: torch's are shared"),
    ("gru_reset_before", "`reset_after=False`: torch has no such form"),
    ("lstm_projection", "`proj_size`: Keras has none"),
    ("attention_value_dim", "`value_dim` other than `key_dim`: torch has none"),
    ("attention_bias_kv", "`add_bias_kv`: Keras has none"),
    ("*spectral_norm_*", "torch divides by a stored estimate, which a plain kernel does not have"),
    ("branches_flattened_concat", "permuted in two pieces, which `--flatten` cannot say"),
    ("conv2d_*flatten*", "an unusual order (Permute, channels_first): refused, or with a warning where a file says nothing of it"),
)  # fmt: skip
"""Why a case is refused or warned about; the first that fits counts."""


def row_of(name: str) -> str:
    titles = [title for title, patterns in ROWS if any(fnmatchcase(name, p) for p in patterns.split())]
    if not titles:
        raise ValueError(f"{name} stands in no row")
    return titles[-1]


def note_of(name: str) -> str:
    for names, note in NOTES:
        if fnmatchcase(name, names):
            return note
    raise ValueError(f"{name} is not converted, and no note says why")


def cell(found: Mapping[str, Mapping[str, str]], names: Sequence[str], pairs: Sequence[str], notes: list[str]) -> str:
    """The worst of what can be converted, and the numbers of the notes on what cannot."""
    statuses: list[str] = []
    numbers: set[int] = set()
    for name in names:
        for status, listed in found[name].items():
            for pair in listed.split():
                if not any(fnmatchcase(pair, wanted) for wanted in pairs):
                    continue
                statuses.append(status)
                if status in ("warned", "refused"):
                    note = note_of(name)
                    if note not in notes:
                        notes.append(note)
                    numbers.add(notes.index(note) + 1)
    if not statuses:
        return "–"
    right = [status for status in statuses if status in ("exact", "close")]
    word = WORDS[max(right, key=ORDER.index)] if right else WORDS[statuses[0]]
    return word + "".join(f" <sup>{number}</sup>" for number in sorted(numbers))


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    notes: list[str] = []
    lines = [LEGEND, "", "| | " + " | ".join(title for title, _ in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for title, _ in ROWS:
        names = [name for name in found if row_of(name) == title]
        lines.append(f"| {title} | " + " | ".join(cell(found, names, pairs, notes) for _, pairs in COLUMNS) + " |")
    lines += ["", "Not converted, or not without a word:", ""]
    lines += [f"{number}. {note[0].upper()}{note[1:]}." for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(results()["distinct"]) + END + rest.split(END)[1]


def remeasure() -> list[str]:
    """Run both zoos and write down what became of them; what went wrong is returned."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, Path(folder, name))) for name in FRAMEWORKS}
        for zoo, equal in (("distinct", False), ("equal", True)):
            found[zoo] = {}
            for name, case in cases(equal).items():
                outcomes = measure(case, equal, workers, Path(folder, "case"))
                found[zoo][name] = summary(case, outcomes)
                wrong += [f"{name} {zoo} {o.run} {o.status} {o.reason}" for o in outcomes if not excused(case, o)]
    found["equal"] = {name: it for name, it in found["equal"].items() if it != found["distinct"].get(name)}
    lines = ",\n".join(
        f' "{zoo}": {{\n' + ",\n".join(f"  {json.dumps(name)}: {json.dumps(it)}" for name, it in each.items()) + "\n }"
        for zoo, each in found.items()
    )
    RESULTS.write_text(f"{{\n{lines}\n}}\n", "utf-8")
    results.cache_clear()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.table")
    parser.add_argument("--check", action="store_true", help="only compare, and fail if the README differs")
    if parser.parse_args().check:
        if with_table(README.read_text("utf-8")) == README.read_text("utf-8"):
            return 0
        print("README.md: its table is not what tests/zoo_results.json says; run `make table`", file=sys.stderr)
        return 1
    wrong = remeasure()
    README.write_text(with_table(README.read_text("utf-8")), "utf-8")
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
