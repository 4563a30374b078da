"""The run of `make fuzz`: each target for the same part of the time, guided by what is reached.

    python -m tests.fuzz [--seconds 600] [TARGET ...]

Each target has a process of its own. What makes one raise is kept in tests/corpus/fuzz/TARGET/,
where the unit tests find it, and the end is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import FOUND, TARGETS, found

_PARSERS = ("mic_supervisor", "yaml")  # what is followed; pydantic's core is no Python


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=600, help="for all of them (600)")
    given = parser.parse_args()
    names = given.targets or [*TARGETS]
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(unknown)}: they are {', '.join(TARGETS)}")
    failed = [name for name in names if not fuzz(name, max(1, given.seconds // len(names)))]
    if failed:
        sys.exit(f"found in {', '.join(failed)}: see {FOUND}")
    print("nothing was found")


def fuzz(name: str, seconds: int) -> bool:
    """Whether nothing was found."""
    (FOUND / name).mkdir(parents=True, exist_ok=True)
    before = found(name)
    with tempfile.TemporaryDirectory(prefix="mic-fuzz-") as corpus:
        for number, data in enumerate(TARGETS[name].seeds()):
            (Path(corpus) / f"{number:04}").write_bytes(data)
        print(f"{name}: {seconds} s", flush=True)
        done = subprocess.run(
            [
                *(sys.executable, "-c", _ONE, name, corpus),
                *(f"-max_total_time={seconds}", f"-artifact_prefix={FOUND / name}/"),
                *("-timeout=20", "-rss_limit_mb=2048", "-verbosity=0", "-print_final_stats=1"),
            ],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    lines = [line for line in done.stdout.splitlines() if "executed_units" in line]
    print("  " + "; ".join(lines or [f"exit {done.returncode}"]), flush=True)
    if done.returncode:
        print(done.stdout[-6000:])
    if not found(name):
        (FOUND / name).rmdir()
    return done.returncode == 0 and found(name) == before


_ONE = f"""
import sys
import atheris
with atheris.instrument_imports(include={_PARSERS!r}):
    from tests.fuzz.targets import TARGETS
run = TARGETS[sys.argv[1]].run
atheris.Setup([sys.argv[0], *sys.argv[2:]], run)
atheris.Fuzz()
"""

if __name__ == "__main__":
    main()
