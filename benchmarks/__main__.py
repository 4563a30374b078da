"""The run of `make bench`: prints the tables; exits with 1 where a target was missed, or a try
came to no end.

With --write they go to docs/benchmarks.md, each section with date, machine and commit.
"""

from __future__ import annotations

import argparse
import compileall
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError

from docker.errors import DockerException

import mic_supervisor
from benchmarks import changes, demo_tour, growth, idle, killed, slow_clients, starts
from benchmarks._common import Options, alone_here
from benchmarks.sheets import Outcome
from tests.support import reliability

PAGE = reliability.PAGE.with_name("benchmarks.md")
MEASUREMENTS: dict[str, Callable[[Options], Outcome]] = {
    "no-change": changes.measure,
    "dry-run": changes.measure,
    "one-change": changes.measure,
    "status": changes.measure,
    "beside": changes.beside,
    "killed": killed.measure,
    "starts": starts.measure,
    "tritons": starts.measure,
    "idle": idle.measure,
    "scrape": idle.measure,
    "slow-clients": slow_clients.measure,
    "growth": growth.measure,
    "demo": demo_tour.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    usual = Options(frozenset(MEASUREMENTS))
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, default=[*MEASUREMENTS], help="which (all)"
    )
    parser.add_argument(
        "--containers", nargs="+", type=int, default=usual.sizes, help="how many instances (8 64)"
    )
    parser.add_argument("--tries", type=int, default=usual.tries, help=f"({usual.tries})")
    parser.add_argument("--beside", type=int, default=usual.beside, help="unrelated ones (500)")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="of idleness (30)")
    parser.add_argument("--write", action="store_true", help=f"to {PAGE.name}")
    given = parser.parse_args()
    options = Options(
        frozenset(given.only), tuple(given.containers), given.tries, given.beside, given.seconds
    )
    missed = []
    with alone_here():
        compileall.compile_dir(Path(mic_supervisor.__file__).parent, quiet=1)
        for measure in dict.fromkeys(MEASUREMENTS[name] for name in given.only):
            begun = time.monotonic()
            try:
                outcome = measure(options)
            except (AssertionError, DockerException, OSError, CalledProcessError) as error:
                traceback.print_exc()  # the others are measured all the same
                missed.append(f"{measure.__module__}: {type(error).__name__}: {error}")
                continue
            for section in outcome.sections():
                lines = outcome.lines(section)
                print("\n".join([f"## {section}", "", *lines]), flush=True)
                if given.write:
                    reliability.write(section, [*reliability.where(), "", *lines], PAGE)
            missed += [str(one) for one in outcome.targets if one.missed]
            print(f"({time.monotonic() - begun:.0f} s)\n", flush=True)
    if missed:
        sys.exit("\n".join(["missed:", *missed]))


if __name__ == "__main__":
    main()
