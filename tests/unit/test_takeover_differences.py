"""What differs from a plain container, and gets a line."""

from __future__ import annotations

from typing import Any

import pytest

from mic_supervisor.takeover.differences import differences
from tests.unit.test_takeover import IMAGE, inspected, request

# A container of `docker run -d IMAGE`, as Engine 20.10 shows it; what later ones show otherwise.
PLAIN_CONFIG = {
    **{"Hostname": "f" * 12, "Domainname": "", "AttachStdout": True, "AttachStderr": True},
    **{"Tty": False, "OpenStdin": False, "Volumes": None, "OnBuild": None, "Labels": {}},
}
PLAIN_HOST = {
    **{"Binds": None, "ContainerIDFile": "", "LogConfig": {"Type": "json-file", "Config": {}}},
    **{"NetworkMode": "default", "PortBindings": {}, "AutoRemove": False, "VolumeDriver": ""},
    **{"RestartPolicy": {"Name": "no", "MaximumRetryCount": 0}, "VolumesFrom": None},
    **{"CapAdd": None, "CapDrop": None, "CgroupnsMode": "host", "Dns": [], "ExtraHosts": None},
    **{"IpcMode": "private", "Cgroup": "", "PidMode": "", "Privileged": False, "UTSMode": ""},
    **{"OomScoreAdj": 0, "SecurityOpt": None, "ShmSize": 64 << 20, "Runtime": "runc"},
    **{"ConsoleSize": [0, 0], "Isolation": "", "CpuShares": 0, "Memory": 0, "MemorySwap": 0},
    **{"MemorySwappiness": None, "OomKillDisable": False, "PidsLimit": None, "Ulimits": []},
    "MaskedPaths": [
        *("/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
        *("/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi"),
        "/sys/firmware",
    ],
    "ReadonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
}
LATER = {
    **{"NetworkMode": "bridge", "CgroupnsMode": "private", "OomKillDisable": None, "Dns": None},
    **{"ConsoleSize": [41, 120], "Ulimits": None, "Isolation": "default"},
    "MaskedPaths": [*PLAIN_HOST["MaskedPaths"], "/sys/devices/virtual/powercap"],  # type: ignore[misc]
}
INFO = {"CgroupVersion": "1", "DefaultRuntime": "runc", "Name": "vm"}


def left(config: dict[str, Any] | None = None, **host: Any) -> list[str]:
    """What differs from a plain container, one line each."""
    base = inspected(PLAIN_CONFIG | (config or {}), **PLAIN_HOST | host)
    endpoint = {"IPAMConfig": None, "Aliases": None, "DNSNames": None, "IPAddress": "172.17.0.2"}
    base["NetworkSettings"] = {"Networks": {"bridge": endpoint}}
    return differences(base, IMAGE["Config"], INFO)


@pytest.mark.parametrize("engine", [{}, LATER])
def test_a_plain_container_has_nothing_without_a_key(engine: dict[str, Any]) -> None:
    assert left(**engine) == []


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ({"CapDrop": ["ALL"], "CapAdd": ["NET_ADMIN"]}, ["--cap-add NET_ADMIN", "--cap-drop ALL"]),
        ({"ReadonlyRootfs": True}, ["--read-only"]),
        ({"Tmpfs": {"/run": "size=64m", "/tmp": ""}}, ["--tmpfs /run=size=64m"]),
        (
            {"Dns": ["1.1.1.1", "9.9.9.9"]},
            ['--dns 1.1.1.1, 9.9.9.9: every container gets it by "dns" in /etc/docker/daemon.json'],
        ),
        ({"NetworkMode": "none"}, ["--network none: the model is in the network bridge, and may"]),
        ({"NetworkMode": "container:abc"}, ["--network container:abc: the model has a network"]),
        ({"IpcMode": "host"}, ["--ipc host: the model has a /dev/shm of its own, of shm_size"]),
        ({"Memory": 1 << 30, "MemorySwap": 2 << 30}, []),
        ({"Memory": 1 << 30, "MemorySwap": -1}, ["--memory-swap -1"]),
        ({"Runtime": "kata"}, ["--runtime kata"]),
        ({"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3}}, ["--restart on-fail"]),
        ({"RestartPolicy": {"Name": "unless-stopped"}}, []),
        ({"Sysctls": {"net.core.somaxconn": "1024"}}, ["--sysctl net.core.somaxconn=1024"]),
        ({"Devices": [{"PathOnHost": "/dev/fuse"}]}, ["--device PathOnHost=/dev/fuse"]),
        ({"MaskedPaths": [], "ReadonlyPaths": None}, ["HostConfig.MaskedPaths (empty): as with"]),
        ({"LogConfig": {"Type": "json-file", "Config": {"max-size": "1m"}}}, ["--log-driver json"]),
        ({"PidsLimit": 100, "OomKillDisable": True}, ["HostConfig.OomKillDisable", "--pids-limit"]),
        ({"DeviceRequests": request(Count=-1)}, []),
        (
            {"DeviceRequests": request(Capabilities=[["gpu", "video"]], Options={"a": "b"})},
            ["--gpus Capabilities=video, Options=a=b"],
        ),
        (
            {"DeviceRequests": request(Driver="cdi", DeviceIDs=["nvidia.com/gpu=2", "x.y/z=1"])},
            ["--gpus DeviceIDs=x.y/z=1"],
        ),
        # No table knows these: a later engine's.
        ({"Novelty": "x\ny", "Another": 0, "List": []}, ["HostConfig.Novelty x y"]),
        ({"Novelty": [{"A": 1, "B": [2, 3]}]}, ["HostConfig.Novelty A=1, B=2, 3"]),
    ],
)
def test_whatever_differs_from_a_plain_container_gets_a_line(
    host: dict[str, Any], expected: list[str]
) -> None:
    found = left(**host)
    assert len(found) == len(expected)
    for text, beginning in zip(found, expected, strict=True):
        assert text.startswith(beginning)


@pytest.mark.parametrize(
    ("config", "host", "expected"),
    [
        ({"Hostname": "api"}, {}, ["--hostname api"]),
        ({"Hostname": "vm"}, {"NetworkMode": "host"}, []),
        ({"Hostname": "vm"}, {}, ["--hostname vm"]),
        ({"Tty": True, "OpenStdin": True, "AttachStdin": True}, {}, ["--interactive", "--tty"]),
        ({"Novelty": {"a": 1}}, {}, ["Config.Novelty a=1"]),
    ],
)
def test_configuration_that_differs_from_the_image(
    config: dict[str, Any], host: dict[str, Any], expected: list[str]
) -> None:
    assert left(config, **host) == expected


def test_labels_and_options_of_a_log_may_be_secret_and_go_by_name() -> None:
    config = {"Labels": {"token": "s3cret", "com.docker.compose.project": "p", "of": "image"}}
    host = {"LogConfig": {"Type": "splunk", "Config": {"splunk-token": "s3cret"}}}
    base = inspected(PLAIN_CONFIG | config, **PLAIN_HOST | host)
    found = differences(base, IMAGE["Config"] | {"Labels": {"of": "image"}}, INFO)
    assert "s3cret" not in str(found)
    assert [text.partition(":")[0] for text in found] == [
        "--log-driver splunk (with splunk-token)",
        "--label token",
    ]


def test_networks_with_what_was_asked_for_there() -> None:
    base = inspected(PLAIN_CONFIG, **PLAIN_HOST | {"NetworkMode": "shop"})
    base["NetworkSettings"] = {
        "Networks": {
            "shop": {
                "Aliases": ["api", "f" * 12, "web"],
                "IPAMConfig": {"IPv4Address": "10.1.0.9"},
                "IPAddress": "10.1.0.9",
                "Novelty": "x",
            },
            "bridge": {
                "Aliases": None,
                "DriverOpts": {"a": "b"},
                "MacAddress": "02:42:00:00:00:01",
            },
            "host": {},
        }
    }
    found = differences(base, IMAGE["Config"], INFO)
    where = "the model is in the network bridge, where others reach it by `listen` and `port` alone"
    assert found == [
        f"--network bridge (DriverOpts a=b): {where}",
        f"--network shop (Aliases api; IPAMConfig IPv4Address=10.1.0.9; Novelty x): {where}",
    ]
