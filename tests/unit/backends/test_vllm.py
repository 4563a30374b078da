"""What the vllm backend makes of a model. No server: vLLM needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mic_supervisor.backends.vllm import VllmBackend
from mic_supervisor.model import (
    ContainerSpec,
    HttpCheck,
    Instance,
    Mount,
    Port,
    Probe,
    Probes,
    TcpCheck,
)
from tests.unit.backends.support import REAL, SECOND, request

BACKEND = VllmBackend()
MODEL = "Qwen/Qwen3-8B"
FILE = "/etc/mic/qwen.env"
HEALTH = HttpCheck("/health")


def compiled(options: dict[str, Any] | None = None, **more: Any) -> Instance:
    return BACKEND.compile(request(BACKEND, {"model": MODEL, **(options or {})}, **more))


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
        probes=Probes(
            startup=Probe(HEALTH, period=2.0),
            liveness=Probe(HEALTH),
            readiness=Probe(HttpCheck("/v1/models", expect=(("object", "list"),))),
        ),
        start_timeout=900.0,
        metrics_path="/metrics",
    )


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
    assert made.probes.readiness == Probe(HEALTH)


def test_a_probe_of_the_file_replaces_all() -> None:
    probe = Probe(TcpCheck())
    assert compiled({"probe": {"tcp": True}}).probes == Probes(probe, probe, probe)


def test_the_environment_of_the_file_wins() -> None:
    made = compiled({"env": {"HF_HOME": "/x"}}, settings={"cache": "/c"})
    assert dict(made.workload.env)["HF_HOME"] == "/x"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"args": ["--port", "1"]}, "args: --port is set by the supervisor"),
        ({"args": ["--host=0.0.0.0"]}, "args: --host is set by the supervisor"),
        ({"runtime": "process"}, "runtime: this version does not act on it yet"),
        ({"network": "host", "container_port": 80}, "container_port: with network: host"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        compiled(options)
