"""A specification that fails is taken back on a real engine, and what took over looked after."""

from __future__ import annotations

import pytest

from tests.integration.job_world import World, masked, outcome, progress, server, web
from tests.support.waiting import http, until

pytestmark = pytest.mark.engine

WHY = "the new specification failed (it exited with 3)"
HINT = "    hint: change the file, or: mic-supervisor retry a-51000000\n"
BAD = server(EXIT_UNLESS="/never", EXIT_CODE=3)


def test_a_roll_out_halts_where_the_first_one_failed(job: World) -> None:
    job.write({"0-2": "a"}, a=web())
    job.apply()
    before = job.runs()
    job.write({"0-2": "a"}, a=BAD)
    done = job.mic("apply", rc=1)
    assert outcome(done.stdout) == (
        f"degraded   a-51000000  GPU 0  http://127.0.0.1:PORT  {WHY}; the last good one runs, "
        "and is ready\n" + HINT + "blocked    a-51000001  GPU 1  http://127.0.0.1:PORT  "
        "the new specification failed on a-51000000; the earlier one runs\n"
        + HINT
        + "blocked    a-51000002  GPU 2  http://127.0.0.1:PORT  "
        "the new specification failed on a-51000000; the earlier one runs\n"
        + HINT
        + "Apply: 0 as desired, 3 not.\n"
    )
    told = progress(done.stdout)
    assert told.count("a-51000000: start: rollback: it exited with 3") == 1
    assert not [line for line in told if "replace" in line and "a-51000000" not in line]
    after = job.runs()
    assert {name: run.id for name, run in after.items()} == {
        name: run.id for name, run in before.items()
    }
    for name in ("a-51000001", "a-51000002"):
        assert after[name] == before[name]
    assert masked(job.plan()) == (
        f"! blocked  a-51000000 on GPU 0: {WHY}; the last good one runs\n"
        + HINT
        + "! blocked  a-51000001 on GPU 1: "
        "the new specification failed on a-51000000; the earlier one runs\n"
        + HINT
        + "! blocked  a-51000002 on GPU 2: "
        "the new specification failed on a-51000000; the earlier one runs\n"
        + HINT
        + "\nNo changes; 3 blocked.\n"
    )
    rows = job.instances()
    assert {name: (row["phase"], row["sync"], row["serving"]) for name, row in rows.items()} == {
        "a-51000000": ("degraded", "out_of_sync", True),
        "a-51000001": ("blocked", "out_of_sync", True),
        "a-51000002": ("blocked", "out_of_sync", True),
    }
    job.write({"0-2": "a"}, a=web())
    job.unchanged()
    assert job.runs() == after


def test_what_took_over_is_probed_and_restarted_when_it_hangs(job: World) -> None:
    job.write({0: "a", 3: "b"}, a=server(), b=web())
    job.mic.run()
    job.apply()
    good = job.run_of("a-51000000")
    job.write({0: "a", 3: "b"}, a=BAD)

    def took_over() -> bool:
        row = job.instances()["a-51000000"]
        return row["phase"] == "degraded" and row["serving"] is True

    until(took_over, "the one that took over")
    row = job.instances()["a-51000000"]
    assert (row["phase"], row["sync"]) == ("degraded", "out_of_sync")
    assert row["reason"] == f"{WHY}; the last good one runs, and is ready"
    back = job.run_of("a-51000000")
    assert (back.id, back.pid == good.pid) == (good.id, False)

    http(f"{job.url('a-51000000')}/health?status=500", "PUT", "sick")
    until(lambda: job.instances()["a-51000000"]["serving"] is False, "the sickness")
    until(took_over, "the restart")
    again = job.run_of("a-51000000")
    assert (again.id, again.pid == back.pid) == (good.id, False)
    assert job.instances()["a-51000000"]["phase"] == "degraded"
    ids = {container["Id"] for container in job.all("a-51000000")}
    causes = [e["cause"] for e in job.mic("history", "a", "--json").json()["events"]]
    assert "rolled back, and not alive: GET /health answers 500" in causes

    # The failed one is tried when somebody asks, and taken back as before.
    told = job.mic("retry", "a", rc=1).stdout
    assert "replace: its specification changed" in masked(told)
    assert job.instances()["a-51000000"]["reason"].startswith(f"{WHY}; the last good one runs")
    assert {container["Id"] for container in job.all("a-51000000")} == ids
    job.write({0: "a", 3: "b"}, a=server(STEP="2"))
    until(lambda: job.instances()["a-51000000"]["phase"] == "ready", "the third one")
    assert job.instances()["a-51000000"]["sync"] == "in_sync"


@pytest.mark.triton
def test_a_server_that_took_over_has_its_model_again(job: World, triton_image: str) -> None:
    job.repository.model("MAM")
    job.write({0: "MAM"}, MAM="{backend: triton}")
    job.apply()
    good = job.run_of("MAM-51000000")
    job.write({0: "MAM"}, MAM="{backend: triton, args: [--no-such-option]}")
    done = job.mic("apply", rc=1)
    told = progress(done.stdout)
    assert [line for line in told if "loading" in line][-1] == "MAM-51000000: loading MAM"
    assert outcome(done.stdout).splitlines()[0].endswith("; the last good one runs, and is ready")
    assert job.run_of("MAM-51000000").id == good.id
    assert http(f"{job.url('MAM-51000000')}/v2/models/MAM/ready").status == 200
