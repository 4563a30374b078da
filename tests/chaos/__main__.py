"""The run of `make chaos`: prints each storm, and the seed; exits with 1 where something fails."""

from __future__ import annotations

import argparse
import random
import sys

import docker

from tests.chaos.play import play
from tests.support import reliability


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long (1800)")
    parser.add_argument("--seed", type=int, help="of a run to be repeated; else another each time")
    parser.add_argument("--write", action="store_true", help=f"to {reliability.PAGE.name}")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    engine = docker.from_env(timeout=60).api
    try:
        outcome = play(engine, seed, given.seconds)
    except AssertionError as error:
        print("\n".join([f"failed: {error}", *getattr(error, "__notes__", [])]))
        sys.exit(f"repeat it: python -m tests.chaos --seed {seed}")
    print("\n".join(outcome.lines()))
    if given.write:
        reliability.write("chaos", [*reliability.where(), "", *outcome.lines()])


if __name__ == "__main__":
    main()
