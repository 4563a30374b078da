"""The backend `mlserver`: one MLServer per instance, as a tree of host processes.

Seen with MLServer 1.7.1. It is configured by MLSERVER_* variables; `mlserver start` has no flags.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import quote

from pydantic import Field, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, common
from mic_supervisor.config.options import AbsolutePath, ModelOptions, Strict
from mic_supervisor.model import HttpCheck, Instance, Probe, Probes

_CONTAINERS_ONLY = "MLServer runs as a host process, without a container; remove the key"
_PORTS = ("http", "grpc", "metrics")
_OURS = {"MLSERVER_HOST": "listen", **{f"MLSERVER_{name.upper()}_PORT": "ports" for name in _PORTS}}


class Settings(Strict):
    """`backends.mlserver`."""

    executable: AbsolutePath = Field(
        description="The program mlserver, as in /opt/mlserver/bin/mlserver."
    )


class Options(ModelOptions):
    """A key that would do nothing is refused with the reason, never ignored."""

    unavailable: ClassVar[dict[str, str]] = {
        **dict.fromkeys(common.CONTAINERS_ONLY, _CONTAINERS_ONLY),
        "args": "`mlserver start` has no flags; set MLSERVER_… variables under env",
        "drain_timeout": "MLServer does not report what it is working on; remove the key",
        "runtime": "MLServer runs as a host process; remove the key",
    }

    path: AbsolutePath = Field(description="The directory that holds model-settings.json.")
    parallel_workers: int = Field(
        default=1, ge=0, description="Processes that compute; 0 computes in the server itself."
    )

    @model_validator(mode="after")
    def _own_variables(self) -> Self:
        for name in self.env:
            if (key := _OURS.get(name)) is not None:
                raise ValueError(f"env: {name} is set by the supervisor; use the key {key}")
            if name == "MLSERVER_PARALLEL_WORKERS":
                raise ValueError(f"env: {name}: use the key parallel_workers")
        return self

    @model_validator(mode="after")
    def _no_image(self) -> Self:
        if any(check.docker for check in common.checks(self)):
            raise ValueError("probe: docker: a host process has no image; use http, tcp or exec")
        return self


class MLServerBackend(BackendBase):
    """Whether it works is asked of the model: `/v2/health/ready` would pass for any V2 server that
    happens to have the port."""

    name = "mlserver"
    Settings = Settings
    Options = Options

    def compile(self, request: CompileRequest) -> Instance:
        """One server that sees the GPUs of the instance and no other. Raises CompileError."""
        options: Options = request.options
        settings: Settings = request.settings
        model = _served_name(request, Path(options.path, "model-settings.json"))
        _refuse_own_ports(request, Path(options.path, "settings.json"))
        ports = common.ports(options, also=_PORTS)
        # By default these are where it is started: two servers would count each other's requests,
        # and a `user` could not make them there.
        metrics, environments = request.directory / "metrics", request.directory / "environments"
        filled = common.texts(
            request,
            ports,
            command=[settings.executable, "start", options.path],
            env={
                **common.visible_gpus(request),
                **options.env,
                "MLSERVER_HOST": options.listen,
                **{f"MLSERVER_{name.upper()}_PORT": f"${{port:{name}}}" for name in _PORTS},
                "MLSERVER_ENVIRONMENTS_DIR": str(environments),
                "MLSERVER_METRICS_DIR": str(metrics),
                "MLSERVER_PARALLEL_WORKERS": str(options.parallel_workers),
            },
            probes=_probes(options, model),
        )
        workload = replace(
            common.process(request, filled, ports),
            directories=tuple(map(str, (request.directory, metrics, environments))),
        )
        return common.instance(request, workload, filled.probes)


def _served_name(request: CompileRequest, path: Path) -> str:
    name = _document(request, path, "model").get("name")
    if not isinstance(name, str) or not name:
        raise common.cannot(request, f"{path} has no name", "give the model one in there")
    return name


def _refuse_own_ports(request: CompileRequest, path: Path) -> None:
    """What settings.json says wins over the environment, and then nobody finds the server."""
    try:
        request.read_text(path)
    except FileNotFoundError:
        return
    except OSError:
        pass  # is said in full by the next line
    found = _document(request, path, "server's settings")
    for key in ("host", *(f"{name}_port" for name in _PORTS)):
        if key in found:
            raise common.cannot(
                request,
                f"{path} sets {key}, which is the supervisor's to choose",
                "remove it there; a model of gpus.yaml has the keys listen and ports",
            )


def _document(request: CompileRequest, path: Path, what: str) -> dict[str, object]:
    try:
        found = json.loads(common.read(request, path, what))
    except ValueError as error:
        raise common.cannot(request, f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise common.cannot(request, f"{path} is no JSON object")
    return found


def _probes(options: Options, model: str) -> Probes:
    """What the file says; where it says nothing, the model's own state.

    `…/ready` is 400 while the model loads. The model's metadata name it, which tells this server
    from a stranger on its port.
    """
    if options.probe is not None:
        return common.probes(options, "metrics")
    path = f"/v2/models/{quote(model, safe='')}"
    ready = HttpCheck(f"{path}/ready")
    alive = HttpCheck(path, expect=(("name", model),))
    return Probes(startup=Probe(ready, period=1.0), liveness=Probe(alive), readiness=Probe(ready))
