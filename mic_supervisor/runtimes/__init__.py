"""Runtimes start and stop workloads. They carry no decisions.

A runtime is blocking and thread-safe: the converger calls it from one thread per lane. Every call
is bounded in time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from mic_supervisor.model import Launch, ObservedWorkload, Pairs, RuntimeView

Progress = Callable[[str], None]
"""Takes one short line for a person: "pulling 41 %"."""


TIMED_OUT = 124
"""What `run_check` gives for a command that was ended at its deadline, as timeout(1) does."""

LONGEST_LINE = 1 << 20
"""Bytes; of a longer line the pieces count as lines."""


def lines(parts: Iterable[bytes], *, whole: bool = False) -> Iterator[str]:
    """A log's lines, however it is cut. Bytes that are not UTF-8 become U+FFFD.

    `whole`: a last line without an end is left out, and none is cut, however long.
    """
    rest = b""
    for part in parts:
        *complete, rest = (rest + part).split(b"\n")
        if len(rest) > LONGEST_LINE and not whole:
            complete, rest = [*complete, rest], b""
        yield from (_text(line) for line in complete)
    if rest and not whole:
        yield _text(rest)


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode(errors="replace")


class Runtime(Protocol):
    """One way to run workloads.

    Errors: RuntimeUnavailable when it cannot be reached, RuntimeRefused when it answered no,
    PreflightFailed and StopFailed as their names say. Nothing else leaves a runtime.
    """

    name: str
    """ "docker", "systemd" or "subprocess"; stands in every ObservedWorkload."""

    creates_ahead: bool
    """Whether `create` works while the predecessor still runs (a container: yes, a unit: no).

    Where it does not, `create` is never called and `start` does both.
    """

    def observe(self) -> RuntimeView:
        """Everything of ours, running or not, and the foreign workloads in our way.

        Never raises for an unreachable runtime: the view's `error` says so. One cheap call.
        """
        ...

    def prepare(self, launch: Launch, progress: Progress) -> None:
        """Make sure that all a start needs is there: pull the image, look for paths and programs.

        Changes nothing that runs. Idempotent; many lanes that want one image share one pull.
        """
        ...

    def create(self, launch: Launch) -> None:
        """Create without starting. A failure leaves nothing behind."""
        ...

    def start(self, launch: Launch) -> None:
        """Start what `create` made (or create and start, see `creates_ahead`).

        Starting what already runs is success. A failed first start leaves nothing behind.
        """
        ...

    def restart(self, workload: ObservedWorkload) -> None:
        """Start an ended workload again, as it is: same container, same specification."""
        ...

    def stop(self, workload: ObservedWorkload, *, signal: str, grace: float) -> None:
        """`signal`, at most `grace` seconds, then KILL for the whole tree; returns when it is gone.

        Stopping what does not run is success. Raises StopFailed if it is still there.
        """
        ...

    def remove(self, workload: ObservedWorkload) -> None:
        """Delete an ended workload and its logs. Removing what is not there is success."""
        ...

    def logs(
        self, workload: ObservedWorkload, *, tail: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Lines, oldest first, without line ends; `tail` None is all of them."""
        ...

    def previous_logs(
        self, workload: ObservedWorkload, *, tail: int | None = None
    ) -> Iterator[str]:
        """The log of the run before, where the runtime keeps it apart from the present one's.

        Raises RuntimeRefused where it does not, or where there was no run before.
        """
        ...

    def run_check(
        self, workload: ObservedWorkload, command: tuple[str, ...], timeout: float
    ) -> tuple[int, str]:
        """Run a command where the workload runs, for at most `timeout` seconds.

        (exit status, output); 124 when it took longer and was ended. Raises RuntimeRefused when
        the command cannot be run.
        """
        ...

    def events(self, stop: threading.Event) -> Iterator[str]:
        """A line for each thing that happens to a workload of ours, until `stop` is set.

        A hint to look, not a record: what happens while nobody listens is lost. Raises
        RuntimeUnavailable when the stream breaks.
        """
        ...


@runtime_checkable
class Images(Protocol):
    """What a runtime offers besides, whose workloads are made of images. Errors as of `Runtime`."""

    def registry_digest(self, image: str) -> str:
        """What the image's tag means in its registry now: "sha256:…". PreflightFailed where the
        registry does not say.
        """
        ...

    def digests(self, image: str) -> tuple[str, ...]:
        """What an image that is here, by its name or id, is in registries; none where it is not."""
        ...

    def pull(self, image: str, progress: Progress) -> None:
        """Make the image's tag mean here what it means in its registry."""
        ...


@dataclass(frozen=True, slots=True)
class HostCommand:
    """A program of this machine and its arguments, to be run to its end. `timeout` is in seconds.

    Of an `instance` one runs at a time.
    """

    instance: str
    command: tuple[str, ...]
    env: Pairs = field(repr=False)
    user: str | None
    directory: str
    timeout: float


@runtime_checkable
class HostCommands(Protocol):
    """What a runtime of host processes offers besides."""

    def run_command(
        self, what: HostCommand, progress: Progress, given_up: Callable[[], bool]
    ) -> None:
        """Run it to its end; `progress` gets what it prints, its last line every half a second.

        Past its time, and once it is `given_up`, which is asked as often, it is ended with all that
        it started. Raises Withdrawn for the second, and PreflightFailed unless it exits with 0.
        """
        ...
