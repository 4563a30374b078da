"""The keys that a model may have whatever its backend; a backend's Options derive from these."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from mic_supervisor.config.container import ContainerOptions
from mic_supervisor.config.types import Advice as Advice
from mic_supervisor.config.types import (
    Duration,
    ListenAddress,
    Memlock,
    PositiveDuration,
    SignalName,
    Size,
)
from mic_supervisor.config.types import Strict as Strict

PortNumber = Annotated[int, Field(ge=1, le=65535, strict=True)]
Text = Annotated[str, Field(min_length=1)]
AbsolutePath = Annotated[str, Field(pattern=r"^/")]


def _env_name(name: str) -> str:
    if not name or any(char in "=$" or char.isspace() or not char.isprintable() for char in name):
        raise ValueError(f"{name!r} cannot be the name of a variable")
    return name


EnvName = Annotated[str, AfterValidator(_env_name)]


def _metric_name(name: str) -> str:
    if not re.fullmatch("[a-zA-Z_:][a-zA-Z0-9_:]*", name):
        raise ValueError(
            f"{name!r} cannot be the name of a metric: write it as the server's metrics show it, "
            "without labels, as in `requests_total`"
        )
    return name


def _body(body: Any) -> Any:
    if not isinstance(body, str | dict | list):
        raise ValueError(f"{body!r} is no text, map or list; write a map, as in `{{inputs: a}}`")
    return body


class RequestOptions(Strict):
    """One request to the model's server, on its port for HTTP."""

    path: AbsolutePath = Field(description="Where it is sent.")
    body: Annotated[
        Any, AfterValidator(_body), WithJsonSchema({"type": ["string", "object", "array"]})
    ] = Field(
        default=None,
        description="POST this, a map or a list as JSON; without it the request is GET.",
    )


class WarmUpOptions(RequestOptions):
    """Requests that have to be answered with 2xx or 3xx before an instance is ready."""

    count: Annotated[int, Field(ge=1)] = Field(
        default=1, description="How many, one after the other."
    )


class ProgressOptions(Strict):
    """A counter that has to move while there is work."""

    metric: Annotated[str, AfterValidator(_metric_name)] = Field(
        description="The counter's name; with labels it is their sum."
    )
    path: AbsolutePath = Field(default="/metrics", description="Where the server shows it.")
    within: PositiveDuration = Field(
        default=120.0,
        description="How long it may stand still before the request is sent, and as long may the "
        "request take.",
    )
    request: RequestOptions = Field(
        description="A small one, which the server answers unless it hangs."
    )


class CheckOptions(Strict):
    """One probe: exactly one of http, tcp, exec, docker; progress beside it, or alone."""

    http: AbsolutePath | None = Field(default=None, description="GET this path; 2xx and 3xx pass.")
    tcp: Literal[True] | None = Field(default=None, description="Connect to the port.")
    exec: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="Run this command, on the host or inside the container; 0 passes."
    )
    docker: Literal[True] | None = Field(
        default=None, description="The health check that the image itself declares."
    )
    progress: ProgressOptions | None = Field(
        default=None,
        description="A counter that has to move while there is work. Alone, or beside the check of "
        "everything, it reports and never restarts.",
    )
    period: PositiveDuration = Field(
        default=5.0, description="From the end of one try to the next."
    )
    timeout: PositiveDuration = Field(default=3.0, description="For one try.")
    failures: Annotated[int, Field(ge=1)] = Field(
        default=3, description="Failed tries in a row until it counts."
    )

    @property
    def kinds(self) -> list[str]:
        """Which check it is; none where it has a progress alone."""
        return [kind for kind in ("http", "tcp", "exec", "docker") if getattr(self, kind)]

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if len(self.kinds) != 1 and (self.kinds or self.progress is None):
            given = " and ".join(self.kinds) or "none"
            raise ValueError(
                f"a probe has exactly one of http, tcp, exec and docker; here: {given}"
            )
        return self


class SplitProbe(Strict):
    """A check for each purpose: startup gates the others, liveness restarts, readiness reports."""

    startup: CheckOptions | None = Field(
        default=None,
        description="Passes once before the others begin; start_timeout is its budget.",
    )
    liveness: CheckOptions | None = Field(
        default=None, description="Failing restarts the instance."
    )
    readiness: CheckOptions | None = Field(
        default=None, description="Failing is reported, nothing more."
    )

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if self.startup is None and self.liveness is None and self.readiness is None:
            raise ValueError("a probe has exactly one of http, tcp, exec and docker; here: none")
        if self.startup is not None and self.startup.progress is not None:
            raise ValueError(
                "startup: a counter says nothing of a start; move its progress to readiness, which "
                "reports, or to liveness, which restarts"
            )
        return self


class LimitOptions(Strict):
    memory: Size | None = Field(default=None, description="Main memory, not the GPU's.")
    cpus: Annotated[float, Field(gt=0, strict=False)] | None = Field(
        default=None, description="CPUs, 1.5 is one and a half."
    )
    nofile: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Open files.")
    memlock: Memlock | None = Field(
        default=None, description='Locked memory: a size, or "unlimited".'
    )
    numa: Literal["near"] | None = Field(
        default=None,
        description="`near`: it gets the CPUs and the memory next to its GPUs alone.",
    )


class PortOptions(Strict):
    http: PortNumber | None = Field(default=None, description="For requests over HTTP.")
    grpc: PortNumber | None = Field(default=None, description="For requests over gRPC.")
    metrics: PortNumber | None = Field(default=None, description="For its metrics.")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        taken: dict[int, str] = {}
        for name in ("http", "grpc", "metrics"):
            port = getattr(self, name)
            if port is not None and taken.setdefault(port, name) != name:
                raise ValueError(f"{name}: the port {port} is taken by {taken[port]}")
        return self


class RolloutOptions(Strict):
    max_unavailable: Annotated[int, Field(ge=1)] = Field(
        default=1, description="GPUs of one model that may be replaced at the same time."
    )
    rollback: bool = Field(
        default=True, description="Return to the last ready specification on failure."
    )


class MountOptions(Strict):
    source: AbsolutePath = Field(description="A path of the host.")
    target: AbsolutePath = Field(description="A path in the container.")
    read_only: bool = Field(default=False, description="Whether the container may only read it.")


def _short_mount(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    source, target, mode, *more = [*given.split(":"), "", ""]
    if not source.startswith("/") or not target.startswith("/") or any(more):
        raise ValueError(
            f"{given!r} is no mount: both sides are absolute paths, as in `/srv/models:/models:ro`"
        )
    if mode not in ("", "ro", "rw"):
        raise ValueError(f"{given!r} has the mode {mode!r}: write `{source}:{target}:ro`")
    return {"source": source, "target": target, "read_only": mode == "ro"}


Mounted = (
    MountOptions
    | Annotated[
        MountOptions,
        BeforeValidator(_short_mount),
        WithJsonSchema({"type": "string", "pattern": "^/[^:]*:/[^:]*(:r[ow])?$"}),
    ]
)
"""A mount as a map, or as Docker and Compose have it: SOURCE:TARGET or SOURCE:TARGET:ro."""


class _Options(Strict):
    unavailable: ClassVar[dict[str, str]] = {}

    backend: Text = Field(description="What serves the model.")
    env: dict[EnvName, str] = Field(
        default={}, description="Environment; ${port}, ${env:NAME} and their like are replaced."
    )
    env_file: AbsolutePath | None = Field(
        default=None, description="A file of KEY=VALUE lines; secrets belong there."
    )
    args: list[str] = Field(default=[], description="Appended to the command; ${…} is replaced.")
    port: PortNumber | None = Field(
        default=None, description="A fixed port, for a model that has one instance."
    )
    ports: PortOptions | None = Field(default=None, description="Fixed ports by name.")
    listen: ListenAddress = Field(default="127.0.0.1", description="The address to serve on.")
    probe: CheckOptions | SplitProbe | None = Field(
        default=None, description="How to tell whether it works; without one it is unprobed."
    )
    warm_up: WarmUpOptions | None = Field(
        default=None,
        description="Requests that have to be answered after a start before it is ready.",
    )
    start_timeout: PositiveDuration = Field(
        default=300.0, description="From the start until ready, loading included."
    )
    stop_timeout: Duration = Field(default=30.0, description="From the stop signal until KILL.")
    stop_signal: SignalName = Field(
        default="SIGTERM", description="The signal that asks it to end."
    )
    drain_timeout: Duration = Field(
        default=0.0, description="For requests to end before the stop signal."
    )
    vram: Size | None = Field(
        default=None,
        description="Memory that it needs on each of its GPUs; checked before anything is stopped.",
    )
    on_foreign: Literal["block", "wait", "ignore"] = Field(
        default="block",
        description="When a foreign process holds a GPU: block the start, wait until the process "
        "is gone, or ignore it and start.",
    )
    foreign_threshold: Size = Field(
        default=512 << 20,
        description="A foreign process that only draws, such as a desktop, counts from this much "
        "memory.",
    )
    prepare: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="A program of the host and its arguments, run before an instance is made or "
        "anything is stopped for it; ${…} is replaced.",
    )
    prepare_timeout: PositiveDuration = Field(
        default=14400.0, description="How long that may take."
    )
    user: Text | None = Field(default=None, description="A user's name or number, or USER:GROUP.")
    working_dir: AbsolutePath | None = Field(
        default=None, description="The directory in which it is started."
    )
    limits: LimitOptions = Field(default=LimitOptions(), description="Bounds on its resources.")
    mounts: list[Mounted] = Field(
        default=[],
        description="Paths of the host in the container; /source:/target:ro is short for a map.",
    )
    shm_size: Size | None = Field(
        default=None, description="The size of /dev/shm in the container."
    )
    network: Literal["bridge", "host"] = Field(
        default="bridge",
        description="bridge: its port is published on the address of listen; host: it has the "
        "network of the host.",
    )
    container_port: PortNumber | None = Field(
        default=None, description="The port inside the container; the same number by default."
    )
    rollout: RolloutOptions = Field(
        default=RolloutOptions(),
        description="How many GPUs change at a time, and whether a failure is taken back.",
    )
    runtime: Literal["docker", "process"] | None = Field(
        default=None, description="What runs the model, where its backend leaves the choice."
    )

    @model_validator(mode="before")
    @classmethod
    def _available(cls, data: Any) -> Any:
        # Runs before types are checked so that the reason is the first thing said of the key.
        if isinstance(data, dict):
            for key, reason in cls.unavailable.items():
                if key in data:
                    raise ValueError(f"{key}: {reason}")
        return data

    @model_validator(mode="after")
    def _prepared_by_a_program_of_the_host(self) -> Self:
        if self.prepare is None and "prepare_timeout" in self.model_fields_set:
            raise ValueError("prepare_timeout: there is nothing to wait for; give prepare as well")
        if self.prepare is not None and not self.prepare[0].startswith("/"):
            raise ValueError(
                f"prepare: the program {self.prepare[0]!r} is not an absolute path; write where it "
                "is, as in /usr/local/bin/fetch-weights"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_name_ports(self) -> Self:
        if self.port is not None and self.ports is not None:
            raise ValueError("ports: give either port or ports, not both")
        return self


class ModelOptions(ContainerOptions, _Options):
    """Keys for every backend. `unavailable` maps a key to why it cannot be used with a backend.

    A key that a backend cannot honour is refused with that reason, never ignored.
    """


class Defaults(Strict):
    """Only keys that mean the same for every backend; one that a backend has no use for is passed
    over for its models. A model's own key wins, and a default of the file wins over a backend's."""

    start_timeout: PositiveDuration | None = None
    stop_timeout: Duration | None = None
    drain_timeout: Duration | None = None
    stop_signal: SignalName | None = None
    on_foreign: Literal["block", "wait", "ignore"] | None = None
    foreign_threshold: Size | None = None
    listen: ListenAddress | None = None
    network: Literal["bridge", "host"] | None = None
    rollout: RolloutOptions | None = None


class Hooks(Strict):
    """Run without a shell, each one at a time, as the supervisor's user."""

    on_endpoints_change: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="A program's absolute path and its arguments: run when the instances that "
        "serve a model change, before one of them is stopped and after one has become ready.",
    )
    on_transition: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="A program's absolute path and its arguments: run for each change of phase, "
        "with one JSON document on its standard input.",
    )
    timeout: PositiveDuration = Field(
        default=30.0,
        description="How long a hook may run. After that, it and all that it started are killed.",
    )
    settle: Duration = Field(
        default=1.0,
        description="From the end of the hook until the instance that it took out is stopped. Some "
        "proxies use the earlier endpoints for a moment.",
    )

    @field_validator("on_endpoints_change", "on_transition")
    @classmethod
    def _absolute(cls, value: list[str] | None) -> list[str] | None:
        if any("${" in item for item in value or ()):
            raise ValueError("a hook's arguments have no placeholders; leave ${…} out")
        if value and not value[0].startswith("/"):
            raise ValueError(
                f"the program {value[0]!r} is not an absolute path; write where it is, as in "
                "/etc/mic/endpoints-changed"
            )
        return value
