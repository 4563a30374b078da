"""The run of `make soak`: prints the figures; exits with 1 where something grows.

With --write they go to docs/reliability.md, with a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path

import docker

from tests.integration.daemon_world import DaemonWorld, container, daemon_world, identity, process
from tests.soak.measure import Look, grown, look, trends
from tests.support import reliability, scopes
from tests.support.waiting import until

GPUS = 4
NAMES = [identity("c", 0), identity("c", 1), identity("p", 2), identity("p", 3)]
PLOT = reliability.PAGE.with_name("soak.png")
LOOK_EVERY = 10.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long (3600)")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between crashes (3)")
    parser.add_argument("--write", action="store_true", help=f"to {reliability.PAGE.name}")
    given = parser.parse_args()
    engine = docker.from_env(timeout=60).api
    with (
        tempfile.TemporaryDirectory(prefix="mic-soak-") as home,
        daemon_world(Path(home), engine, gpus=GPUS) as world,
    ):
        looks = soak(world, given.seconds, given.every)
    lines = table(looks)
    print("\n".join(lines))
    if given.write:
        draw(looks)
        reliability.write("soak", [*lines, "", f"![What was measured]({PLOT.name})"])
    if found := grown(looks):
        sys.exit("; ".join(found))


def soak(world: DaemonWorld, seconds: float, every: float) -> list[Look]:
    """Kills one instance after the other, and has it started again at once: a person who says
    `retry` ends the backoff that so many ends have.
    """
    world.write({0: "c", 1: "c", 2: "p", 3: "p"}, c=container("stop_timeout: 2s"), p=process())
    daemon = world.mic.run()
    world.converged(*NAMES, timeout=60)
    begun, crashes, looks = time.monotonic(), 0, list[Look]()

    def note() -> None:
        assert world.engine is not None
        records = [*(world.mic.run_dir / "processes").rglob("record.json")]
        looks.append(
            look(
                daemon.pid,
                time.monotonic() - begun,
                crashes,
                log=daemon.log,
                state=world.mic.state_dir,
                run=world.mic.run_dir,
                left=len(scopes.containers(world.engine, world.mic.scope)) + len(records),
            )
        )

    for name in cycle(NAMES):
        due = time.monotonic() + every
        before = world.marks()
        os.kill(before[name][2], signal.SIGKILL)
        crashes += 1
        is_back = partial(back, world, name, before[name][2])
        # Each look costs the daemon an answer, and that is no part of the crash.
        until(is_back, f"{name} to be back", timeout=60, period=0.5)
        if not looks or time.monotonic() - begun >= looks[-1].seconds + LOOK_EVERY:
            note()
            print(json.dumps(asdict(looks[-1])), flush=True)
        if time.monotonic() - begun >= seconds:
            break
        time.sleep(max(0.0, due - time.monotonic()))
    assert daemon.process.poll() is None
    return looks


def back(world: DaemonWorld, name: str, dead: int) -> bool:
    row = world.rows()[name]
    if row["phase"] == "backoff":
        world.mic.ask("retry", timeout=1, name=name)
    marks = world.marks()
    return row["phase"] == "unprobed" and name in marks and marks[name][2] != dead


def table(looks: Sequence[Look]) -> list[str]:
    last = looks[-1]
    return [
        *reliability.where(),
        f"{last.crashes} crashes in {last.seconds / 60:.0f} minutes, of two containers and two "
        "host processes in turn.",
        "",
        "| What | Second quarter | Last quarter | Slope per hour | May grow by |",
        "|---|---|---|---|---|",
        *(
            f"| {one.name}{f', {one.unit}' if one.unit else ''} | {one.first:.1f} | "
            f"{one.last:.1f} | {one.slope:+.1f} | {one.allowed:.1f} |"
            for one in trends(looks)
        ),
        f"| history, lines at most | | {max(one.history for one in looks)} | | 2000 in all |",
    ]


def draw(looks: Sequence[Look]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [one.seconds / 60 for one in looks]
    shown = {
        "memory, MiB": [one.memory / (1 << 20) for one in looks],
        "open files": [one.files for one in looks],
        "threads": [one.threads for one in looks],
        "processor time, s": [one.cpu for one in looks],
        "history, lines": [one.history for one in looks],
        "log, KiB": [one.log / 1024 for one in looks],
    }
    figure, axes = pyplot.subplots(3, 2, figsize=(9, 7), sharex=True)
    for axis, (name, values) in zip(axes.flat, shown.items(), strict=True):
        axis.plot(minutes, values, linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel(f"minutes, {looks[-1].crashes} crashes")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
