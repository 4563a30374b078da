"""What counts as newer than what runs: the image that a tag names, the files of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from mic_supervisor.model import ContainerSpec, Placement
from mic_supervisor.plan.assess import Assessment
from mic_supervisor.plan.memory import Memory, Pulled, memory_key
from mic_supervisor.plan.spec import mapping

_ID = re.compile(r"(sha256:)?[0-9a-f]{64}")


def tags(items: Collection[Assessment]) -> dict[str, list[Assessment]]:
    """Who is made from each tag. A digest or an id never moves, so that nobody is asked for it."""
    users: dict[str, list[Assessment]] = {}
    for item in items:
        workload = item.instance.workload
        if isinstance(workload, ContainerSpec):
            image = workload.image
            if "@" not in image and not _ID.fullmatch(image):
                users.setdefault(image, []).append(item)
    return users


def last_image(item: Assessment, tag: str) -> str | None:
    """The id of the image that an instance runs, or ran last, if it was made from this tag."""
    last = item.running or next(iter(item.ours), None)
    if last is None or mapping(last.identity.spec).get("image") != tag:
        return None
    return last.image_id


class Answer(NamedTuple):
    """`digest` is what the registry has of a tag, None where it is asked for none; `running` are
    the digests and the id of the image that an instance runs, or ran last.
    """

    item: Assessment
    tag: str
    digest: str | None
    running: Sequence[str]


def moved(found: Collection[Answer], memory: Memory) -> dict[str, Pulled | None]:
    """By instance, what a pull has it run from now on; None: no longer another one than the file's.

    An instance for which nothing changes is not in it.
    """
    pulled: dict[str, Pulled | None] = {}
    for item, tag, digest, running in found:
        name, before = item.instance.id, memory.of(item.instance.id).pulled
        if digest is not None and running and digest not in running:
            pulled[name] = Pulled(tag, digest, running[0])
        elif before is not None and (before.image, before.digest) != (tag, digest):
            pulled[name] = None  # it is again what runs, or nothing runs
    return pulled


class Loaded(NamedTuple):
    """A model that its server has loaded from files with this fingerprint."""

    item: Assessment
    placement: Placement
    files: str


def loaded(items: Collection[Assessment], memory: Memory) -> list[Loaded]:
    """Every model of which it is known what its server has loaded."""
    return [
        Loaded(item, one, files)
        for item in items
        for one in item.instance.placements
        if item.runs and item.loaded(one)
        if (files := (memory.of(item.instance.id).files or {}).get(one.model)) is not None
    ]


def outdated(found: Collection[tuple[Loaded, str | None]]) -> list[tuple[str, str]]:
    """What has other files now: how a restart names it, and a warning.

    `found` has the fingerprint now beside each; None: not known.
    """
    return [
        (
            memory_key(item.instance.id, one.called) if item.instance.shared else item.instance.id,
            f"{one.called} in {item.instance.id}: the files in {one.directory} are not those that "
            "are loaded; load them with: mic-supervisor restart "
            f"{one.called if item.instance.shared else item.instance.id}, or apply --pull",
        )
        for (item, one, before), now in found
        if now is not None and now != before
    ]
