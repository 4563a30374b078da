"""`init --from-running` drops nothing of a container in silence: on a real engine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import docker
import pytest
from docker.errors import NotFound

from mic_supervisor.config.types import parse_size
from tests.integration.docker_world import docker as run_docker
from tests.mock_nvml import MockGpu, MockNvml, MockProcess
from tests.support.drafts import comments_of, model_of
from tests.support.mic import Mic

pytestmark = pytest.mark.engine

END = ("sleep", "300")


@pytest.fixture
def on_gpus(
    mic: Mic, tmp_path: Path, engine: docker.APIClient, busybox_image: str
) -> Iterator[Callable[..., None]]:
    """Containers as `docker run` makes them, by name; each is on a mock GPU of its own."""
    nvml = MockNvml(tmp_path)
    mic.env |= {"MIC_GPU_SOURCE": "nvml", **nvml.env()}
    made: list[str] = []

    def start(**wanted: str) -> None:
        pids = []
        for name, options in wanted.items():
            made.append(f"{mic.scope}-{name}")
            run_docker("run", "--detach", "--name", made[-1], *options.split(), busybox_image, *END)
            pids.append(engine.inspect_container(made[-1])["State"]["Pid"])
        nvml.set([MockGpu(processes=[MockProcess(pid)]) for pid in pids])
        mic("init", "--from-running", rc=0)
        assert mic("check", rc=0).stdout.startswith(f"{mic.config}: valid")

    yield start
    for name in made:
        with suppress(NotFound):
            engine.remove_container(name, force=True, v=True)


def test_a_plain_container_has_all_that_the_file_says(
    mic: Mic, on_gpus: Callable[..., None], busybox_image: str
) -> None:
    on_gpus(plain="", bounded="--memory 64m --restart always")
    name = f"{mic.scope}-plain"
    assert model_of(mic, name) == {
        **{"backend": "container", "image": busybox_image, "command": [*END]}
    }
    (only,) = comments_of(mic, f"{mic.scope}-bounded")
    assert only.endswith("mic-supervisor apply")
    assert comments_of(mic, name)[0].endswith(
        f"container {name} on GPU 0 now. To take it over: docker stop {name}; mic-supervisor apply"
    )
    assert "no key" not in mic.config.read_text()


def test_each_setting_of_a_container_is_carried_over_or_noted(
    mic: Mic, on_gpus: Callable[..., None], free_port: Callable[[], int]
) -> None:
    web, other, udp = sorted(free_port() for _ in range(3))
    carried = (
        f"--publish 127.0.0.1:{web}:80 --shm-size 128m --user 1000:1000 --workdir /tmp --env A=b "
        f"--volume {mic.home}:/data:ro --memory 64m --cpu-quota 50000 --stop-signal 2 "
        "--stop-timeout 0 --health-cmd true --health-interval 9s --ulimit memlock=32768 "
    )
    noted = (
        "--cap-drop ALL --cap-add NET_BIND_SERVICE --read-only --tmpfs /run:size=1m "
        "--dns 192.0.2.53 --dns-search example.com --dns-option ndots:2 --add-host db:192.0.2.9 "
        "--sysctl net.core.somaxconn=99 --ulimit stack=1000000:2000000 --ulimit nofile=1000:2000 "
        "--group-add 44 --hostname api --domainname example.com --label tier=s3cret "
        "--pids-limit 100 --cpuset-cpus 0 --cpu-shares 512 --memory-reservation 32m "
        "--oom-score-adj 100 --security-opt no-new-privileges --device /dev/null:/dev/x "
        "--log-opt max-size=1m --mount type=tmpfs,target=/scratch "
        f"--publish 127.0.0.1:{other}:81 --publish 127.0.0.1:{udp}:53/udp"
    )
    on_gpus(
        many=carried + noted,
        host="--ipc host --pid host --uts host --network host --userns host -it",
        joined=f"--network container:{mic.scope}-many --restart on-failure:3",
        alone="--network none --rm --volume /anon --stop-signal RTMIN+3 --ipc shareable "
        "--security-opt systempaths=unconfined",
        linked=f"--link {mic.scope}-many:other --publish-all --expose 80",
    )
    found = model_of(mic, f"{mic.scope}-many")
    assert {key: found[key] for key in found if key not in ("image", "command", "env_file")} == {
        **{"backend": "container", "port": web, "container_port": 80, "shm_size": "128m"},
        **{"user": "1000:1000", "working_dir": "/tmp", "stop_signal": "SIGINT"},
        "mounts": [{"source": str(mic.home), "target": "/data", "read_only": True}],
        "limits": {"memory": "64m", "cpus": 0.5, "nofile": 1000, "memlock": "32k"},
        "stop_timeout": "0s",
        "probe": {
            **{"exec": ["/bin/sh", "-c", "true"], "period": "9s"},
            **{"timeout": "30s", "failures": 3},
        },
    }
    first, *items = comments_of(mic, f"{mic.scope}-many")
    assert f"are not carried over: {udp} to 53/udp, {other} to 81." in first
    assert_items(
        items,
        *("--cap-add CAP_NET_BIND_SERVICE", "--cap-drop ALL", "--read-only", "--tmpfs /run=size"),
        *("--dns 192.0.2.53", "--dns-search example.com", "--dns-option ndots:2"),
        *("--add-host db:192.0.2.9", "--sysctl net.core.somaxconn=99", "--group-add 44"),
        *("--ulimit stack=1000000:2000000", "--ulimit nofile=1000:2000", "--hostname api"),
        *("--domainname example.com", "--label tier", "--pids-limit 100", "--cpuset-cpus 0"),
        *("--cpu-shares 512", f"--memory-reservation {32 << 20}", "--oom-score-adj 100"),
        *("--security-opt no-new-privileges", "--device PathOnHost=/dev/null"),
        *("--log-driver json-file (with max-size)", "--mount of type tmpfs at /scratch"),
    )
    assert "s3cret" not in mic.config.read_text()

    first, *items = comments_of(mic, f"{mic.scope}-host")
    assert "It serves on the host's network" in first
    assert_items(
        items,
        *("--ipc host: the model has a /dev/shm", "--pid host", "--uts host"),
        *("--security-opt label=disable", "--userns host", "--interactive", "--tty"),
    )
    found = model_of(mic, f"{mic.scope}-host")
    assert found["network"] == "host"
    assert parse_size(found["shm_size"]) == shutil.disk_usage("/dev/shm").total

    assert_items(
        comments_of(mic, f"{mic.scope}-joined")[1:],
        *("--network container:", "--restart on-failure: the supervisor"),
    )
    first, *items = comments_of(mic, f"{mic.scope}-alone")
    assert "/anon is the volume " in first
    assert_items(
        items,
        *("--network none: the model is in the network bridge", "--rm: as soon as it is stopped"),
        *("--ipc shareable", "HostConfig.MaskedPaths (empty)", "HostConfig.ReadonlyPaths (empty)"),
        "--stop-signal RTMIN+3: the model gets SIGTERM",
    )
    first, *items = comments_of(mic, f"{mic.scope}-linked")
    assert re.search(r"Docker chose its port \d+, and the supervisor chooses another one", first)
    assert_items(items, "--link ")
    assert model_of(mic, f"{mic.scope}-linked")["container_port"] == 80


def assert_items(items: list[str], *expected: str) -> None:
    """Each line is expected, and each that is expected is there."""
    for beginning in expected:
        assert [item for item in items if item.startswith(beginning)], beginning
    assert len(items) == len(expected), items
