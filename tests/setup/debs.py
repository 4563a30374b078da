"""Debian packages of the sources as they are now; what goes into them is downloaded once."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.setup.steps import CHECKOUT, Missing, cache_dir, fingerprint, say

PYTHONS = ("3.11", "3.13")  # of Debian 12 and 13
_KEPT = 8  # packages; other checkouts may use an older state


def _builder() -> dict[str, Any]:
    return runpy.run_path(str(CHECKOUT / "packaging" / "build.py"))


def _libraries() -> Path:
    return cache_dir() / "package-libraries"


def ensure() -> None:
    """Raises Missing."""
    for python in PYTHONS:
        say(f"packages: libraries for Python {python}")
        try:
            _builder()["libraries"](python, _libraries())
        except subprocess.CalledProcessError as error:
            raise Missing(
                f"cannot download what packages are made of: {error}",
                hint="look at the package index, then try again",
            ) from error


def build(wheel: Path, python: str, version: str) -> Path:
    """A package of this wheel; the same one a second time."""
    sources = [path for path in sorted((CHECKOUT / "packaging").iterdir()) if path.is_file()]
    key = fingerprint(wheel, python, version, *sources)
    out = cache_dir() / "own-debs" / key
    if not any(out.glob("*.deb")):
        _builder()["build"]("deb", python, wheel, kept=_libraries(), out=out, version=version)
    stale = sorted(out.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in stale[:-_KEPT]:
        shutil.rmtree(path)
    return next(out.glob("*.deb"))
