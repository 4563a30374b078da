"""Proposals for what runs already, from what the engine and /proc say."""

from __future__ import annotations

from typing import Any

import pytest

from mic_supervisor.host.processes import Stat
from mic_supervisor.takeover import Proposal, distinct, for_env_file, indices_of, named
from mic_supervisor.takeover.containers import is_candidate, propose, wanted_gpus
from mic_supervisor.takeover.processes import root_of

KNOWN = {"GPU-aaaa": 0, "GPU-bbbb": 1, "GPU-cccc": 2}
IMAGE = {
    "Config": {
        "Entrypoint": ["/entry"],
        "Cmd": ["serve"],
        "Env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all"],
        "User": "",
        "WorkingDir": "/app",
    }
}


def inspected(config: dict[str, Any] | None = None, **host: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"Image": "a/b:1", "Labels": {}, **IMAGE["Config"]}
    return {"Id": "f" * 64, "Name": "/web", "Config": base | (config or {}), "HostConfig": host}


def request(**values: Any) -> list[dict[str, Any]]:
    return [{"Driver": "", "Count": 0, "DeviceIDs": None, "Capabilities": [["gpu"]], **values}]


@pytest.mark.parametrize(
    ("host", "default", "expected"),
    [
        ({"DeviceRequests": request(DeviceIDs=["1", "GPU-a"])}, None, ["1", "GPU-a"]),
        ({"DeviceRequests": request(Count=-1)}, None, ["all"]),
        ({"DeviceRequests": request(Count=2)}, None, ["0", "1"]),
        (
            {"DeviceRequests": request(Driver="cdi", DeviceIDs=["nvidia.com/gpu=2", "x.y/z=1"])},
            None,
            ["2"],
        ),
        ({"DeviceRequests": request(Capabilities=[["tpu"]])}, None, []),
        ({"Runtime": "nvidia"}, "runc", ["all"]),
        ({}, "nvidia", ["all"]),
        ({"Runtime": "runc"}, "nvidia", []),
        ({}, "runc", []),
    ],
)
def test_what_a_container_asks_for(
    host: dict[str, Any], default: str | None, expected: list[str]
) -> None:
    assert wanted_gpus(inspected(**host), default) == expected


@pytest.mark.parametrize(("visible", "expected"), [("void", []), ("none", []), ("0,2", ["0", "2"])])
def test_the_variable_of_the_nvidia_runtime(visible: str, expected: list[str]) -> None:
    env = [f"NVIDIA_VISIBLE_DEVICES={visible}"]
    assert wanted_gpus(inspected({"Env": env}, Runtime="nvidia"), None) == expected


def test_gpus_by_any_name() -> None:
    assert indices_of(["GPU-b", "0"], KNOWN) == (0, 1)
    assert indices_of(["all"], KNOWN) == (0, 1, 2)
    assert indices_of(["7", ""], KNOWN) == ()


def test_a_plain_container_needs_no_more_than_its_image() -> None:
    found = propose(inspected(), IMAGE, ["1"], KNOWN, [])
    assert found.entry == {"backend": "container", "image": "a/b:1"}
    assert (found.name, found.gpus, found.stop) == ("web", (1,), ("docker stop web",))
    assert (found.secrets, found.notes, found.refused) == ((), (), None)


def test_everything_that_was_set() -> None:
    found = propose(
        inspected(
            {
                "Cmd": ["--model", "x"],
                "Env": ["PATH=/bin", "TOKEN=s3cret", "ODD-NAME=x", "NVIDIA_VISIBLE_DEVICES=0"],
                "User": "1000",
                "StopSignal": "SIGINT",
                "StopTimeout": 60,
                "Labels": {
                    "com.docker.compose.project": "shop",
                    "com.docker.compose.service": "api",
                },
            },
            PortBindings={
                "9000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9001"}],
                "80/tcp": [{"HostIp": "", "HostPort": "8080"}],
                "53/udp": [{"HostIp": "", "HostPort": "53"}],
            },
            ShmSize=2 << 30,
            Memory=1 << 30,
            NanoCpus=1_500_000_000,
            Ulimits=[{"Name": "memlock", "Soft": -1, "Hard": -1}],
            Privileged=True,
            RestartPolicy={"Name": "always"},
        )
        | {
            "Mounts": [
                {"Type": "volume", "Name": "v", "Source": "/d/v", "Destination": "/v", "RW": True},
                {"Type": "bind", "Source": "/m", "Destination": "/models", "RW": False},
                {"Type": "tmpfs", "Source": "", "Destination": "/scratch"},
            ]
        },
        IMAGE | {"Config": IMAGE["Config"] | {"Healthcheck": {"Test": ["CMD", "true"]}}},
        ["all"],
        KNOWN,
        [2],
    )
    assert found.entry == {
        "backend": "container",
        "image": "a/b:1",
        "command": ["--model", "x"],
        "port": 8080,
        "container_port": 80,
        "listen": "0.0.0.0",
        "mounts": [
            {"source": "/m", "target": "/models", "read_only": True},
            {"source": "/d/v", "target": "/v"},
        ],
        "shm_size": 2 << 30,
        "user": "1000",
        "limits": {"memory": 1 << 30, "cpus": 1.5, "memlock": "unlimited"},
        "stop_signal": "SIGINT",
        "stop_timeout": "60s",
        "probe": {"docker": True},
    }
    assert found.secrets == (("TOKEN", "s3cret"),)
    assert "s3cret" not in repr(found)
    assert (found.name, found.gpus) == ("api", (2,))
    assert found.stop == ("docker compose -p shop stop api",)
    assert found.notes == (
        "It publishes more ports, which are not carried over: 9001 to 9000.",
        "/v is the volume v, by its path on this host.",
        "The tmpfs mount at /scratch is not carried over.",
        "Not carried over: privileged.",
        "An env_file cannot hold ODD-NAME: put it under env.",
        "It may see GPU 0, 1, 2, and uses these only.",
    )


def test_a_container_that_restarts_has_to_be_told_not_to() -> None:
    found = propose(
        inspected(RestartPolicy={"Name": "unless-stopped"}, NetworkMode="host"),
        None,
        ["0"],
        KNOWN,
        [],
    )
    assert found.stop == ("docker update --restart=no web", "docker stop web")
    assert found.entry["network"] == "host"


def test_a_placeholder_in_a_command_cannot_be_taken_over() -> None:
    found = propose(inspected({"Cmd": ["sh", "-c", "echo ${HOME}"]}), IMAGE, ["0"], KNOWN, [])
    assert found.refused == "'echo ${HOME}' holds ${, which is a placeholder here"


def test_whose_is_somebody_elses_already() -> None:
    assert is_candidate(inspected())
    assert not is_candidate(inspected({"Labels": {"io.mic.managed-by": "mic-supervisor"}}))
    assert not is_candidate(inspected({"Labels": {"com.docker.swarm.task": "x"}}))


def test_names() -> None:
    taken: set[str] = set()
    wanted = ["web", "web", "my app/1", "none", "---", "模型", "x" * 200]
    assert [named(text, taken) for text in wanted] == [
        *("web", "web-2", "my-app-1", "none-1", "model", "模型", "x" * 60)
    ]
    one = Proposal("a", "x", {}, (), ())
    assert [item.name for item in distinct([one, one])] == ["a", "a-2"]


def test_env_files() -> None:
    pairs = [("B", "2"), ("A", "x y=z"), ("L", "a\nb"), ("Q", '"q"'), ("ODD-NAME", "1"), ("E", "")]
    assert for_env_file(pairs) == (
        (("A", "x y=z"), ("B", "2"), ("E", ""), ("L", "a\nb"), ("Q", '"q"')),
        ("ODD-NAME",),
    )


def tree(*rows: tuple[int, int, str, int]) -> dict[int, Stat]:
    return {pid: Stat(pid, name, "S", parent, session, 1) for pid, parent, name, session in rows}


def test_the_root_is_what_somebody_started() -> None:
    known = tree(
        (1, 0, "systemd", 1),
        (50, 1, "bash", 50),
        (60, 50, "python3", 50),
        (61, 60, "VLLM::EngineCor", 50),
        (62, 61, "worker", 62),
        (70, 1, "python3", 70),
    )
    assert root_of(61, known) == 60
    assert root_of(62, known) == 62  # of a session of its own
    assert root_of(70, known) == 70
    assert root_of(99, known) == 99
