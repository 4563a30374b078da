"""Commands for workloads of tests. Only the standard library: this runs inside of machines, too."""

from __future__ import annotations

import sys
from pathlib import Path

# What serves models in tests: see there for what it can be told. SERVE is it as a model's command.
SERVER = Path(__file__).parents[2] / "mic_supervisor" / "demo" / "server.py"
SERVE = f'[{sys.executable}, {SERVER}, --port, "${{port}}"]'

# Deaf to TERM, in a session of its own, its parent gone, and so once more; with nothing of ours in
# its environment but what it was started with.
STUBBORN = """
import os, signal, time
def escape(depth):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if depth:
                escape(depth - 1)
            while True:
                time.sleep(1)
        os._exit(0)
"""


def python(text: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-u", "-c", text, *arguments)


def sh(text: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", text)
