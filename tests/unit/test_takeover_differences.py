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


def found(config: dict[str, Any] | None = None, **host: Any) -> tuple[dict[str, Any], list[str]]:
    """What differs from a plain container: keys, and one line each for the rest."""
    base = inspected(PLAIN_CONFIG | (config or {}), **PLAIN_HOST | host)
    endpoint = {"IPAMConfig": None, "Aliases": None, "DNSNames": None, "IPAddress": "172.17.0.2"}
    base["NetworkSettings"] = {"Networks": {"bridge": endpoint}}
    return differences(base, IMAGE["Config"], INFO)


@pytest.mark.parametrize("engine", [{}, LATER])
def test_a_plain_container_has_nothing_without_a_key(engine: dict[str, Any]) -> None:
    assert found(**engine) == ({}, [])


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ({"DnsSearch": ["a.b"]}, ['--dns-search a.b: every container gets it by "dns-search"']),
        ({"NetworkMode": "none"}, ["--network none: the model is in the network bridge, and may"]),
        ({"NetworkMode": "container:abc"}, ["--network container:abc: the model has a network"]),
        ({"IpcMode": "container:f0"}, ["--ipc container:f0: the model has a /dev/shm of its own"]),
        ({"Memory": 1 << 30, "MemorySwap": 2 << 30}, []),
        ({"Memory": 1 << 30, "MemorySwap": -1}, ["--memory-swap -1"]),
        ({"Runtime": "kata"}, ["--runtime kata"]),
        ({"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3}}, ["--restart on-fail"]),
        ({"RestartPolicy": {"Name": "unless-stopped"}}, []),
        ({"Devices": [{"PathOnHost": "/dev/nvidia0"}]}, ["--device /dev/nvidia0:/dev/nvidia0:rwm"]),
        (
            {"SecurityOpt": ['seccomp={"a": 1}']},
            ['--security-opt seccomp={"a": 1}: save a profile'],
        ),
        ({"ExtraHosts": ["db:a.b"]}, ["--add-host db:a.b"]),
        ({"Tmpfs": {"/run": "huge=always"}}, ["--tmpfs /run:huge=always"]),
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
    entry, left = found(**host)
    assert entry == {} and len(left) == len(expected), left
    for text, beginning in zip(left, expected, strict=True):
        assert text.startswith(beginning)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (
            {"CapDrop": ["ALL"], "CapAdd": ["CAP_NET_ADMIN"]},
            {"cap_add": ["CAP_NET_ADMIN"], "cap_drop": ["ALL"]},
        ),
        ({"ReadonlyRootfs": True}, {"read_only": True}),
        ({"Tmpfs": {"/run": "size=64m", "/tmp": ""}}, {"tmpfs": ["/run:size=64m", "/tmp"]}),
        ({"Dns": ["1.1.1.1", "9.9.9.9"]}, {"dns": ["1.1.1.1", "9.9.9.9"]}),
        ({"IpcMode": "host"}, {"ipc": "host"}),
        ({"IpcMode": "shareable"}, {"ipc": "shareable"}),
        ({"Sysctls": {"net.core.somaxconn": "9"}}, {"sysctls": {"net.core.somaxconn": "9"}}),
        ({"CpusetCpus": "0-3"}, {"cpuset": "0-3"}),
        ({"GroupAdd": ["44", "video"]}, {"group_add": ["44", "video"]}),
        ({"ExtraHosts": ["db:1.2.3.4", "v6:::1"]}, {"extra_hosts": ["db:1.2.3.4", "v6:::1"]}),
        ({"SecurityOpt": ["no-new-privileges"]}, {"security_opt": ["no-new-privileges"]}),
        (
            {"MaskedPaths": [], "ReadonlyPaths": []},
            {"security_opt": ["systempaths=unconfined"]},
        ),
        (
            {
                "Devices": [
                    {"PathOnHost": "/dev/fuse", "PathInContainer": "", "CgroupPermissions": ""},
                    {
                        **{"PathOnHost": "/dev/a", "PathInContainer": "/dev/b"},
                        "CgroupPermissions": "r",
                    },
                ]
            },
            {"devices": ["/dev/fuse:/dev/fuse:rwm", "/dev/a:/dev/b:r"]},
        ),
    ],
)
def test_what_has_a_key_is_carried_over(host: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found(**host) == (expected, [])


@pytest.mark.parametrize(
    ("config", "host", "expected"),
    [
        ({"Hostname": "a_b"}, {}, ["--hostname a_b"]),
        ({"Hostname": "vm"}, {"NetworkMode": "host"}, []),
        ({"Tty": True, "OpenStdin": True, "AttachStdin": True}, {}, ["--interactive", "--tty"]),
        ({"Novelty": {"a": 1}}, {}, ["Config.Novelty a=1"]),
    ],
)
def test_configuration_that_differs_from_the_image(
    config: dict[str, Any], host: dict[str, Any], expected: list[str]
) -> None:
    assert found(config, **host) == ({}, expected)


def test_a_host_name_and_labels_are_carried_over_without_those_of_others() -> None:
    labels = {"a.b": "x", "com.docker.compose.project": "p", "of": "image", "io.docker.x": "1"}
    base = inspected(PLAIN_CONFIG | {"Labels": labels, "Hostname": "vm"}, **PLAIN_HOST)
    entry, left = differences(base, IMAGE["Config"] | {"Labels": {"of": "image"}}, INFO)
    assert entry == {"labels": {"a.b": "x"}, "hostname": "vm"}
    assert [text.partition(":")[0] for text in left] == ["--label io.docker.x"]


def test_options_of_a_log_and_labels_that_stay_may_be_secret_and_go_by_name() -> None:
    config = {"Labels": {"token": "s3cret${"}}
    host = {"LogConfig": {"Type": "splunk", "Config": {"splunk-token": "s3cret"}}}
    entry, left = found(config, **host)
    assert entry == {} and "s3cret" not in str(left)
    assert [text.partition(":")[0] for text in left] == [
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
    entry, left = differences(base, IMAGE["Config"], INFO)
    assert entry == {"networks": ["shop"], "network_aliases": ["api", "web"]}
    assert left == [
        "--network bridge (DriverOpts a=b): the model is in its other networks alone",
        "--network shop (IPAMConfig IPv4Address=10.1.0.9; Novelty x): Docker chooses these for a "
        "model",
    ]
