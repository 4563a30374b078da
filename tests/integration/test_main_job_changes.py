"""Each edit of the file, and each accident, gets the smallest plan that mends it, and converges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import docker
import pytest

from tests.integration.job_world import LABEL, World, gated, masked, outcome, progress, web, world
from tests.support.waiting import http, until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient, busybox_image: str
) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("job"), engine) as made:
        yield made


@pytest.fixture
def two(job: World) -> World:
    """`a` on GPU 0 and `b` on GPU 1, ready."""
    job.models.clear()
    job.write({0: "a", 1: "b"}, a=web(), b=web())
    job.apply()
    assert set(job.runs()) == {"a-51000000", "b-51000001"}
    return job


def end_of(job: World, instance: str) -> None:
    until(lambda: instance not in job.runs(), f"the end of {instance}")


def test_a_model_moves_to_another_gpu(two: World) -> None:
    before = two.runs()
    two.write({2: "a", 1: "b"})
    assert two.plan() == (
        "- remove   a-51000000  GPU 0  the file no longer names it\n"
        "+ create   a-51000002  GPU 2  nothing runs for it yet\n"
        "\n"
        "Plan: 1 to create, 1 to remove.\n"
    )
    named = re.findall(r"^    removes (\S+)$", two.mic("plan", rc=0).stdout, re.MULTILINE)
    assert sorted(named) == sorted(item["Name"][1:] for item in two.all("a-51000000"))
    two.apply()
    assert two.all("a-51000000") == []
    assert set(two.runs()) == {"a-51000002", "b-51000001"}
    assert two.runs()["b-51000001"] == before["b-51000001"]
    two.unchanged()


def test_two_models_swap_their_gpus(two: World) -> None:
    two.write({0: "b", 1: "a"})
    assert two.plan() == (
        "- remove   a-51000000  GPU 0  the file has b on its GPU\n"
        "+ create   b-51000000  GPU 0  nothing runs for it yet\n"
        "+ create   a-51000001  GPU 1  nothing runs for it yet\n"
        "- remove   b-51000001  GPU 1  the file has a on its GPU\n"
        "\n"
        "Plan: 2 to create, 2 to remove.\n"
    )
    two.apply()
    assert set(two.runs()) == {"b-51000000", "a-51000001"}
    two.unchanged()


def test_none_empties_a_gpu(two: World) -> None:
    before = two.runs()
    two.write({0: "none", 1: "b"})
    assert two.plan() == (
        "- remove   a-51000000  GPU 0  the file keeps its GPU empty\n\nPlan: 1 to remove.\n"
    )
    assert (
        two.apply() == "ready      b-51000001  GPU 1  http://127.0.0.1:PORT\nApply: 1 as desired.\n"
    )
    assert two.runs() == {"b-51000001": before["b-51000001"]}
    assert {gpu["index"]: gpu["state"] for gpu in two.status(rc=0)["gpus"]} == {
        0: "kept_empty",
        1: "managed",
        2: "idle",
        3: "idle",
    }
    two.unchanged()


def test_a_gpu_that_the_file_no_longer_names_is_left_by_its_instance(two: World) -> None:
    before = two.runs()
    two.write({1: "b"})
    assert two.plan() == (
        "- remove   a-51000000  GPU 0  the file no longer names it\n\nPlan: 1 to remove.\n"
    )
    two.apply()
    assert two.runs() == {"b-51000001": before["b-51000001"]}
    two.unchanged()


def test_a_killed_container_is_started_again(two: World) -> None:
    before = two.runs()
    two.engine.kill(before["a-51000000"].id)
    end_of(two, "a-51000000")
    assert two.plan() == (
        "+ start    a-51000000  GPU 0  it exited with 137 (SIGKILL)\n\nPlan: 1 to start.\n"
    )
    row = two.instances()["a-51000000"]
    assert (row["phase"], row["sync"], row["reason"]) == (
        "pending",
        "out_of_sync",
        "it exited with 137 (SIGKILL)",
    )
    two.apply()
    after = two.runs()
    assert after["a-51000000"].id == before["a-51000000"].id
    assert after["a-51000000"].started_at != before["a-51000000"].started_at
    assert after["b-51000001"] == before["b-51000001"]
    assert two.instances()["a-51000000"]["restarts"] == 1
    two.unchanged()


def test_a_container_stopped_by_hand_is_started_again(two: World) -> None:
    before = two.runs()
    two.engine.stop(before["a-51000000"].id, timeout=30)
    assert two.plan() == (
        "+ start    a-51000000  GPU 0  it exited with 143 (SIGTERM)\n\nPlan: 1 to start.\n"
    )
    two.apply()
    assert two.runs()["a-51000000"].id == before["a-51000000"].id
    two.unchanged()


def test_a_container_removed_by_hand_is_made_again(two: World) -> None:
    before = two.runs()
    two.engine.remove_container(before["a-51000000"].id, force=True)
    assert two.plan() == (
        "+ create   a-51000000  GPU 0  it is missing: its workload was removed\n"
        "\n"
        "Plan: 1 to create.\n"
    )
    two.apply()
    after = two.runs()
    assert after["a-51000000"].id != before["a-51000000"].id
    assert after["b-51000001"] == before["b-51000001"]
    two.unchanged()


def test_a_container_paused_by_hand_is_left_to_the_hand(two: World) -> None:
    before = two.runs()
    two.engine.pause(before["a-51000000"].id)
    try:
        row = two.instances()["a-51000000"]
        assert (row["phase"], row["reason"]) == ("degraded", "it was paused by hand")
        two.unchanged()
    finally:
        two.engine.unpause(before["a-51000000"].id)
    assert two.runs() == before


def test_a_changed_variable_replaces_its_own_container_and_is_shown_nowhere(two: World) -> None:
    secrets = ("hunter-one", "hunter-two")
    two.write({0: "a", 1: "b"}, a=web(f"env: {{TOKEN: {secrets[0]}}}"))
    assert two.plan() == (
        "~ replace  a-51000000  GPU 0  its specification changed: env.TOKEN\n"
        '    env.TOKEN: null -> "(hidden)"\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    two.apply()
    before = two.runs()
    two.write({0: "a", 1: "b"}, a=web(f"env: {{TOKEN: {secrets[1]}}}"))
    planned, as_json = two.plan(), two.mic("plan", "--json").stdout
    assert planned == (
        "~ replace  a-51000000  GPU 0  its specification changed: env.TOKEN\n"
        '    env.TOKEN: "(hidden)" -> "(hidden)"\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    assert json.loads(as_json)["actions"][0]["diff"] == [
        {"path": "env.TOKEN", "before": "(hidden)", "after": "(hidden)"}
    ]
    applied = two.mic("apply", rc=0)
    after = two.runs()
    assert after["a-51000000"].id != before["a-51000000"].id
    assert after["b-51000001"] == before["b-51000001"]
    two.unchanged()

    assert "TOKEN=hunter-two" in two.one("a-51000000")["Config"]["Env"]
    kept = [path.read_text(errors="replace") for path in two.mic.state_dir.rglob("*.json")]
    labels = [json.dumps(c["Config"]["Labels"]) for c in two.all("a-51000000")]
    assert len(labels) == 2  # the predecessor stays, stopped
    shown = [planned, as_json, str(applied), two.mic("status", "--json").stdout, *kept, *labels]
    assert not [text for text in shown if "hunter" in text]


def test_a_changed_env_file_replaces_and_is_shown_nowhere(two: World) -> None:
    path = two.mic.home / "secrets.env"
    path.write_text("TOKEN=hunter-one\n")
    two.write({0: "a", 1: "b"}, a=web(f"env_file: {path}"))
    two.apply()
    path.write_text("# the same\n\nTOKEN=hunter-one\n")
    two.unchanged()
    path.write_text("TOKEN=hunter-two\n")
    assert two.plan() == (
        "~ replace  a-51000000  GPU 0  its specification changed: file_env.TOKEN\n"
        '    file_env.TOKEN: "(hidden)" -> "(hidden)"\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    two.apply()
    assert "TOKEN=hunter-two" in two.one("a-51000000")["Config"]["Env"]
    assert "hunter" not in json.dumps(two.one("a-51000000")["Config"]["Labels"])


def test_a_replaced_container_stays_until_the_next_replacement(two: World) -> None:
    ids = [two.runs()["a-51000000"].id]
    for number in (1, 2):
        two.write({0: "a", 1: "b"}, a=web(f"env: {{STEP: '{number}'}}"))
        done = two.mic("apply", rc=0)
        assert progress(done.stdout) == [
            "a-51000000: replace: its specification changed: env.STEP",
            "a-51000000: starting",
            "a-51000000: ready",
        ]
        ids.insert(0, two.runs()["a-51000000"].id)
        assert [container["Id"] for container in two.all("a-51000000")] == ids[:2]
    two.unchanged()


def test_going_back_to_the_predecessors_specification_starts_it_again(two: World) -> None:
    before = two.runs()["a-51000000"]
    two.write({0: "a", 1: "b"}, a=web("env: {STEP: '1'}"))
    two.apply()
    two.write({0: "a", 1: "b"}, a=web())
    assert two.plan() == (
        "~ replace  a-51000000  GPU 0  its specification changed: env.STEP\n"
        '    env.STEP: "(hidden)" -> null\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    two.apply()
    assert two.runs()["a-51000000"].id == before.id
    two.unchanged()


def test_a_fixed_port(two: World, free_port: Callable[[], int]) -> None:
    port, before = free_port(), two.runs()
    two.write({0: "a", 1: "b"}, a=web(f"port: {port}"))
    assert two.plan() == (
        "~ replace  a-51000000  GPU 0  its specification changed: ports.http.host\n"
        f"    ports.http.host: null -> {port}\n"
        "\n"
        "Plan: 1 to replace.\n"
    )
    two.apply()
    assert two.url("a-51000000") == f"http://127.0.0.1:{port}"
    assert http(f"http://127.0.0.1:{port}/health").text == "ok\n"
    assert two.runs()["b-51000001"] == before["b-51000001"]
    two.unchanged()


def test_a_fixed_port_passes_from_one_model_to_another(
    two: World, free_port: Callable[[], int]
) -> None:
    port = free_port()
    two.write({0: "a", 1: "b"}, a=web(f"port: {port}"))
    two.apply()
    two.write({0: "a", 1: "b"}, a=web(), b=web(f"port: {port}"))
    two.apply()
    assert two.url("b-51000001") == f"http://127.0.0.1:{port}"
    assert two.url("a-51000000") != f"http://127.0.0.1:{port}"
    two.unchanged()


def test_ports_stay_when_a_container_is_replaced(two: World) -> None:
    before = two.url("a-51000000")
    two.write({0: "a", 1: "b"}, a=web("env: {STEP: '1'}"))
    two.apply()
    assert two.url("a-51000000") == before


def test_one_model_on_three_gpus_changes_one_gpu_at_a_time(two: World) -> None:
    two.write({"0-2": "a"})
    two.apply()
    two.write({"0-2": "a"}, a=web("env: {STEP: '1'}"))
    assert two.plan() == (
        "~ replace  a-51000000  GPU 0  its specification changed: env.STEP\n"
        '    env.STEP: null -> "(hidden)"\n'
        "~ replace  a-51000001  GPU 1  its specification changed: env.STEP\n"
        '    env.STEP: null -> "(hidden)"\n'
        "    waits for its turn: 1 instance of a at a time\n"
        "~ replace  a-51000002  GPU 2  its specification changed: env.STEP\n"
        '    env.STEP: null -> "(hidden)"\n'
        "    waits for its turn: 1 instance of a at a time\n"
        "\n"
        "Plan: 3 to replace.\n"
    )
    told = progress(two.mic("apply", rc=0).stdout)
    assert told == [
        f"a-5100000{index}: {what}"
        for index in range(3)
        for what in ("replace: its specification changed: env.STEP", "starting", "ready")
    ]
    two.unchanged()


def test_one_instance_over_two_gpus(two: World) -> None:
    two.write({"0,1": "a"})
    assert two.plan() == (
        "- remove   a-51000000    GPU 0    the file has a on its GPU\n"
        "+ create   a-51000000x2  GPU 0,1  nothing runs for it yet\n"
        "- remove   b-51000001    GPU 1    the file has a on its GPU\n"
        "\n"
        "Plan: 1 to create, 2 to remove.\n"
    )
    assert two.apply() == (
        "ready      a-51000000x2  GPU 0,1  http://127.0.0.1:PORT\nApply: 1 as desired.\n"
    )
    assert set(two.runs()) == {"a-51000000x2"}
    two.unchanged()


def test_what_the_engine_was_told_by_hand_is_not_compared(two: World) -> None:
    """The labels hold what was asked for, and nothing that the engine made of it is drift."""
    container = two.one("a-51000000")
    labels = [key.removeprefix(LABEL) for key in container["Config"]["Labels"]]
    assert sorted(key for key in labels if not key.startswith("test.")) == [
        *("backend", "gpus", "host", "instance", "made", "managed-by", "model", "origin", "ports"),
        *("schema", "scope", "spec", "spec-hash"),
    ]
    two.engine.update_container(container["Id"], mem_limit="64m", memswap_limit="64m")
    two.unchanged()


@pytest.mark.triton
def test_instances_per_gpu_changes_in_place(job: World, triton_image: str) -> None:
    job.models.clear()
    job.repository.model("MAM")
    job.write({0: "MAM"}, MAM="{backend: triton, instances_per_gpu: 1}")
    job.apply()
    before = job.runs()
    job.write({0: "MAM"}, MAM="{backend: triton, instances_per_gpu: 3}")
    assert job.plan() == (
        "~ load     MAM-51000000  GPU 0  instances_per_gpu changed\n"
        '    instances_per_gpu: "1" -> "3"\n'
        "\n"
        "Plan: 1 to load.\n"
    )
    done = job.mic("apply", rc=0)
    assert progress(done.stdout) == [
        "MAM-51000000: load: instances_per_gpu changed",
        "MAM-51000000: loading MAM",
        "MAM-51000000: ready",
    ]
    assert outcome(done.stdout) == (
        "ready      MAM-51000000  GPU 0  http://127.0.0.1:PORT\nApply: 1 as desired.\n"
    )
    config = http(f"{job.url('MAM-51000000')}/v2/models/MAM/config").json()
    assert [group["count"] for group in config["instance_group"]] == [3]
    assert job.runs() == before
    job.unchanged()

    # Somebody else unloads it: noticed, and loaded again.
    http(f"{job.url('MAM-51000000')}/v2/repository/models/MAM/unload", "POST", {})
    until(
        lambda: http(f"{job.url('MAM-51000000')}/v2/models/MAM/config").status != 200, "the unload"
    )
    assert masked(job.plan()) == (
        "~ load     MAM-51000000  GPU 0  the server does not have MAM loaded\n"
        '    instances_per_gpu: null -> "3"\n'
        "\n"
        "Plan: 1 to load.\n"
    )
    job.apply()
    assert job.runs() == before
    job.unchanged()


def test_one_that_is_slow_delays_no_other(two: World) -> None:
    gate = two.gate()
    two.write({0: "a", 1: "b", 2: "slow", 3: "c"}, slow=gated(gate), c=web())
    apply = two.mic.start("apply")
    until(lambda: "c-51000003: ready" in apply.text(), "the other one")
    assert "slow-51000002: ready" not in apply.text()
    (gate / "go").touch()
    assert apply.process.wait(30) == 0
    assert "slow-51000002: ready" in apply.text()
