"""What the engine is asked for, as whole documents, and labels there and back."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.model import ContainerSpec, Identity, Launch, Limits, Mount, Near, Port
from mic_supervisor.runtimes.docker.create import container_config, identity_of, labels

GPU = "GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10"
OTHER = "GPU-00000000-0000-0000-0000-000000000001"
IDENTITY = Identity(
    scope="default",
    host="c0ffee",
    instance="mam-0",
    model="MAM",
    backend="triton",
    gpus=(GPU, OTHER),
    ports={"http": 20000, "grpc": 20001},
    spec={"image": "x:1"},
    spec_hash="abc",
)
LABELS = {
    "io.mic.managed-by": "mic-supervisor",
    "io.mic.schema": "1",
    "io.mic.scope": "default",
    "io.mic.host": "c0ffee",
    "io.mic.instance": "mam-0",
    "io.mic.model": "MAM",
    "io.mic.backend": "triton",
    "io.mic.gpus": f"{GPU},{OTHER}",
    "io.mic.ports": '{"grpc":20001,"http":20000}',
    "io.mic.spec": '{"image":"x:1"}',
    "io.mic.spec-hash": "abc",
    "io.mic.origin": "file",
}


def config(
    spec: ContainerSpec, discovered: frozenset[str] = frozenset(), near: Near | None = None
) -> dict[str, object]:
    launch = Launch("mic-default-mam-0", "docker", IDENTITY, spec, near)
    return container_config(launch, spec, discovered)


def test_the_least() -> None:
    assert config(ContainerSpec("x:1")) == {
        "Image": "x:1",
        "Labels": LABELS,
        "Env": ["NVIDIA_VISIBLE_DEVICES=void"],
        "StopSignal": "SIGTERM",
        "StopTimeout": 30,
        "HostConfig": {
            "Init": True,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "3"}},
            "NetworkMode": "bridge",
            "RestartPolicy": {"Name": "no"},
        },
    }


def test_everything() -> None:
    spec = ContainerSpec(
        "x:1",
        command=("serve", "--port", "20000"),
        entrypoint=("/bin/tini", "--"),
        env=(("A", "1"), ("B", "x=y")),
        devices=(GPU, OTHER),
        mounts=(Mount("/srv/m", "/models", read_only=True),),
        ports=(Port("http", 20000, 8000), Port("grpc", 20001, 20001)),
        listen="0.0.0.0",
        shm_size=2 << 30,
        user="1000:1000",
        working_dir="/srv",
        limits=Limits(memory=1 << 30, cpus=1.5, nofile=1024, memlock=-1),
        stop_signal="SIGINT",
        stop_timeout=0.2,
    )
    assert config(spec) == {
        "Image": "x:1",
        "Labels": LABELS,
        "Cmd": ["serve", "--port", "20000"],
        "Entrypoint": ["/bin/tini", "--"],
        "Env": ["A=1", "B=x=y"],
        "User": "1000:1000",
        "WorkingDir": "/srv",
        "ExposedPorts": {"8000/tcp": {}, "20001/tcp": {}},
        "StopSignal": "SIGINT",
        "StopTimeout": 1,
        "HostConfig": {
            "Init": True,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "3"}},
            "NetworkMode": "bridge",
            "RestartPolicy": {"Name": "no"},
            "PortBindings": {
                "8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "20000"}],
                "20001/tcp": [{"HostIp": "0.0.0.0", "HostPort": "20001"}],
            },
            "DeviceRequests": [
                {
                    "Driver": "",
                    "DeviceIDs": [GPU, OTHER],
                    "Capabilities": [["gpu", "compute", "utility"]],
                }
            ],
            "Mounts": [{"Type": "bind", "Source": "/srv/m", "Target": "/models", "ReadOnly": True}],
            "ShmSize": 2 << 30,
            "Memory": 1 << 30,
            "NanoCpus": 1_500_000_000,
            "Ulimits": [
                {"Name": "nofile", "Soft": 1024, "Hard": 1024},
                {"Name": "memlock", "Soft": -1, "Hard": -1},
            ],
        },
    }


def test_the_keys_of_containers() -> None:
    spec = ContainerSpec(
        "x:1",
        limits=Limits(nofile=5),
        networks=("shop", "more"),
        network_aliases=("mam", "chat"),
        ipc="host",
        host_devices=("/dev/fuse:/dev/x:rw",),
        cap_add=("SYS_PTRACE",),
        cap_drop=("ALL",),
        security_opt=("no-new-privileges=true", "systempaths=unconfined"),
        group_add=("44",),
        extra_hosts=("db:192.0.2.9",),
        dns=("192.0.2.53",),
        tmpfs=("/run:size=1m", "/tmp"),
        ulimits=(("core", "0:-1"),),
        read_only=True,
        cpuset="0-3",
        labels=(("a", "b"),),
        hostname="api",
        sysctls=(("net.core.somaxconn", "99"),),
        pull="always",
    )
    found = config(spec)
    plain = config(ContainerSpec("x:1"))
    host, usual = found.pop("HostConfig"), plain.pop("HostConfig")
    assert isinstance(host, dict) and isinstance(usual, dict)
    assert found == plain | {
        "Labels": {"a": "b", **LABELS},
        "Hostname": "api",
        "NetworkingConfig": {"EndpointsConfig": {"shop": {"Aliases": ["mam", "chat"]}}},
    }
    assert host == usual | {
        "NetworkMode": "shop",
        "IpcMode": "host",
        "Devices": [
            {
                **{"PathOnHost": "/dev/fuse", "PathInContainer": "/dev/x"},
                "CgroupPermissions": "rw",
            }
        ],
        "CapAdd": ["SYS_PTRACE"],
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges=true"],
        "MaskedPaths": [],
        "ReadonlyPaths": [],
        "GroupAdd": ["44"],
        "ExtraHosts": ["db:192.0.2.9"],
        "Dns": ["192.0.2.53"],
        "Tmpfs": {"/run": "size=1m", "/tmp": ""},
        "Ulimits": [
            {"Name": "nofile", "Soft": 5, "Hard": 5},
            {"Name": "core", "Soft": 0, "Hard": -1},
        ],
        "ReadonlyRootfs": True,
        "CpusetCpus": "0-3",
        "Sysctls": {"net.core.somaxconn": "99"},
    }


def test_labels_of_ours_win() -> None:
    found = config(ContainerSpec("x:1", labels=(("io.mic.scope", "other"),)))
    assert found["Labels"] == LABELS


def test_a_slice_is_asked_for_by_its_uuid() -> None:
    part = "MIG-f15ae561-7b5c-5a0c-8ab1-3a1e0c2d9f10"
    found = config(ContainerSpec("x:1", devices=(part,)), frozenset())
    (request,) = found["HostConfig"]["DeviceRequests"]  # type: ignore[index]
    assert request["DeviceIDs"] == [part]


def test_it_is_confined_to_what_is_near_its_gpus() -> None:
    spec = ContainerSpec("x:1")
    plain = config(spec)
    host = config(spec, near=Near((0, 1, 8), (1,)))["HostConfig"]
    assert host == {**plain["HostConfig"], "CpusetCpus": "0,1,8", "CpusetMems": "1"}  # type: ignore[dict-item]


def test_cdi_only_when_the_engine_knows_every_gpu() -> None:
    spec = ContainerSpec("x:1", devices=(GPU, OTHER))
    both = frozenset({f"nvidia.com/gpu={GPU}", f"nvidia.com/gpu={OTHER}", "nvidia.com/gpu=all"})
    found = config(spec, both)
    assert found["HostConfig"]["DeviceRequests"] == [  # type: ignore[index]
        {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={GPU}", f"nvidia.com/gpu={OTHER}"]}
    ]
    # The NVIDIA runtime as the engine's default must not add the rest.
    assert found["Env"] == ["NVIDIA_VISIBLE_DEVICES=void"]
    found = config(spec, frozenset({f"nvidia.com/gpu={GPU}"}))
    assert found["HostConfig"]["DeviceRequests"][0]["Driver"] == ""  # type: ignore[index]
    assert found["Env"] == []


def test_what_the_user_says_of_visible_devices_stands() -> None:
    spec = ContainerSpec("x:1", env=(("NVIDIA_VISIBLE_DEVICES", "all"),))
    assert config(spec)["Env"] == ["NVIDIA_VISIBLE_DEVICES=all"]


def test_host_network_publishes_nothing() -> None:
    found = config(ContainerSpec("x:1", network="host", ports=(Port("http", 20000, 20000),)))
    assert "ExposedPorts" not in found
    assert found["HostConfig"]["NetworkMode"] == "host"  # type: ignore[index]
    assert "PortBindings" not in found["HostConfig"]  # type: ignore[operator]


def test_an_empty_entrypoint_is_none_at_all() -> None:
    assert config(ContainerSpec("x:1", entrypoint=()))["Entrypoint"] == [""]


TEXT = st.text(st.characters(exclude_categories=("Cs",)))
NAMES = TEXT.filter(lambda text: "," not in text and text != "")


@given(
    identity=st.builds(
        Identity,
        scope=TEXT,
        host=TEXT,
        instance=NAMES,
        model=TEXT,
        backend=TEXT,
        gpus=st.lists(NAMES, max_size=8).map(tuple),
        ports=st.dictionaries(TEXT, st.integers(1, 65535)),
        spec=st.none()
        | st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT)),
        spec_hash=TEXT,
        schema=st.integers(1, 99),
        origin=TEXT,
    )
)
def test_labels_read_back_as_they_were(identity: Identity) -> None:
    written = labels(identity)
    assert all(type(value) is str for value in written.values())
    assert identity_of(json.loads(json.dumps(written)), "name") == identity


@given(
    found=st.dictionaries(
        st.sampled_from(sorted(LABELS)),
        TEXT | st.sampled_from(["{", "[]", "null", "²", '{"a":true}']),
    )
)
def test_broken_labels_never_break(found: dict[str, str]) -> None:
    identity = identity_of(found, "name")
    assert identity.instance
    assert all(type(port) is int for port in identity.ports.values())
    assert identity.spec is None or isinstance(identity.spec, dict)
