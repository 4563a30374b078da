"""A real model server that runs as a host process and needs no GPU: MLServer, from PyPI.

It was taken because it is there in well under a minute; llama.cpp's server is built for seven.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.setup.steps import cache_dir, fingerprint, run, say

# With uvloop 0.22 and newer, the workers of MLServer 1.7.1 do not start.
REQUIREMENTS = ("mlserver==1.7.1", "uvloop<0.22")
_DONE = ".installed"


def home() -> Path:
    """Where its virtual environment is, or will be: one for each version and interpreter."""
    return cache_dir() / f"mlserver-{fingerprint(REQUIREMENTS, sys.version)}"


def program() -> Path | None:
    """`mlserver`; None where it is not set up."""
    return home() / "bin" / "mlserver" if (home() / _DONE).is_file() else None


def ensure() -> None:
    """Raises Missing."""
    if program() is not None:
        say("mlserver: up to date")
        return
    for old in cache_dir().glob("mlserver-*"):
        shutil.rmtree(old)
    say(f"mlserver: installing {' and '.join(REQUIREMENTS)} into {home()}")
    python = home() / "bin" / "python"
    run([sys.executable, "-m", "venv", str(home())], "create a virtual environment for mlserver")
    pip = [str(python), "-m", "pip", "install", "--no-input", "-q"]
    run([*pip, *REQUIREMENTS], f"install {REQUIREMENTS[0]}")
    (home() / _DONE).touch()
