"""Triton Inference Server in containers, its models loaded over HTTP.

Three ways: a server on each GPU, one per model over all its GPUs, or one for all models.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from mic_supervisor.backends import Ask, BackendBase, CompileRequest, Member, common, error_text
from mic_supervisor.backends.triton.config import generate, is_ours, mark_of, positions_of
from mic_supervisor.backends.triton.log import load_failure
from mic_supervisor.config import container as container_keys
from mic_supervisor.config.container import ContainerOptions
from mic_supervisor.config.document import BadKey, parse_gpu_key
from mic_supervisor.config.options import (
    AbsolutePath,
    Advice,
    EnvName,
    LimitOptions,
    ModelOptions,
    Mounted,
    PortOptions,
    Text,
)
from mic_supervisor.config.types import Duration, ListenAddress, PositiveDuration, Size
from mic_supervisor.model import (
    HttpCall,
    HttpCheck,
    Instance,
    LoadState,
    Mount,
    Pairs,
    Placement,
    PlacementState,
    Probe,
    Probes,
)
from mic_supervisor.text import quoted

_REPOSITORY = "/models"  # inside the container
_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}  # inside, and of a server for all models
SHARED = "triton-shared"  # the id of that server
# What only a server for all models has here; with one for each model, the model says it.
_OF_SHARED = (
    *("gpus", "ports", "args", "env", "env_file", "listen", "mounts", "limits", "network"),
    *("start_timeout", "stop_timeout", *container_keys.KEYS),
)
# What no model says of that server: its models have it from the file's `defaults` alone.
_OF_DEFAULTS = ("listen", "network", "rollout", "stop_signal", "stop_timeout")
# What a model says of its server, where that is not for all models.
_OF_SERVER = frozenset(
    {
        *("args", "env", "env_file", "port", "ports", "listen", "probe", "stop_timeout", "user"),
        *("stop_signal", "working_dir", "limits", "mounts", "shm_size", "network", "rollout"),
        *container_keys.KEYS,
        "warm_up",
        *("prepare", "prepare_timeout"),
    }
)
# Triton 2.51 takes the name from the URL as it stands, percent signs and all.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_OWN_FLAGS = frozenset(
    {
        *("--exit-on-error", "--exit-timeout-secs", "--grpc-address", "--grpc-port"),
        *("--http-address", "--http-port", "--id", "--load-model", "--log-format"),
        *("--metrics-address", "--metrics-port", "--model-control-mode", "--model-repository"),
        *("--model-store", "--strict-readiness", "--allow-http"),
    }
)


class Settings(ContainerOptions):
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
        default=None,
        description="The GPUs that a shared server has for itself; else those of its models.",
    )
    ports: PortOptions | None = Field(
        default=None, description="The ports of a shared server; 8000, 8001 and 8002 by default."
    )
    args: list[str] | None = Field(default=None, description="More flags of a shared server.")
    env: dict[EnvName, str] | None = Field(
        default=None, description="The environment of a shared server."
    )
    env_file: AbsolutePath | None = Field(
        default=None, description="A file of KEY=VALUE lines for a shared server."
    )
    listen: ListenAddress | None = Field(
        default=None, description="The address that a shared server serves on."
    )
    mounts: list[Mounted] | None = Field(
        default=None, description="Paths of the host in a shared server's container."
    )
    limits: LimitOptions | None = Field(default=None, description="Bounds of a shared server.")
    network: Literal["bridge", "host"] | None = Field(
        default=None, description="The network of a shared server."
    )
    start_timeout: PositiveDuration | None = Field(
        default=None, description="From the start of a shared server until it answers."
    )
    stop_timeout: Duration | None = Field(
        default=None, description="From a shared server's stop signal until KILL."
    )

    @model_validator(mode="after")
    def _only_of_a_shared_server(self) -> Self:
        for key in _OF_SHARED:
            if key in self.model_fields_set and self.server != "shared":
                instead = "remove the key" if key == "gpus" else "give it to the models"
                raise ValueError(
                    f"{key}: it belongs to a server for all models, but this says server: "
                    f"{self.server}; {instead}, or write server: shared"
                )
        return self

    @field_validator("gpus")
    @classmethod
    def _gpu_keys(cls, value: list[int | str] | None) -> list[int | str] | None:
        for key in value or ():
            try:
                selection = parse_gpu_key(key)
            except BadKey as error:
                raise ValueError(f"{key}: {error}") from error
            if len(selection.keys) != 1:
                raise ValueError(f"{key}: name one GPU at a time")
        return value

    @field_validator("args")
    @classmethod
    def _own_flags(cls, value: list[str] | None) -> list[str] | None:
        _refuse_own_flags(value or ())
        return value

    def advice(self) -> Iterable[Advice]:
        return common.advise_tag(self.image)


def _refuse_own_flags(args: Iterable[str]) -> None:
    for arg in args:
        flag = arg.partition("=")[0]
        if flag in _OWN_FLAGS:
            raise ValueError(f"args: {flag} is set by the supervisor; remove it")


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
        common.refuse_own_startup(
            self,
            "whether a Triton server is up is checked in its own way, before its model is loaded",
        )
        return self

    @model_validator(mode="after")
    def _own_flags(self) -> Self:
        _refuse_own_flags(self.args)
        return self


class TritonBackend(BackendBase):
    """A server starts empty; the model is loaded when its startup probe has passed.

    1. Nothing is written into the repository, and it is mounted read-only: the configuration, with
       the generated instance group, goes into the load call.
    2. The call replaces the configuration on disk in memory only, and a plain load by somebody else
       undoes that once a file of the model has changed: so what runs is compared again and again,
       by the mark in it (see `group_name`).
    3. A port may be answered by a foreign process: the startup probe wants our `--id` as the name.
    """

    name = "triton"
    Settings = Settings
    Options = Options
    example = (
        "  triton:\n"
        "    image: nvcr.io/nvidia/tritonserver:25.04-py3\n"
        "    model_repository: /srv/triton/model_repository\n"
        "    shm_size: 2g\n",
        "  MAM: {backend: triton, instances_per_gpu: 8}     # a directory of the repository\n",
    )

    def compile(self, request: CompileRequest) -> Instance:
        options: Options = request.options
        model = _model(request)
        if len(request.gpus) != 1:
            raise common.cannot(
                request,
                f"server: per-gpu runs one server for one GPU, and this entry has "
                f"{len(request.gpus)}",
                'write a range ("3-4") for one server on each, or server: per-model',
            )
        member = Member(request.model, options, request.gpus)
        placement = self.compile_placement(request, member)
        return _instance(request, options, _probes(request.instance, model, options), (placement,))

    # --- a server of several GPUs, perhaps of several models --------------------------------------

    def server_of(self, settings: Any, model: str) -> str | None:
        if settings.server == "shared":
            return SHARED
        return f"{model}-server" if settings.server == "per-model" else None

    def reserved(self, settings: Any) -> tuple[str | int, ...]:
        return tuple(settings.gpus or ())

    def conflicts(self, settings: Any, given: Iterable[str]) -> dict[str, str]:
        if settings.server != "shared":
            return {}
        why = "all models are in one server, which no model configures; "
        return {
            key: why + (f"see backends.triton.{key}" if key in _OF_SHARED else "remove the key")
            for key in given
            if key in _OF_SERVER
        }

    def compile_placement(self, request: CompileRequest, member: Member) -> Placement:
        settings: Settings = request.settings
        options: Options = member.options
        own = replace(request, model=member.model, options=options)
        model, gpus = _model(own), tuple(gpu.uuid for gpu in member.gpus)
        positions = [number for number, gpu in enumerate(request.gpus) if gpu.uuid in gpus]
        repository, count = Path(settings.model_repository), options.instances_per_gpu
        generated = generate(own, repository, model, count, positions)
        body = json.dumps({"parameters": {"config": generated.text}}, ensure_ascii=False)
        summary: Pairs = (("instances_per_gpu", str(count)),)
        if len(request.gpus) > 1:
            summary = (*summary, ("places", _listed(positions)))
        made = _calls(model, gpus, generated.digest, body, options.start_timeout)
        return replace(made, summary=summary, directory=str(repository / model))

    def compile_server(
        self, request: CompileRequest, members: Sequence[Member], placements: Sequence[Placement]
    ) -> Instance:
        settings: Settings = request.settings
        shared = settings.server == "shared"
        compiled = {item.model for item in placements}
        names = [member.options.model or member.model for member in members]
        if shared:
            options = _options_of_shared(request, members[0].options)
            probes = _probes(request.instance, None, options)
            request = replace(request, options=options)
        else:
            options = members[0].options
            probes = _probes(request.instance, names[0], options)
            request = replace(request, options=options, model=members[0].model)
        made = _instance(request, options, probes, tuple(placements))
        vram = [item.options.vram for item in members if item.options.vram is not None]
        strictest = min(
            (m.options.on_foreign for m in members), key=("block", "wait", "ignore").index
        )
        return replace(
            made,
            shared=shared,
            inventory=HttpCall("POST", "/v2/repository/index", '{"ready": true}'),
            frozen_models=tuple(name for name in names if name not in compiled),
            vram=max(vram, default=None),
            on_foreign=strictest,
            foreign_threshold=min(member.options.foreign_threshold for member in members),
        )

    def surplus(self, instance: Instance, ask: Ask) -> tuple[Placement, ...]:
        """By the mark in its configuration: what an ensemble brought along, or a person loaded,
        has none.
        """
        assert instance.inventory is not None  # else nobody asks
        known = {*instance.frozen_models, *(item.model for item in instance.placements)}
        found = []
        for name in _ready_models(*ask(instance.inventory)):
            if name in known or not _NAME.fullmatch(name):
                continue
            status, body = ask(HttpCall("GET", f"/v2/models/{name}/config"))
            config = _json(body) if status == 200 else None
            if isinstance(config, dict) and (mark := mark_of(config, name)) is not None:
                here = range(len(instance.gpus))
                gpus = tuple(instance.gpus[one] for one in positions_of(config) if one in here)
                found.append(_calls(name, gpus, mark, "", 60.0))
        return tuple(found)

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
        reason = f"Triton answers {status}" + (f": {quoted(said, 200)}" if said else "")
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
    for name, inside in _PORTS.items():
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


def _instance(
    request: CompileRequest, options: Options, probes: Probes, placements: tuple[Placement, ...]
) -> Instance:
    settings: Settings = request.settings
    exit_timeout = math.ceil(settings.exit_timeout)
    if options.stop_timeout <= exit_timeout:
        raise common.cannot(
            request,
            f"its stop_timeout, {options.stop_timeout:g}s, would kill Triton before its own "
            f"exit_timeout, {exit_timeout}s, has passed",
            "raise the model's stop_timeout or lower backends.triton.exit_timeout",
        )
    bridge = options.network == "bridge"
    ports = common.ports(options, container=_PORTS)
    if not bridge:
        ports = tuple(type(port)(port.name, port.host) for port in ports)
    filled = common.texts(
        request,
        ports,
        command=[*_command(bridge, options.listen, exit_timeout), *options.args],
        env=options.env,
        probes=probes,
    )
    workload = common.container(
        request,
        filled,
        ports,
        image=settings.image,
        own_mounts=[Mount(settings.model_repository, _REPOSITORY, read_only=True)],
        shm_size=settings.shm_size,
    )
    return common.instance(request, workload, filled.probes, placements)


def _options_of_shared(request: CompileRequest, member: Options) -> Options:
    """The options that a model would have whose server is like the one for all models.

    `member` are those of any of its models.
    """
    settings: Settings = request.settings
    given = {key: getattr(member, key) for key in _OF_DEFAULTS}
    given |= {
        key: getattr(settings, key)
        for key in _OF_SHARED
        if key != "gpus" and key in settings.model_fields_set
    }
    fixed = settings.ports.model_dump(exclude_none=True) if settings.ports is not None else {}
    given["ports"] = PortOptions(**{**_PORTS, **fixed})
    # What was validated as a setting needs no validation as an option, which is of texts.
    return Options(backend="triton").model_copy(update=given)


def _probes(instance: str, model: str | None, options: Options) -> Probes:
    # `/v2/health/ready` would be wrong for readiness: it fails while any model loads or unloads.
    given = common.probes(options, "metrics")
    ready = Probe(HttpCheck(f"/v2/models/{model}/ready")) if model is not None else None
    return Probes(
        startup=Probe(HttpCheck("/v2", expect=(("name", instance),)), period=1.0),
        liveness=common.over(given.liveness, Probe(HttpCheck("/v2/health/live"))),
        readiness=common.over(given.readiness, ready),
    )


def _calls(model: str, gpus: tuple[str, ...], digest: str, body: str, timeout: float) -> Placement:
    repository = f"/v2/repository/models/{model}"
    return Placement(
        model=model,
        gpus=gpus,
        digest=digest,
        load=HttpCall("POST", f"{repository}/load", body, timeout=timeout),
        # The models that only an ensemble uses go with it; for others this changes nothing.
        unload=HttpCall(
            "POST", f"{repository}/unload", '{"parameters": {"unload_dependents": true}}'
        ),
        verify=HttpCall("GET", f"/v2/models/{model}/config"),
    )


def _listed(positions: Iterable[int]) -> str:
    return ",".join(map(str, sorted(positions)))


def _ready_models(status: int | None, body: str) -> list[str]:
    listed = _json(body) if status == 200 else None
    if not isinstance(listed, list):
        return []
    return sorted(
        {str(item["name"]) for item in listed if isinstance(item, dict) and "name" in item}
    )


def _json(body: str) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _loaded(placement: Placement, body: str) -> PlacementState:
    model = placement.model
    config = _json(body)
    if not isinstance(config, dict) or config.get("name") != model:
        return PlacementState(
            model, LoadState.UNKNOWN, reason="the answer is not Triton's configuration of it"
        )
    groups = config.get("instance_group") or []
    positions = positions_of(config) if len(dict(placement.summary)) > 1 else ()
    # A group for each position, where the GPUs are simulated: what is counted is one of them.
    counted = groups[:1] if positions else groups
    count = sum(group.get("count", 0) for group in counted) or 1
    summary: Pairs = (("instances_per_gpu", str(count)),)
    if positions:
        summary = (*summary, ("places", _listed(positions)))
    if is_ours(config, model, placement.digest):
        return PlacementState(model, LoadState.LOADED, placement.digest, summary=summary)
    # Any digest but ours: what runs was sent by an earlier generation or by somebody else.
    other = hashlib.sha256(body.encode()).hexdigest()
    reason = "it runs with another configuration"
    return PlacementState(model, LoadState.LOADED, other, reason, summary)
