"""Runs a helper to its end: the hook, a check, a credential helper, a question to a system tool.

Its time is bounded, and so is what is kept of its output. Nothing is written to a file system,
which may be read-only or full. What it leaves behind may hold its output and is not waited for.
"""

from __future__ import annotations

import errno
import os
import pwd
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MOST = 64 << 10
"""Bytes of each stream that are kept, unless told otherwise."""

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_REAP = 1.0  # seconds for the kernel to end what was killed


@dataclass(frozen=True, slots=True)
class Ended:
    """`code` is negative for a death by signal, None where it did not end in time."""

    code: int | None
    output: bytes
    errors: bytes  # empty where both streams are one


def run(
    command: Sequence[str],
    timeout: float,
    *,
    given: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    apart: bool = False,
    most: int = MOST,
    last: bool = False,
    watch: Callable[[bytes], bool] | None = None,
    wake: float = 1.0,
    end: Callable[[subprocess.Popen[bytes]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> Ended:
    """`given` is on its standard input. Past its time it is killed with its session.

    Without an `env` it has ours, and what a service of systemd lacks of a shell's.
    Standard output and error are one stream unless they are to be `apart`; of each the first bytes
    are kept, or the `last`. `watch` gets what came, at least every `wake` seconds, and has it ended
    by returning False. `end`, if there is one, is called before the program is reaped, however
    it ended. `options` are Popen's. Raises OSError, whatever the reason.
    """
    try:
        # No pipe: a program that does not read must not hold us up.
        with os.fdopen(os.memfd_create("given"), "r+b") as stdin:
            stdin.write(given)
            stdin.seek(0)
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if apart else subprocess.STDOUT,
                env={**plain_environment(home()), **os.environ} if env is None else env,
                cwd=cwd,
                start_new_session=True,
                **options,
            )
    except (ValueError, subprocess.SubprocessError) as error:  # a NUL; no such user
        raise OSError(errno.EINVAL, str(error)) from error
    streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    kept = {stream.fileno(): bytearray() for stream in streams}
    ended = False
    deadline = clock() + timeout
    try:
        ended = _collect(
            process.pid, kept, lambda: deadline - clock(), -most if last else most, watch, wake
        )
    finally:
        if end is not None:
            end(process)
        elif not ended:
            # Not all of it may be ours to kill: setuid, and a supervisor without CAP_KILL.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_REAP)
        for stream in streams:
            stream.close()
    output, errors, *_ = (*map(bytes, kept.values()), b"")
    return Ended(process.returncode if ended else None, output, errors)


def plain_environment(home: str) -> dict[str, str]:
    """What a program has that is given nothing else."""
    return {"PATH": DEFAULT_PATH, "HOME": home, "LANG": "C.UTF-8"}


def home() -> str:
    """The home of whom this program runs as. systemd sets no HOME for a service of root."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return "/"


def _collect(
    pid: int,
    kept: Mapping[int, bytearray],
    left: Callable[[], float],
    most: int,
    watch: Callable[[bytes], bool] | None,
    wake: float,
) -> bool:
    """Whether it ended in time. Not until the end of a pipe: a child may hold it."""
    handle = os.pidfd_open(pid)
    try:
        with selectors.DefaultSelector() as waiting:
            waiting.register(handle, selectors.EVENT_READ)
            for pipe in kept:
                os.set_blocking(pipe, False)
                waiting.register(pipe, selectors.EVENT_READ)
            while (seconds := left()) > 0:
                found = waiting.select(min(seconds, wake) if watch is not None else seconds)
                ready = {key.fd for key, _ in found}
                over = handle in ready
                came: list[bytes] = []
                for pipe in kept if over else ready:
                    if not _drain(pipe, kept[pipe], most, came) and not over:
                        waiting.unregister(pipe)
                if watch is not None and not watch(b"".join(came)):
                    return False
                if over:
                    return True
    finally:
        os.close(handle)
    return False


def _drain(pipe: int, kept: bytearray, most: int, came: list[bytes]) -> bool:
    """Read what is there; False at the end of the pipe. Beyond the bound it is thrown away, and
    `came` has it all.
    """
    for _ in range(64):  # a program that never stops writing must not keep us here
        try:
            part = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return True
        if not part:
            return False
        kept += part
        came.append(part)
        if most < 0:
            del kept[:most]
        else:
            del kept[most:]
    return True
