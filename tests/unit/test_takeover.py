"""Proposals for what runs already, from what the engine and /proc say."""

from __future__ import annotations

from typing import Any

import pytest

from mic_supervisor.host.processes import Stat
from mic_supervisor.takeover import Proposal, distinct, for_env_file, named, numbers_of
from mic_supervisor.takeover.containers import Around, is_candidate, propose, wanted_gpus
from mic_supervisor.takeover.processes import is_its_own, root_of

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


def container(config: dict[str, Any] | None = None, **host: Any) -> Proposal:
    return propose(inspected(config, **host), Around(IMAGE), ["0"], KNOWN, [])


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
    assert numbers_of(["GPU-b", "0"], KNOWN) == (0, 1)
    assert numbers_of(["all"], KNOWN) == (0, 1, 2)
    assert numbers_of(["7", ""], KNOWN) == ()


def test_a_plain_container_needs_no_more_than_its_image() -> None:
    found = propose(inspected(), Around(IMAGE), ["1"], KNOWN, [])
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
                "Healthcheck": {"Test": ["CMD", "true"]},
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
        Around(IMAGE | {"Config": IMAGE["Config"] | {"Healthcheck": {"Test": ["CMD", "true"]}}}),
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
        "tmpfs": ["/scratch"],
        "shm_size": "2g",
        "user": "1000",
        "limits": {"memory": "1g", "cpus": 1.5, "memlock": "unlimited"},
        "stop_signal": "SIGINT",
        "stop_timeout": "60s",
        "probe": {"docker": True},
    }
    assert found.secrets == (("TOKEN", "s3cret"),)
    assert "s3cret" not in repr(found)
    assert (found.name, found.gpus) == ("api", (2,))
    assert found.stop == ("docker compose -p shop stop api",)
    assert found.notes == (
        "It publishes more ports, which are not carried over: 53 to 53/udp, 9001 to 9000.",
        "/v is the volume v, by its path on this host.",
        "An env_file cannot hold ODD-NAME: put it under env.",
        "It may see GPU 0, 1, 2, and uses these only.",
    )
    assert found.left == ("--privileged",)


@pytest.mark.parametrize(
    ("config", "entry", "expected"),
    [
        ({"StopSignal": "15"}, {}, []),
        ({"StopSignal": "2"}, {"stop_signal": "SIGINT"}, []),
        ({"StopSignal": "quit"}, {"stop_signal": "SIGQUIT"}, []),
        ({"StopSignal": "SIGRTMIN+3"}, {}, ["--stop-signal SIGRTMIN+3: the model gets SIGTERM"]),
        ({"StopSignal": "37"}, {}, ["--stop-signal 37: the model gets SIGTERM"]),
        ({"StopTimeout": 0}, {"stop_timeout": "0s"}, []),
        (
            {"StopTimeout": -1},
            {},
            ["--stop-timeout -1: give a long `stop_timeout`, as in 24h"],
        ),
        (
            {"Healthcheck": {"Test": ["CMD-SHELL", "curl -f x || exit 1"], "Interval": 9 * 10**9}},
            {
                "probe": {
                    "exec": ["/bin/sh", "-c", "curl -f x || exit 1"],
                    **{"period": "9s", "timeout": "30s", "failures": 3},
                }
            },
            [],
        ),
        (
            {
                "Healthcheck": {
                    **{"Test": ["CMD", "check"], "Retries": 5, "Timeout": 500 * 10**6},
                    "StartPeriod": 600 * 10**9,
                }
            },
            {
                "start_timeout": "10m",
                "probe": {"exec": ["check"], "period": "30s", "timeout": "500ms", "failures": 5},
            },
            [],
        ),
        (
            {"Healthcheck": {"Test": ["CMD-SHELL", "test ${X}"]}},
            {},
            ["--health-cmd /bin/sh -c test ${X}: give a `probe`"],
        ),
        (
            {"Env": [*IMAGE["Config"]["Env"], "GONE"]},
            {},
            ["--env GONE: it unsets the image's variable"],
        ),
    ],
)
def test_what_needs_another_form_or_has_none(
    config: dict[str, Any], entry: dict[str, Any], expected: list[str]
) -> None:
    found = container(config)
    assert found.entry == {"backend": "container", "image": "a/b:1", **entry}
    assert [*found.left] == expected


def test_a_stop_signal_of_the_image_is_carried_over_since_ours_would_replace_it() -> None:
    image = {"Config": IMAGE["Config"] | {"StopSignal": "SIGQUIT"}}
    given = inspected({"StopSignal": "SIGQUIT"})
    found = propose(given, Around(image), ["0"], KNOWN, [])
    assert found.entry["stop_signal"] == "SIGQUIT"


def test_a_health_check_that_is_switched_off_is_no_probe() -> None:
    image = {"Config": IMAGE["Config"] | {"Healthcheck": {"Test": ["CMD", "true"]}}}
    given = inspected({"Healthcheck": {"Test": ["NONE"]}})
    found = propose(given, Around(image), ["0"], KNOWN, [])
    assert "probe" not in found.entry
    assert [*found.left] == ["--no-healthcheck: the image's check runs, and nothing follows it"]


def test_limits_that_are_no_single_number() -> None:
    ulimits = [
        {"Name": "nofile", "Soft": 1024, "Hard": 4096},
        {"Name": "memlock", "Soft": -1, "Hard": -1},
        {"Name": "stack", "Soft": 67108864, "Hard": 67108864},
        {"Name": "nofile", "Soft": -1, "Hard": -1},
    ]
    found = container(None, Ulimits=ulimits[:3], CpuQuota=150_000, CpuPeriod=50_000)
    assert found.entry["limits"] == {"cpus": 3.0, "memlock": "unlimited"}
    assert found.entry["ulimits"] == {"nofile": {"soft": 1024, "hard": 4096}, "stack": 67108864}
    found = container(None, Ulimits=ulimits[3:], NanoCpus=8 * 10**9, CpusetCpus="0-1,4")
    assert found.entry["ulimits"] == {"nofile": -1}
    assert found.entry["limits"] == {"cpus": 3}  # more CPUs than those do nothing
    assert found.left == ()


def test_a_tmpfs_of_either_option_is_one() -> None:
    options = {"SizeBytes": 1 << 20, "Mode": 0o1777, "Options": [["noexec"], ["uid", "5"]]}
    given = inspected(
        Tmpfs={"/run": "size=64m", "/tmp": ""},
        Mounts=[{"Type": "tmpfs", "Target": "/scratch", "TmpfsOptions": options}],
    )
    given["Mounts"] = [{"Type": "tmpfs", "Destination": "/scratch"}]
    found = propose(given, Around(IMAGE), ["0"], KNOWN, [])
    assert found.entry["tmpfs"] == [
        *("/run:size=64m", "/tmp", "/scratch:noexec,uid=5,size=1048576,mode=1777")
    ]


def test_the_hosts_shared_memory_has_no_size() -> None:
    found = container(None, IpcMode="host", ShmSize=2 << 30, SecurityOpt=["label=disable"])
    assert found.entry == {"backend": "container", "image": "a/b:1", "ipc": "host"}
    assert found.left == ()


def test_ports_that_docker_chose_and_addresses_that_one_key_cannot_hold() -> None:
    given = inspected(PortBindings={"80/tcp": [{"HostIp": "", "HostPort": ""}]})
    given["NetworkSettings"] = {
        "Ports": {
            "80/tcp": [
                {"HostIp": "0.0.0.0", "HostPort": "32768"},
                {"HostIp": "::", "HostPort": "32768"},
            ],
            "90/tcp": None,
        }
    }
    found = propose(given, Around(IMAGE), ["0"], KNOWN, [])
    assert found.entry == {
        **{"backend": "container", "image": "a/b:1"},
        **{"container_port": 80, "listen": "0.0.0.0"},
    }
    assert found.notes == (
        "Docker chose its port 32768, and the supervisor chooses another one. `port` gives it a "
        "fixed one.",
        "It listens on ::, too, and `listen` is one address.",
    )


def test_a_volume_that_docker_mounts_is_not_taken_by_its_path() -> None:
    """Where no container uses it, that path is an empty directory."""
    given = inspected(
        Mounts=[{"Type": "volume", "Target": "/c", "VolumeOptions": {"Subpath": "s"}}]
    )
    given["Mounts"] = [
        {
            "Type": "volume",
            "Name": "nfs",
            "Source": "/d/nfs/_data",
            "Destination": "/a",
            "RW": True,
        },
        {
            "Type": "volume",
            "Name": "dir",
            "Source": "/d/dir/_data",
            "Destination": "/b",
            "RW": True,
        },
        {
            "Type": "volume",
            "Name": "own",
            "Source": "/d/own/_data",
            "Destination": "/c",
            "Mode": "z",
        },
        {"Type": "bind", "Source": "/m", "Destination": "/d", "Mode": "ro,Z", "RW": False},
        {"Type": "bind", "Source": "/n", "Destination": "/e", "Propagation": "rshared", "New": "x"},
    ]
    volumes = {
        "nfs": {"type": "nfs", "o": "addr=h,password=s3cret", "device": ":/models"},
        "dir": {"type": "none", "o": "bind", "device": "/srv/models"},
    }
    found = propose(given, Around(IMAGE, volumes=volumes), ["0"], KNOWN, [])
    assert found.entry["mounts"] == [
        {"source": "/srv/models", "target": "/b"},
        {"source": "/d/own/_data", "target": "/c"},
        {"source": "/m", "target": "/d", "read_only": True},
        {"source": "/n", "target": "/e"},
    ]
    assert [*found.left] == [
        "--mount of the volume nfs at /a, which Docker mounts (type nfs, device :/models): "
        "mount it on this host, and give its path under `mounts`",
        "--mount at /c with Subpath=s",
        "--mount at /d with Z",
        "--mount at /e with rshared, New=x",
    ]
    assert "s3cret" not in str(found.notes)


def test_the_choice_of_gpus_is_not_carried_into_a_container_that_has_its_own() -> None:
    found = container({"Env": ["PATH=/bin", "CUDA_VISIBLE_DEVICES=1", "A=1"]})
    assert found.secrets == (("A", "1"),)
    assert found.notes == (
        "CUDA_VISIBLE_DEVICES is left out: a model sees its own GPUs and no other.",
    )


def test_an_image_whose_name_has_moved_on_is_said() -> None:
    found = propose(inspected(), Around(IMAGE, image_moved=True), ["0"], KNOWN, [])
    assert found.notes == (
        "It runs an earlier image of that name; the model gets what it names now.",
    )


def test_an_empty_command_keeps_the_image_from_running_its_own() -> None:
    assert container({"Cmd": None}).entry["entrypoint"] == ["/entry"]


def test_a_container_that_restarts_has_to_be_told_not_to() -> None:
    found = propose(
        inspected(RestartPolicy={"Name": "unless-stopped"}, NetworkMode="host"),
        Around(),
        ["0"],
        KNOWN,
        [],
    )
    assert found.stop == ("docker update --restart=no web", "docker stop web")
    assert found.entry["network"] == "host"


def test_a_placeholder_in_a_command_cannot_be_taken_over() -> None:
    found = container({"Cmd": ["sh", "-c", "echo ${HOME}"]})
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


@pytest.mark.parametrize(
    "name",
    ["HOME", "XDG_CACHE_HOME", "LISTEN_HOST", "PROMPT_TEMPLATE", "LESS_IS_MORE", "DBUS_HOST"],
)
def test_a_variable_that_only_looks_like_one_of_a_session_is_kept(name: str) -> None:
    assert is_its_own(name)


@pytest.mark.parametrize(
    "name",
    ["PWD", "XDG_SESSION_ID", "XDG_RUNTIME_DIR", "LISTEN_FDS", "SSH_TTY", "CUDA_VISIBLE_DEVICES"],
)
def test_a_variable_of_a_session_or_a_unit_is_not_its_own(name: str) -> None:
    assert not is_its_own(name)
