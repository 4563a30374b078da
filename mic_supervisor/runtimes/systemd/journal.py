"""The journal of a unit as lines, by journalctl(1): its format on disk has no other reader here."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mic_supervisor import codec
from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.host import programs
from mic_supervisor.runtimes import lines
from mic_supervisor.text import quoted

_PROGRAM = "journalctl"
_QUIETLY = (_PROGRAM, "--quiet", "--no-pager")
_SHORT = 10.0  # seconds for a question with a short answer
_SYNC = 3.0  # seconds for journald to write what it was sent
_QUIET = 0.5  # seconds without a line until the unit is looked at
_SILENCE = 60.0  # seconds without a line until it has failed, where nothing is followed
_BLOCK = 1 << 16
_JOURNALS = ("/var/log/journal", "/run/log/journal")

# sd-messages.h, SD_MESSAGE_SPAWN_FAILED
_SPAWN_FAILED = "641257651c1b4ec9a8624d7a40a9e1e7"
_STEP = re.compile(r"Failed at step (\S+) spawning (.+?): (.+)$")


def read(
    what: str,
    invocation: str,
    *,
    tail: int | None,
    follow: bool = False,
    ended: Callable[[], bool] = lambda: True,
) -> Iterator[str]:
    """Lines of one run. With `follow` it goes on until `ended` says so and everything was read.

    Who follows may lag behind the journal. So what is left at the end is asked for by the cursor
    of the last line that came.

    Raises RuntimeRefused, "cannot WHAT: …".
    """
    sync()
    run = f"_SYSTEMD_INVOCATION_ID={invocation}"
    arguments = [
        *("--follow", "--output=json", "--output-fields=MESSAGE") * follow,
        *("--output=cat",) * (not follow),
        *("--all", f"--lines={'all' if tail is None else max(tail, 0)}", run),
    ]
    seen, timeout, cursor = False, 0.0, ""
    with _open(what, arguments) as process:
        assert process.stderr is not None
        try:
            for line in lines(_parts(process, ended if follow else None), whole=follow):
                seen = True
                if not follow:
                    yield line
                elif (entry := _entry(line)) is not None:
                    cursor, text = entry
                    yield text
            timeout = _QUIET  # at the end of its output it is about to end
        finally:
            over = _has_ended(process, timeout)
            said = _last(process.stderr.read())
    if not seen and not _may_read():
        raise RuntimeRefused(
            f"cannot {what}: the journal may not be read by this user",
            hint="run as root, or as a member of the group systemd-journal",
        )
    if not follow and not over:
        raise RuntimeRefused(f"cannot {what}: the journal gave no answer in {_SILENCE:g} s")
    if over and process.returncode:
        raise RuntimeRefused(f"cannot {what}: {quoted(said) if said else f'{_PROGRAM} failed'}")
    if cursor:
        rest = _ask(what, "--output=cat", "--all", f"--after-cursor={cursor}", run)
        yield from lines([rest.encode()])
    elif follow:
        yield from read(what, invocation, tail=tail)


def previous(what: str, scope: str, instance: str, before: float) -> str | None:
    """The run, by invocation, of an instance's last line before the time `before`.

    Whatever its unit was called: it is found by the fields that every unit of ours logs.
    """
    sync()
    found = _ask(
        what,
        *("--output=json", "--output-fields=_SYSTEMD_INVOCATION_ID", "--reverse", "--lines=1"),
        f"--until=@{before:.6f}",
        *(f"MIC_SCOPE={scope}", f"MIC_INSTANCE={instance}"),
    )
    for line in found.splitlines():
        run = _fields(line).get("_SYSTEMD_INVOCATION_ID")
        if isinstance(run, str):
            return run
    return None


def spawn_failure(unit: str, invocation: str) -> str | None:
    """What PID 1's child said when it could not execute the program; None: nothing was found."""
    sync()
    try:
        text = _ask(
            "read the journal",
            *("--output=cat", "--reverse", "--lines=1", f"MESSAGE_ID={_SPAWN_FAILED}"),
            *(f"UNIT={unit}", f"INVOCATION_ID={invocation}"),
        )
    except RuntimeRefused:
        return None  # it only adds to what is known
    match = _STEP.search(text.strip())
    return f"{match[2]}: {match[3]} (step {match[1]})" if match else None


def last_words(invocation: str) -> str | None:
    """The last line that a run, or what came before its program, has written."""
    try:
        last = [*read("read the journal", invocation, tail=1)]
    except RuntimeRefused:
        return None  # it only adds to what is known
    return quoted(last[-1]) if last else None


def sync() -> None:
    """Have journald write what it was sent; what it does not do in time is read a moment later."""
    with suppress(OSError):  # whoever reads it next will tell
        programs.run([_PROGRAM, "--sync"], _SYNC)  # only root may ask for it


def _may_read() -> bool:
    if os.geteuid() == 0:
        return True
    directories = [path for path in map(Path, _JOURNALS) if path.is_dir()]
    return any(
        os.access(file, os.R_OK) for path in directories for file in path.glob("*/system.journal")
    )


def _open(what: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [*_QUIETLY, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
        )
    except OSError as error:
        raise RuntimeRefused(f"cannot {what}: {_PROGRAM}: {error.strerror}") from error


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _ask(what: str, *arguments: str) -> str:
    try:
        done = programs.run([*_QUIETLY, *arguments], _SHORT, env=_environment(), apart=True)
    except OSError as error:
        raise RuntimeRefused(f"cannot {what}: {_PROGRAM}: {error.strerror}") from error
    if done.code is None:
        raise RuntimeRefused(f"cannot {what}: the journal gave no answer in {_SHORT:g} s")
    if done.code:
        raise RuntimeRefused(f"cannot {what}: {_last(done.errors) or f'{_PROGRAM} failed'}")
    return done.output.decode(errors="replace")


def _has_ended(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Whether it ended by itself within `timeout` seconds; it is killed where it did not."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        return False
    return True


def _last(said: bytes) -> str:
    return said.decode(errors="replace").strip().rpartition("\n")[2]


def _fields(line: str) -> dict[str, Any]:
    """An entry as journalctl writes it; empty where the line is none, cut as it may be."""
    with suppress(codec.BadDocument):
        found = codec.parse(line)
        if isinstance(found, dict):
            return found
    return {}


def _entry(line: str) -> tuple[str, str] | None:
    """The cursor and the text of an entry; None: the line is none."""
    found = _fields(line)
    cursor = found.get("__CURSOR")
    return (cursor, _text(found.get("MESSAGE"))) if isinstance(cursor, str) else None


def _text(value: Any) -> str:
    """A field's value: a list of its bytes where it is not UTF-8, a list of such where it came more
    than once, nothing where it was too large.
    """
    if isinstance(value, list):
        if all(isinstance(one, int) and 0 <= one < 256 for one in value):
            value = bytes(value).decode(errors="replace")
        else:
            value = " ".join(_text(one) for one in value)
    return value.removesuffix("\r") if isinstance(value, str) else ""


def _parts(process: subprocess.Popen[bytes], ended: Callable[[], bool] | None) -> Iterator[bytes]:
    """Its output until the end; with `ended`, until that, asked while it is quiet."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    last_output = time.monotonic()
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_READ)
        while True:
            if waiting.select(_QUIET):
                if not (part := os.read(pipe, _BLOCK)):
                    return
                last_output = time.monotonic()
                yield part
            elif ended is None:
                if time.monotonic() - last_output >= _SILENCE:
                    return
            elif ended():
                sync()
                return
