"""Networks that nobody could be served in are refused, and those that were made anew joined."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.errors import PreflightFailed, RuntimeRefused
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.networks import check, join
from tests.unit.runtimes.docker.engine_fake import FakeEngine, Handler, fails, reply

BRIDGE = {"Id": "n1", "Driver": "bridge", "Scope": "local", "Internal": False}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(tmp_path / "d.sock")
    yield fake
    fake.close()


def engine(fake: FakeEngine, **networks: dict[str, Any]) -> Engine:
    for name, found in networks.items():
        fake.answers[f"GET /networks/{name}"] = reply(BRIDGE | found)
    return Engine(fake.url, timeout=60.0, work_timeout=60.0)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, None),
        ({"Driver": "overlay", "Scope": "swarm", "Attachable": True}, None),
        ({"Driver": "overlay", "Scope": "swarm"}, "cannot x: the network a is of a swarm"),
        ({"Internal": True}, "cannot x: its port cannot be published: a is internal"),
        ({"Driver": "macvlan"}, "cannot x: its port cannot be published: a is internal, or with"),
    ],
)
def test_a_network_that_can_be_joined(
    fake: FakeEngine, found: dict[str, Any], expected: str | None
) -> None:
    asked = engine(fake, a=found)
    if expected is None:
        check(asked, "cannot x", ["a"])
        return
    error = fails(lambda: check(asked, "cannot x", ["a"]))
    assert isinstance(error, PreflightFailed) and str(error).startswith(expected)


def test_one_that_publishes_is_enough(fake: FakeEngine) -> None:
    check(engine(fake, a={"Internal": True}, b={}), "cannot x", ["a", "b"])
    check(engine(fake), "cannot x", [])


def test_only_what_is_missing_or_was_made_anew_is_joined(fake: FakeEngine) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def note(handler: Handler) -> None:
        asked.append((handler.path.partition("/networks/")[2], json.loads(handler.body)))
        handler.send(200, b"")

    same, fresh, old = {"NetworkID": "n1"}, {"NetworkID": ""}, {"NetworkID": "n0"}
    there = {"same": same, "fresh": fresh, "old": old}
    fake.answers["GET /containers/c1/json"] = reply(
        {"Id": "c1", "NetworkSettings": {"Networks": there}}
    )
    for name in ("old", "new"):
        for verb in ("connect", "disconnect"):
            fake.answers[f"POST /networks/{name}/{verb}"] = note
    names = ["same", "fresh", "old", "new"]
    join(engine(fake, same={}, fresh={}, old={}, new={}), "cannot x", "c1", names, ["mam"])
    connect = {"Container": "c1", "EndpointConfig": {"Aliases": ["mam"]}}
    assert asked == [
        ("old/disconnect", {"Container": "c1", "Force": True}),
        ("old/connect", connect),
        ("new/connect", connect),
    ]


def test_a_network_that_is_gone_leaves_the_others_as_they_are(fake: FakeEngine) -> None:
    fake.answers["GET /containers/c1/json"] = reply({"Id": "c1"})
    error = fails(lambda: join(engine(fake), "cannot x", "c1", ["a"], []))
    assert isinstance(error, RuntimeRefused)
    assert str(error) == "cannot x: there is no network a"
    assert (
        error.hint == "create it: docker network create a; or see what there is: docker network ls"
    )


def test_without_networks_the_engine_is_asked_for_nothing(fake: FakeEngine) -> None:
    join(engine(fake), "cannot x", "c1", [], [])
    assert fake.requests == []
