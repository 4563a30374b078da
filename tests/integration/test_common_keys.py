"""The keys that every model has, of a real container and a real process: what is in force.

Each is read from the kernel, not from what was asked for. How systemd keeps them is told by
tests/integration/systemd.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.job_world import World, server
from tests.support.commands import SERVER
from tests.support.mic import Mic
from tests.support.scopes import runs
from tests.support.waiting import http, until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="cannot run: only root may change the user")


class Kernel:
    """What the kernel says of a process."""

    def __init__(self, pid: int) -> None:
        self.path = Path(f"/proc/{pid}")

    def __getitem__(self, name: str) -> str:
        return (self.path / name).read_text()

    @property
    def environ(self) -> dict[str, str]:
        return dict(item.split("=", 1) for item in self["environ"].split("\0") if "=" in item)

    @property
    def ids(self) -> tuple[str, str]:
        """The real user and group."""
        found = dict(re.findall(r"^(Uid|Gid):\t(\d+)", self["status"], re.MULTILINE))
        return found["Uid"], found["Gid"]

    def limit(self, name: str) -> list[str]:
        """Soft and hard."""
        return re.findall(rf"^Max {name} +(\S+) +(\S+)", self["limits"], re.MULTILINE)[0]

    def control(self, version_1: str, version_2: str) -> int:
        """A number of its control group; of "50000 100000" the first."""
        for line in self["cgroup"].splitlines():
            _, controllers, group = line.split(":", 2)
            base = Path("/sys/fs/cgroup")
            if not controllers:
                found = base / group.lstrip("/") / version_2
            elif version_1.partition(".")[0] in controllers.split(","):
                found = base / version_1.partition(".")[0] / group.lstrip("/") / version_1
            else:
                continue
            if found.exists():
                return int(found.read_text().split()[0])
        raise AssertionError(f"no control group has {version_1} or {version_2}:\n{self['cgroup']}")


def named(kernel: Kernel) -> Kernel:
    """The server itself: with an init in front, the init's only child."""
    if "server" in kernel["cmdline"] and "init" not in kernel["cmdline"].split("\0")[0]:
        return kernel
    pid = kernel.path.name
    (child,) = (kernel.path / "task" / pid / "children").read_text().split()
    return Kernel(int(child))


@pytest.mark.engine
def test_of_a_container(job: World, tmp_path: Path) -> None:
    data, fixed = tmp_path / "data", tmp_path / "fixed"
    for path in (data, fixed):
        path.mkdir()
        path.chmod(0o777)
    (tmp_path / "secret.env").write_text("FROM_FILE=one\nBOTH=file\n")
    port = job.mic.ports.take()
    model = server(
        *("user: '1234:5678'", "working_dir: /data", "shm_size: 48m", f"port: {port}"),
        *(f"env_file: {tmp_path}/secret.env", "container_port: 8080", "listen: 127.0.0.2"),
        "limits: {memory: 96m, cpus: 0.5, nofile: 321, memlock: 1m}",
        f"mounts: [{{source: {data}, target: /data}}, "
        f"{{source: {fixed}, target: /fixed, read_only: true}}]",
        BOTH="model",
        PORT="8080",
    ).replace('--port, "${port}"', "--verbose")
    job.write({0: "all"}, all=model)
    job.apply()
    (instance,) = job.instances()
    found = job.one(instance)
    kernel = named(Kernel(found["State"]["Pid"]))
    assert kernel.ids == ("1234", "5678")
    assert (kernel.path / "cwd").readlink() == Path("/data")
    assert list(kernel.limit("open files")) == ["321", "321"]
    assert list(kernel.limit("locked memory")) == [str(1 << 20)] * 2
    assert kernel.control("memory.limit_in_bytes", "memory.max") == 96 << 20
    assert kernel.control("cpu.cfs_quota_us", "cpu.max") == 50_000
    env = kernel.environ
    assert (env["FROM_FILE"], env["BOTH"]) == ("one", "model")
    mounts = {line.split()[1]: line.split()[3].split(",") for line in kernel["mounts"].splitlines()}
    assert ("rw" in mounts["/data"], "ro" in mounts["/fixed"]) == (True, True)
    assert f"size={48 << 10}k" in mounts["/dev/shm"]
    assert job.instances()[instance]["endpoints"]["http"] == f"http://127.0.0.2:{port}"
    assert http(f"http://127.0.0.2:{port}/health").status == 200
    assert http(f"http://127.0.0.1:{port}/health").status == 0
    job.unchanged()


@pytest.mark.engine
def test_of_a_container_on_the_hosts_network(job: World) -> None:
    job.write({0: "web"}, web=server("network: host", HOST="127.0.0.1"))
    job.apply()
    (row,) = job.instances().values()
    assert http(f"{row['endpoints']['http']}/health").status == 200
    kernel = Kernel(job.one(row["id"])["State"]["Pid"])
    assert (kernel.path / "ns/net").readlink() == Path("/proc/self/ns/net").readlink()


@pytest.mark.engine
def test_an_entrypoint_of_the_file_and_none_at_all(job: World) -> None:
    up = "mkdir -p /w && echo ok > /w/health && exec httpd -f -p ${port} -h /w"
    keys = "backend: container, image: mic-test/busybox:1, probe: {http: /health}"
    job.write(
        {0: "own", 1: "bare"},
        own=f"{{{keys}, entrypoint: [sh, -c], command: ['{up}']}}",
        bare=f"{{{keys}, entrypoint: [], command: [sh, -c], args: ['{up}']}}",
    )
    job.apply()
    assert {row["phase"] for row in job.instances().values()} == {"ready"}


def process(mic: Mic, *more: str, **env: object) -> None:
    """A file with the server of the tests as a process on GPU 0."""
    variables = "".join(f"\n              {key}: '{value}'" for key, value in env.items())
    keys = "".join(f"\n            {one}" for one in more)
    mic.write(f"""
        version: 1
        models:
          all:
            backend: process
            command: [/usr/bin/env, python3, {SERVER}, --port, "${{port}}"]
            env:
              MODEL: all{variables}{keys}
        gpus: {{0: all}}
        """)


def row(mic: Mic) -> dict[str, Any]:
    (found,) = mic.status()["instances"]
    return dict(found)


@as_root
def test_of_a_process(mic: Mic, tmp_path: Path) -> None:
    place = Path("/var/tmp")  # that anybody may enter, as pytest's own directory is not
    (tmp_path / "secret.env").write_text("FROM_FILE=one\nBOTH=file\n")
    port = mic.ports.take()
    program = place / f"{mic.scope}-server.py"
    program.write_text(SERVER.read_text())
    program.chmod(0o755)
    try:
        process(
            mic,
            *("user: '1234:5678'", f"working_dir: {place}", f"port: {port}", "listen: 127.0.0.2"),
            *(f"env_file: {tmp_path}/secret.env", "limits: {nofile: 321, memlock: 1m}"),
            "probe: {http: /health, period: 200ms}",
            BOTH="model",
            HOST="127.0.0.2",
        )
        mic.write(mic.config.read_text().replace(str(SERVER), str(program)))
        mic("apply", rc=0)
        found = row(mic)
        kernel = Kernel(found["pid"])
        assert kernel.ids == ("1234", "5678")
        assert (kernel.path / "cwd").readlink() == place
        assert list(kernel.limit("open files")) == ["321", "321"]
        assert list(kernel.limit("locked memory")) == [str(1 << 20)] * 2
        env = kernel.environ
        assert (env["FROM_FILE"], env["BOTH"], env["MODEL"]) == ("one", "model", "all")
        assert found["endpoints"]["http"] == f"http://127.0.0.2:{port}"
        assert http(f"http://127.0.0.2:{port}/health").status == 200
        assert mic("plan", rc=0).stdout == "No changes.\n"
    finally:
        program.unlink()


@pytest.mark.parametrize("key", ["memory: 1g", "cpus: 2"])
def test_what_only_systemd_keeps_of_a_process_is_refused_before_the_start(
    mic: Mic, key: str
) -> None:
    process(mic, f"limits: {{{key}}}")
    said = mic("apply", rc=1).stdout
    assert f"cannot keep limits.{key.partition(':')[0]}: a process without systemd has no" in said


# --- probes -------------------------------------------------------------------------------------

PROBES = {
    "http": "{http: /ready, period: 200ms}",
    "tcp": "{tcp: true, period: 200ms}",
    "exec": '{exec: [python3, -c, "import urllib.request as r; '
    "r.urlopen('http://127.0.0.1:${port}/ready')\"], period: 200ms, timeout: 20s}",
}


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_of_a_process_waits_and_restarts(mic: Mic, kind: str) -> None:
    delay = {"START_DELAY": 1.0} if kind == "tcp" else {"READY_DELAY": 1.0}
    process(mic, f"probe: {PROBES[kind]}", **delay)
    begun = time.monotonic()
    mic("apply", rc=0)
    assert time.monotonic() - begun > 1.0
    mic.run()
    found = until(lambda: row(mic)["phase"] == "ready" and row(mic), "it to be adopted")
    if kind == "tcp":
        os.kill(found["pid"], signal.SIGKILL)
    else:
        http(f"{found['endpoints']['http']}/ready?status=503", "PUT", "{}")

    def again() -> bool:
        now = row(mic)
        return bool(now["phase"] == "ready" and now["restarts"] == 1)

    until(again, "the server that works again")
    assert row(mic)["pid"] != found["pid"]


@pytest.mark.engine
@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_of_a_container_waits(job: World, kind: str) -> None:
    delay = {"START_DELAY": 1.0} if kind == "tcp" else {"READY_DELAY": 1.0}
    job.write({0: "one"}, one=server(f"probe: {PROBES[kind]}", **delay))
    begun = time.monotonic()
    job.apply()
    assert time.monotonic() - begun > 1.0
    (found,) = job.instances().values()
    assert found["phase"] == "ready"


@pytest.mark.engine
def test_an_image_without_a_health_check_is_unknown_and_not_well(job: World) -> None:
    model = server("probe: {docker: true, period: 200ms}", "start_timeout: 2s")
    job.write({0: "one"}, one=model)
    said = job.mic("apply")
    assert said.rc != 0
    assert "the image declares no health check" in said.stdout + said.stderr


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "env", "least", "most"),
    [
        (("stop_timeout: 20s",), {"STOP_DELAY": 1}, 1.0, 18.0),  # it is given its time
        (("stop_timeout: 1s",), {"IGNORE_SIGTERM": 1}, 1.0, 18.0),  # and no more than that
        (("stop_timeout: 20s", "stop_signal: SIGKILL"), {"IGNORE_SIGTERM": 1}, 0.0, 18.0),
        (("stop_timeout: 20s", "stop_signal: SIGQUIT"), {"IGNORE_SIGTERM": 1}, 0.0, 18.0),
    ],
)
def test_how_a_process_is_stopped(
    mic: Mic, keys: tuple[str, ...], env: dict[str, int], least: float, most: float
) -> None:
    process(mic, *keys, "probe: {http: /health, period: 200ms}", **env, CHILDREN=1)
    mic("apply", rc=0)
    found = row(mic)
    (child,) = http(f"{found['endpoints']['http']}/pid").json()["children"]
    mic.write(mic.config.read_text().replace("{0: all}", "{0: none}"))
    begun = time.monotonic()
    mic("apply", rc=0)
    assert least <= time.monotonic() - begun < most
    assert [pid for pid in (found["pid"], child) if runs(pid)] == []
