"""Containers that do not start, do not stay, do not get ready or do not stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime

import docker
import pytest

from tests.integration.job_world import World, outcome, progress, server, web, world
from tests.support.waiting import http, until

pytestmark = pytest.mark.engine

# Runs, and is asked for something that it does not have.
NEVER = web("start_timeout: 5s", "env: {STEP: never}").replace(
    "{http: /health}", "{http: /nope, period: 200ms}"
)
GOOD = "ready      good-51000003  GPU 3  http://127.0.0.1:PORT\n"


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    busybox_image: str,
    server_image: str,
) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("job"), engine) as made:
        yield made


@pytest.fixture
def good(job: World) -> Iterator[World]:
    """`good` on GPU 3, ready; it stays untouched through the test."""
    job.models.clear()
    job.write({3: "good"}, good=web())
    job.apply()
    before = job.runs()
    assert set(before) == {"good-51000003"}
    yield job
    assert job.runs()["good-51000003"] == before["good-51000003"]


def test_a_container_that_exits_at_once(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=server(EXIT_UNLESS="/never", EXIT_CODE=7))
    begun = time.monotonic()
    done = good.mic("apply", rc=3)
    assert time.monotonic() - begun < 50  # a start may take 60 s
    assert outcome(done.stdout) == (
        f"backoff    a-51000000  GPU 0  it exited with 7\n{GOOD}Apply: 1 as desired, 1 not.\n"
    )
    told = progress(done.stdout)
    # The first failure is answered at once, the second with backoff.
    assert told.count("a-51000000: start: it exited with 7") == 1
    assert told[-1] == "a-51000000: backoff: it exited with 7"
    # One container, started twice: a crash starts the same one again.
    assert len(good.all("a-51000000")) == 1
    assert good.mic("logs", "a-51000000", rc=0).stdout.count("exiting with 7\n") == 2


def test_a_container_that_is_killed_for_its_memory_says_so(good: World) -> None:
    hungry = web("limits: {memory: 8m}").replace("mkdir -p /w", "sleep 0.2; tail /dev/zero")
    good.write({0: "a", 3: "good"}, a=hungry)
    done = good.mic("apply", rc=3)
    cause = "it used more memory than its limit and was killed"
    assert outcome(done.stdout) == (
        f"backoff    a-51000000  GPU 0  {cause}\n{GOOD}Apply: 1 as desired, 1 not.\n"
    )
    assert progress(done.stdout).count(f"a-51000000: start: {cause}") == 1


def test_the_time_of_the_next_try(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=server(EXIT_UNLESS="/never", EXIT_CODE=7))
    document = good.mic("apply", "--json", rc=3).json()
    row = document["instances"][0]
    assert (row["phase"], row["health"], row["restarts"]) == ("backoff", "unhealthy", 1)
    (container,) = good.all("a-51000000")
    ended = container["State"]["FinishedAt"]
    assert row["next_retry"] - datetime.fromisoformat(f"{ended[:19]}+00:00").timestamp() >= 5
    # It is down since its start, and not since its last try.
    assert row["next_retry"] - row["since"] > 5.5
    (blocked,) = document["remaining"]["blocked"]
    assert blocked["until"] == row["next_retry"]
    at = time.strftime("%H:%M:%S", time.localtime(row["next_retry"]))
    assert blocked["reason"] == f"backoff: it exited with 7; next try at {at}"


def test_whoever_calls_apply_asks_for_a_try_now(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=server(EXIT_UNLESS="/mnt/go", EXIT_CODE=5))
    good.apply(rc=3)
    good.write(
        {0: "a", 3: "good"},
        a=server(f"mounts: [{{source: {good.mic.home}, target: /mnt}}]", EXIT_UNLESS="/mnt/go"),
    )
    good.apply(rc=3)
    (good.mic.home / "go").touch()
    assert good.apply() == (
        "ready      a-51000000  GPU 0  http://127.0.0.1:PORT\n" + GOOD + "Apply: 2 as desired.\n"
    )
    (good.mic.home / "go").unlink()


def test_a_container_that_never_gets_ready(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=NEVER)
    done = good.mic("apply", rc=3)
    assert outcome(done.stdout) == (
        "backoff    a-51000000  GPU 0  http://127.0.0.1:PORT  "
        "not up within 5 s: GET /nope answers 404\n"
        f"{GOOD}Apply: 1 as desired, 1 not.\n"
    )
    assert len(good.all("a-51000000")) == 1


def test_a_replacement_that_never_gets_ready_is_rolled_back(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=web())
    good.apply()
    before = good.runs()["a-51000000"]
    good.write({0: "a", 3: "good"}, a=NEVER)
    done = good.mic("apply", rc=3)
    why = "the new specification failed (not up within 5 s: GET /nope answers 404)"
    assert outcome(done.stdout) == (
        f"degraded   a-51000000  GPU 0  http://127.0.0.1:PORT  {why}; the last good one runs, "
        "and is ready\n"
        "    hint: change the file, or: mic-supervisor retry a-51000000\n"
        f"{GOOD}Apply: 1 as desired, 1 not.\n"
    )
    assert [line for line in progress(done.stdout) if "rollback" in line] == [
        "a-51000000: start: rollback: not up within 5 s: GET /nope answers 404"
    ]
    after = good.runs()["a-51000000"]
    assert after.id == before.id
    assert after.started_at != before.started_at
    row = good.instances()["a-51000000"]
    assert (row["phase"], row["sync"], row["health"]) == ("degraded", "out_of_sync", "degraded")
    assert row["serving"] is True
    good.mic("status", rc=3)
    assert good.plan() == (
        f"! blocked  a-51000000 on GPU 0: {why}; the last good one runs\n"
        "    hint: change the file, or: mic-supervisor retry a-51000000\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    good.write({0: "a", 3: "good"}, a=web())
    good.unchanged()
    assert good.runs()["a-51000000"] == after


def test_a_replacement_that_crashes_is_rolled_back(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=web())
    good.apply()
    before = good.runs()["a-51000000"]
    good.write({0: "a", 3: "good"}, a=server(EXIT_UNLESS="/never", EXIT_CODE=3))
    text = good.apply(rc=3)
    assert text.splitlines()[0] == (
        "degraded   a-51000000  GPU 0  http://127.0.0.1:PORT  the new specification failed "
        "(it exited with 3); the last good one runs, and is ready"
    )

    assert good.runs()["a-51000000"].id == before.id
    assert "exiting with 3" in good.mic("logs", "--previous", "a-51000000", rc=0).stdout


def test_without_rollback_the_new_one_is_kept(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=web())
    good.apply()
    before = good.runs()["a-51000000"]
    good.write({0: "a", 3: "good"}, a=f"{NEVER[:-1]}, rollout: {{rollback: false}}}}")
    text = good.apply(rc=3)
    assert text.splitlines()[0] == (
        "backoff    a-51000000  GPU 0  http://127.0.0.1:PORT  "
        "not up within 5 s: GET /nope answers 404"
    )
    assert good.runs()["a-51000000"].id != before.id


def test_a_replacement_that_cannot_be_made_stops_nothing(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=web())
    good.apply()
    before = good.runs()
    good.write({0: "a", 3: "good"}, a=web("mounts: [{source: /nonexistent, target: /w}]"))
    good.apply(rc=3)
    assert good.runs() == before
    good.write({0: "b", 3: "good"}, b=web("mounts: [{source: /nonexistent, target: /w}]"))
    text = good.apply(rc=3)
    assert "the mount source /nonexistent does not exist" in text
    assert good.runs() == before  # a model that runs is worth more than an empty GPU


def test_a_stop_that_ignores_sigterm_ends_with_kill(good: World) -> None:
    good.write({0: "a", 3: "good"}, a=server("stop_timeout: 1s", IGNORE_SIGTERM=1))
    good.apply()
    ref = good.runs()["a-51000000"].id
    good.write({0: "a", 3: "good"}, a=web("stop_timeout: 1s"))
    begun = time.monotonic()
    good.apply()
    assert 1 < time.monotonic() - begun < 28  # and not 30 s, as without `stop_timeout`
    state = good.engine.inspect_container(ref)["State"]
    assert (state["Running"], state["ExitCode"]) == (False, 137)
    assert "ignoring SIGTERM" in good.mic("logs", "--previous", "a-51000000", rc=0).stdout
    good.unchanged()


def test_a_container_that_sickens_later_is_told_by_status(good: World) -> None:
    """One look of `status` can tell, and restarts nothing: that is up to who converges."""
    good.write({0: "a", 3: "good"}, a=server())
    good.apply()
    http(f"{good.url('a-51000000')}/health?status=500", "PUT", "sick")
    until(lambda: good.instances()["a-51000000"]["phase"] != "ready", "the sickness")
    row = good.instances()["a-51000000"]
    assert row["reason"] == "GET /health answers 500"
    good.mic("status", rc=3)
