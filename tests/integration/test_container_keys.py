"""The keys of containers on a real engine: what they do, what blocks, and the way from Docker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from mic_supervisor.errors import MicError, PreflightFailed
from mic_supervisor.runtimes.docker.keys import KEYS
from tests.integration.docker_world import World as Runtime
from tests.integration.docker_world import docker as run_docker
from tests.integration.job_world import World, web
from tests.mock_nvml import MockGpu, MockNvml, MockProcess
from tests.support.drafts import comments_of, model_of
from tests.support.mic import Mic
from tests.support.waiting import http

pytestmark = pytest.mark.engine

IMAGE, SERVER = "mic-test/busybox:1", "mic-test/server:1"
INSTANCE = "web-51000000"


@pytest.fixture
def network(engine: docker.APIClient, scope: str) -> Iterator[Callable[..., str]]:
    """Makes networks of the engine, by the end of their names."""
    made: list[str] = []

    def make(end: str = "net", **options: Any) -> str:
        name = f"{scope}-{end}"
        engine.create_network(name, **options)
        made.append(name)
        return name

    yield make
    for name in made:
        for one in engine.inspect_network(name).get("Containers") or {}:
            engine.disconnect_container_from_network(one, name, force=True)
        engine.remove_network(name)


def asked_from(network: str, url: str) -> str:
    """What another container in a network gets."""
    ask = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=5).read().decode())"
    return run_docker("run", "--rm", "--network", network, SERVER, "python3", "-c", ask)


# --- what each of them does -----------------------------------------------------------------------


def test_each_key_reaches_the_kernel(job: World) -> None:
    job.write(
        {0: "web"},
        web=web(
            "ipc: shareable, devices: ['/dev/null:/dev/x:r'], cap_add: [SYS_PTRACE]",
            "cap_drop: [ALL]",
            "security_opt: ['no-new-privileges:true'], group_add: [44], dns: 192.0.2.53",
            "extra_hosts: {db: 192.0.2.9}, tmpfs: ['/w:size=1m', /run], read_only: true",
            "ulimits: {core: 0, nproc: {soft: 1000, hard: 2000}}, cpuset: '0', hostname: api",
            "labels: {tier: front, of.one: 1}, sysctls: {net.core.somaxconn: 99}",
        ),
    )
    job.apply()
    found = job.one(INSTANCE)
    proc = Path(f"/proc/{found['State']['Pid']}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    assert int(status["CapBnd"], 16) == 1 << 19  # CAP_SYS_PTRACE alone
    assert (status["NoNewPrivs"], status["Cpus_allowed_list"]) == ("1", "0")
    assert "44" in status["Groups"].split()
    limits = (proc / "limits").read_text()
    assert [line.split()[-3:-1] for line in limits.splitlines() if "processes" in line] == [
        ["1000", "2000"]
    ]
    mounts = {
        line.split()[1]: line.split()[3] for line in (proc / "mounts").read_text().splitlines()
    }
    assert mounts["/"].startswith("ro") and "size=1024k" in mounts["/w"] and "/run" in mounts
    ref = found["Id"]
    assert run_docker("exec", ref, "cat", "/proc/sys/net/core/somaxconn") == "99"
    assert run_docker("exec", ref, "hostname") == "api"
    assert "192.0.2.9\tdb" in run_docker("exec", ref, "cat", "/etc/hosts")
    assert "192.0.2.53" in run_docker("exec", ref, "cat", "/etc/resolv.conf")
    assert run_docker("exec", ref, "ls", "/dev/x") == "/dev/x"
    assert found["HostConfig"]["IpcMode"] == "shareable"
    labels = found["Config"]["Labels"]
    assert (labels["tier"], labels["of.one"], labels["io.mic.model"]) == ("front", "1", "web")
    job.unchanged()

    # Another spelling and order is the same; what changes replaces, and says so.
    job.write(
        {0: "web"},
        web=web(
            "ipc: host, devices: [/dev/null:/dev/x:r], cap_add: [cap_sys_ptrace], cap_drop: [all]",
            "security_opt: [no-new-privileges], group_add: ['44'], dns: [192.0.2.53]",
            "extra_hosts: ['db=192.0.2.9'], tmpfs: ['/w:size=1m', /run], read_only: true",
            "ulimits: {nproc: {soft: 1000, hard: 2000}, core: 0}, cpuset: '0', hostname: api",
            "labels: [of.one=1, tier=front], sysctls: [net.core.somaxconn=99], pull: never",
        ),
    )
    assert '    ipc: "shareable" -> "host"\n' in job.plan()
    assert len([line for line in job.plan().splitlines() if line.startswith("    ")]) == 1
    job.apply()
    ipc = Path(f"/proc/{job.one(INSTANCE)['State']['Pid']}/ns/ipc").readlink()
    assert ipc == Path("/proc/self/ns/ipc").readlink()


def test_a_service_of_another_project_reaches_it_by_name(
    job: World, network: Callable[..., str], engine: docker.APIClient
) -> None:
    shop, inner = network("shop"), network("inner", internal=True)
    job.write(
        {0: "web"},
        web=web(
            f"networks: [{shop}, {inner}], network_aliases: [chat], container_port: 8000",
        )
        .replace("-p ${port}", "-p 8000")
        .replace("{http: /health}", "{startup: {tcp: true}, readiness: {http: /health}}"),
    )
    job.apply()
    for where in (shop, inner):
        for name in ("web", "chat"):
            assert asked_from(where, f"http://{name}:8000/health") == "ok"
    assert http(f"{job.url(INSTANCE)}/health").status == 200
    assert job.instances()[INSTANCE]["phase"] == "ready"
    job.unchanged()

    # A network that somebody made anew while it was down is another one by its id.
    ref = job.one(INSTANCE)["Id"]
    run_docker("kill", ref)
    for name, internal in ((shop, False), (inner, True)):
        engine.remove_network(name)
        engine.create_network(name, internal=internal)
    job.apply()
    assert job.one(INSTANCE)["Id"] == ref
    assert asked_from(inner, "http://chat:8000/health") == "ok"
    assert http(f"{job.url(INSTANCE)}/health").status == 200


def test_what_is_missing_blocks_before_anything_is_stopped(
    job: World, network: Callable[..., str], tmp_path: Path
) -> None:
    job.write({0: "web"}, web=web())
    job.apply()
    ran = job.run_of(INSTANCE)
    profile, inner, later = tmp_path / "seccomp.json", network("inner", internal=True), network()
    run_docker("network", "rm", later)
    for keys, said, hint in (
        (f"networks: [{later}]", f"there is no network {later}", f"docker network create {later}"),
        (f"networks: [{inner}]", "its port cannot be published", "docker network create NAME"),
        ("devices: [/dev/nothing]", "this machine has no /dev/nothing", "remove it from devices"),
        (f"security_opt: ['seccomp={profile}']", "No such file", "the absolute path of a profile"),
        ("image: 'mic-test/nothing:1', pull: never", "it is not on this machine", "docker pull"),
    ):
        text = web(keys)
        if "image" in keys:
            text = text.replace("image: mic-test/busybox:1, ", "")
        job.write({0: "web"}, web=text)
        done = job.mic("apply", timeout=60)
        assert done.rc != 0 and said in done.stdout and hint in done.stdout, done
        assert job.run_of(INSTANCE) == ran
    profile.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    run_docker("network", "create", later)
    job.write({0: "web"}, web=web(f"networks: [{later}]", f"security_opt: ['seccomp={profile}']"))
    job.apply()
    assert job.run_of(INSTANCE) != ran
    assert '"defaultAction"' in job.one(INSTANCE)["HostConfig"]["SecurityOpt"][0]
    job.unchanged()
    job.write({0: "none"})  # before the networks go
    job.apply()


def test_a_creation_that_was_cut_short_joins_the_rest_at_its_start(
    world: Runtime, network: Callable[..., str], engine: docker.APIClient
) -> None:
    one, two = network("one"), network("two")
    launch = world.launch(networks=(one, two), network_aliases=("a",))
    world.runtime.create(launch)
    engine.disconnect_container_from_network(launch.name, two, force=True)
    world.runtime.start(launch)
    found = engine.inspect_container(launch.name)["NetworkSettings"]["Networks"]
    assert {name: one["Aliases"][0] for name, one in found.items()} == {one: "a", two: "a"}
    world.runtime.stop(world.one(), signal="SIGKILL", grace=0)
    world.runtime.remove(world.one())


def test_always_asks_the_registry_although_the_image_is_there(world: Runtime) -> None:
    world.runtime.prepare(world.launch(), pytest.fail)
    always = world.launch(pull="always")
    with pytest.raises(MicError, match="cannot pull mic-test/busybox:1") as caught:
        world.runtime.prepare(always, lambda line: None)
    assert isinstance(caught.value, PreflightFailed)
    world.runtime.create(always)
    world.runtime.prepare(always, pytest.fail)  # what is only started again needs no registry


# --- from a container of somebody else ------------------------------------------------------------

OPTIONS = (
    "--ipc shareable --device /dev/null:/dev/x:r --cap-add SYS_PTRACE --cap-drop ALL "
    "--security-opt no-new-privileges --group-add 44 --dns 192.0.2.53 --add-host db:192.0.2.9 "
    "--tmpfs /w:size=1m --mount type=tmpfs,target=/scratch,tmpfs-size=65536,tmpfs-mode=1777 "
    "--ulimit core=0 --ulimit nproc=1000:2000 --ulimit nofile=512 --read-only --cpuset-cpus 0 "
    "--label tier=front --hostname api --sysctl net.core.somaxconn=99 --network-alias chat "
    "--security-opt systempaths=unconfined"
)
"""All but networks, and `pull`, which a container does not have."""


@pytest.mark.usefixtures("device_requests")
def test_a_container_with_every_key_is_taken_over_as_it_is(
    mic: Mic,
    tmp_path: Path,
    engine: docker.APIClient,
    network: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    nvml, port, name = MockNvml(tmp_path), free_port(), f"{mic.scope}-api"
    mic.env |= {"MIC_GPU_SOURCE": "nvml", **nvml.env()}
    shop, more = network("shop"), network("more")
    serve = "mkdir -p /w; echo ok > /w/health; exec httpd -f -p 80 -h /w"
    run_docker(
        *("run", "--detach", "--name", name, "--publish", f"127.0.0.1:{port}:80"),
        *("--network", shop, *OPTIONS.split()),
        *("--env", "NVIDIA_VISIBLE_DEVICES=void", IMAGE, "sh", "-c", serve),
    )
    try:
        taken_over(mic, engine, nvml, name, shop, more)
        assert http(f"http://127.0.0.1:{port}/health").status == 200
    finally:
        mic("down", "--yes", rc=0)
        engine.remove_container(name, force=True)


def taken_over(
    mic: Mic, engine: docker.APIClient, nvml: MockNvml, name: str, shop: str, more: str
) -> None:
    engine.connect_container_to_network(name, more, aliases=["talk"])
    was = engine.inspect_container(name)
    nvml.set([MockGpu(processes=[MockProcess(was["State"]["Pid"])])])
    mic("init", "--from-running", rc=0)
    assert comments_of(mic, name)[1:] == []
    entry = model_of(mic, name)
    assert set(entry) >= {key.key for key in KEYS}
    assert entry["networks"] == [shop, more]
    assert entry["network_aliases"] == sorted(["chat", name, "talk"])
    assert mic("check", rc=0).stdout.startswith(f"{mic.config}: valid")

    run_docker("stop", "--time", "0", name)
    nvml.set([MockGpu()])
    mic("apply", rc=0, timeout=90)
    (row,) = mic.status()["instances"]
    ours = engine.inspect_container(row["container_id"])
    for key in KEYS:
        before, after = was[key.section][key.field], ours[key.section][key.field]
        if key.key == "labels":
            after = {label: after[label] for label in before}
        if key.key == "tmpfs":
            before = before | {"/scratch": "size=65536,mode=1777"}
        assert normal(before) == normal(after), key.key
    assert ours["HostConfig"]["MaskedPaths"] == []
    for where, alias in ((shop, "chat"), (more, "talk"), (shop, name)):
        assert asked_from(where, f"http://{alias}/health") == "ok"
    assert mic("plan", rc=0).stdout == "No changes.\n"


def normal(value: Any) -> Any:
    """Without order, and without what two clients spell in two ways."""
    if not isinstance(value, list):
        return value
    return sorted(str(item).removesuffix("=true").removeprefix("CAP_") for item in value)
