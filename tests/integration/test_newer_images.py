"""A tag that moves in a real registry: what is shown, pulled and replaced, and when nobody asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.docker_world import docker
from tests.integration.job_world import World, outcome, web
from tests.support.registry import Registry, registry
from tests.support.scopes import remove_containers

pytestmark = pytest.mark.engine

A, B = "a-51000000", "a-51000001"


@pytest.fixture
def tags(job: World) -> Iterator[Registry]:
    """A registry whose tag is version 1, which the models `a` of a file with GPUs 0 and 1 run."""
    with registry(job.mic.home / "registry", job.engine, job.mic.ports.take()) as made:
        made.first, made.second = made.push(1), made.push(2)
        made.push(3, "echo > /w")  # where the server would have its directory
        made.move(1)
        job.write({"0-1": "a"}, a=of(made.image))
        job.apply()
        assert versions(job) == {A: "1", B: "1"}
        yield made
        job.mic.close()
        remove_containers(job.engine, job.mic.scope)  # they hold the images


def of(image: str, *more: str) -> str:
    return web(*more).replace("mic-test/busybox:1", image)


def versions(job: World) -> dict[str, str]:
    """What is in the container of each instance that runs."""
    found = {}
    for instance in job.runs():
        # By the command: the SDK may lose what is said before it has read the head.
        found[instance] = docker("exec", job.one(instance)["Id"], "cat", "/version")
    return found


def test_a_tag_that_moved_is_shown_pulled_and_replaced(job: World, tags: Registry) -> None:
    first, second = tags.first, tags.second
    tags.move(2)
    before, asked = job.runs(), tags.asked
    job.unchanged()
    job.apply()
    assert (job.runs(), tags.asked) == (before, asked), "nobody said --pull"

    cause = f"{tags.image} is another image now: {first[:19]} -> {second[:19]}"
    turn = "    waits for its turn: 1 instance of a at a time\n"
    diff = f'    digest: "{first}" -> "{second}"\n'
    assert job.plan("--pull") == (
        f"~ replace  {A}  GPU 0  {cause}\n{diff}~ replace  {B}  GPU 1  {cause}\n{diff}{turn}"
        "\nPlan: 2 to replace.\n"
    )
    assert job.runs() == before
    assert not job.engine.images(f"{tags.host}/m@{second}"), "a plan downloads nothing"
    job.unchanged()

    done = job.mic("apply", "--pull", rc=0)
    told = done.stdout
    assert told.index(f"pulled {tags.image}") < told.index("replace: "), (
        "before anything is stopped"
    )
    assert versions(job) == {A: "2", B: "2"}
    after = job.runs()
    job.unchanged()
    assert job.plan("--pull") == "No changes.\n"
    job.apply("--pull")
    assert job.runs() == after
    assert job.one(A)["Config"]["Image"] == f"{tags.image}@{second}"

    # Another reason to make it anew takes no other image.
    tags.move(1)
    job.write({"0-1": "a"}, a=of(tags.image, "env: {A: b}"))
    job.apply()
    assert versions(job) == {A: "2", B: "2"}


def test_an_image_that_fails_is_taken_back(job: World, tags: Registry) -> None:
    before = job.runs()
    tags.move(3)
    done = job.mic("apply", "--pull", rc=1)
    assert "the last good one runs, and is ready" in outcome(done.stdout)
    assert versions(job) == {A: "1", B: "1"}
    assert job.run_of(A).id == before[A].id
    assert job.runs()[B] == before[B]
    # Its publisher takes it back as well: what runs is what the tag means again.
    running = job.runs()
    tags.move(1)
    assert job.plan("--pull") == "No changes.\n"
    job.apply("--pull")
    job.unchanged()
    assert job.runs() == running


def test_the_daemon_tries_it_on_one_gpu_first(job: World, tags: Registry) -> None:
    job.mic.run()
    tags.move(2)
    before = job.runs()
    assert job.plan("--pull", "--target", "1").count("~ replace") == 1
    done = job.mic("apply", "--pull", "--target", "1", rc=0)
    assert f"pulled {tags.image}" in done.stdout
    assert versions(job) == {A: "1", B: "2"}
    job.unchanged()
    assert job.runs()[A] == before[A]
    job.mic("apply", "--pull", rc=0)
    assert versions(job) == {A: "2", B: "2"}


def test_a_registry_that_is_down_stops_nothing(job: World, tags: Registry) -> None:
    gone = f"127.0.0.1:{job.mic.ports.take()}/m:1"
    job.engine.tag(tags.image, gone[:-2], "1")
    try:
        job.write({"0": "a", "2": "b"}, a=of(tags.image), b=of(gone))
        job.apply()
        tags.move(2)
        before = job.runs()
        why = f"cannot ask for the digest of {gone}: {gone[:-4]} cannot be reached ("
        plan = job.plan("--pull")
        assert f"\nwarning: {why}" in plan
        assert "~ replace  a-51000000" in plan
        assert plan.endswith("Plan: 1 to replace.\n")

        done = job.mic("apply", "--pull", rc=3)
        assert f"    {why}" in done.stdout
        assert done.stdout.endswith("Apply: 1 as desired, 1 not.\n")
        assert versions(job) == {A: "2", "b-51000002": "1"}
        assert job.runs()["b-51000002"] == before["b-51000002"]

        tags.stop()
        running = job.runs()
        done = job.mic("apply", "--pull", rc=1)
        assert done.stdout.count("cannot ask for the digest of") == 4  # as it happens, and after
        assert job.runs() == running
        job.apply()
    finally:
        job.engine.remove_image(gone, force=True)


def test_a_digest_never_moves(job: World, tags: Registry) -> None:
    pinned = of(f"{tags.host}/m@{tags.first}")
    job.write({0: "a"}, a=pinned)
    job.apply()
    tags.move(2)
    asked = tags.asked
    assert job.plan("--pull") == "No changes.\n"
    job.apply("--pull")
    assert (versions(job), tags.asked) == ({A: "1"}, asked)
