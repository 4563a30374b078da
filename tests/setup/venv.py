"""Makes .venv with the project in it, editable; `python -m tests.setup.venv test` for the tests.

A stamp keyed by pyproject.toml, the interpreter and the checkout's path makes a second call free.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.setup import packages
from tests.setup.steps import CHECKOUT, Missing, cache_dir, die, fingerprint, run, say

VENV = CHECKOUT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = ("", "package", "test", "proof")  # each holds all that stand before it


def _stamp(extra: str) -> Path:
    return VENV / f".installed-{extra or 'base'}"


def _usable() -> bool:
    """Whether .venv holds a working Python with pip, made for this path."""
    try:
        asked = subprocess.run(
            [PYTHON, "-c", "import sys, pip; print(sys.prefix)"], capture_output=True, text=True
        )
    except OSError:
        return False
    return asked.returncode == 0 and Path(asked.stdout.strip()) == VENV


def _create(extra: str) -> None:
    """venv, else virtualenv from the package index.

    For the tests, which set the machine up anyhow, Debian's python3-venv is installed before that;
    a demo changes nothing of the machine, whoever runs it. Raises Missing.
    """
    shutil.rmtree(VENV, ignore_errors=True)
    say(f".venv: creating it with Python {sys.version.split()[0]}")
    make = [sys.executable, "-m", "venv", str(VENV)]
    try:
        run(make, "create .venv")
        return
    except Missing as error:
        say(f".venv: {str(error).splitlines()[0]}; trying other ways")
        without = error
    shutil.rmtree(VENV, ignore_errors=True)
    debian = shutil.which("apt-get") is not None and sys.base_prefix == "/usr"
    if extra and debian and os.geteuid() == 0:
        say(".venv: installing Debian's python3-venv")
        try:
            packages.install(["python3-venv"])
            run(make, "create .venv")
            return
        except Missing as error:
            say(f".venv: {str(error).splitlines()[0]}; trying virtualenv")
            shutil.rmtree(VENV, ignore_errors=True)
    target = cache_dir() / "virtualenv"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), "virtualenv"]
    try:
        if not (target / "virtualenv").is_dir():
            run(pip, "install virtualenv")
        run(
            [sys.executable, "-m", "virtualenv", "-q", str(VENV)],
            "create .venv",
            env={"PYTHONPATH": str(target)},
        )
    except Missing as error:
        if debian and "ensurepip" in str(without):
            raise Missing(
                "cannot create .venv: this Python comes without venv",
                hint="as root: apt install python3-venv",
            ) from error
        raise


def main(extra: str) -> None:
    version = sys.version.split()[0]
    if sys.version_info < (3, 11):  # noqa: UP036  `python3` may be anything on a new machine
        die(
            f"cannot create .venv: this is Python {version}; 3.11 or newer is needed",
            hint="name a newer one: make PYTHON=/path/to/python3.11 test",
        )
    key = fingerprint(CHECKOUT / "pyproject.toml", sys.version, str(CHECKOUT))
    stamps = [_stamp(one) for one in EXTRAS[EXTRAS.index(extra) :]]
    if _usable() and any(s.is_file() and s.read_text() == key for s in stamps):
        say(".venv: up to date")
        return
    try:
        if not _usable():
            _create(extra)
        what = f"{CHECKOUT}[{extra}]" if extra else str(CHECKOUT)
        say(f".venv: installing {what}, editable")
        pip = [str(PYTHON), "-m", "pip", "install", "--no-input", "-q"]
        run([*pip, "-e", what], f"install {what}")
    except Missing as error:
        die(str(error), hint=error.hint)
    _stamp(extra).write_text(key)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
