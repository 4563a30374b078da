"""vLLM as the supervisor runs it, with a stand-in for the program: vLLM itself needs a GPU.

tests/support/vllm/vllm takes vLLM's command line and answers what the supervisor asks.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.integration.job_world import World
from tests.mock_nvml import MockGpu, MockNvml
from tests.setup.steps import CHECKOUT
from tests.support.mic import Mic
from tests.support.scopes import runs
from tests.support.waiting import http, until

PROGRAM = CHECKOUT / "tests" / "support" / "vllm" / "vllm"
SECRET = "hf_xyzzy_of_the_tests"
GAUGES = (
    'vllm:num_requests_running{{engine="0",model_name="Qwen/Qwen3-8B"}} {0}\n'
    'vllm:num_requests_waiting{{engine="0",model_name="Qwen/Qwen3-8B"}} 0.0\n'
)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def write(mic: Mic, gpus: str, *, settings: str = "", **options: str) -> None:
    given = {"backend": "vllm", "model": "Qwen/Qwen3-8B", "stop_timeout": "5s", **options}
    model = ", ".join(f"{key}: {value}" for key, value in given.items())
    mic.write(f"""
        version: 1
        backends: {{vllm: {{executable: {PROGRAM}, {settings}}}}}
        models: {{qwen: {{{model}}}}}
        gpus: {{{gpus}}}
        """)


def the_row(mic: Mic) -> dict[str, Any]:
    (row,) = mic.status()["instances"]
    found: dict[str, Any] = row
    return found


def put(url: str, path: str, body: str) -> None:
    assert http(f"{url}{path}", "PUT", body).status == 200


def test_a_process_over_two_gpus(mic: Mic, tmp_path: Path, token: Path) -> None:
    settings = f"cache: {tmp_path}/cache, hf_token_file: {token}"
    options = {"runtime": "process", "args": "[--served-model-name=qwen]"}
    write(mic, '"0,1": qwen', settings=settings, **options)
    mic("apply", rc=0)
    row = the_row(mic)
    url = row["endpoints"]["http"]
    assert row["phase"] == "ready"
    assert row["endpoints"]["metrics"] == f"{url}/metrics"
    port = url.rpartition(":")[2]
    assert http(f"{url}/args").json() == [
        *("serve", "Qwen/Qwen3-8B", "--host=127.0.0.1", f"--port={port}"),
        *("--tensor-parallel-size=2", "--served-model-name=qwen"),
    ]
    env = http(f"{url}/env").json()
    assert env["HF_HOME"] == f"{tmp_path}/cache/huggingface"
    assert env["VLLM_CACHE_ROOT"] == f"{tmp_path}/cache/vllm"
    assert env["PATH"].startswith(f"{PROGRAM.parent}:/usr/")
    assert Path(env["HF_TOKEN_PATH"]).read_text().strip() == SECRET
    assert not any(SECRET in value for value in env.values())
    for path in [*mic.state_dir.rglob("*"), *mic.run_dir.rglob("*")]:
        assert not path.is_file() or SECRET not in path.read_text(errors="replace"), path
    assert mic("plan", rc=0).stdout.strip() == "No changes."

    # The engine is a process of its own, which ignores SIGTERM and the server's end.
    (engine,) = http(f"{url}/pid").json()["children"]
    token.unlink()
    plan = mic("plan", "--json", rc=0).json()
    assert plan["actions"] == []
    assert "its Hugging Face token" in plan["blocked"][0]["reason"]
    assert the_row(mic)["pid"] == row["pid"]
    write(mic, '"0,1": none', settings=settings, **options)
    mic("apply", rc=0)
    until(lambda: not runs(row["pid"]) and not runs(engine), "the end of server and engine")


def test_its_gpus_are_numbers_on_a_driver(mic: Mic, tmp_path: Path) -> None:
    nvml = MockNvml(tmp_path)
    nvml.set([MockGpu(), MockGpu(), MockGpu()])
    mic.env |= {"MIC_GPU_SOURCE": "nvml", **nvml.env()}
    write(mic, '"1,2": qwen', runtime="process")
    mic("apply", rc=0)
    env = http(f"{the_row(mic)['endpoints']['http']}/env").json()
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("1,2", "PCI_BUS_ID")


def test_its_own_server_is_ready_under_another_name_and_with_a_key(mic: Mic) -> None:
    write(mic, "0: qwen", runtime="process")
    mic("apply", rc=0)
    url = the_row(mic)["endpoints"]["http"]
    put(url, "/v1/models", json.dumps({"data": [{"id": "meta-llama/Llama-3.1-8B"}]}))
    assert the_row(mic)["phase"] == "ready"
    put(url, "/v1/models?status=401", json.dumps({"error": "Unauthorized"}))
    assert the_row(mic)["phase"] == "ready"
    put(url, "/v1/models", json.dumps({"detail": "something else"}))
    row = the_row(mic)
    assert row["phase"] != "ready"
    assert "data[].id lacks Qwen/Qwen3-8B" in row["reason"]
    assert http(f"{url}/v1/models", "DELETE").status == 200
    assert the_row(mic)["phase"] == "ready"


def test_a_name_in_a_configuration_file_is_the_one_that_is_asked_for(
    mic: Mic, tmp_path: Path
) -> None:
    config = tmp_path / "vllm.yaml"
    config.write_text("served-model-name: qwen\nport: 1\n")
    write(mic, "0: qwen", runtime="process", args=f"[--config={config}]")
    mic("apply", rc=0)
    row = the_row(mic)
    assert row["phase"] == "ready"
    assert http(f"{row['endpoints']['http']}/v1/models").json()["data"][0]["id"] == "qwen"


def test_what_is_in_flight_is_waited_for(mic: Mic) -> None:
    write(mic, "0: qwen", runtime="process", drain_timeout="30s")
    mic("apply", rc=0)
    row = the_row(mic)
    url = row["endpoints"]["http"]
    put(url, "/metrics", GAUGES.format("1.0"))
    write(mic, "0: none", runtime="process", drain_timeout="30s")
    apply = mic.start("apply")
    until(lambda: "draining" in apply.text(), "the wait")
    time.sleep(1.0)  # it asks four times a second
    assert apply.process.poll() is None and runs(row["pid"])
    put(url, "/metrics", GAUGES.format("0.0"))
    assert apply.process.wait(60) == 0
    assert not runs(row["pid"])


def test_an_engine_that_hangs_is_reported_and_restarted_where_that_is_asked_for(mic: Mic) -> None:
    counter = 'vllm:iteration_tokens_total_count{{engine="0",model_name="qwen"}} {}\n'
    write(mic, "0: qwen", runtime="process", hang_timeout="8s")
    mic.run()
    until(lambda: the_row(mic)["pid"], "its start")
    row = the_row(mic)
    url = row["endpoints"]["http"]
    until(lambda: http(f"{url}/health").status == 200, "the server")
    put(url, "/metrics", counter.format(7))
    put(url, "/v1/completions", json.dumps({"choices": []}))
    until(lambda: the_row(mic)["phase"] == "ready", "its readiness", timeout=60)

    put(url, "/v1/completions?delay=3600", "")
    assert http(f"{url}/health").status == 200
    until(lambda: the_row(mic)["phase"] == "degraded", "the report", timeout=90)
    assert the_row(mic)["reason"] == (
        "it hangs: vllm:iteration_tokens_total_count has not moved for 4 s, and "
        "POST /v1/completions: no answer within 4 s"
    )
    put(url, "/metrics", counter.format(8))
    until(lambda: the_row(mic)["phase"] == "ready", "the end of it", timeout=60)
    assert (the_row(mic)["pid"], the_row(mic)["restarts"]) == (row["pid"], 0)

    write(mic, "0: qwen", runtime="process", hang_timeout="8s", on_hang="restart")
    until(lambda: the_row(mic)["restarts"] == 1, "the restart", timeout=120)
    assert the_row(mic)["pid"] != row["pid"]


def test_a_program_that_is_not_there_stops_nothing(mic: Mic, tmp_path: Path) -> None:
    write(mic, "0: qwen", runtime="process")
    mic("apply", rc=0)
    pid = the_row(mic)["pid"]
    mic.write(mic.config.read_text().replace(str(PROGRAM), f"{tmp_path}/vllm"))
    said = mic("apply", rc=1).stdout
    assert f"cannot run {tmp_path}/vllm: it does not exist" in said
    assert the_row(mic)["pid"] == pid
    mic.write(mic.config.read_text().replace(f"executable: {tmp_path}/vllm, ", ""))
    assert mic("check", rc=0)
    said = mic("plan", rc=0).stdout
    assert "backends.vllm.executable names none" in said


# --- in a container -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(engine: docker.APIClient, server_image: str) -> Iterator[str]:
    """An image with vLLM's entrypoint: `vllm serve`."""
    made = engine.create_container(server_image)["Id"]
    tag = f"mic-test/vllm-{made[:8]}:1"
    try:
        subprocess.run(["docker", "cp", PROGRAM, f"{made}:/usr/local/bin/vllm"], check=True)
        change = ["--change", 'ENTRYPOINT ["vllm", "serve"]', "--change", "CMD []"]
        subprocess.run(["docker", "commit", *change, made, tag], check=True, capture_output=True)
        yield tag
        engine.remove_image(tag, force=True)
    finally:
        engine.remove_container(made, force=True)


@pytest.mark.engine
def test_a_configuration_file_in_the_image_may_name_the_model(job: World, image: str) -> None:
    mic = job.mic
    made = job.engine.create_container(image)["Id"]
    tag = f"mic-test/vllm-{made[:8]}:1"
    try:
        archive = io.BytesIO()
        text = b"served-model-name: qwen\n"
        with tarfile.open(fileobj=archive, mode="w") as tar:
            info = tarfile.TarInfo("vllm.yaml")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
        job.engine.put_archive(made, "/etc", archive.getvalue())
        job.engine.commit(made, tag.partition(":")[0], "1")
        settings = f"image: '{tag}'"
        write(mic, "0: qwen", settings=settings, args="[--config=/etc/vllm.yaml]")
        mic("apply", rc=0)
        assert the_row(mic)["phase"] == "ready"
    finally:
        mic("down", "--yes")
        job.engine.remove_container(made, force=True)
        job.engine.remove_image(tag, force=True)


@pytest.mark.engine
def test_a_container_and_from_there_to_a_process(
    job: World, image: str, tmp_path: Path, token: Path
) -> None:
    mic = job.mic
    (tmp_path / "cache").mkdir()
    settings = f"image: '{image}', cache: {tmp_path}/cache, hf_token_file: {token}, shm_size: 96m"
    write(mic, '"0,1": qwen', settings=settings)
    mic("apply", rc=0)
    row = the_row(mic)
    url, instance = row["endpoints"]["http"], row["id"]
    assert row["phase"] == "ready"
    assert http(f"{url}/args").json()[1:] == [
        *("Qwen/Qwen3-8B", "--host=0.0.0.0", f"--port={url.rpartition(':')[2]}"),
        "--tensor-parallel-size=2",
    ]
    env = http(f"{url}/env").json()
    assert (env["HF_HOME"], env["VLLM_CACHE_ROOT"]) == ("/cache/huggingface", "/cache/vllm")
    assert "CUDA_VISIBLE_DEVICES" not in env
    found = job.one(instance)
    inside = Path(f"/proc/{found['State']['Pid']}/root")
    assert (inside / env["HF_TOKEN_PATH"][1:]).read_text().strip() == SECRET
    assert SECRET not in json.dumps(found)
    (inside / "cache" / "seen").touch()
    assert (tmp_path / "cache" / "seen").exists()
    mounted = (Path("/proc") / str(found["State"]["Pid"]) / "mounts").read_text().splitlines()
    flags = {line.split()[1]: line.split()[3].split(",") for line in mounted}
    assert "ro" in flags[env["HF_TOKEN_PATH"]] and "rw" in flags["/cache"]
    assert f"size={96 * 1024}k" in flags["/dev/shm"]
    job.unchanged()

    write(mic, '"0,1": qwen', settings=settings, runtime="process")
    mic("apply", rc=0)
    moved = the_row(mic)
    assert (moved["id"], moved["phase"], moved["container_id"]) == (instance, "ready", None)
    assert moved["endpoints"] == row["endpoints"]
    assert not [one for one in job.all(instance) if one["State"]["Running"]]
    write(mic, '"0,1": qwen', settings=settings)
    mic("apply", rc=0)
    assert the_row(mic)["container_id"] is not None
    assert not runs(moved["pid"])
