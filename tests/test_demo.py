"""`make demo` keeps its word."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_keras_recognises_what_torch_learned(tmp_path: Path) -> None:
    script = shutil.copy(ROOT / "demo" / "lenet5.py", tmp_path)
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("SAME\n") and "0 digits classified differently" in run.stdout
