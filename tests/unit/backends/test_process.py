"""The process backend's own keys and its environment."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mic_supervisor.backends.process import ProcessBackend
from mic_supervisor.model import HttpCheck, Instance, Port, Probe, Probes, ProcessSpec
from tests.unit.backends.support import REAL, SECOND, SIMULATED, request

BACKEND = ProcessBackend()
COMMAND = ["/opt/whisper/bin/serve", "--port", "${port}"]
FILE = "/etc/mic/whisper.env"


def env(options: dict[str, Any], **more: Any) -> dict[str, str]:
    workload = BACKEND.compile(request(BACKEND, {"command": COMMAND, **options}, **more)).workload
    return dict(workload.env)


def test_a_command_with_its_gpus() -> None:
    options = {
        "command": COMMAND,
        "args": ["-v"],
        "env": {"MODEL_DIR": "/srv/whisper"},
        "env_file": FILE,
        "probe": {"http": "/health"},
        "working_dir": "/srv",
        "stop_timeout": "1m",
    }
    made = BACKEND.compile(
        request(
            BACKEND,
            options,
            model="whisper",
            instance="whisper-0",
            gpus=(REAL, SECOND),
            files={FILE: "TOKEN=x\n"},
        )
    )
    probe = Probe(HttpCheck("/health"))
    assert made == Instance(
        id="whisper-0",
        model="whisper",
        backend="process",
        gpus=(REAL.uuid, SECOND.uuid),
        workload=ProcessSpec(
            command=("/opt/whisper/bin/serve", "--port", "${port}", "-v"),
            env=(
                ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
                ("CUDA_VISIBLE_DEVICES", f"{REAL.uuid},{SECOND.uuid}"),
                ("MODEL_DIR", "/srv/whisper"),
            ),
            env_file=FILE,
            file_env=(("TOKEN", "x"),),
            ports=(Port("http"),),
            working_dir="/srv",
            stop_timeout=60.0,
        ),
        probes=Probes(probe, probe, probe),
    )


def test_its_ports_and_metrics() -> None:
    options = {"command": [*COMMAND, "${port:grpc}"], "metrics": "/metrics"}
    made = BACKEND.compile(request(BACKEND, options))
    assert (made.workload.ports, made.metrics_path) == ((Port("http"), Port("grpc")), "/metrics")


def test_env_decides_over_the_gpus_it_sees() -> None:
    assert env({"env": {"CUDA_VISIBLE_DEVICES": "${gpu_indices}"}}) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "${gpu_indices}",
    }


def test_so_does_env_file() -> None:
    # At launch `env` wins over the file: the default must not be there.
    files = {FILE: "CUDA_VISIBLE_DEVICES=7\n"}
    assert env({"env_file": FILE}, files=files) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_a_simulated_gpu_hides_nothing() -> None:
    assert env({}, gpus=(SIMULATED,)) == {}


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"command": []}, "at least 1 item"),
        ({"command": ["serve"]}, "command: the program 'serve' is not an absolute path"),
        ({"probe": {"docker": True}}, "a host process has no image"),
        ({"probe": {"readiness": {"docker": True}}}, "a host process has no image"),
        ({"network": "host"}, "network: a host process has no container"),
        ({"container_port": 80}, "container_port: a host process has no container"),
        ({"shm_size": "1g"}, "shm_size: a host process has no container"),
        ({"mounts": []}, "mounts: a host process has no container"),
        ({"runtime": "docker"}, "runtime: there is one way to run it"),
    ],
)
def test_what_a_process_cannot_have_is_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        request(BACKEND, {"command": COMMAND, **options})
