"""mic-supervisor demo"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from types import FrameType

    from mic_supervisor.demo.screen import Screen
    from mic_supervisor.demo.world import World


@click.command(name="demo")
@click.option("--once", is_flag=True, help="End after the tour, with 0 if every step worked.")
def command(once: bool) -> int:
    """A guided tour on four simulated GPUs, with a small model server for each model.

    Everything is real but the GPUs and the models: the same commands, daemon and processes. It
    needs no root, no Docker and no GPU, uses a scope, directories and ports of its own, and removes
    all of it at the end. After the tour it stays up until Ctrl-C.
    """
    from mic_supervisor.demo.screen import Screen
    from mic_supervisor.demo.tour import Tour
    from mic_supervisor.demo.world import World

    screen = Screen()
    with _ended_by_signals():
        world = World()
        began = time.monotonic()
        try:
            Tour(world, screen).play()
            seconds = time.monotonic() - began
            if not once:
                _stay(world, screen)
        finally:
            world.close()
    screen.say("")
    screen.say(f"The tour took {seconds:.1f} s. Everything of the demo is removed.")
    return 0


def _stay(world: World, screen: Screen) -> None:
    """Show what the daemon logs, until Ctrl-C or SIGTERM."""
    screen.heading("Your turn")
    screen.say(f"The daemon keeps running, and shows itself at {world.url}/")
    screen.say("In another terminal:")
    screen.say("")
    screen.say(f"  . {world.env}")
    screen.say("  mic-supervisor status")
    screen.say(f"  $EDITOR {world.config}")
    screen.say("")
    screen.say("What the daemon does about it is shown here. Ctrl-C ends the demo.")
    screen.say("")
    try:
        with world.daemon_log.open(errors="replace") as log:
            log.seek(0, 2)
            while True:
                text = log.read()
                if text:
                    screen.output(text)
                elif not world.daemon_runs:
                    screen.say("The daemon has ended. The models run until Ctrl-C.")
                    signal.pause()
                else:
                    time.sleep(0.2)
    except (KeyboardInterrupt, _Ended):
        screen.say("")


class _Ended(SystemExit):
    """SIGTERM or SIGHUP."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: with everything removed."""

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise _Ended(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers[:2]:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stdout.flush()
