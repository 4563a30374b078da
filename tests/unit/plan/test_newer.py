"""What counts as newer, by what a registry and a directory said. How they are asked: converge."""

from __future__ import annotations

import pytest

from mic_supervisor.plan.memory import InstanceMemory, Memory, Pulled
from mic_supervisor.plan.newer import Answer, Loaded, last_image, moved, outdated, tags
from tests.unit.plan import builders as b

NAME = "MAM-aaaaaaaa"
NEW, OLD = Pulled("mam:1", "sha256:new", "sha256:old"), Pulled("mam:1", "sha256:old", "sha256:a")


@pytest.mark.parametrize(
    ("before", "digest", "running", "after"),
    [
        (None, "sha256:new", ("sha256:old", "id-1"), {NAME: NEW}),
        (NEW, "sha256:new", ("sha256:old", "id-1"), {NAME: NEW}),  # not replaced with it yet
        (None, "sha256:old", ("sha256:old", "id-1"), {}),
        (None, "sha256:old", ("sha256:x", "sha256:old", "id-1"), {}),  # an image has several
        (OLD, "sha256:old", ("sha256:old", "id-1"), {}),
        (NEW, "sha256:old", ("sha256:old", "id-1"), {NAME: None}),  # it moved back
        (Pulled("mam:0", "sha256:new", ""), "sha256:new", ("sha256:new",), {NAME: None}),
        (NEW, None, ("id-1",), {NAME: None}),  # of no registry any more
        (None, None, ("id-1",), {}),
        (None, "sha256:new", (), {}),  # nothing runs, and a start takes what is here
        (OLD, "sha256:new", (), {NAME: None}),
    ],
)
def test_a_tag_moved_if_what_runs_has_another_digest(
    before: Pulled | None,
    digest: str | None,
    running: tuple[str, ...],
    after: dict[str, Pulled | None],
) -> None:
    item = b.assessment(b.on("MAM", 0))
    memory = Memory({NAME: InstanceMemory(pulled=before)})
    assert moved([Answer(item, "mam:1", digest, running)], memory) == after


def test_who_shares_a_tag_is_asked_for_once_and_a_digest_never() -> None:
    images = ["mam:1", "mam:1", "other", "mam@sha256:" + "0" * 64, "0" * 64, "sha256:" + "0" * 64]
    instances = [b.on("m", n, workload=b.container(image)) for n, image in enumerate(images)]
    host = b.on("h", 7, workload=b.program())
    items = [b.assessment(one) for one in (*instances, host)]
    assert tags(items) == {"mam:1": items[:2], "other": items[2:3]}


def test_the_last_image_counts_if_it_was_made_from_the_tag() -> None:
    instance = b.on("MAM", 0)
    item = b.assessment(instance, b.workload(instance, image_id="id-1"))
    assert (last_image(item, "mam:1"), last_image(item, "mam:2")) == ("id-1", None)
    assert last_image(b.assessment(instance), "mam:1") is None


def test_files_are_outdated_when_they_are_known_to_be_others() -> None:
    item = b.assessment(b.on("MAM", 0))
    one = Loaded(item, b.placement("MAM", 0), "digest")
    assert outdated([(one, None), (one, "digest")]) == []
    ((name, warning),) = outdated([(one, "another")])
    assert name == NAME
    assert warning.endswith(f"load them with: mic-supervisor restart {NAME}, or apply --pull")
