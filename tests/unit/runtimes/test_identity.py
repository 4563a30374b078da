"""What carries our labels and is not ours: copies, as people and tools make them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor.model import ForeignWorkload, Identity, ObservedWorkload, RunState
from mic_supervisor.plan.launch import given_name
from mic_supervisor.runtimes.docker.create import MADE, labels
from mic_supervisor.runtimes.docker.view import split
from mic_supervisor.runtimes.identity import copies

IDENTITY = Identity(
    "default", "h", "MAM-1", "MAM", "triton", ("GPU-1",), {"http": 20000}, {"image": "x:1"}, "abc"
)
NAME = "mic-default-MAM-1-187461a1"
OURS = {**labels(IDENTITY), MADE: "1"}
FROM_IMAGE = "its labels are those of its image, which was made from a container of ours"
OTHER_NAME = f"it has the labels of {NAME}, and another name: it is a copy"


def item(name: str, ref: str, labels: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "Id": ref,
        "Names": [f"/{name}"],
        "ImageID": "plain",
        "Labels": OURS if labels is None else labels,
        "State": "running",
        "Status": "Up 2 minutes",
        **more,
    }


def look(
    *items: dict[str, Any], known: dict[str, bool] | None = None, **images: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """(the ids of ours, why each of the others is not) by id."""
    of_image = {"plain": {}, **images}.__getitem__
    ours, foreign_workloads = split(
        items, "default", "h", images=of_image, given_name=given_name, known=known
    )
    assert all(isinstance(one, ForeignWorkload) for one in foreign_workloads)
    return [one.ref for one in ours], {one.ref: one.reason for one in foreign_workloads}


def test_the_name_that_we_give_is_the_one_of_every_version() -> None:
    """It is how a container of an earlier version is known: no release may change it."""
    assert given_name(IDENTITY) == NAME
    without_ports = replace(IDENTITY, ports={}, gpus=("GPU-1", "GPU-2"))
    assert given_name(without_ports) == "mic-default-MAM-1-1bc2716f"


def test_what_has_the_name_that_we_gave_is_ours() -> None:
    assert look(item(NAME, "a")) == (["a"], {})
    # An earlier version did not write a label of its making.
    assert look(item(NAME, "a", labels(IDENTITY))) == (["a"], {})


@pytest.mark.parametrize("name", ["jupyter", "eager_hopper", "mic-default-MAM-1-copy", f"{NAME}2"])
def test_what_has_another_name_is_a_copy(name: str) -> None:
    assert look(item(NAME, "a"), item(name, "b")) == (["a"], {"b": OTHER_NAME})
    assert look(item(name, "b")) == ([], {"b": OTHER_NAME})


@pytest.mark.parametrize("change", ["spec-hash", "ports", "gpus", "instance"])
def test_labels_that_somebody_edited_lead_to_another_name(change: str) -> None:
    edited = {**OURS, f"io.mic.{change}": '{"http":1}'}
    ours, foreign_workloads = look(item(NAME, "a", edited))
    assert ours == []
    assert foreign_workloads["a"].endswith("and another name: it is a copy")


@pytest.mark.parametrize("name", [NAME, "jupyter"])
def test_labels_of_the_image_count_for_nothing(name: str) -> None:
    copy = item(name, "b", ImageID="committed")
    assert look(copy, committed=OURS) == ([], {"b": FROM_IMAGE})
    # Nor do they by being mixed with those of somebody else.
    mixed = item(name, "b", {**OURS, "com.example": "1"}, ImageID="committed")
    assert look(mixed, committed=OURS) == ([], {"b": FROM_IMAGE})


def test_one_of_ours_may_run_an_image_with_our_labels() -> None:
    mine = item(NAME, "a", {**OURS, MADE: "2"}, ImageID="committed")
    assert look(mine, committed=OURS) == (["a"], {})
    # An image that somebody else's platform labelled says nothing of the container either.
    swarm = {"com.docker.swarm.task.id": "x", "com.docker.compose.container-number": "1"}
    mine = item(NAME, "a", {**OURS, **swarm}, ImageID="theirs")
    assert look(mine, theirs=swarm) == (["a"], {})


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("com.docker.swarm.task.id", "it belongs to a Docker Swarm service"),
        ("com.docker.compose.container-number", "it belongs to a Docker Compose project"),
    ],
)
def test_what_another_platform_made_with_our_labels_is_its_own(label: str, reason: str) -> None:
    assert look(item(NAME, "a", {**OURS, label: "1"})) == ([], {"a": reason})


def test_what_was_ours_stays_ours_under_another_name() -> None:
    assert look(item("renamed", "a"), known={"a": True}) == (["a"], {})
    # By its name of then, where only that was written down.
    assert look(item("renamed", "a"), known={"renamed": True}) == (["a"], {})
    assert look(item("renamed", "a"), known={"b": True}) == ([], {"a": OTHER_NAME})
    # Once it has its name again it needs no memory.
    assert look(item(NAME, "a")) == (["a"], {})


def test_what_takes_the_name_of_one_that_was_renamed_is_a_copy_for_good() -> None:
    found = look(item("renamed", "a"), item(NAME, "b"), known={"a": True})
    assert found == (["a"], {"b": "it has the former name of renamed, which is ours"})
    found = look(item(NAME, "b"), known={"a": True, "b": False})
    assert found == ([], {"b": "it took the name of one of ours that was renamed, and is gone"})


def test_a_copy_says_of_which_instance_it_is_one() -> None:
    items = [item("x", "a"), item("y", "b", {}), item("z", "c", {**OURS, "io.mic.scope": "demo"})]
    _, foreign_workloads = split(items, "default", "h", given_name=given_name)
    assert {one.ref: (one.claims, one.has_our_name) for one in foreign_workloads} == {
        "a": ("MAM-1", False),
        "b": (None, False),
        "c": (None, False),
    }
    _, (usurper,) = split(
        [item(NAME, "a")], "default", "h", images=lambda _: OURS, given_name=given_name
    )
    assert (usurper.claims, usurper.has_our_name) == ("MAM-1", True)


def test_two_of_one_instance_are_both_ours_under_names_of_their_own() -> None:
    """A replacement that was cut short leaves two; that is for the plan to settle."""
    second = replace(IDENTITY, ports={"http": 20001})
    found = [
        ObservedWorkload("docker", given_name(one), str(port), one, RunState.RUNNING)
        for port, one in enumerate((IDENTITY, second))
    ]
    assert copies(found, given_name, {}) == {}
