"""The comfyui backend: its command, its own directories, and whose answer a probe takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mic_supervisor.backends.comfyui import ComfyUIBackend
from mic_supervisor.errors import CompileError
from mic_supervisor.model import (
    HttpCall,
    HttpCheck,
    Instance,
    Port,
    Probe,
    Probes,
    ProcessSpec,
)
from tests.unit.backends.support import REAL, SECOND, SIMULATED, request

BACKEND = ComfyUIBackend()
OWN = "/var/lib/mic/instance_data/default/face-1"
FILES = {"/opt/ComfyUI/main.py": "", "/srv/paths.yaml": "", "/srv/more.yaml": ""}


def compiled(options: dict[str, Any] | None = None, **more: Any) -> Instance:
    more.setdefault("settings", {"path": "/opt/ComfyUI"})
    more.setdefault("files", FILES)
    asked = request(BACKEND, options or {}, model="face", instance="face-1", **more)
    return BACKEND.compile(replace(asked, directory=Path(OWN)))


def process(options: dict[str, Any] | None = None, **more: Any) -> ProcessSpec:
    workload = compiled(options, **more).workload
    assert isinstance(workload, ProcessSpec)
    return workload


def flags(options: dict[str, Any] | None = None, **more: Any) -> str:
    """What follows the program and its port."""
    command = process(options, **more).command
    return " ".join(command[command.index("${port}") + 1 :])


def test_one_instance() -> None:
    check = HttpCheck("/system_stats", listed=(("system.argv", f"{OWN}/user"),))
    assert compiled({"args": ["--highvram"]}) == Instance(
        id="face-1",
        model="face",
        backend="comfyui",
        gpus=(REAL.uuid,),
        workload=ProcessSpec(
            command=(
                *("/opt/ComfyUI/.venv/bin/python", "main.py"),
                *("--listen", "127.0.0.1", "--port", "${port}"),
                *("--user-directory", f"{OWN}/user"),
                *("--temp-directory", OWN),
                *("--database-url", f"sqlite:///{OWN}/comfyui.db"),
                *("--output-directory", f"{OWN}/output"),
                *("--input-directory", f"{OWN}/input"),
                "--highvram",
            ),
            env=(
                ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
                ("CUDA_VISIBLE_DEVICES", REAL.uuid),
                ("PYTHONUNBUFFERED", "1"),
            ),
            ports=(Port("http"),),
            working_dir="/opt/ComfyUI",
            stop_signal="SIGINT",
            directories=(OWN, f"{OWN}/user", f"{OWN}/output", f"{OWN}/input"),
        ),
        probes=Probes(
            startup=Probe(check, period=1.0, timeout=10.0),
            liveness=Probe(check, period=10.0, timeout=30.0),
            readiness=Probe(check, period=5.0, timeout=10.0),
        ),
    )


def test_the_url_of_an_absolute_path_has_four_slashes() -> None:
    assert f"--database-url sqlite:////{OWN[1:]}/comfyui.db" in flags()


def test_a_data_directory_of_the_hosts_own() -> None:
    made = process(settings={"path": "/opt/ComfyUI", "data": "/srv/comfyui"})
    assert made.directories[:2] == ("/srv/comfyui/face-1", "/srv/comfyui/face-1/user")
    assert OWN not in " ".join(made.command)


def test_the_interpreter() -> None:
    made = process(settings={"path": "/opt/ComfyUI/", "python": "/opt/venv/bin/python"})
    assert made.command[0] == "/opt/venv/bin/python"
    assert process(settings={"path": "/opt/ComfyUI/"}).command[0] == "/opt/ComfyUI/.venv/bin/python"


def test_directories_that_the_file_names_are_not_made() -> None:
    options = {"output_directory": "/srv/out", "input_directory": "/srv/in"}
    made = process(options)
    assert made.directories == (OWN, f"{OWN}/user")
    assert "--output-directory /srv/out --input-directory /srv/in" in " ".join(made.command)


def test_models_from_elsewhere() -> None:
    given = flags({"extra_model_paths": ["/srv/paths.yaml", "/srv/more.yaml"], "args": ["--fast"]})
    assert given.endswith("--extra-model-paths-config /srv/paths.yaml /srv/more.yaml --fast")


def test_a_simulated_gpu_is_computed_on_the_cpu() -> None:
    made = process({"args": ["--highvram", "--preview-method", "auto"]}, gpus=(SIMULATED,))
    assert made.command[-3:] == ("--cpu", "--preview-method", "auto")
    assert made.env == (("PYTHONUNBUFFERED", "1"),)


def test_a_real_one_may_be_left_idle_on_request() -> None:
    assert flags({"args": ["--cpu"]}).endswith("/input --cpu")


def test_two_gpus_are_both_visible() -> None:
    env = dict(process(gpus=(REAL, SECOND)).env)
    assert env["CUDA_VISIBLE_DEVICES"] == f"{REAL.uuid},{SECOND.uuid}"


def test_what_the_env_file_sets_is_left_to_it() -> None:
    files = FILES | {"/etc/face.env": "PYTHONUNBUFFERED=\nCUDA_VISIBLE_DEVICES=7\n"}
    env = dict(process({"env_file": "/etc/face.env"}, files=files).env)
    assert env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_liveness_and_readiness_may_be_given() -> None:
    made = compiled({"probe": {"liveness": {"http": "/queue", "period": "1m"}}}).probes
    assert made.liveness == Probe(HttpCheck("/queue"), period=60.0)
    assert made.startup == compiled().probes.startup
    assert made.readiness == compiled().probes.readiness


# --- draining -----------------------------------------------------------------------------------


def test_it_is_drained_when_there_is_time_for_it() -> None:
    made = compiled({"drain_timeout": "2m"})
    assert (made.drain, made.drain_timeout) == (HttpCall("GET", "/prompt"), 120.0)
    assert compiled().drain is None


@pytest.mark.parametrize(
    ("status", "body", "drained"),
    [
        (200, '{"exec_info": {"queue_remaining": 0}}', True),
        (200, '{"exec_info": {"queue_remaining": 1}}', False),
        (500, '{"exec_info": {"queue_remaining": 0}}', False),
        (200, '{"exec_info": {}}', False),
        (200, '{"exec_info": null}', False),
        (200, "[]", False),
        (200, "it works!", False),
    ],
)
def test_only_an_empty_queue_is_drained(status: int, body: str, drained: bool) -> None:
    assert BACKEND.is_drained(status, body) is drained


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"args": ["--port", "1"]}, "args: --port is set by the supervisor: use the key port"),
        ({"args": ["--por=1"]}, "args: --port is set by the supervisor"),
        ({"args": ["--temp", "/x"]}, "--temp-directory is set by the supervisor: each instance"),
        ({"args": ["--output-directory", "/x"]}, "use the key output_directory"),
        ({"args": ["--extra-model-paths-config", "/x"]}, "use the key extra_model_paths"),
        ({"args": ["--cuda-device", "0"]}, "the file gives each instance its GPUs"),
        ({"args": ["--tls-keyfile", "/x"]}, "let a proxy do TLS"),
        ({"probe": {"http": "/x"}}, "is checked in its own way"),
        ({"probe": {"startup": {"http": "/x"}}}, "is checked in its own way"),
        ({"probe": {"liveness": {"docker": True}}}, "docker: a host process has no image"),
        ({"working_dir": "/x"}, "working_dir: ComfyUI runs in backends.comfyui.path"),
        ({"network": "host"}, "network: ComfyUI runs as a host process"),
        ({"mounts": []}, "mounts: ComfyUI runs as a host process"),
        ({"output_directory": "out"}, "output_directory"),
    ],
)
def test_what_is_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        request(BACKEND, options, settings={"path": "/opt/ComfyUI"})


def test_flags_of_its_own_that_begin_alike_are_not_ours() -> None:
    args = ["--listen-to-nobody", "--database", "--", "-p", "--default-hashing-function", "md5"]
    with pytest.raises(ValidationError, match="--database-url is set by the supervisor"):
        request(BACKEND, {"args": args}, settings={"path": "/opt/ComfyUI"})
    del args[1]
    assert flags({"args": args}).endswith(" ".join(args))


def test_a_path_without_comfyui() -> None:
    with pytest.raises(CompileError) as caught:
        compiled(settings={"path": "/opt/elsewhere"})
    assert str(caught.value) == (
        "cannot configure face: its program /opt/elsewhere/main.py cannot be read: "
        "No such file or directory"
    )


def test_model_paths_that_are_not_there() -> None:
    with pytest.raises(CompileError, match=r"its extra_model_paths /srv/gone\.yaml cannot be read"):
        compiled({"extra_model_paths": ["/srv/gone.yaml"]})
