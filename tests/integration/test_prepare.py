"""The command of `prepare`: before what is stopped, in whose name, how often, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests.integration.daemon_world import process
from tests.integration.job_world import World, outcome, progress, simulated, web
from tests.support.waiting import until

pytestmark = pytest.mark.engine

A, P = "a-51000000", "p-51000000"


def script(job: World, *lines: str) -> Path:
    """/bin/sh with these lines, which begin with a line in `ran` for each run."""
    path = job.mic.home / "fetch"
    path.write_text("\n".join(["#!/bin/sh", f'echo "$@" >> {ran(job)}', *lines, ""]))
    path.chmod(0o755)
    return path


def ran(job: World) -> Path:
    return job.mic.home / "ran"


def runs(job: World) -> list[str]:
    return ran(job).read_text().splitlines() if ran(job).exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_is_run_before_anything_is_stopped_and_once(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    before = job.run_of(A)
    weights = job.mic.home / "weights"
    fetch = script(
        job,
        f"docker ps -q --no-trunc --filter id={before.id} >> {ran(job)}",
        "printf '\\r 10 %%'; sleep 3; printf '\\r 99 %%\\n'; sleep 1",
        f"mkdir -p {weights}; echo $TOKEN > {weights}/model; echo done",
    )
    mount = f"mounts: [{{source: {weights}, target: /weights, read_only: true}}]"
    first = f'prepare: [{fetch}, "${{model}}"]'
    job.write({0: "a"}, a=web(first))
    assert job.plan() == "No changes.\n", "it is not what runs"
    assert runs(job) == []

    job.write({0: "a"}, a=web(first, mount, "env: {TOKEN: s3cret}"))
    assert f"\n    runs {fetch} first\n" in job.plan()
    assert runs(job) == []
    told = progress(job.mic("apply", rc=0).stdout)
    assert f"{A}: prepare: “10 %”" in told
    assert f"{A}: prepare: “done”" in told
    assert runs(job) == ["a", before.id], "what served before runs meanwhile"
    assert (weights / "model").read_text() == "s3cret\n"
    after = job.run_of(A)
    assert after != before

    # Not again for the same: not by an apply, nor for a crash.
    job.unchanged()
    job.apply()
    os.kill(after.pid, signal.SIGKILL)
    until(lambda: not alive(after.pid), "its end")
    job.apply()
    assert job.run_of(A).id == after.id
    assert runs(job) == ["a", before.id]


def test_of_a_process_it_is_run_for_each_specification(job: World) -> None:
    fetch = script(job)
    job.write({0: "p"}, p=process(f"prepare: [{fetch}, one]"))
    job.mic.run()
    job.apply()
    assert runs(job) == ["one"]
    pid = job.instances()[P]["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: job.instances()[P]["pid"] not in (None, pid), "the next one")
    assert runs(job) == ["one"]
    job.write({0: "p"}, p=process(f"prepare: [{fetch}, two]", "working_dir: /tmp"))
    until(lambda: runs(job) == ["one", "two"], "the next preparation")
    job.apply()
    assert runs(job) == ["one", "two"]


def test_one_that_fails_blocks_and_is_tried_again(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    before = job.run_of(A)
    fetch = script(job, "echo no space; exit 3")
    job.write({0: "a"}, a=web(f"prepare: [{fetch}, x]", "env: {A: b}"))
    done = job.mic("apply", rc=1)
    why = f"cannot prepare: {fetch} exits with 3: “no space”"
    assert f"{A}: failed: {why}" in progress(done.stdout)
    assert job.run_of(A) == before
    assert f"backoff    {A}  GPU 0  http://127.0.0.1:PORT  {why}\n" in outcome(done.stdout)
    assert job.instances()[A]["serving"] is True
    script(job)
    job.mic("retry", "a", rc=0)
    assert runs(job) == ["x", "x"]
    assert job.run_of(A) != before

    job.write({0: "a"}, a=web("prepare: [/nowhere/fetch]", "env: {A: c}"))
    done = job.mic("apply", rc=1)
    assert "cannot prepare: /nowhere/fetch does not run: No such file or directory" in done.stdout


def test_it_is_ended_with_all_that_it_started(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.mic.run()
    job.apply()
    served = job.run_of(A)
    pids = job.mic.home / "pids"
    fetch = script(job, f"setsid sleep 600 & echo $! $$ > {pids}; echo 'half of it'; wait; sleep 9")

    def begun(before: list[int]) -> list[int]:
        def other() -> list[int]:
            now = [int(pid) for pid in pids.read_text().split()] if pids.exists() else []
            return now if len(now) == 2 and now != before else []

        return until(other, "its start")

    def ended(found: list[int]) -> None:
        until(lambda: not any(map(alive, found)), "the end of all of it")

    job.write({0: "a"}, a=web(f"prepare: [{fetch}]", "env: {A: b}"))
    found = begun([])
    until(lambda: "prepare: “half of it”" in str(job.instances()[A]["reason"]), "its line")
    assert job.instances()[A]["serving"] is True
    # Another specification, then the one that runs, then a pause, then the end of the daemon.
    job.write({0: "a"}, a=web(f"prepare: [{fetch}]", "env: {A: c}"))
    ended(found)
    found = begun(found)
    job.write({0: "a"}, a=web())
    ended(found)
    until(lambda: job.instances()[A]["phase"] == "ready", "what ran before")
    job.write({0: "a"}, a=web(f"prepare: [{fetch}]", "env: {A: d}"))
    found = begun(found)
    job.mic("pause", "a", rc=0)
    ended(found)
    job.write({0: "a"}, a=web(f"prepare: [{fetch}]", "env: {A: e}"))
    job.mic.daemons[-1].stop()
    assert job.run_of(A) == served
    # Its own time is over, too.
    job.mic("resume", "a", rc=0)
    job.write({0: "a"}, a=web(f"prepare: [{fetch}]", "prepare_timeout: 3s", "env: {A: f}"))
    done = job.mic("apply", rc=1)
    assert f"cannot prepare: {fetch} did not end within 3 s: “half of it”" in done.stdout
    ended([int(pid) for pid in pids.read_text().split()])
    assert job.run_of(A) == served


def test_a_daemon_that_ends_ends_it(job: World) -> None:
    pids = job.mic.home / "pids"
    fetch = script(job, f"sleep 600 & echo $! $$ > {pids}; wait")
    job.write({0: "a"}, a=web(f"prepare: [{fetch}]"))
    daemon = job.mic.run()
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "its start")
    found = [int(pid) for pid in pids.read_text().split()]
    assert daemon.stop(timeout=20) == 0
    until(lambda: not any(map(alive, found)), "the end of all of it")


def test_of_one_model_one_at_a_time(job: World) -> None:
    lock = job.mic.home / "lock"
    fetch = script(job, f"mkdir {lock} || exit 7", "sleep 0.5", f"rmdir {lock}")
    job.write({"0-2": "a"}, a=web(f'prepare: [{fetch}, "${{instance}}"]'))
    job.apply()
    assert sorted(runs(job)) == ["a-51000000", "a-51000001", "a-51000002"]


def test_it_has_the_model_s_user_directory_and_environment(job: World) -> None:
    home = Path(tempfile.mkdtemp(prefix="mic-prepare-"))  # where anybody may go
    try:
        home.chmod(0o777)
        fetch = home / "fetch"
        fetch.write_text('#!/bin/sh\necho "$(id -u) $PWD $COLOUR $HOLDS" > seen\n')
        fetch.chmod(0o755)
        keys = (f"prepare: [{fetch}]", "user: nobody", f"working_dir: {home}")
        text = process(*keys).replace("env: {", "env: {COLOUR: red, ")
        job.write({0: "p"}, p=text)
        job.apply()
        assert (home / "seen").read_text() == f"65534 {home} red {simulated(0)}\n"
        assert (home / "seen").stat().st_uid == 65534
    finally:
        shutil.rmtree(home)
