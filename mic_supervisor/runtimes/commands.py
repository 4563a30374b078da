"""Commands of the host that are run to their end, as `prepare` is, for both process runtimes.

What such a command prints is its progress: of a bar that is drawn over and over the last state.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from mic_supervisor.errors import PreflightFailed, Withdrawn
from mic_supervisor.host import processes, programs
from mic_supervisor.runtimes import TIMED_OUT, HostCommand, Progress, checks
from mic_supervisor.text import one_line, quoted

POLL = 0.5  # seconds between two lines that are shown, and two looks at whether it is given up
END_TIMEOUT = 1.0  # seconds from TERM to KILL
_MOST = 4096  # bytes of its output that are kept
_LONGEST = 200  # characters of a line


class Output:
    """What a command has printed so far, the end of it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._kept = b""
        self._shown = ""

    def add(self, part: bytes) -> None:
        self._kept = (self._kept + part)[-_MOST:]

    @property
    def last(self) -> str:
        """The last line that is not empty, "" where there is none."""
        lines = self._kept.replace(b"\r", b"\n").split(b"\n")
        found = (line.decode(errors="replace").strip() for line in reversed(lines))
        return one_line(next(filter(None, found), ""), _LONGEST)

    def show(self) -> None:
        """Pass the last line on, if it is another one."""
        if (last := self.last) != self._shown:
            self._shown = last
            self._progress(f"prepare: {quoted(last)}")


def check_verdict(what: HostCommand, code: int, output: Output) -> None:
    """Raises PreflightFailed unless it exited with 0; 124 is TIMED_OUT."""
    if code == 0:
        return
    how = f"exits with {code}"
    if code > 128:
        how = f"was {checks.ended_by(code - 128)}"
    elif code == TIMED_OUT:
        how = f"did not end within {what.timeout:g} s"
    said = f": {quoted(output.last)}" if output.last else ""
    raise PreflightFailed(
        f"cannot prepare: {what.command[0]} {how}{said}",
        hint=f"see to what it needs, then: mic-supervisor retry {what.instance}",
    )


def withdrawn(what: HostCommand) -> Withdrawn:
    return Withdrawn(f"gave up {what.command[0]}: it is not wanted any more, or we end")


def run(what: HostCommand, progress: Progress, given_up: Callable[[], bool], *, scope: str) -> None:
    """As a child of this process. See HostCommands.

    A supervisor that was killed has left the one that it ran, which would do the same beside this.
    """
    who, nonce, output = checks.account(what.user), f"{scope}/{what.instance}", Output(progress)
    checks.end_all(nonce)
    over = False
    again = 0.0

    def watch(part: bytes) -> bool:
        nonlocal again, over
        output.add(part)
        if (now := time.monotonic()) >= again:
            again = now + POLL
            output.show()
            over = given_up()
        return not over

    def end(process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + END_TIMEOUT
        while time.monotonic() < deadline:
            # It is not waited for: its PID is its own until then.
            if (own := processes.stat(process.pid)) is None or not own.running:
                break
            time.sleep(0.02)
        checks.end_all(nonce, process.pid)

    env = {**checks.environment(what, who), checks.CHECK_ID: nonce}
    try:
        done = programs.run(
            what.command,
            what.timeout,
            env=env,
            cwd=what.directory,
            end=end,
            watch=watch,
            wake=POLL,
            **checks.as_account(who),
        )
    except OSError as error:
        raise PreflightFailed(
            f"cannot prepare: {what.command[0]} does not run: {error.strerror or error}",
            hint=f"it must be there, and executable for {what.user or 'this user'}",
        ) from error
    if over:
        raise withdrawn(what)
    output.show()
    code = TIMED_OUT if done.code is None else done.code
    check_verdict(what, 128 - code if code < 0 else code, output)
