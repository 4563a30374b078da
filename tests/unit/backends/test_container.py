"""The container backend's own keys."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mic_supervisor.backends.container import ContainerBackend
from mic_supervisor.model import ContainerSpec, HttpCheck, Instance, Port, Probe, Probes
from tests.unit.backends.support import REAL, request

BACKEND = ContainerBackend()


def test_an_image_with_a_command() -> None:
    options = {
        "image": "ghcr.io/huggingface/text-embeddings-inference:1.8",
        "command": ["--port", "${port}", "--model-id", "BAAI/bge-m3"],
        "args": ["--auto-truncate"],
        "env": {"RUST_LOG": "info"},
        "probe": {"http": "/health"},
    }
    probe = Probe(HttpCheck("/health"))
    assert BACKEND.compile(
        request(BACKEND, options, model="embed", instance="embed-1")
    ) == Instance(
        id="embed-1",
        model="embed",
        backend="container",
        gpus=(REAL.uuid,),
        workload=ContainerSpec(
            image="ghcr.io/huggingface/text-embeddings-inference:1.8",
            command=("--port", "${port}", "--model-id", "BAAI/bge-m3", "--auto-truncate"),
            env=(("RUST_LOG", "info"),),
            devices=(REAL.uuid,),
            ports=(Port("http"),),
        ),
        probes=Probes(probe, probe, probe),
    )


def test_without_a_command_the_image_runs_its_own() -> None:
    workload = BACKEND.compile(request(BACKEND, {"image": "i"})).workload
    assert isinstance(workload, ContainerSpec)
    assert (workload.command, workload.entrypoint) == ((), None)


def test_there_is_nothing_to_publish_on_the_host_network() -> None:
    with pytest.raises(ValidationError, match="container_port: with network: host"):
        request(BACKEND, {"image": "i", "network": "host", "container_port": 80})


def test_an_image_is_needed() -> None:
    with pytest.raises(ValidationError, match="image"):
        request(BACKEND, {"command": ["x"]})
