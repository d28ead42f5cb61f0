"""Speed and memory beside `cp` and beside the hand-written way, in one run.

    make bench                      1 GB: sixteen Linear(4096, 4096) in torch
    python bench/bench.py --layers 2

Each row is a process of its own, run twice, and the better time counts (the first run of all of them warms the
page cache). Memory is the peak resident set of the process minus that of an interpreter that does nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SIZE = 4096
QUIET = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}

MAKE = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear({size}, {size}) for _ in range({layers})))
torch.save(model.state_dict(), sys.argv[1])
torch.save(model, sys.argv[2])
torch.save(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).state_dict(), sys.argv[3])
"""

BY_HAND = """
import sys, torch
import keras
state = torch.load(sys.argv[1])
layers = sorted({name.partition(".")[0] for name in state}, key=int)
model = keras.Sequential([keras.Input((state["0.weight"].shape[1],)), *(keras.layers.Dense(state[f"{n}.weight"].shape[0]) for n in layers)])
for n, layer in zip(layers, model.layers):
    layer.set_weights([state[f"{n}.weight"].numpy().T, state[f"{n}.bias"].numpy()])
model.save(sys.argv[2])
"""


@dataclass(frozen=True)
class Cost:
    seconds: float
    peak: int


def cost(command: Sequence[str], remove: Path | None = None, runs: int = 2) -> Cost:
    """The better time and the larger peak of `runs` runs of a command; `remove` is deleted before each."""
    costs = []
    for _ in range(runs):
        if remove is not None:
            shutil.rmtree(remove) if remove.is_dir() else remove.unlink(missing_ok=True)
        os.sync()
        started = time.perf_counter()
        pid = os.posix_spawnp(
            command[0],
            list(command),
            {**QUIET, **os.environ},
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)],
        )
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - started
        if status:
            sys.exit(f"failed: {' '.join(command[:4])}")
        costs.append(Cost(seconds, usage.ru_maxrss * 1024))
    return Cost(min(c.seconds for c in costs), max(c.peak for c in costs))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=16, help="Linear(4096, 4096) layers of 67 MB each")
    arguments.add_argument("--folder", type=Path, help="where to put the files (5 times the model)")
    given = arguments.parse_args()
    neutral = str(Path(sys.executable).with_name("neutral"))

    with tempfile.TemporaryDirectory(prefix="neutral-bench-", dir=given.folder) as folder:
        state, module, small = (str(Path(folder, name)) for name in ("state.pt", "module.pt", "small.pt"))
        copy, archive, keras = (Path(folder, name) for name in ("copy.pt", "state.nwt", "module.keras"))
        subprocess.run(
            [sys.executable, "-c", MAKE.format(size=SIZE, layers=given.layers), state, module, small], check=True
        )
        nothing = cost([sys.executable, "-c", "pass"])
        print(
            f"{Path(state).stat().st_size / 1e9:.2f} GB in {given.layers} Linear({SIZE}, {SIZE}), {os.cpu_count()} cores\n"
        )
        print(f"{'':44}{'seconds':>9}{'× cp':>7}{'peak memory':>14}")

        copied = cost(["cp", state, str(copy)], copy)
        copy.unlink()

        def row(what: str, spent: Cost, allowed: float | None = None) -> None:
            memory = f"{max(0, spent.peak - nothing.peak) / 1e6:.0f} MB"
            verdict = (
                ""
                if allowed is None
                else f"   allowed {allowed:.2f} s: {'ok' if spent.seconds <= allowed else 'TOO SLOW'}"
            )
            print(
                f"{what:44}{spent.seconds:9.2f}{spent.seconds / copied.seconds:7.1f}{memory:>14}{verdict}", flush=True
            )

        row("cp state.pt copy.pt", copied)
        row(
            "neutral export state.pt state.nwt",
            cost([neutral, "-q", "export", state, str(archive)], archive),
            2 * copied.seconds + 0.5,
        )
        archive.unlink()
        row(
            "neutral convert module.pt module.keras",
            cost([neutral, "-q", "convert", module, str(keras)], keras),
            5 * copied.seconds,
        )
        keras.unlink()
        row(
            "by hand: torch.load, .T, set_weights, save",
            cost([sys.executable, "-c", BY_HAND, state, str(keras)], keras, runs=1),
        )
        row("neutral show of a small file", cost([neutral, "show", small], runs=5), 0.4)


if __name__ == "__main__":
    main()
