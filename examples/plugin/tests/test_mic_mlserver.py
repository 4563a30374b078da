"""What the backend makes of a model. No server and no supervisor: compiling is pure."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from mic_mlserver import MLServerBackend
from pydantic import ValidationError

from mic_supervisor.backends import CompileRequest
from mic_supervisor.backends.registry import GROUP, Registry
from mic_supervisor.errors import CompileError
from mic_supervisor.model import (
    Gpu,
    HttpCheck,
    Instance,
    Port,
    Probe,
    Probes,
    ProcessSpec,
    TcpCheck,
)

BACKEND = MLServerBackend()
GPU = Gpu("GPU-11111111-2222-3333-4444-555555555555", 0, "NVIDIA H200")
OWN = "/var/lib/mic/instance_data/flowers"
MODEL = {"/srv/iris/model-settings.json": json.dumps({"name": "iris", "implementation": "x.Y"})}


def compiled(
    options: dict[str, Any] | None = None, files: dict[str, str | OSError] | None = None
) -> Instance:
    """What the supervisor gets, with options as the file writes them and these files on disk."""
    there: dict[str, str | OSError] = {**MODEL, **(files or {})}

    def read_text(path: Path) -> str:
        found = there.get(str(path), FileNotFoundError(2, "No such file or directory"))
        if isinstance(found, OSError):
            raise found
        return found

    given = {"backend": "mlserver", "path": "/srv/iris", **(options or {})}
    return BACKEND.compile(
        CompileRequest(
            model="flowers",
            instance="flowers-11111111",
            options=BACKEND.Options.model_validate(given),
            settings=BACKEND.Settings.model_validate({"executable": "/opt/mlserver/bin/mlserver"}),
            gpus=(GPU,),
            read_text=read_text,
            directory=Path(OWN),
        )
    )


def test_one_server() -> None:
    ready = HttpCheck("/v2/models/iris/ready")
    assert compiled({"ports": {"grpc": 8081}, "env": {"A": "b"}, "stop_timeout": "1m"}) == Instance(
        id="flowers-11111111",
        model="flowers",
        backend="mlserver",
        gpus=(GPU.uuid,),
        workload=ProcessSpec(
            command=("/opt/mlserver/bin/mlserver", "start", "/srv/iris"),
            env=(
                ("A", "b"),
                ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
                ("CUDA_VISIBLE_DEVICES", GPU.uuid),
                ("MLSERVER_ENVIRONMENTS_DIR", f"{OWN}/environments"),
                ("MLSERVER_GRPC_PORT", "${port:grpc}"),
                ("MLSERVER_HOST", "127.0.0.1"),
                ("MLSERVER_HTTP_PORT", "${port:http}"),
                ("MLSERVER_METRICS_DIR", f"{OWN}/metrics"),
                ("MLSERVER_METRICS_PORT", "${port:metrics}"),
                ("MLSERVER_PARALLEL_WORKERS", "1"),
            ),
            ports=(Port("http"), Port("grpc", 8081), Port("metrics")),
            stop_timeout=60.0,
            directories=(OWN, f"{OWN}/metrics", f"{OWN}/environments"),
        ),
        probes=Probes(
            startup=Probe(ready, period=1.0),
            liveness=Probe(HttpCheck("/v2/models/iris", expect=(("name", "iris"),))),
            readiness=Probe(ready),
        ),
    )


def test_a_probe_of_the_file_replaces_all() -> None:
    probe = Probe(TcpCheck())
    assert compiled({"probe": {"tcp": True}}).probes == Probes(probe, probe, probe)


@pytest.mark.parametrize(
    ("file", "text", "cause"),
    [
        ("model-settings.json", FileNotFoundError(2, "No such file or directory"), "its model "),
        ("model-settings.json", "{", "is no JSON"),
        ("model-settings.json", "[]", "is no JSON object"),
        ("model-settings.json", '{"implementation": "x.Y"}', "has no name"),
        ("settings.json", '{"http_port": 8080}', "sets http_port, which is the supervisor's"),
        ("settings.json", PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_files_that_do_not_do(file: str, text: str | OSError, cause: str) -> None:
    with pytest.raises(CompileError, match=cause) as caught:
        compiled(files={f"/srv/iris/{file}": text})
    assert str(caught.value).startswith("cannot configure flowers: ")


def test_settings_that_leave_the_ports_alone() -> None:
    assert compiled(files={"/srv/iris/settings.json": '{"debug": false}'}) == compiled()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"args": ["-v"]}, "args: `mlserver start` has no flags"),
        ({"mounts": []}, "mounts: MLServer runs as a host process"),
        ({"env": {"MLSERVER_HTTP_PORT": "1"}}, "env: MLSERVER_HTTP_PORT is set by the supervisor"),
        ({"env": {"MLSERVER_PARALLEL_WORKERS": "1"}}, "use the key parallel_workers"),
        ({"parallel_workers": -1}, "greater than or equal to 0"),
        ({"probe": {"docker": True}}, "a host process has no image"),
        ({"modelpath": "/x"}, "Extra inputs are not permitted"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        compiled(options)


def test_the_supervisor_finds_it() -> None:
    """Installed: its entry point is there, and the class passes what a plug-in has to pass."""
    assert [entry.value for entry in entry_points(group=GROUP) if entry.name == "mlserver"] == [
        "mic_mlserver:MLServerBackend"
    ]
    found = Registry().get("mlserver")
    assert found is not None and found.Options is MLServerBackend.Options
