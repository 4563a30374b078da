"""What is wrong with one entry is said in one sentence, and delays nobody else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import docker
import pytest

from tests.integration.job_world import Run, World, outcome, web, world
from tests.support.mic import Result

pytestmark = [pytest.mark.engine, pytest.mark.triton]

# Nobody listens on port 1: the answer is the same with and without a network.
IMAGE = "{backend: container, image: 'localhost:1/nobody/made:this'}"
PROGRAM = "{backend: container, image: mic-test/busybox:1, command: [no-such-program]}"
MODELS = {
    "good": web(),
    "image": IMAGE,
    "mount": web("mounts: [{source: /nonexistent/weights, target: /w}]"),
    "program": PROGRAM,
    "secrets": web("env_file: /nonexistent/secrets.env"),
    "absent": "{backend: triton}",
    "syntax": "{backend: triton}",
    "fails": "{backend: triton}",
}
ID = {name: f"{name}-5100000{index}" for index, name in enumerate(MODELS)}


@dataclass
class Story:
    world: World
    planned: Result
    applied: Result
    runs: dict[str, Run]

    def row(self, name: str) -> str:
        """What apply says at its end of one entry: its line, and those that belong to it."""
        text = outcome(self.applied.stdout).replace(str(self.world.repository.path), "REPOSITORY")
        place = re.escape(f"{ID[name]}  GPU {list(MODELS).index(name)}")
        found = re.search(rf"^\w+ +{place}.*\n(?:    .*\n)*", text, re.MULTILINE)
        assert found is not None, text
        return found[0]


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    busybox_image: str,
    triton_image: str,
) -> Iterator[Story]:
    with world(tmp_path_factory.mktemp("broken"), engine, gpus=len(MODELS)) as made:
        made.repository.model("syntax", config='name: "syntax"\nbackend = python\n')
        made.repository.model("fails", fails=True)
        made.write(dict(enumerate(MODELS)), **MODELS)
        planned = made.mic("plan", rc=0)
        yield Story(made, planned, made.mic("apply", timeout=180), made.runs())


def test_apply_exits_with_3_and_the_good_one_is_ready(story: Story) -> None:
    assert story.applied.rc == 3
    assert story.applied.stderr == ""
    assert outcome(story.applied.stdout).splitlines()[-1] == "Apply: 1 as desired, 7 not."
    assert story.row("good") == f"ready      {ID['good']}  GPU 0  http://127.0.0.1:PORT\n"
    # Nothing was left behind of those that could not start; the server of "fails" runs, empty.
    assert sorted(story.runs) == [ID["fails"], ID["good"]]
    assert len(story.world.containers()) == 2


def test_plan_knows_already_what_needs_no_trying(story: Story) -> None:
    lines = story.planned.stdout.splitlines()
    created = ("good", "image", "mount", "program", "fails")
    assert [line.split()[:3] for line in lines if line.startswith("+")] == [
        ["+", "create", ID[name]] for name in created
    ]
    blocked = [line for line in lines if line.startswith("! blocked")]
    for line, name in zip(blocked, ("absent", "secrets", "syntax"), strict=True):
        gpu = list(MODELS).index(name)
        why = story.row(name).splitlines()[0].split("  ")[-1]
        line = line.replace(str(story.world.repository.path), "REPOSITORY")
        assert line == f"! blocked  {ID[name]} on GPU {gpu}: {why}"
    assert lines[-1] == "Plan: 5 to create; 3 blocked."


def test_an_image_that_cannot_be_pulled(story: Story) -> None:
    assert story.row("image") == (
        "backoff    image-51000001  GPU 1  cannot pull localhost:1/nobody/made:this: "
        'localhost:1 cannot be reached (“Get "http://localhost:1/v2/": dial tcp 127.0.0.1:1: '
        "connect: connection refused”)\n"
        "    hint: check the network and the engine's proxy; without a registry: "
        "docker load -i FILE\n"
    )


def test_a_mount_whose_source_is_missing(story: Story) -> None:
    assert story.row("mount") == (
        "backoff    mount-51000002  GPU 2  cannot prepare "
        "mic-SCOPE-mount-51000002-HASH: the mount source /nonexistent/weights does not exist\n"
        "    hint: create it with: mkdir -p /nonexistent/weights\n"
    )


def test_a_program_that_the_image_does_not_have(story: Story) -> None:
    assert story.row("program") == (
        "backoff    program-51000003  GPU 3  cannot create container "
        "mic-SCOPE-program-51000003-HASH: the image has no program no-such-program\n"
        "    hint: check the command and the entrypoint\n"
    )


def test_an_env_file_that_is_missing(story: Story) -> None:
    assert story.row("secrets") == (
        "blocked    secrets-51000004  GPU 4  cannot configure secrets: its env_file "
        "/nonexistent/secrets.env cannot be read: No such file or directory\n"
        "    hint: create /nonexistent/secrets.env, or name another file\n"
    )


def test_a_model_that_is_not_in_the_repository(story: Story) -> None:
    assert story.row("absent") == (
        "blocked    absent-51000005  GPU 5  cannot configure absent: neither "
        "config.pbtxt.template nor config.pbtxt is in REPOSITORY/absent\n"
        "    hint: put one there, or set `model:` if the directory in REPOSITORY has another name\n"
    )


def test_a_template_with_a_syntax_error(story: Story) -> None:
    assert story.row("syntax") == (
        "blocked    syntax-51000006  GPU 6  cannot configure syntax: "
        "REPOSITORY/syntax/config.pbtxt.template:2:9: “'backend = python': Expected \":\"”\n"
        "    hint: correct the file; if the field is right and new, upgrade the package "
        "tritonclient\n"
    )


def test_a_model_that_fails_to_load_says_what_triton_says(story: Story) -> None:
    assert story.row("fails") == (
        "backoff    fails-51000007  GPU 7  http://127.0.0.1:PORT  cannot load fails: "
        "“Internal: RuntimeError: told to fail (at /models/fails/1/model.py(14): initialize)”\n"
        "    hint: see `mic-supervisor logs fails-51000007`\n"
    )


def test_what_was_mended_comes_up_and_nothing_else_changes(story: Story) -> None:
    made = story.world
    made.repository.model("absent")
    made.repository.model("syntax")
    made.repository.model("fails")
    (made.mic.home / "secrets.env").write_text("TOKEN=x\n")
    made.write(
        dict(enumerate(MODELS)),
        image=web(),
        mount=web(),
        program=web(),
        secrets=web(f"env_file: {made.mic.home}/secrets.env"),
    )
    made.apply()
    after = made.runs()
    assert sorted(after) == sorted(ID.values())
    assert {name: after[name] for name in story.runs} == story.runs
    made.unchanged()
