"""`mic-supervisor init` on the mock NVML: real containers and real processes."""

from __future__ import annotations

import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from mic_supervisor.config.types import format_size
from mic_supervisor.gpu.owners import owner_ref
from mic_supervisor.model import OwnerKind
from tests.mock_nvml import GIB, MockGpu, MockNvml, MockProcess, mock_uuid
from tests.support.drafts import comments_of, model_of
from tests.support.mic import Mic
from tests.support.require import missing
from tests.support.waiting import http, until


@pytest.fixture
def nvml(tmp_path: Path, mic: Mic) -> MockNvml:
    mock = MockNvml(tmp_path)
    mock.set([MockGpu(), MockGpu(), MockGpu()])
    mic.env |= {"MIC_GPU_SOURCE": "nvml", "MIC_DOCKER_HOST": "none", **mock.env()}
    return mock


@pytest.fixture
def nobodys() -> None:
    kind, ref = owner_ref(Path("/proc/self/cgroup").read_text())
    if kind is not OwnerKind.ORPHAN:
        missing(f"the tests run inside {ref}, and so would its orphans")


@pytest.fixture
def spawn() -> Iterator[Callable[..., int]]:
    made: list[subprocess.Popen[bytes]] = []

    def start(*command: str, cwd: Path | str = "/", **env: str) -> int:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], **env},
        )
        made.append(process)
        return process.pid

    yield start
    for process in made:
        process.kill()
        process.wait()


def limits_here() -> dict[str, Any]:
    """`limits` of a process with this one's own, which a service would not have."""
    limits: dict[str, Any] = {}
    for key, plain in (("nofile", {1024}), ("memlock", {64 << 10, 8 << 20})):
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{key.upper()}"))
        if soft not in plain:
            limits[key] = "unlimited" if soft == resource.RLIM_INFINITY else soft
            if key == "memlock" and soft != resource.RLIM_INFINITY:
                limits[key] = format_size(soft)
    return {"limits": limits} if limits else {}


# --- a first file -----------------------------------------------------------------------------


def test_a_first_file_lists_every_gpu_and_starts_nothing(mic: Mic, nvml: MockNvml) -> None:
    nvml.change(1, processes=[MockProcess(os.getpid(), 2 * GIB)])
    nvml.change(2, open_error=15)
    done = mic("init", rc=0)
    assert done.stdout == (
        f"Wrote {mic.config}: valid: 2 GPUs, 2 of them kept empty; 0 models.\n"
        "Next: edit it, then: mic-supervisor check, plan, apply\n"
    )
    text = mic.config.read_text()
    name = Path("/proc/self/comm").read_text().strip()
    assert text.endswith(
        "gpus:\n"
        f"  # GPU 0: Mock A100, 40.0 GiB, {mock_uuid(0)}\n"
        "  0: none\n"
        f"  # GPU 1: Mock A100, 40.0 GiB, {mock_uuid(1)}\n"
        f"  # held now by PID {os.getpid()} ({name})\n"
        "  1: none\n"
        "  # GPU 2: cannot open it: the GPU fell off the bus; find the cause with: "
        "dmesg | grep -i xid,\n"
        "  # then reboot\n"
        "  # 2: none\n"
    )
    assert stat.S_IMODE(mic.config.stat().st_mode) == 0o644
    assert mic("check", rc=0).stdout.startswith(f"{mic.config}: valid")
    assert "No changes" in mic("plan", rc=0).stdout


def test_what_is_there_is_not_replaced_unless_forced(mic: Mic, nvml: MockNvml) -> None:
    mic.write("mine")
    assert mic("init", rc=1).stderr == (
        f"error: cannot write {mic.config}: it is there already\nhint: replace it with: --force\n"
    )
    assert mic.config.read_text() == "mine"
    mic("init", "--force", rc=0)
    assert "gpus:" in mic.config.read_text()
    assert [path.name for path in mic.home.iterdir() if path.name.startswith(".")] == []


def test_another_place_is_made(mic: Mic, nvml: MockNvml) -> None:
    target = mic.home / "new" / "deep" / "gpus.yaml"
    mic("init", "--output", target, rc=0)
    mic("check", target, rc=0)
    assert not mic.config.exists()


def test_drop_ins_that_do_not_go_with_it_are_said(mic: Mic, nvml: MockNvml) -> None:
    drop_ins = Path(f"{mic.config}.d")
    drop_ins.mkdir()
    (drop_ins / "10.yaml").write_text("gpus: {0: nothing}")
    done = mic("init", rc=1)
    assert done.stdout == f"Wrote {mic.config}, which is not valid together with its drop-ins:\n"
    assert "10.yaml:1:11: error: gpus.0: " in done.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [("none", "MIC_GPU_SOURCE is none"), ("nvml", "cannot read GPUs: NVML says")],
)
def test_without_gpus_nothing_is_written(mic: Mic, nvml: MockNvml, source: str, said: str) -> None:
    nvml.break_library(20)
    mic.env["MIC_GPU_SOURCE"] = source
    done = mic("init", rc=1)
    assert said in done.stderr
    assert "hint: " in done.stderr
    assert not mic.config.exists()


def test_a_machine_whose_driver_counts_none(mic: Mic, nvml: MockNvml) -> None:
    nvml.set([])
    assert "this machine has no GPU that can be opened" in mic("init", rc=1).stderr


# --- from what runs ---------------------------------------------------------------------------


@pytest.mark.usefixtures("nobodys")
def test_a_process_becomes_a_model_and_can_be_taken_over(
    mic: Mic, nvml: MockNvml, spawn: Callable[..., int], free_port: Callable[[], int]
) -> None:
    port = free_port()
    server = mic.home / "serve.py"
    server.write_text(
        "import http.server, sys\n"
        "http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])),"
        " http.server.SimpleHTTPRequestHandler).serve_forever()\n"
    )
    pid = spawn(
        *(sys.executable, "serve.py", str(port)),
        cwd=mic.home,
        TOKEN="s3cret",
        SSH_CONNECTION="x",
        CUDA_VISIBLE_DEVICES="1",
    )
    until(lambda: http(f"http://127.0.0.1:{port}/", timeout=1).status == 200, "the server")
    nvml.change(1, processes=[MockProcess(pid, 2 * GIB)])
    comm = Path(f"/proc/{pid}/comm").read_text().strip()
    done = mic("init", "--from-running", rc=0)
    secrets = mic.home / "serve.env"
    assert done.stdout == (
        f"Wrote {mic.config}: valid: 3 GPUs, 2 of them kept empty; 1 model.\n"
        f"- PID {pid} ({comm}): as model serve on GPU 1\n"
        f"    its environment is in {secrets}, readable by you alone\n"
        f"    mic-supervisor kill {pid}\n"
        "    mic-supervisor apply\n"
    )
    assert "s3cret" not in mic.config.read_text() + done.stdout + done.stderr
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    assert secrets.read_text() == f"PATH={os.environ['PATH']}\nTOKEN=s3cret\n"
    assert model_of(mic, "serve") == {
        "backend": "process",
        "command": [sys.executable, "serve.py", str(port)],
        "working_dir": str(mic.home),
        "port": port,
        "probe": {"tcp": True},
        "env_file": str(secrets),
        **limits_here(),
    }
    mic("check", rc=0)
    # Until the old one is gone its GPU is blocked: nothing of a stranger's is stopped.
    assert f"(PID {pid}), not ours" in mic("plan", rc=0).stdout

    # The steps that it names do it.
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    nvml.change(1, processes=[])
    mic("apply", rc=0)
    assert http(f"http://127.0.0.1:{port}/").status == 200
    mic("down", "--yes", rc=0)


@pytest.mark.usefixtures("nobodys")
def test_the_whole_of_a_server_is_proposed_once_and_comfyui_by_its_own_backend(
    mic: Mic, nvml: MockNvml, spawn: Callable[..., int]
) -> None:
    home = mic.home / "ComfyUI"
    (home / "comfy").mkdir(parents=True)
    (home / "nodes.py").write_text("")
    (home / "main.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "main.py", "--port", "8188", "--highvram"],
        cwd=home,
        start_new_session=True,
        stdout=subprocess.PIPE,
        env={"PATH": "/usr/bin"},
    )
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        nvml.change(0, processes=[MockProcess(child)])
        nvml.change(2, processes=[MockProcess(process.pid)])
        mic("init", "--from-running", rc=0)
        assert model_of(mic, "comfyui") == {
            "backend": "comfyui",
            "port": 8188,
            "output_directory": f"{home}/output",
            "input_directory": f"{home}/input",
            "args": ["--highvram"],
            "env_file": f"{mic.home}/comfyui.env",
            **limits_here(),
        }
        text = mic.config.read_text()
        assert f"    path: {home}\n    python: {sys.executable}\n" in text
        assert '  "0,2": comfyui\n' in text
        mic("check", rc=0)
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.usefixtures("nobodys")
@pytest.mark.skipif(os.geteuid() != 0, reason="cannot run: only root may change the user")
def test_what_a_process_was_started_with_is_carried_over_or_noted(
    mic: Mic, nvml: MockNvml, spawn: Callable[..., int]
) -> None:
    output = mic.home / "its.log"
    given = "umask 027; ulimit -n 777; ulimit -s 4096; ulimit -l 32"
    pid = spawn(
        *("/bin/sh", "-c"),
        f"{given}; exec >{output} chrt --batch 0 setpriv --no-new-privs --reuid=nobody "
        "--regid=daemon --groups=daemon,video /bin/sleep 1000",
        **{"HOME": "/srv/home", "XDG_CACHE_HOME": "/srv/cache", "MIC_ROPHONE": "hw:0"},
        CUDA_VISIBLE_DEVICES="0,1",
    )
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "the program")
    nvml.change(0, processes=[MockProcess(pid)])
    done = mic("init", "--from-running", rc=0)
    assert re.search(r"    without \d+ of its settings: see the comments above it\n", done.stdout)
    found = model_of(mic, "sleep")
    assert found["user"] == "nobody:daemon"
    assert found["limits"] == {"nofile": 777, "memlock": "32k"}
    env = (mic.home / "sleep.env").read_text()
    assert "HOME=/srv/home\n" in env
    assert "XDG_CACHE_HOME=/srv/cache\n" in env
    first, *items = comments_of(mic, "sleep")
    assert "MIC_ROPHONE is left out: such names are the supervisor's own." in first
    assert "CUDA_VISIBLE_DEVICES is '0,1' there, and it holds these GPUs only." in first
    for expected in (
        "no_new_privs 1, and 0 here",
        "umask 0027, and 0022 here",
        f"scheduling policy {os.SCHED_BATCH}, and ",
        f"max stack size {4 << 20}, and ",
        "more groups than its user has: video",
        f"its output in {output}: a model's is in `mic-supervisor logs`",
    ):
        assert [item for item in items if item.startswith(expected)], expected
    mic("check", rc=0)


@pytest.mark.usefixtures("nobodys")
def test_a_process_that_listens_elsewhere_keeps_its_address(
    mic: Mic, nvml: MockNvml, spawn: Callable[..., int], free_port: Callable[[], int]
) -> None:
    port = free_port()
    command = (sys.executable, "-m", "http.server", "--bind", "0.0.0.0", str(port))
    pid = spawn(*command, cwd=mic.home)
    until(lambda: http(f"http://127.0.0.1:{port}/", timeout=1).status == 200, "the server")
    nvml.change(0, processes=[MockProcess(pid)])
    mic("init", "--from-running", rc=0)
    found = model_of(mic, "server")
    assert (found["port"], found["listen"]) == (port, "0.0.0.0")


@pytest.mark.usefixtures("nobodys")
def test_what_cannot_be_taken_over_is_a_comment(
    mic: Mic, nvml: MockNvml, spawn: Callable[..., int]
) -> None:
    odd = spawn("/bin/sh", "-c", "while :; do sleep 1; done; : ${X}")
    other = spawn("/bin/sleep", "1000", MIC_SCOPE="other", MIC_INSTANCE="b-0")
    nvml.change(0, processes=[MockProcess(odd)])
    nvml.change(1, processes=[MockProcess(other)])
    done = mic("init", "--from-running", rc=0)
    assert done.stderr == (
        f"warning: PID {other} is left out: it belongs to instance b-0 of scope other\n"
    )
    assert f"- PID {odd} (sh): only as a comment: " in done.stdout
    text = mic.config.read_text()
    assert "  # sh:\n  #   backend: process\n" in text
    assert "  # sh is there now, and cannot be taken over as it is\n  0: none\n" in text
    mic("check", rc=0)
    assert not (mic.home / "sh.env").exists()


@pytest.mark.usefixtures("nobodys")
def test_two_on_one_gpu_are_both_written_and_one_has_it(
    mic: Mic, nvml: MockNvml, spawn: Callable[..., int]
) -> None:
    first, second = sorted([spawn("/bin/sleep", "1000"), spawn("/bin/sleep", "1001")])
    nvml.change(0, processes=[MockProcess(first), MockProcess(second)])
    done = mic("init", "--from-running", rc=0)
    assert f"- PID {first} (sleep): as model sleep on GPU 0\n" in done.stdout
    assert f"- PID {second} (sleep): as model sleep-2, on no GPU yet\n" in done.stdout
    assert "sleep-2 is there now, too, and a GPU has one model" in mic.config.read_text()


@pytest.mark.engine
@pytest.mark.usefixtures("device_requests")
def test_a_container_becomes_a_model_and_can_be_taken_over(
    mic: Mic,
    nvml: MockNvml,
    engine: docker.APIClient,
    server_image: str,
    free_port: Callable[[], int],
) -> None:
    from docker.types import DeviceRequest

    del mic.env["MIC_DOCKER_HOST"]
    port, name = free_port(), f"{mic.scope}-web"
    data = mic.home / "data"
    data.mkdir()
    made = engine.create_container(
        server_image,
        ["model-server", "--port", "8000"],
        name=name,
        environment={"TOKEN": "s3cret"},
        ports=[8000],
        labels={"io.mic.scope": mic.scope},
        host_config=engine.create_host_config(
            device_requests=[DeviceRequest(device_ids=[mock_uuid(1)], capabilities=[["gpu"]])],
            port_bindings={8000: ("127.0.0.1", port)},
            binds=[f"{data}:/data:ro"],
            shm_size="128m",
            restart_policy={"Name": "always"},
        ),
    )["Id"]
    engine.start(made)
    try:
        pid = engine.inspect_container(made)["State"]["Pid"]
        nvml.change(1, processes=[MockProcess(pid)])
        before = engine.inspect_container(made)["State"]
        done = mic("init", "--from-running", rc=0)
        assert engine.inspect_container(made)["State"] == before
        assert re.search(rf"- container {name}: as model {name} on GPU 1\n", done.stdout)
        assert f"    docker update --restart=no {name}\n    docker stop {name}\n" in done.stdout
        assert "s3cret" not in mic.config.read_text() + done.stdout
        assert model_of(mic, name) == {
            "backend": "container",
            "image": server_image,
            "command": ["model-server", "--port", "8000"],
            "port": port,
            "container_port": 8000,
            "mounts": [{"source": str(data), "target": "/data", "read_only": True}],
            "shm_size": "128m",
            "env_file": f"{mic.home}/{name}.env",
        }
        assert (mic.home / f"{name}.env").read_text() == "TOKEN=s3cret\n"
        mic("check", rc=0)

        engine.update_container(made, restart_policy={"Name": "no"})
        engine.stop(made, timeout=1)
        nvml.change(1, processes=[])
        mic("apply", rc=0, timeout=90)
        row = mic("status", "--json").json()["instances"][0]
        ours = engine.inspect_container(row["container_id"])
        assert "TOKEN=s3cret" in ours["Config"]["Env"]
        assert ours["HostConfig"]["PortBindings"]["8000/tcp"][0]["HostPort"] == str(port)
        # Ours is not proposed to ourselves.
        nvml.change(1, processes=[MockProcess(ours["State"]["Pid"])])
        again = mic("init", "--from-running", "--output", mic.home / "again.yaml", rc=0)
        assert "0 models" in again.stdout
        nvml.change(1, processes=[])
        mic("down", "--yes", rc=0)
    finally:
        engine.remove_container(made, force=True)


@pytest.mark.usefixtures("nobodys")
def test_an_engine_that_is_away_leaves_the_containers_out(
    mic: Mic, nvml: MockNvml, spawn: Callable[..., int]
) -> None:
    mic.env["MIC_DOCKER_HOST"] = "unix:///no/such.sock"
    nvml.change(0, processes=[MockProcess(spawn("/bin/sleep", "1000"))])
    done = mic("init", "--from-running", rc=0)
    assert done.stderr.startswith("warning: containers are left out: cannot look for containers: ")
    assert "as model sleep on GPU 0" in done.stdout
