"""What every step of the set-up shares: a line for a person, commands with a log, cache, lock.

Only the standard library: these files run before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

CHECKOUT = Path(__file__).resolve().parents[2]
IN_CI = bool(os.environ.get("CI"))


class Missing(Exception):
    """A component cannot be had here. Fatal in CI; elsewhere its tests are skipped, loudly."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def die(message: str, *, hint: str | None = None) -> NoReturn:
    print(f"setup: error: {message}", file=sys.stderr)
    if hint:
        print(f"setup: hint: {hint}", file=sys.stderr)
    raise SystemExit(1)


def cache_dir() -> Path:
    """Where everything that is slow to make is kept, outside every checkout; created if need be."""
    given = os.environ.get("MIC_TEST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(given).absolute() if given else Path(base) / "mic-supervisor-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


def fingerprint(*parts: object) -> str:
    """16 hex digits that change when any part does. A Path counts by what the file holds."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def run(
    argv: Sequence[str],
    purpose: str,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 1800,
) -> str:
    """Runs a command with no standard input and returns what it printed on both streams.

    A failure raises Missing("cannot PURPOSE: …") with the end of the output.
    """
    try:
        done = subprocess.run(
            argv,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except FileNotFoundError:
        raise Missing(
            f"cannot {purpose}: {argv[0]} is not installed", hint=f"install {argv[0]}"
        ) from None
    except subprocess.TimeoutExpired as error:
        raise Missing(
            f"cannot {purpose}: no end within {timeout:.0f} s: {' '.join(argv)}",
            hint="look at the network and the package mirror, then try again",
        ) from error
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-20:])
        raise Missing(
            f"cannot {purpose}: {argv[0]} exited with {done.returncode}:\n{tail}",
            hint=f"run it by hand: {' '.join(argv)}",
        )
    return done.stdout


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One set-up at a time on this machine, whichever checkout it was started from."""
    with (cache_dir() / f"{name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another set-up to finish ({handle.name})")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
