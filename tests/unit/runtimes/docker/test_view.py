"""What the engine lists and tells, as the model's words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.model import ForeignWorkload, Identity, ObservedWorkload, RunState
from mic_supervisor.runtimes.docker.create import labels
from mic_supervisor.runtimes.docker.view import detailed, foreign_reason, is_a_list, split

IDENTITY = Identity("default", "h", "mam", "MAM", "triton", ("GPU-1",), {}, {}, "abc")
OURS = labels(IDENTITY)


def listed(**changes: Any) -> dict[str, Any]:
    return {
        "Id": "f27c76fe8b00",
        "Names": ["/mic-default-mam"],
        "Image": "x:1",
        "ImageID": "sha256:a663",
        "Created": 1795346253,
        "Ports": [],
        "Labels": OURS,
        "State": "running",
        "Status": "Up 2 minutes",
        "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.2"}}},
        **changes,
    }


def only(item: dict[str, Any]) -> ObservedWorkload:
    ((workload,), foreign_workloads) = split([item], "default", "h")
    assert foreign_workloads == ()
    return workload


def test_a_running_container() -> None:
    assert only(listed()) == ObservedWorkload(
        runtime="docker",
        name="mic-default-mam",
        ref="f27c76fe8b00",
        identity=IDENTITY,
        state=RunState.RUNNING,
        created_at=1795346253.0,
        address="172.17.0.2",
        image_id="sha256:a663",
    )


def test_the_address_is_that_of_the_network_that_it_was_created_in() -> None:
    networks = {"a": {"IPAddress": "10.0.0.2"}, "b": {"IPAddress": "10.0.1.2"}}
    for first, address in (("a", "10.0.0.2"), ("b", "10.0.1.2"), ("gone", "10.0.0.2")):
        found = listed(HostConfig={"NetworkMode": first}, NetworkSettings={"Networks": networks})
        assert only(found).address == address


@pytest.mark.parametrize(
    ("state", "status", "run_state", "exit_code", "health", "error"),
    [
        ("created", "Created", RunState.CREATED, None, None, None),
        ("running", "Up Less than a second", RunState.RUNNING, None, None, None),
        ("running", "Up 2 minutes (healthy)", RunState.RUNNING, None, "healthy", None),
        ("running", "Up 2 hours (unhealthy)", RunState.RUNNING, None, "unhealthy", None),
        ("running", "Up 1 second (health: starting)", RunState.RUNNING, None, "starting", None),
        ("paused", "Up 5 weeks (Paused)", RunState.PAUSED, None, None, None),
        ("restarting", "Restarting (1) 2 seconds ago", RunState.RUNNING, None, None, None),
        ("exited", "Exited (0) 3 seconds ago", RunState.EXITED, 0, None, None),
        ("exited", "Exited (137) About a minute ago", RunState.EXITED, 137, None, None),
        ("exited", "Exited (-1) 3 seconds ago", RunState.EXITED, -1, None, None),
        ("removing", "Removal In Progress", RunState.REMOVING, None, None, None),
        ("dead", "Dead", RunState.EXITED, None, None, "the engine could not remove it completely"),
        ("levitating", "", RunState.UNKNOWN, None, None, None),
    ],
)
def test_states(
    state: str,
    status: str,
    run_state: RunState,
    exit_code: int | None,
    health: str | None,
    error: str | None,
) -> None:
    found = only(listed(State=state, Status=status))
    assert (found.state, found.exit_code, found.engine_health, found.error) == (
        run_state,
        exit_code,
        health,
        error,
    )
    assert (found.address is not None) == (run_state is RunState.RUNNING)


def test_a_foreign_container_with_its_ports() -> None:
    ports = [
        {"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
        {"IP": "::", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
        {"PrivatePort": 443, "Type": "tcp"},
        {"IP": "0.0.0.0", "PrivatePort": 53, "PublicPort": 53, "Type": "udp"},
    ]
    item = listed(Labels={"a": "b"}, Names=["/x/alias", "/web"], Ports=ports)
    assert split([item], "default", "h") == (
        (),
        (
            ForeignWorkload(
                "docker", "web", "f27c76fe8b00", (8080,), True, "it has no labels of ours"
            ),
        ),
    )
    ((), (stopped,)) = split([listed(Labels=None, State="exited")], "default", "h")
    assert not stopped.running


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"io.mic.managed-by": "other"}, "it has no labels of ours"),
        ({"io.mic.scope": "demo"}, "it belongs to scope demo"),
        ({"io.mic.scope": ""}, "it belongs to scope (none)"),
        ({"io.mic.host": "x"}, "it was made by the supervisor of another machine"),
        ({"com.docker.swarm.task.id": "x"}, "it belongs to a Docker Swarm service"),
    ],
)
def test_whose_it_is(changes: dict[str, str], reason: str | None) -> None:
    assert foreign_reason({**OURS, **changes}, "default", "h") == reason


@pytest.mark.parametrize(
    "items",
    [
        [None],
        [float("nan")],
        ["cut"],
        [[listed()]],
        [{}],
        [listed(Id=None)],
        [listed(Id="")],
        [listed(Labels=["io.mic.scope"])],
        [listed(), 7],
        {"Id": "x"},
        None,
    ],
)
def test_a_list_with_what_tells_not_which_container_it_is_is_none(items: Any) -> None:
    assert not is_a_list(items)


def test_a_container_without_labels_or_names_is_one() -> None:
    assert is_a_list([listed(Labels=None, Names=None), {"Id": "x"}])


@pytest.mark.parametrize(
    "changes",
    [
        {"Status": f"Exited ({'9' * 5000}) 2 seconds ago"},
        {"Created": 10**400},
        {"Created": -(10**400)},
        {"Labels": {**OURS, "io.mic.schema": "9" * 5000}},
        {"Labels": {**OURS, "io.mic.ports": '{"http": ' + "9" * 5000 + "}"}},
        {"Labels": {**OURS, "io.mic.spec": '{"a":' * 5000}},
        {"Ports": [{"PublicPort": [1]}, {"PublicPort": {"a": 1}}]},
    ],
)
def test_numbers_without_end_and_members_of_other_types_are_unknown(
    changes: dict[str, Any],
) -> None:
    assert only(listed(**changes)).ref == "f27c76fe8b00"
    (foreign,) = split([listed(**changes | {"Labels": {}})], "default", "h")[1]
    assert foreign.ports == ()


def test_sorted_by_name() -> None:
    items = [listed(Names=[f"/{name}"]) for name in "cab"]
    assert [w.name for w in split(items, "default", "h")[0]] == ["a", "b", "c"]


def inspected(**state: Any) -> dict[str, Any]:
    return {
        "Id": "f27c76fe8b00",
        "Created": "2026-11-22T11:17:32.5Z",
        "Image": "sha256:a663",
        "State": {
            "Status": "running",
            "Pid": 4121,
            "ExitCode": 0,
            "Error": "",
            "OOMKilled": False,
            "StartedAt": "2026-11-22T11:17:33.484791722Z",
            "FinishedAt": "0001-01-01T00:00:00Z",
            **state,
        },
        "NetworkSettings": {"Networks": {"other": {"IPAddress": "10.0.0.2"}}},
    }


def test_inspection_of_a_running_container() -> None:
    base = only(listed())
    assert detailed(base, inspected()) == dataclasses.replace(
        base,
        pid=4121,
        created_at=1795346252.5,
        started_at=1795346253.484791,
        address="10.0.0.2",
    )


def test_inspection_of_an_ended_container() -> None:
    found = detailed(
        only(listed()),
        inspected(
            Status="exited",
            Pid=0,
            ExitCode=137,
            OOMKilled=True,
            FinishedAt="2026-11-22T12:17:33+01:00",
        ),
    )
    assert (found.state, found.pid, found.exit_code) == (RunState.EXITED, None, 137)
    assert found.finished_at == 1795346253.0
    assert found.error == "it used more memory than its limit and was killed"
    assert found.address is None


def test_inspection_of_one_that_never_started() -> None:
    found = detailed(
        only(listed()),
        inspected(
            Status="created", Pid=0, ExitCode=128, Error="no GPU", StartedAt="0001-01-01T00:00:00Z"
        ),
    )
    assert (found.state, found.exit_code, found.started_at) == (RunState.CREATED, None, None)
    assert found.error == "“no GPU”"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("Id", "Names", "Created", "Ports", "Labels", "State", "Status", "NetworkSettings")
ITEMS = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON))
STATES = st.fixed_dictionaries(
    {"Status": st.sampled_from(["exited", "running"]) | JSON},
    optional=dict.fromkeys(("StartedAt", "FinishedAt", "Pid", "ExitCode", "Health", "Error"), JSON),
)


@pytest.mark.slow
@given(st.lists(JSON | ITEMS, max_size=4))
def test_no_answer_is_a_surprise(items: list[Any]) -> None:
    if is_a_list(items):
        workloads, foreign_workloads = split(items, "default", "h")
        assert len(workloads) + len(foreign_workloads) == len(items)
    else:
        assert not all(isinstance(item, dict) and item.get("Id") for item in items) or any(
            not isinstance(item.get("Labels") or {}, dict) or not isinstance(item["Id"], str)
            for item in items
        )


@given(ITEMS, JSON | STATES)
def test_nor_is_one_about_a_container_of_ours(changes: dict[str, Any], state: Any) -> None:
    workloads, foreign_workloads = split([{**listed(), **changes, "Labels": OURS}], "default", "h")
    assert (len(workloads), foreign_workloads) == (1, ())
    detailed(workloads[0], {**changes, "State": state})
