"""The project's own wheel, built once for each state of the sources."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.setup.steps import CHECKOUT, cache_dir, fingerprint

_KEPT = 3  # wheels; other checkouts may use an older state


def build() -> Path:
    """The wheel of the sources as they are now, uncommitted changes included."""
    # Through links, too: what the package shares lies beside it.
    walked = os.walk(CHECKOUT / "mic_supervisor", followlinks=True)
    sources = sorted(
        Path(directory, name)
        for directory, _, names in walked
        if not directory.endswith(("__pycache__", ".pytest_cache"))
        for name in names
    )
    names = [str(path.relative_to(CHECKOUT)) for path in sources]
    key = fingerprint(CHECKOUT / "pyproject.toml", names, *sources)
    kept = cache_dir() / "own-wheels"
    kept.mkdir(exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = kept / key
        if not any(target.glob("*.whl")):
            _build(target, sources)
        stale = [path for path in kept.iterdir() if path.is_dir() and path != target]
        stale.sort(key=lambda path: path.stat().st_mtime)
        for path in stale[: -(_KEPT - 1)]:
            shutil.rmtree(path)
    return next(target.glob("*.whl"))


def _build(target: Path, sources: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as name:
        # Elsewhere: setuptools would leave its build directories in the checkout.
        scratch = Path(name)
        (scratch / "README.md").touch()  # pyproject.toml refers to it; its text is not needed
        shutil.copy(CHECKOUT / "pyproject.toml", scratch)
        for path in sources:
            copy = scratch / path.relative_to(CHECKOUT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        done = subprocess.run(
            [
                *[sys.executable, "-m", "pip", "wheel", "-q", "--no-input", "--no-deps"],
                *["--wheel-dir", str(target), str(scratch)],
            ],
            capture_output=True,
            text=True,
            timeout=300,
        )
    if done.returncode:
        raise AssertionError(f"cannot build the wheel: {done.stderr or done.stdout}")
