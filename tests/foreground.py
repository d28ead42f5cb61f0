"""Signals for the processes that tests start."""

from __future__ import annotations

import signal


def usual_signals() -> None:
    """As in a terminal, whoever started the tests: nohup and `&` in a script have some ignored, which a child inherits.

    For `subprocess.Popen(preexec_fn=...)`.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
