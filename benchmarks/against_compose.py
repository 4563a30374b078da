"""What a look costs with 8 containers and nothing to do, beside Docker Compose v2.

`docker compose up -d` of 8 unchanged services, `mic-supervisor plan` and `status` through a daemon,
and `plan` without one. All are processes of their own, and take turns.

    python -m benchmarks.against_compose [TRIES]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks._common import Target, alternating, installed, judge, machine, median, times
from tests.integration.job_world import web
from tests.setup.peers import compose
from tests.setup.steps import Missing
from tests.support.mic import PROGRAM

TARGET = 1.3  # through a daemon, of Compose's time
ALONE = 0.5  # seconds


def services(home: Path) -> Path:
    one = "{image: mic-test/busybox:1, command: [sleep, '3600'], stop_grace_period: 0s}"
    lines = [f"  s{number}: {one}" for number in range(8)]
    path = home / "compose.yaml"
    path.write_text("services:\n" + "\n".join(lines) + "\n")
    return path


@contextmanager
def composed(program: Path, home: Path, project: str) -> Iterator[list[str]]:
    """The command that brings 8 services up; they are up already, and gone afterwards."""
    command = [str(program), "-p", project, "-f", str(services(home))]
    try:
        subprocess.run([*command, "up", "-d"], check=True, capture_output=True)
        yield [*command, "up", "-d"]
    finally:
        subprocess.run([*command, "down"], check=True, capture_output=True)


def main(tries: int) -> None:
    try:
        program = compose()
    except Missing as error:
        sys.exit(f"cannot measure: {error}; {error.hint}")
    with machine("mic-test/busybox:1", gpus=8) as job:
        job.write({"0-7": "a"}, a=web())
        job.apply()
        environment = installed(job.mic.environment(), job.mic.home / "bytecode")

        def run(*command: object, socket: bool = True) -> None:
            words = [str(word) for word in command]
            env = environment if socket else {**environment, "MIC_SOCKET": "/nowhere/mic.sock"}
            subprocess.run(words, env=env, cwd=job.mic.home, check=True, capture_output=True)

        daemon = job.mic.run()
        try:
            with composed(program, job.mic.home, f"{job.mic.scope}-peer") as up:
                taken = alternating(
                    tries,
                    {
                        "docker compose up -d": lambda: run(*up),
                        "plan, through a daemon": lambda: run(PROGRAM, "plan"),
                        "status, through a daemon": lambda: run(PROGRAM, "status"),
                        "plan, without a daemon": lambda: run(PROGRAM, "plan", socket=False),
                        "mic-supervisor --version": lambda: run(PROGRAM, "--version"),
                    },
                )
        finally:
            daemon.stop()
    base = median(taken["docker compose up -d"])
    times(f"Nothing to do, 8 running containers, {tries} tries each", taken, base, "ratio")
    through = max(median(taken[f"{one}, through a daemon"]) / base for one in ("plan", "status"))
    alone = median(taken["plan, without a daemon"])
    judge(
        Target("through a daemon, of Compose's time", through, TARGET),
        Target("without a daemon", alone, ALONE, " s"),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
