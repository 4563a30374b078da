"""`init --from-running` drops nothing of a container in silence: on a real engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import docker
import pytest
from docker.errors import NotFound

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
        "--cap-drop ALL --cap-add NET_BIND_SERVICE --read-only --tmpfs /run:size=1m "
        "--dns 192.0.2.53 --add-host db:192.0.2.9 --sysctl net.core.somaxconn=99 "
        "--ulimit stack=1000000:2000000 --ulimit nofile=1000:2000 --group-add 44 --hostname api "
        "--label tier=front --cpuset-cpus 0 --security-opt no-new-privileges "
        "--device /dev/null:/dev/x --mount type=tmpfs,target=/scratch "
    )
    noted = (
        "--dns-search example.com --dns-option ndots:2 --domainname example.com --pids-limit 100 "
        "--label com.docker.token=s3cret --cpu-shares 512 --memory-reservation 32m "
        "--oom-score-adj 100 --log-opt max-size=1m "
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
        "limits": {"memory": "64m", "cpus": 0.5, "memlock": "32k"},
        "ulimits": {
            "nofile": {"soft": 1000, "hard": 2000},
            "stack": {"soft": 1000000, "hard": 2000000},
        },
        **{"cap_add": ["CAP_NET_BIND_SERVICE"], "cap_drop": ["ALL"], "read_only": True},
        **{"tmpfs": ["/run:size=1m", "/scratch"], "dns": ["192.0.2.53"], "group_add": ["44"]},
        **{"extra_hosts": ["db:192.0.2.9"], "sysctls": {"net.core.somaxconn": "99"}},
        **{"hostname": "api", "labels": {"tier": "front"}, "cpuset": "0"},
        "security_opt": ["no-new-privileges"],
        "devices": ["/dev/null:/dev/x:rwm"],
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
        *("--dns-search example.com", "--dns-option ndots:2", "--domainname example.com"),
        *("--label com.docker.token: programs", "--pids-limit 100", "--cpu-shares 512"),
        *(f"--memory-reservation {32 << 20}", "--oom-score-adj 100"),
        "--log-driver json-file (with max-size)",
    )
    assert "s3cret" not in mic.config.read_text()

    first, *items = comments_of(mic, f"{mic.scope}-host")
    assert "It serves on the host's network" in first
    assert_items(
        items,
        *("--pid host", "--uts host", "--userns host", "--interactive", "--tty"),
    )
    found = model_of(mic, f"{mic.scope}-host")
    assert (found["network"], found["ipc"], found.get("shm_size")) == ("host", "host", None)

    assert_items(
        comments_of(mic, f"{mic.scope}-joined")[1:],
        *("--network container:", "--restart on-failure: the supervisor"),
    )
    first, *items = comments_of(mic, f"{mic.scope}-alone")
    assert "/anon is the volume " in first
    assert_items(
        items,
        *("--network none: the model is in the network bridge", "--rm: as soon as it is stopped"),
        "--stop-signal RTMIN+3: the model gets SIGTERM",
    )
    found = model_of(mic, f"{mic.scope}-alone")
    assert (found["ipc"], found["security_opt"]) == ("shareable", ["systempaths=unconfined"])
    first, *items = comments_of(mic, f"{mic.scope}-linked")
    assert re.search(r"Docker chose its port \d+, and the supervisor chooses another one", first)
    assert_items(items, "--link ")
    assert model_of(mic, f"{mic.scope}-linked")["container_port"] == 80


def assert_items(items: list[str], *expected: str) -> None:
    """Each line is expected, and each that is expected is there."""
    for beginning in expected:
        assert [item for item in items if item.startswith(beginning)], beginning
    assert len(items) == len(expected), items
