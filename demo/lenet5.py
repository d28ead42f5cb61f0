"""LeNet-5 learns handwritten digits in torch and recognises them in Keras.

    make demo

Trains on the digits that ship inside scikit-learn, saves the whole module as a pickle, runs the two commands
`neutral export` and `neutral import --to keras`, and lets Keras, in a process of its own, classify the digits that
were held out. Ends with status 1 unless Keras says the same of every one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path("demo-out")
ALLOWED = 1e-4
"""How far two float32 frameworks may be apart in a logit (which is of the order of 10)."""

QUIET = {
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "CUDA_VISIBLE_DEVICES": "",
}

KERAS = """
import sys
import numpy as np
import keras
held_out = np.load(sys.argv[2])
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(held_out["images"].transpose(0, 2, 3, 1), verbose=0))
"""


def digits() -> dict[str, Any]:
    """The 1,797 digits of 8×8, three times as wide with a border of two: 28×28, split into training and held-out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    large = np.kron(images.reshape(-1, 1, 8, 8) / 16, np.ones((3, 3)))
    large = np.pad(large, [(0, 0), (0, 0), (2, 2), (2, 2)]).astype(np.float32)
    names = ("train_images", "images", "train_labels", "labels")
    return dict(
        zip(names, train_test_split(large, labels, test_size=360, random_state=0, stratify=labels), strict=True)
    )


def train(data: dict[str, Any], epochs: int = 8) -> Any:
    """LeNet-5, trained for a few seconds."""
    import torch
    from torch import nn

    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much on a busy machine
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten(),
        nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip
    images, labels = torch.from_numpy(data["train_images"]), torch.from_numpy(data["train_labels"])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def step(what: str, work: Callable[[], Any]) -> Any:
    """Do it, and print how long it took."""
    started = time.perf_counter()
    result = work()
    print(f"{time.perf_counter() - started:7.2f} s  {what}", flush=True)
    return result


def run(*command: str) -> None:
    """A command of its own process; the demo ends if it fails."""
    if subprocess.run(command, check=False, env={**QUIET, **os.environ}).returncode:
        sys.exit(f"failed: {' '.join(command[:3])}")


def main() -> int:
    import torch

    OUT.mkdir(exist_ok=True)
    pickled, archive, converted = OUT / "lenet5.pt", OUT / "lenet5.nwt", OUT / "lenet5.keras"
    held_out, answers = OUT / "held_out.npz", OUT / "keras_logits.npy"
    neutral = str(Path(sys.executable).with_name("neutral"))

    data = step("digits from scikit-learn, 1,437 to learn and 360 held out", digits)
    model = step("LeNet-5 trained in torch", lambda: train(data))
    torch.save(model, pickled)
    np.savez(held_out, images=data["images"], labels=data["labels"])
    with torch.no_grad():
        expected = step("the held-out digits in torch", lambda: model(torch.from_numpy(data["images"])).numpy())

    step("neutral export lenet5.pt lenet5.nwt", lambda: run(neutral, "export", str(pickled), str(archive), "--force"))
    step(
        "neutral import lenet5.nwt --to keras", lambda: run(neutral, "import", str(archive), "--to", "keras", "--force")
    )
    step(
        "the held-out digits in Keras (a process without torch)",
        lambda: run(sys.executable, "-c", KERAS, str(converted), str(held_out), str(answers)),
    )

    logits = np.load(answers)
    right_torch = int((expected.argmax(1) == data["labels"]).sum())
    right_keras = int((logits.argmax(1) == data["labels"]).sum())
    differing = int((expected.argmax(1) != logits.argmax(1)).sum())
    distance = float(np.abs(expected - logits).max())
    total = len(expected)
    print(f"\ntorch  {right_torch} of {total} right\nkeras  {right_keras} of {total} right")
    print(f"{differing} digits classified differently, the largest difference of a logit is {distance:.1e}")
    same = differing == 0 and distance <= ALLOWED
    print("SAME" if same else "DIFFERENT")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
