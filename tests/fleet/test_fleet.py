"""The collection in ansible/ on three hosts, over ssh, with real requests through nginx.

`make test-fleet PYTEST_ARGS=-s` shows what each run prints.
"""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import yaml

from tests.fleet import inventory
from tests.fleet.namespaces import GPU_HOSTS, answered
from tests.fleet.world import EVERYTHING, Fleet
from tests.support.waiting import until

LITELLM = """\
proxy_form: litellm
proxy_openai: [chat=gpt]
proxy_output: /etc/nginx/litellm.yaml
proxy_reload: [touch, /etc/nginx/was-read]
"""


def test_one_command_shows_the_plan_of_every_host(fleet: Fleet) -> None:
    before = fleet.marks(), fleet.file("gpu1")
    inventory.release(fleet, "--model", "v2")
    played = fleet.play("mic.supervisor.apply", "--check", "--diff")
    guide = inventory.GUIDE.read_text()
    shown = re.search(r"^~ replace.*?^Plan: .*?$", guide, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert played.text.count(shown[0]) == 3
    assert [played.recap(host)["changed"] for host in GPU_HOSTS] == [1, 1, 1]
    assert before == (fleet.marks(), fleet.file("gpu1"))


def test_a_change_goes_from_host_to_host_and_fails_no_request(fleet: Fleet) -> None:
    inventory.release(fleet, "--model", "v2")
    begun = time.time()
    with fleet.load() as counted:
        fleet.play("mic.supervisor.apply")
    assert answered(counted) > 100
    fleet.serves("v2")
    times = [[at for at in fleet.history(host) if at > begun] for host in GPU_HOSTS]
    assert max(times[0]) < min(times[1])
    assert max(times[1]) < min(times[2])
    again = fleet.play("mic.supervisor.apply")
    assert [again.recap(host)["changed"] for host in GPU_HOSTS] == [0, 0, 0]
    fleet.play("mic.supervisor.status")


def test_a_bad_revision_ends_on_the_first_gpu_of_the_first_host(fleet: Fleet) -> None:
    was, before, text = fleet.versions(), fleet.marks(), fleet.file("gpu2")
    inventory.release(fleet, "--exit-unless", "/nowhere")
    with fleet.load() as counted:
        played = fleet.play("mic.supervisor.apply", rc=2)
    assert answered(counted) > 50
    assert played.recap("gpu1")["failed"] == 1
    assert "instances are not as /etc/mic/gpus.yaml asks" in played.text
    assert fleet.versions() == was
    assert fleet.upstream() == EVERYTHING
    after = fleet.marks()
    assert [one for one in EVERYTHING if before[one] != after[one]] == ["gpu1/chat-51000000"]
    assert fleet.file("gpu2") == text
    inventory.release(fleet, "--model", "mended")
    fleet.play("mic.supervisor.apply")
    fleet.serves("mended")


def test_a_host_that_is_not_there_keeps_all_as_they_are(fleet: Fleet) -> None:
    before = fleet.marks()
    inventory.release(fleet, "--model", "unreachable")
    fleet.connect("gpu3", up=False)
    try:
        played = fleet.play("mic.supervisor.apply", rc=None)
    finally:
        fleet.connect("gpu3")
    assert played.rc != 0
    assert played.recap("gpu3")["unreachable"] == 1
    assert "TASK [Apply]" not in played.text
    assert fleet.marks() == before


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ("{0: chat, 1: chatt}", "unknown model 'chatt'"),
        ("{0: chat, 1: chat, 7: chat}", "GPU 7"),
    ],
    ids=["invalid", "blocked"],
)
def test_one_host_that_cannot_follow_keeps_all_as_they_are(
    fleet: Fleet, gpus: str, said: str
) -> None:
    before = fleet.marks()
    inventory.release(fleet, "--model", "refused")
    fleet.write("host_vars/gpu3.yaml", f"gpus_on_host: {gpus}\n")
    try:
        played = fleet.play("mic.supervisor.apply", rc=2)
    finally:
        inventory.write(fleet)
    assert played.recap("gpu3")["failed"] == 1
    assert said in played.text
    assert "TASK [Apply]" not in played.text
    assert fleet.marks() == before


def test_a_controller_that_is_killed_in_the_middle_goes_on_with_the_next_run(fleet: Fleet) -> None:
    inventory.release(fleet, "--model", "killed")
    with fleet.load() as counted:
        process = fleet.playing("mic.supervisor.apply")
        until(
            lambda: fleet.versions()["gpu1/chat-51000001"] == "killed",
            "the first host to be done",
            timeout=120,
        )
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        fleet.play("mic.supervisor.apply")
    assert answered(counted) > 100
    fleet.serves("killed")
    again = fleet.play("mic.supervisor.apply")
    assert [again.recap(host)["changed"] for host in GPU_HOSTS] == [0, 0, 0]


def test_litellm_is_told_of_every_instance(fleet: Fleet) -> None:
    fleet.write("litellm.yaml", LITELLM)
    fleet.play("mic.supervisor.apply", "--extra-vars", "@litellm.yaml")
    text = fleet.run([*fleet.within("proxy", "-a"), "cat", "/etc/nginx/litellm.yaml"])
    listed = yaml.safe_load(text)["model_list"]
    names = [one["model_info"]["id"].replace(".", "/") for one in listed]
    assert sorted(names) == EVERYTHING
    assert {(one["model_name"], one["litellm_params"]["model"]) for one in listed} == {
        ("chat", "openai/gpt")
    }
    answers = {one["litellm_params"]["api_base"].removesuffix("/v1") for one in listed}
    assert "" not in {fleet.version(url) for url in answers}
    fleet.run([*fleet.within("proxy", "-a"), "test", "-e", "/etc/nginx/was-read"])
