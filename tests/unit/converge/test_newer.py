"""What is newer where it comes from: registries and directories in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mic_supervisor.converge.newer import Newer, look_for_newer
from mic_supervisor.errors import MicError, PreflightFailed
from mic_supervisor.host.files import fingerprint
from mic_supervisor.model import Instance
from mic_supervisor.plan.look import Look, look
from mic_supervisor.plan.memory import InstanceMemory, Memory, Pulled
from mic_supervisor.runtimes import Progress
from tests.unit.converge.rig import Engine
from tests.unit.plan import builders as b

NAME = "MAM-aaaaaaaa"


class Hub(Engine):
    """An engine, and the registry that it asks. `here` are digests by what an image is called."""

    def __init__(self, digest: str | MicError, **here: str) -> None:
        super().__init__()
        self.digest = digest
        self.here = {name.replace("_", ":"): (digest,) for name, digest in here.items()}

    def registry_digest(self, image: str) -> str:
        self.calls.append(f"ask for {image}")
        if isinstance(self.digest, MicError):
            raise self.digest
        return self.digest

    def digests(self, image: str) -> tuple[str, ...]:
        return self.here.get(image, ())

    def pull(self, image: str, progress: Progress) -> None:
        self.calls.append(f"pull {image}")
        progress(f"pulled {image}")
        assert isinstance(self.digest, str)
        self.here[image] = (self.digest,)


def seen(instance: Instance, pulled: Pulled | None = None) -> Look:
    runs = b.workload(instance, image_id="id-1")
    memory = b.known(runs)
    if pulled is not None:
        memory = Memory({NAME: replace(memory.of(NAME), pulled=pulled)})
    return look(b.desired(instance), b.observed(runs), memory, b.NOW, b.CONTEXT)


def found(at: Look, hub: Hub, *, pull: bool = False, ask: bool = True) -> tuple[Newer, list[str]]:
    said: list[str] = []
    report = (lambda _item, text: said.append(text)) if pull else None
    return asyncio.run(look_for_newer(at, None, {"docker": hub}, ask=ask, report=report)), said


def test_a_tag_that_moved_is_found_and_only_pulled_on_demand() -> None:
    at = seen(b.on("MAM", 0))
    hub = Hub("sha256:new", mam_1="sha256:old", **{"id-1": "sha256:old"})
    newer, _ = found(at, hub)
    assert newer.pulled == {NAME: Pulled("mam:1", "sha256:new", "sha256:old")}
    assert hub.calls == ["ask for mam:1"]
    newer, said = found(at, hub, pull=True)
    assert newer.pulled == {NAME: Pulled("mam:1", "sha256:new", "sha256:old")}
    assert (hub.calls[1:], said) == (["ask for mam:1", "pull mam:1"], ["pulled mam:1"])


def test_what_is_here_already_is_not_pulled() -> None:
    hub = Hub("sha256:new", mam_1="sha256:new", **{"id-1": "sha256:old"})
    newer, _ = found(seen(b.on("MAM", 0)), hub, pull=True)
    assert [*newer.pulled] == [NAME]
    assert hub.calls == ["ask for mam:1"]


def test_a_tag_that_did_not_move_is_nothing() -> None:
    hub = Hub("sha256:old", **{"id-1": "sha256:old"})
    assert found(seen(b.on("MAM", 0)), hub)[0] == Newer()


def test_no_registry_is_asked_for_what_came_from_none() -> None:
    hub = Hub("sha256:new")
    newer, _ = found(seen(b.on("MAM", 0)), hub, pull=True)
    warning = "mam:1 came from no registry, and none is asked for it"
    assert (newer, hub.calls) == (Newer(warnings=(warning,)), [])
    # It was built here, and its name is another image's by now.
    newer, _ = found(seen(b.on("MAM", 0)), Hub("sha256:new", mam_1="sha256:new"))
    assert newer.pulled == {NAME: Pulled("mam:1", "sha256:new", "id-1")}


def test_a_tag_that_moved_back_is_what_runs() -> None:
    at = seen(b.on("MAM", 0), Pulled("mam:1", "sha256:bad", "sha256:old"))
    newer, _ = found(at, Hub("sha256:old", **{"id-1": "sha256:old"}))
    assert newer.pulled == {NAME: None}
    assert at.plan.count == 1
    assert at.renewed(newer.pulled, ()).plan.count == 0


def test_nobody_is_asked_without_a_word_or_for_a_digest() -> None:
    hub = Hub("sha256:new", **{"id-1": "sha256:old"})
    assert found(seen(b.on("MAM", 0)), hub, ask=False)[0] == Newer()
    for image in ("mam@sha256:" + "0" * 64, "sha256:" + "0" * 64):
        pinned = b.on("MAM", 0, workload=b.container(image))
        assert found(seen(pinned), hub)[0] == Newer()
    assert hub.calls == []


def test_a_registry_that_refuses_is_told_once_and_pulls_nothing() -> None:
    error = PreflightFailed("cannot ask", hint="wait")
    at = seen(b.on("MAM", 0))
    hub = Hub(error)
    hub.here["id-1"] = ("sha256:old",)
    newer, _ = found(at, hub, pull=True)
    assert newer == Newer(failures=((at.assessments[0], error),), warnings=("cannot ask; wait",))


def test_files_that_are_not_those_that_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("x")
    placed = replace(b.placement("MAM", 0), directory=str(tmp_path))
    instance = b.on("MAM", 0, placements=(placed,))
    known = {NAME: InstanceMemory(files={"MAM": fingerprint(tmp_path)})}

    def at(memory: Mapping[str, InstanceMemory], *, loaded: bool = True) -> Look:
        runs = b.workload(instance)
        health = {runs.ref: b.passed(*((b.loaded("MAM"),) if loaded else ()))}
        return look(
            b.desired(instance),
            b.observed(runs, health=health),
            Memory(memory),
            b.NOW,
            b.CONTEXT,
        )

    assert found(at(known), Hub(""), ask=False)[0] == Newer()
    os.utime(tmp_path / "model.py", (0, 0))
    newer, _ = found(at(known), Hub(""), ask=False)
    assert newer.restarts == {NAME}
    (warning,) = newer.warnings
    assert warning.startswith(f"MAM in {NAME}: the files in {tmp_path} are not those")
    # Nothing is said of what is not loaded, nor of what an earlier version loaded.
    assert found(at(known, loaded=False), Hub(""), ask=False)[0] == Newer()
    assert found(at({}), Hub(""), ask=False)[0] == Newer()
