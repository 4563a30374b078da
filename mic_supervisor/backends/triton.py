"""Triton Inference Server: one server in a container per GPU, its model loaded over HTTP."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, common, error_text
from mic_supervisor.backends.triton_config import Generated, generate, is_ours
from mic_supervisor.backends.triton_log import load_failure
from mic_supervisor.config.options import (
    AbsolutePath,
    CheckOptions,
    ModelOptions,
    PortOptions,
    Strict,
    Text,
)
from mic_supervisor.config.types import Duration, Size
from mic_supervisor.model import (
    HttpCall,
    HttpCheck,
    Instance,
    LoadState,
    Mount,
    Placement,
    PlacementState,
    Probe,
    Probes,
)

_REPOSITORY = "/models"  # inside the container
_INSIDE = {"http": 8000, "grpc": 8001, "metrics": 8002}
_LATER = "a server that several models or GPUs share comes with a later version; remove the key"
# Triton 2.51 takes the name from the URL as it stands, percent signs and all.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_OWN_FLAGS = frozenset(
    {
        "--exit-on-error",
        "--exit-timeout-secs",
        "--grpc-address",
        "--grpc-port",
        "--http-address",
        "--http-port",
        "--id",
        "--load-model",
        "--log-format",
        "--metrics-address",
        "--metrics-port",
        "--model-control-mode",
        "--model-repository",
        "--model-store",
        "--strict-readiness",
        "--allow-http",
    }
)


class Settings(Strict):
    """`backends.triton`.

    `exit_timeout` is how long Triton itself lets requests end after SIGTERM; a client that keeps an
    idle connection open makes it wait all of that.
    """

    image: Text = Field(description="An image that has tritonserver on its PATH.")
    model_repository: AbsolutePath = Field(
        description="The directory of the models on this host; it is mounted read-only."
    )
    shm_size: Size = Field(default=1 << 30, description="The size of /dev/shm of a server.")
    exit_timeout: Duration = Field(
        default=25.0, description="For requests to end after SIGTERM; less than stop_timeout."
    )
    server: Literal["per-gpu", "per-model", "shared"] = Field(
        default="per-gpu", description="Which models and GPUs share a server."
    )
    gpus: list[int | str] | None = Field(
        default=None, description="The GPUs that a shared server has for itself."
    )
    ports: PortOptions | None = Field(default=None, description="The ports of a shared server.")

    @field_validator("server")
    @classmethod
    def _one_server_per_gpu(cls, value: str) -> str:
        if value != "per-gpu":
            raise ValueError(f"{value!r} comes with a later version; this one knows per-gpu")
        return value

    @model_validator(mode="before")
    @classmethod
    def _nothing_shared(cls, data: Any) -> Any:
        for key in ("gpus", "ports"):
            if isinstance(data, dict) and key in data:
                raise ValueError(f"{key}: {_LATER}")
        return data


class Options(ModelOptions):
    """`model` is the directory in the repository where that is not the name in the file."""

    unavailable: ClassVar[dict[str, str]] = {
        "drain_timeout": "Triton finishes its requests after the stop signal; "
        "use backends.triton.exit_timeout",
        "runtime": common.ONE_RUNTIME,
        "container_port": "Triton's ports in its container are fixed; use port or ports",
    }

    model: Annotated[str, Field(pattern=f"^{_NAME.pattern}$")] | None = Field(
        default=None, description="The model's directory, if not the name used here."
    )
    instances_per_gpu: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Copies of the model that run side by side on each GPU."
    )

    @model_validator(mode="after")
    def _own_probes(self) -> Self:
        if self.probe is None:
            return self
        if isinstance(self.probe, CheckOptions) or self.probe.startup is not None:
            raise ValueError(
                "probe: whether a Triton server is up is checked in its own way, before its model "
                "is loaded; give probe.liveness or probe.readiness"
            )
        return self

    @model_validator(mode="after")
    def _own_flags(self) -> Self:
        for arg in self.args:
            flag = arg.partition("=")[0]
            if flag in _OWN_FLAGS:
                raise ValueError(f"args: {flag} is set by the supervisor; remove it")
        return self


class TritonBackend(BackendBase):
    """A server starts empty; the model is loaded when its startup probe has passed.

    1. Nothing is written into the repository, and it is mounted read-only: the configuration, with
       the generated instance group, goes into the load call.
    2. The call replaces the configuration on disk in memory only, and a plain load by somebody else
       undoes that once a file of the model has changed: so what runs is compared again and again,
       by the mark in it (see `group_name`).
    3. A port may be answered by a stranger: the startup probe wants our `--id` as the name.
    """

    name = "triton"
    Settings = Settings
    Options = Options

    def compile(self, request: CompileRequest) -> Instance:
        options: Options = request.options
        settings: Settings = request.settings
        model = _model(request)
        if len(request.gpus) != 1:
            raise common.cannot(
                request,
                f"server: per-gpu runs one server for one GPU, and this entry has "
                f"{len(request.gpus)}",
                'write a range ("3-4") for one server on each',
            )
        exit_timeout = math.ceil(settings.exit_timeout)
        if options.stop_timeout <= exit_timeout:
            raise common.cannot(
                request,
                f"its stop_timeout, {options.stop_timeout:g}s, would kill Triton before its own "
                f"exit_timeout, {exit_timeout}s, has passed",
                "raise the model's stop_timeout or lower backends.triton.exit_timeout",
            )
        generated = generate(
            request, Path(settings.model_repository), model, options.instances_per_gpu
        )
        bridge = options.network == "bridge"
        ports = common.ports(options, container=_INSIDE)
        if not bridge:
            ports = tuple(type(port)(port.name, port.host) for port in ports)
        filled = common.texts(
            request,
            ports,
            command=[*_command(bridge, options.listen, exit_timeout), *options.args],
            env=options.env,
            probes=_probes(request.instance, model, options),
        )
        workload = common.container(
            request,
            filled,
            ports,
            image=settings.image,
            own_mounts=[Mount(settings.model_repository, _REPOSITORY, read_only=True)],
            shm_size=settings.shm_size,
        )
        placement = _placement(model, request.gpus[0].uuid, generated, options)
        return common.instance(request, workload, filled.probes, (placement,))

    def placement_state(
        self, placement: Placement, status: int | None, body: str
    ) -> PlacementState:
        """Reads `GET /v2/models/X/config`.

        A model that is loaded for the first time, one that could not be and one that was unloaded
        all give the same answer: ABSENT. A load call waits for the one in progress.
        """
        model = placement.model
        if status is None:
            return PlacementState(model, LoadState.UNKNOWN, reason="Triton does not answer")
        if status == 200:
            return _loaded(placement, body)
        said = error_text(body)
        # The status is 404 here and 400 in other versions; the words are the same.
        if 400 <= status < 500 and said.startswith("Request for unknown model"):
            known = "has no available versions" in said
            reason = "Triton has no version of it loaded" if known else "it is not loaded"
            return PlacementState(model, LoadState.ABSENT, reason=reason)
        reason = f"Triton answers {status}" + (f": {said[:200]}" if said else "")
        return PlacementState(model, LoadState.UNKNOWN, reason=reason)

    def load_failure(self, answer: str, log: Sequence[str], model: str) -> str:
        """Triton's own words, and what its log says where those tell nothing."""
        return load_failure(answer, log, model)


def _model(request: CompileRequest) -> str:
    name: str = request.options.model or request.model
    if not _NAME.fullmatch(name):
        raise common.cannot(
            request,
            "in a model's name Triton's HTTP interface takes only ASCII letters, digits, "
            "'-', '_' and '.'",
            "rename its directory in the repository, and give the directory's name as `model:`",
        )
    return name


def _command(bridge: bool, listen: str, exit_timeout: int) -> list[str]:
    command = [
        "tritonserver",
        f"--model-repository={_REPOSITORY}",
        "--model-control-mode=explicit",
        "--id=${instance}",
    ]
    for name, inside in _INSIDE.items():
        if bridge:
            command.append(f"--{name}-port={inside}")
        else:
            command += [f"--{name}-address={listen}", f"--{name}-port=${{port:{name}}}"]
    return [
        *command,
        "--strict-readiness=false",
        "--exit-on-error=false",
        f"--exit-timeout-secs={exit_timeout}",
        "--log-format=ISO8601",
    ]


def _probes(instance: str, model: str, options: Options) -> Probes:
    # `/v2/health/ready` would be wrong for readiness: it fails while any model loads or unloads.
    given = common.probes(options)
    return Probes(
        startup=Probe(HttpCheck("/v2", expect=(("name", instance),)), period=1.0),
        liveness=given.liveness or Probe(HttpCheck("/v2/health/live")),
        readiness=given.readiness or Probe(HttpCheck(f"/v2/models/{model}/ready")),
    )


def _placement(model: str, gpu: str, generated: Generated, options: Options) -> Placement:
    repository = f"/v2/repository/models/{model}"
    body = json.dumps({"parameters": {"config": generated.text}}, ensure_ascii=False)
    return Placement(
        model=model,
        gpu=gpu,
        digest=generated.digest,
        load=HttpCall("POST", f"{repository}/load", body, timeout=options.start_timeout),
        # The models that only an ensemble uses go with it; for others this changes nothing.
        unload=HttpCall(
            "POST", f"{repository}/unload", '{"parameters": {"unload_dependents": true}}'
        ),
        verify=HttpCall("GET", f"/v2/models/{model}/config"),
        summary=(("instances_per_gpu", str(options.instances_per_gpu)),),
    )


def _loaded(placement: Placement, body: str) -> PlacementState:
    model = placement.model
    try:
        config = json.loads(body)
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("name") != model:
        return PlacementState(
            model, LoadState.UNKNOWN, reason="the answer is not Triton's configuration of it"
        )
    groups = config.get("instance_group") or []
    count = sum(group.get("count", 0) for group in groups) or 1
    summary = (("instances_per_gpu", str(count)),)
    if is_ours(config, model, placement.digest):
        return PlacementState(model, LoadState.LOADED, placement.digest, summary=summary)
    # Any digest but ours: what runs was sent by an earlier generation or by somebody else.
    other = hashlib.sha256(body.encode()).hexdigest()
    reason = "it runs with another configuration"
    return PlacementState(model, LoadState.LOADED, other, reason, summary)
