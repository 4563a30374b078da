"""What a plan costs when there is nothing to do, against the least that it could cost.

`mic-supervisor plan` with 8 running containers, against a fresh interpreter that imports the Docker
SDK and makes one list call. Both are processes of their own, as in a shell.

    python -m benchmarks.plan_no_change [TRIES]
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks._common import Target, alternating, installed, judge, machine, median, times
from tests.integration.job_world import LABEL, web
from tests.support.mic import PROGRAM

TARGET = 1.5
LIST = """\
import sys
from docker import APIClient
api = APIClient(base_url=sys.argv[1])
assert len(api.containers(all=True, filters={"label": sys.argv[2]})) == 8
"""
IMPORT = "from docker import APIClient"


def main(tries: int) -> None:
    with machine("mic-test/busybox:1", gpus=8) as job:
        job.write({"0-7": "a"}, a=web())
        job.apply()
        environment = installed(job.mic.environment(), job.mic.home / "bytecode")
        engine = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        label = f"{LABEL}scope={job.mic.scope}"

        def run(*command: object) -> str:
            done = subprocess.run(
                [str(word) for word in command],
                env=environment,
                cwd=job.mic.home,
                check=True,
                capture_output=True,
                text=True,
            )
            return done.stdout

        def plan() -> None:
            printed = run(PROGRAM, "plan")
            assert printed == "No changes.\n", printed

        taken = alternating(
            tries,
            {
                "mic-supervisor plan": plan,
                "Docker SDK, one list": lambda: run(sys.executable, "-c", LIST, engine, label),
                "Docker SDK, import alone": lambda: run(sys.executable, "-c", IMPORT),
                "mic-supervisor --version": lambda: run(PROGRAM, "--version"),
                "python -c pass": lambda: run(sys.executable, "-c", "pass"),
            },
        )
    base = median(taken["Docker SDK, one list"])
    title = f"A plan without changes, 8 running containers, {tries} tries each"
    times(title, taken, base, "ratio")
    judge(Target("ratio", median(taken["mic-supervisor plan"]) / base, TARGET))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
