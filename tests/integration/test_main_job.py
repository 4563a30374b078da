"""From nothing to ready and back to "No changes.": two Triton servers and a container."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import docker
import pytest

from tests.integration.job_world import Run, World, outcome, progress, server, simulated, world
from tests.support.mic import Result
from tests.support.triton import infer_request
from tests.support.waiting import http

pytestmark = [pytest.mark.engine, pytest.mark.triton]

MODELS = {
    "MAM": "{backend: triton, instances_per_gpu: 2}",
    "web": server(),
}
GPUS: dict[int | str, str] = {0: "MAM", 1: "MAM", 2: "web"}
INSTANCES = ["MAM-51000000", "MAM-51000001", "web-51000002"]


@dataclass
class Story:
    """What each command of the first run printed."""

    world: World
    planned: Result
    planned_json: Result
    applied: Result
    runs: dict[str, Run]


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    triton_image: str,
    server_image: str,
) -> Iterator[Story]:
    with world(tmp_path_factory.mktemp("job"), engine) as made:
        made.repository.model("MAM")
        made.write(GPUS, **MODELS)
        planned = made.mic("plan", "--detailed-exitcode", rc=2)
        planned_json = made.mic("plan", "--json", rc=0)
        applied = made.mic("apply", rc=0)
        yield Story(made, planned, planned_json, applied, made.runs())


@pytest.fixture
def gpus_yaml(story: Story) -> Iterator[None]:
    """The test may write another file: the old one comes back."""
    yield
    story.world.write(GPUS)


def test_the_plan_lists_three_creates_with_their_cause(story: Story) -> None:
    assert story.planned.stdout == (
        "+ create   MAM-51000000  GPU 0  nothing runs for it yet\n"
        "+ create   MAM-51000001  GPU 1  nothing runs for it yet\n"
        "+ create   web-51000002  GPU 2  nothing runs for it yet\n"
        "\n"
        "Plan: 3 to create.\n"
    )
    assert story.planned.stderr == ""


def test_the_plan_as_json(story: Story) -> None:
    document = story.planned_json.json()
    assert re.fullmatch(r"[0-9a-f]{64}", document.pop("config_hash"))
    assert document.pop("host")
    names = {
        action["instance"]: [re.sub(r"-[0-9a-f]{8}$", "", step) for step in action.pop("steps")]
        for action in document["actions"]
    }
    scope = story.world.mic.scope
    assert names == {
        instance: [f"{verb} mic-{scope}-{instance}" for verb in ("prepare", "create", "start")]
        for instance in INSTANCES
    }
    assert document == {
        "version": 1,
        "changes": 3,
        "actions": [
            {
                "action": "create",
                "instance": instance,
                "model": instance.partition("-")[0],
                "backend": "container" if instance.startswith("web") else "triton",
                "gpus": [simulated(index)],
                "cause": "nothing runs for it yet",
                "code": "missing",
                "waits": None,
                "diff": [],
            }
            for index, instance in enumerate(INSTANCES)
        ],
        "blocked": [],
        "left_out": [],
        "warnings": [],
        "profile": None,
    }


def test_apply_ends_with_everything_ready(story: Story) -> None:
    assert outcome(story.applied.stdout) == (
        "ready      MAM-51000000  GPU 0  http://127.0.0.1:PORT\n"
        "ready      MAM-51000001  GPU 1  http://127.0.0.1:PORT\n"
        "ready      web-51000002  GPU 2  http://127.0.0.1:PORT\n"
        "Apply: 3 as desired.\n"
    )
    assert story.applied.stderr == ""


def test_apply_tells_what_it_does_while_it_does_it(story: Story) -> None:
    told = progress(story.applied.stdout)
    for instance in INSTANCES:
        mine = [line.removeprefix(f"{instance}: ") for line in told if line.startswith(instance)]
        load = ["load: the server does not have MAM loaded", "loading MAM"]
        assert mine == [
            "create: nothing runs for it yet",
            "starting",
            *(load if instance.startswith("MAM") else []),
            "ready",
        ]


def test_the_servers_answer_inference_requests(story: Story) -> None:
    for instance in ("MAM-51000000", "MAM-51000001"):
        url = f"{story.world.url(instance)}/v2/models/MAM"
        answer = http(f"{url}/infer", "POST", infer_request(1.0, 2.5))
        assert answer.status == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == [1.0, 2.5]
        groups = http(f"{url}/config").json()["instance_group"]
        assert [(group["kind"], group["count"]) for group in groups] == [("KIND_CPU", 2)]


def test_status_says_ready_and_exits_with_0(story: Story) -> None:
    document = story.world.status(rc=0)
    rows = {row["id"]: (row["phase"], row["sync"], row["health"]) for row in document["instances"]}
    assert rows == dict.fromkeys(INSTANCES, ("ready", "in_sync", "healthy"))


def test_then_there_is_nothing_to_do(story: Story) -> None:
    story.world.unchanged()


def test_a_second_apply_changes_nothing(story: Story) -> None:
    done = story.world.mic("apply", rc=0)
    assert progress(done.stdout) == []
    assert outcome(done.stdout) == outcome(story.applied.stdout)
    assert story.world.runs() == story.runs


def test_comments_and_order_change_nothing(story: Story, gpus_yaml: None) -> None:
    lines = ["# a comment", "gpus:"]
    lines += [f"  {key}: {model}  # {key}" for key, model in reversed(GPUS.items())]
    lines += ["models:", "  MAM: {instances_per_gpu: 2, backend: triton}", ""]
    lines += [f"  web: {MODELS['web']}", story.world.settings, "version: 1"]
    story.world.mic.write("\n".join(lines) + "\n")
    story.world.unchanged()
    story.world.mic("apply", rc=0)
    assert story.world.runs() == story.runs


def test_another_spelling_of_the_gpus_changes_nothing(story: Story, gpus_yaml: None) -> None:
    story.world.write({simulated(0): "MAM", "1": "MAM", "00005100:02:00.0": "web"})
    story.world.unchanged()
    story.world.mic("apply", rc=0)
    assert story.world.runs() == story.runs


def test_an_absent_gpu_blocks_its_own_entry_only(story: Story, gpus_yaml: None) -> None:
    story.world.write({**GPUS, 7: "MAM"})
    assert story.world.plan() == (
        "! blocked  MAM on GPU 7: there is no GPU 7; this machine has GPU 0,1,2,3\n\n"
        "No changes; 1 blocked.\n"
    )
    done = story.world.mic("apply", rc=3)
    assert outcome(done.stdout).splitlines()[-1] == "Apply: 3 as desired, 1 not."
    assert story.world.runs() == story.runs
