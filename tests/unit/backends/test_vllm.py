"""What the vllm backend makes of a model. No server: vLLM needs a GPU.

tests/integration/test_vllm.py runs what comes of it, with a stand-in for the program.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
from pydantic import ValidationError

from mic_supervisor.backends.vllm import VllmBackend
from mic_supervisor.errors import CompileError
from mic_supervisor.model import (
    ContainerSpec,
    HttpCall,
    HttpCheck,
    Instance,
    Mount,
    Port,
    Probe,
    Probes,
    ProcessSpec,
    Progress,
    TcpCheck,
)
from tests.unit.backends.support import REAL, SECOND, SIMULATED, request

BACKEND = VllmBackend()
MODEL = "Qwen/Qwen3-8B"
FILE = "/etc/mic/qwen.env"
HEALTH = HttpCheck("/health")
EXECUTABLE = "/opt/vllm/bin/vllm"
TOKEN = "/etc/mic/hf-token"
HOST = {"executable": EXECUTABLE}


def compiled(options: dict[str, Any] | None = None, **more: Any) -> Instance:
    return BACKEND.compile(request(BACKEND, {"model": MODEL, **(options or {})}, **more))


def probes(name: str) -> Probes:
    ready = HttpCheck("/v1/models", listed=(("data[].id", name),))
    return Probes(
        startup=Probe(ready, period=2.0),
        liveness=Probe(HEALTH, period=10.0, timeout=10.0),
        readiness=Probe(ready, timeout=10.0),
    )


def process(options: dict[str, Any] | None = None, **more: Any) -> ProcessSpec:
    more.setdefault("settings", HOST)
    workload = compiled({"runtime": "process", **(options or {})}, **more).workload
    assert isinstance(workload, ProcessSpec)
    return workload


def command(options: dict[str, Any] | None = None, **more: Any) -> tuple[str, ...]:
    workload = compiled(options, **more).workload
    assert isinstance(workload, ContainerSpec)
    return workload.command


def test_one_model_over_two_gpus() -> None:
    made = compiled(
        {"args": ["--max-model-len", "8192"], "env_file": FILE},
        model="qwen",
        instance="qwen-3-4",
        gpus=(REAL, SECOND),
        settings={"image": "vllm/vllm-openai:v0.11.0", "cache": "/srv/cache"},
        files={FILE: "HF_TOKEN=hf_x\n"},
    )
    assert made == Instance(
        id="qwen-3-4",
        model="qwen",
        backend="vllm",
        gpus=(REAL.uuid, SECOND.uuid),
        workload=ContainerSpec(
            image="vllm/vllm-openai:v0.11.0",
            command=(
                MODEL,
                "--host=0.0.0.0",
                "--port=${port}",
                "--tensor-parallel-size=2",
                "--max-model-len",
                "8192",
            ),
            env=(("HF_HOME", "/cache/huggingface"), ("VLLM_CACHE_ROOT", "/cache/vllm")),
            env_file=FILE,
            file_env=(("HF_TOKEN", "hf_x"),),
            devices=(REAL.uuid, SECOND.uuid),
            mounts=(Mount("/srv/cache", "/cache"),),
            ports=(Port("http"),),
            shm_size=8 << 30,
        ),
        probes=probes(MODEL),
        start_timeout=900.0,
        metrics_path="/metrics",
        openai_model=MODEL,
    )


def moves(name: str = MODEL) -> Progress:
    body = json.dumps({"model": name, "prompt": "1", "max_tokens": 1})
    call = HttpCall("POST", "/v1/completions", body, 150.0)
    return Progress("vllm:iteration_tokens_total_count", call, within=150.0)


def test_an_engine_that_hangs_is_reported() -> None:
    made = compiled({"hang_timeout": "5m", "args": ["--served-model-name=qwen"]}).probes
    usual = probes("qwen")
    assert (made.startup, made.liveness) == (usual.startup, usual.liveness)
    assert usual.readiness is not None
    assert made.readiness == replace(usual.readiness, progress=moves("qwen"))


def test_an_engine_that_hangs_is_restarted_where_that_is_asked_for() -> None:
    made = compiled({"hang_timeout": "5m", "on_hang": "restart"}).probes
    usual = probes(MODEL)
    assert (made.startup, made.readiness) == (usual.startup, usual.readiness)
    assert usual.liveness is not None
    assert made.liveness == replace(usual.liveness, progress=moves())


def test_a_hang_is_seen_beside_a_probe_of_the_file() -> None:
    made = compiled({"hang_timeout": "5m", "probe": {"startup": {"http": "/health"}}}).probes
    assert made == Probes(Probe(HEALTH), None, Probe(None, progress=moves()))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"on_hang": "restart"}, "on_hang: it needs a hang_timeout"),
        (
            {"hang_timeout": "5m", "args": ["--disable-log-stats"]},
            "hang_timeout: with --disable-log-stats vLLM does not count what it does",
        ),
        (
            {
                "hang_timeout": "5m",
                "probe": {"progress": {"metric": "a_total", "request": {"path": "/a"}}},
            },
            "hang_timeout: the probe has a progress; remove one of them",
        ),
    ],
)
def test_a_hang_that_cannot_be_seen_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)):
        compiled(options)


@pytest.mark.parametrize(
    "options", [{"args": ["--api-key=x"]}, {"env": {"VLLM_API_KEY": "x"}}, {"env_file": FILE}]
)
def test_a_server_with_a_key_cannot_be_asked_for_a_token(options: dict[str, Any]) -> None:
    with pytest.raises(CompileError, match="the server wants an API key") as caught:
        compiled({"hang_timeout": "5m", **options}, files={FILE: "VLLM_API_KEY=x\n"})
    assert caught.value.hint is not None


def test_one_gpu_is_not_spread_over() -> None:
    assert command() == (MODEL, "--host=0.0.0.0", "--port=${port}")


@pytest.mark.parametrize("flag", ["-tp=1", "--tensor_parallel_size=2", "--pipeline-parallel-size"])
def test_whoever_spreads_by_hand_is_left_to_it(flag: str) -> None:
    assert command({"args": [flag]}, gpus=(REAL, SECOND))[-2:] == ("--port=${port}", flag)


def test_where_it_listens() -> None:
    assert command({"network": "host", "listen": "10.0.0.5"})[1:3] == (
        "--host=10.0.0.5",
        "--port=${port}",
    )
    assert command({"container_port": 8000})[1:3] == ("--host=0.0.0.0", "--port=8000")


@pytest.mark.parametrize(
    "options",
    [
        {"env": {"VLLM_API_KEY": "k"}},
        {"env_file": FILE},
        {"args": ["--api-key", "k"]},
        {"args": ["--api-key=k"]},
    ],
)
def test_with_a_key_no_probe_asks_for_what_needs_it(options: dict[str, Any]) -> None:
    made = compiled(options, files={FILE: "VLLM_API_KEY=k\n"})
    assert made.probes.readiness == Probe(HEALTH, timeout=10.0)
    assert made.probes.startup == Probe(HEALTH, period=2.0)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["--served-model-name", "qwen"], "qwen"),
        (["--served_model_name=qwen"], "qwen"),
        (["--served-model-name", "qwen", "qwen-latest", "--max-model-len", "8"], "qwen"),
        (["--served-model-name"], MODEL),
    ],
)
def test_ready_is_that_the_model_is_listed_as_clients_call_it(args: list[str], name: str) -> None:
    assert compiled({"args": args}).probes == probes(name)


CONFIG = "/srv/qwen/vllm.yaml"
MOUNTED = {"mounts": [{"source": "/srv/qwen", "target": "/config"}]}


@pytest.mark.parametrize(
    "options",
    [
        {"args": ["--config", CONFIG], "runtime": "process"},
        {"args": ["--config=vllm.yaml"], "runtime": "process", "working_dir": "/srv/qwen"},
        {"args": ["--config=/config/vllm.yaml"], **MOUNTED},
        {"args": ["--config=vllm.yaml"], "working_dir": "/config", **MOUNTED},
    ],
)
def test_flags_of_a_configuration_file_count_like_those_of_the_command(
    options: dict[str, Any],
) -> None:
    def made(text: str, *args: str) -> Probes:
        given = {**options, "args": [*options["args"], *args]}
        return compiled(given, settings=HOST, files={CONFIG: text}).probes

    assert made("served-model-name: qwen") == probes("qwen")
    assert made("served_model_name: [qwen, latest]\nport: 1\nmodel: x") == probes("qwen")
    assert made("served-model-name: qwen", "--served-model-name=mine") == probes("mine")
    for key in ("api-key: k", "api_key: [k, l]"):
        assert made(key).readiness == Probe(HEALTH, timeout=10.0)


@pytest.mark.parametrize("text", ["", "- a", "{", "a: " + "[" * 3000, "x" * (1 << 17), "\x00"])
def test_a_configuration_file_that_says_nothing_changes_nothing(text: str) -> None:
    options = {"args": [f"--config={CONFIG}"], "runtime": "process"}
    assert compiled(options, settings=HOST, files={CONFIG: text}).probes == probes(MODEL)
    assert compiled(options, settings=HOST).probes == probes(MODEL)  # it is not there
    inside = {"args": [f"--config={CONFIG}"]}  # the image's own, and not this host's
    assert compiled(inside, files={CONFIG: "served-model-name: x"}).probes == probes(MODEL)


def test_a_configuration_file_that_spreads_the_model_is_left_to_it() -> None:
    options = {"args": ["--config=/config/vllm.yaml"], **MOUNTED}

    def spread(text: str) -> bool:
        made = command(options, gpus=(REAL, SECOND), files={CONFIG: text})
        return "--tensor-parallel-size=2" not in made

    assert spread("pipeline-parallel-size: 2")
    assert not spread("tensor-parallel-size: 1")  # the command wins


def test_a_configuration_file_must_leave_plain_http_on_the_port() -> None:
    options = {"args": [f"--config={CONFIG}"], "runtime": "process"}
    with pytest.raises(CompileError) as caught:
        compiled(options, settings=HOST, files={CONFIG: "ssl-keyfile: /k"})
    assert str(caught.value).endswith(f"{CONFIG} sets ssl-keyfile")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("remove it there: it is probed over plain HTTP")
    probe = {"probe": {"exec": ["curl", "-k", "https://127.0.0.1:${port}/health"]}}
    assert compiled({**options, **probe}, settings=HOST, files={CONFIG: "ssl-keyfile: /k"})


def test_a_probe_of_the_file_replaces_all() -> None:
    probe = Probe(TcpCheck())
    assert compiled({"probe": {"tcp": True}}).probes == Probes(probe, probe, probe)


def test_the_environment_of_the_file_wins() -> None:
    made = compiled({"env": {"HF_HOME": "/x"}}, settings={"cache": "/c"})
    assert dict(made.workload.env)["HF_HOME"] == "/x"
    # At launch `env` wins over the file: the default must not be there.
    files = {FILE: "HF_HOME=/y\n"}
    made = compiled({"env_file": FILE}, settings={"cache": "/c"}, files=files)
    assert dict(made.workload.env) == {"VLLM_CACHE_ROOT": "/cache/vllm"}


# --- as a host process -------------------------------------------------------------------------


def test_the_same_as_a_process() -> None:
    settings = {**HOST, "cache": "/srv/cache/", "image": "not/used:1"}
    made = compiled(
        {"runtime": "process", "args": ["--max-model-len", "8192"], "user": "vllm"},
        gpus=(REAL, SECOND),
        settings=settings,
    )
    assert made.workload == ProcessSpec(
        command=(
            *(EXECUTABLE, "serve", MODEL, "--host=127.0.0.1", "--port=${port}"),
            *("--tensor-parallel-size=2", "--max-model-len", "8192"),
        ),
        env=(
            ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
            ("CUDA_VISIBLE_DEVICES", "${gpu_indices}"),
            ("HF_HOME", "/srv/cache/huggingface"),
            ("PATH", "/opt/vllm/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("VLLM_CACHE_ROOT", "/srv/cache/vllm"),
        ),
        ports=(Port("http"),),
        user="vllm",
    )
    assert (made.probes, made.metrics_path) == (probes(MODEL), "/metrics")
    assert made.start_timeout == 900.0


def test_a_simulated_gpu_is_no_device() -> None:
    assert set(dict(process(gpus=(SIMULATED,)).env)) == {"PATH"}


def test_numbers_and_never_uuids_whatever_the_file_of_variables_says() -> None:
    env = dict(process().env)
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == (
        "${gpu_indices}",
        "PCI_BUS_ID",
    )
    assert "GPU-" not in str(process())
    files = {FILE: "CUDA_VISIBLE_DEVICES=7\n"}
    assert "CUDA_VISIBLE_DEVICES" not in dict(process({"env_file": FILE}, files=files).env)


def test_a_slice_has_no_number_and_is_named_by_its_uuid() -> None:
    part = "MIG-f15ae561-7b5c-5a0c-8ab1-3a1e0c2d9f10"
    slice_ = replace(REAL, uuid=part, parent=REAL.uuid)
    assert dict(process(gpus=(slice_,)).env)["CUDA_VISIBLE_DEVICES"] == part


def test_without_a_program_the_model_is_refused() -> None:
    with pytest.raises(CompileError) as caught:
        process(settings={})
    assert str(caught.value) == (
        "cannot configure MAM: runtime: process needs a program, and backends.vllm.executable "
        "names none"
    )


# --- the token ---------------------------------------------------------------------------------


def test_the_token_goes_by_the_name_of_its_file() -> None:
    files = {TOKEN: "hf_secret\n"}
    made = compiled(settings={"hf_token_file": TOKEN}, files=files).workload
    assert isinstance(made, ContainerSpec)
    assert made.mounts == (Mount(TOKEN, "/run/secrets/hf_token", read_only=True),)
    assert dict(made.env) == {"HF_TOKEN_PATH": "/run/secrets/hf_token"}
    hosted = process(settings={**HOST, "hf_token_file": TOKEN}, files=files)
    assert dict(hosted.env)["HF_TOKEN_PATH"] == TOKEN
    for spec in (made, hosted):
        assert "hf_secret" not in json.dumps(asdict(spec))


@pytest.mark.parametrize("runtime", ["docker", "process"])
@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (None, "its Hugging Face token /etc/mic/hf-token cannot be read: No such file"),
        ("\n", "its Hugging Face token /etc/mic/hf-token does not hold one word"),
        ("HF_TOKEN = hf_secret\n", "does not hold one word"),
    ],
)
def test_a_token_that_is_not_there_is_found_before_the_start(
    runtime: str, text: str | None, cause: str
) -> None:
    files = {} if text is None else {TOKEN: text}
    with pytest.raises(CompileError, match=cause) as caught:
        compiled({"runtime": runtime}, settings={**HOST, "hf_token_file": TOKEN}, files=files)
    assert "hf_secret" not in str(caught.value)


# --- draining ----------------------------------------------------------------------------------


def gauges(running: str, waiting: str, labels: str = '{engine="0",model_name="m, x"}') -> str:
    return (
        "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        "# TYPE vllm:num_requests_running gauge\n"
        f"vllm:num_requests_running{labels} {running}\n"
        f"vllm:num_requests_waiting{labels} {waiting}\n"
        'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 3.0\n'
    )


@pytest.mark.parametrize(
    ("status", "body", "drained"),
    [
        (200, gauges("0.0", "0.0"), True),
        (200, gauges("0", "0", ""), True),
        (200, gauges("1.0", "0.0"), False),
        (200, gauges("0.0", "2.0"), False),
        (200, gauges("0.0", "0.0") + gauges("1.0", "0.0"), False),
        (200, gauges("NaN", "0.0"), False),
        (200, gauges("x", "0.0"), False),
        (200, 'vllm:num_requests_running{engine="0"} 0.0\n', False),
        (200, "", False),
        (404, gauges("0.0", "0.0"), False),
    ],
)
def test_what_the_gauges_say(status: int, body: str, drained: bool) -> None:
    assert BACKEND.is_drained(status, body) is drained


def test_it_is_asked_only_where_the_file_wants_it() -> None:
    assert compiled().drain is None
    assert compiled({"drain_timeout": "1m"}).drain == HttpCall("GET", "/metrics")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"args": ["--port", "1"]}, "args: --port is set by the supervisor: use the key port"),
        ({"args": ["--host=0.0.0.0"]}, "args: --host is set by the supervisor: use the key listen"),
        ({"args": ["--ssl_keyfile=/k"]}, "args: --ssl-keyfile is set by the supervisor: it is pro"),
        ({"runtime": "podman"}, "Input should be 'docker' or 'process'"),
        ({"network": "host", "container_port": 80}, "container_port: with network: host"),
        ({"runtime": "process", "shm_size": "1g"}, "shm_size: a host process has no container"),
        ({"runtime": "process", "ipc": "host"}, "ipc: a host process has no container"),
        ({"runtime": "process", "mounts": []}, "mounts: a host process has no container"),
        ({"runtime": "process", "container_port": 80}, "container_port: a host process has no"),
        ({"runtime": "process", "network": "bridge"}, "network: a host process has no bridge"),
        ({"runtime": "process", "probe": {"docker": True}}, "a host process has no image"),
        (
            {"drain_timeout": "1m", "args": ["--disable-log-stats"]},
            "drain_timeout: with --disable-log-stats vLLM does not report",
        ),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        compiled(options)


def test_a_default_of_the_whole_file_is_no_mistake_of_a_process() -> None:
    assert process({"network": "host", "drain_timeout": "0s"})
