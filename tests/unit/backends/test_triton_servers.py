"""What the triton backend makes of models that share a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from mic_supervisor.backends import Member
from mic_supervisor.backends.triton import Options, TritonBackend
from mic_supervisor.errors import CompileError
from mic_supervisor.model import ContainerSpec, Gpu, HttpCall, Instance
from tests.unit.backends.support import REAL, SECOND, request

BACKEND = TritonBackend()
SETTINGS = {"image": "tritonserver:1", "model_repository": "/srv/repo"}


def shared(*gpus: Gpu, members: Sequence[Member], **settings: Any) -> Instance:
    made = request(
        BACKEND,
        {},
        model="triton-shared",
        instance="triton-shared",
        gpus=gpus,
        settings={**SETTINGS, "server": "shared", **settings},
        files={f"/srv/repo/{one.model}/config.pbtxt": "" for one in members},
    )
    placements = [BACKEND.compile_placement(made, one) for one in members]
    return BACKEND.compile_server(made, members, placements)


def member(name: str, *gpus: Gpu, **options: Any) -> Member:
    return Member(name, Options.model_validate({"backend": "triton", **options}), gpus)


def sent(instance: Instance, model: str) -> dict[str, Any]:
    (one,) = [item for item in instance.placements if item.model == model]
    config: dict[str, Any] = json.loads(json.loads(one.load.body or "")["parameters"]["config"])
    return config


def test_instances_are_placed_by_the_position_of_the_gpu_in_the_server() -> None:
    a, b = member("A", REAL, SECOND, instances_per_gpu=3), member("B", SECOND)
    made = shared(REAL, SECOND, members=[a, b])
    (group,) = sent(made, "A")["instance_group"]
    assert (group["count"], group["kind"], group["gpus"]) == (3, "KIND_GPU", [0, 1])
    (group,) = sent(made, "B")["instance_group"]
    assert (group["count"], group["gpus"]) == (1, [1])
    assert [one.gpus for one in made.placements] == [(REAL.uuid, SECOND.uuid), (SECOND.uuid,)]
    elsewhere = shared(REAL, SECOND, members=[a, member("B", REAL)])
    assert made.placements[0].digest == elsewhere.placements[0].digest
    assert made.placements[1].digest != elsewhere.placements[1].digest
    assert made.workload == elsewhere.workload  # nothing about the server itself has changed


def test_a_shared_server_has_fixed_ports_and_no_readiness_of_one_model() -> None:
    made = shared(REAL, SECOND, members=[member("A", REAL, vram="2g"), member("B", SECOND)])
    assert isinstance(made.workload, ContainerSpec)
    assert [(port.name, port.host) for port in made.workload.ports] == [
        ("http", 8000),
        ("grpc", 8001),
        ("metrics", 8002),
    ]
    assert (made.model, made.shared, made.probes.readiness, made.vram) == (
        "triton-shared",
        True,
        None,
        2 << 30,
    )
    own = shared(REAL, members=[member("A", REAL)], ports={"http": 9000}, args=["--x"])
    assert isinstance(own.workload, ContainerSpec)
    assert [port.host for port in own.workload.ports] == [9000, 8001, 8002]
    assert own.workload.command[-1] == "--x"


def test_a_shared_server_has_what_the_file_says_for_every_model_and_its_settings_go_first() -> None:
    said = {
        "network": "host",
        "listen": "10.0.0.5",
        "stop_timeout": "50s",
        "stop_signal": "SIGINT",
        "rollout": {"rollback": False},
        "foreign_threshold": "1g",
    }
    both = [member("A", REAL, **said), member("B", SECOND, **said | {"foreign_threshold": "2g"})]
    made = shared(REAL, SECOND, members=both)
    work = made.workload
    assert isinstance(work, ContainerSpec)
    assert (work.network, work.listen, work.stop_timeout) == ("host", "10.0.0.5", 50.0)
    assert (work.stop_signal, made.rollback, made.foreign_threshold) == ("SIGINT", False, 1 << 30)
    assert "--http-port=${port:http}" in work.command
    assert "--http-address=10.0.0.5" in work.command
    own = shared(REAL, SECOND, members=both, network="bridge", listen="127.0.0.1").workload
    assert isinstance(own, ContainerSpec)
    assert (own.network, own.listen, own.stop_timeout) == ("bridge", "127.0.0.1", 50.0)
    assert "--http-port=8000" in own.command


def test_a_shared_server_has_the_keys_of_containers_from_its_settings() -> None:
    made = shared(REAL, members=[member("A", REAL)], networks=["shop"], ipc="host", read_only=True)
    work = made.workload
    assert isinstance(work, ContainerSpec)
    assert (work.networks, work.network_aliases) == (("shop",), ("triton-shared",))
    assert (work.ipc, work.shm_size, work.read_only) == ("host", None, True)
    settings = BACKEND.Settings.model_validate({**SETTINGS, "server": "shared"})
    (said,) = BACKEND.conflicts(settings, ["ipc"]).values()
    assert said.endswith("see backends.triton.ipc")
    with pytest.raises(ValidationError, match="cap_add: it belongs to a server for all models"):
        BACKEND.Settings.model_validate({**SETTINGS, "cap_add": ["IPC_LOCK"]})
    with pytest.raises(CompileError, match="with network: host it joins no other network"):
        shared(REAL, members=[member("A", REAL, network="host")], networks=["shop"])


def test_surplus_is_what_has_our_mark_and_no_entry() -> None:
    made = shared(REAL, SECOND, members=[member("A", REAL)])
    ours = {"name": "B", "instance_group": [{"name": "B-0123456789ab", "gpus": [1], "count": 1}]}
    answers = {
        "/v2/repository/index": json.dumps([{"name": n, "state": "READY"} for n in "ABC"]),
        "/v2/models/B/config": json.dumps(ours),
        "/v2/models/C/config": json.dumps({"name": "C", "instance_group": [{"name": "C_0"}]}),
    }

    def ask(call: HttpCall) -> tuple[int | None, str]:
        return 200, answers[call.path]

    (found,) = BACKEND.surplus(made, ask)
    assert (found.model, found.gpus) == ("B", (SECOND.uuid,))
    assert found.unload.path == "/v2/repository/models/B/unload"
    assert BACKEND.surplus(made, lambda _call: (None, "")) == ()
    assert BACKEND.surplus(replace(made, frozen_models=("B",)), ask) == ()
