"""The keys that a model may have whatever its backend; a backend's Options derive from these."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mic_supervisor.config.types import Duration, Memlock, SignalName, Size

PortNumber = Annotated[int, Field(ge=1, le=65535, strict=True)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Unknown keys are errors; nothing is coerced between strings, numbers and booleans."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class CheckOptions(Strict):
    """One probe: exactly one of http, tcp, exec, docker."""

    http: Annotated[str, Field(pattern=r"^/")] | None = None
    tcp: Literal[True] | None = None
    exec: Annotated[list[Text], Field(min_length=1)] | None = None
    docker: Literal[True] | None = None
    period: Duration = 5.0
    timeout: Duration = 3.0
    failures: Annotated[int, Field(ge=1)] = 3

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [k for k in ("http", "tcp", "exec", "docker") if getattr(self, k) is not None]
        if len(kinds) != 1:
            given = " and ".join(kinds) or "none"
            raise ValueError(f"a probe has exactly one of http, tcp, exec and docker; here: {given}")
        return self


class SplitProbe(Strict):
    startup: CheckOptions | None = None
    liveness: CheckOptions | None = None
    readiness: CheckOptions | None = None


class LimitOptions(Strict):
    memory: Size | None = None
    cpus: Annotated[float, Field(gt=0, strict=False)] | None = None
    nofile: Annotated[int, Field(ge=1)] | None = None
    memlock: Memlock | None = None


class PortOptions(Strict):
    http: PortNumber | None = None
    grpc: PortNumber | None = None
    metrics: PortNumber | None = None


class RolloutOptions(Strict):
    max_unavailable: Annotated[int, Field(ge=1)] = 1
    rollback: bool = True


class MountOptions(Strict):
    source: Annotated[str, Field(pattern=r"^/")]
    target: Annotated[str, Field(pattern=r"^/")]
    read_only: bool = False


class ModelOptions(Strict):
    """Keys for every backend. `unavailable` maps a key to why it cannot be used with a backend.

    A key that a backend cannot honour is refused with that reason, never ignored.
    """

    unavailable: ClassVar[dict[str, str]] = {}

    backend: Text
    env: dict[str, str] = {}
    env_file: Annotated[str, Field(pattern=r"^/")] | None = None
    args: list[str] = []
    port: PortNumber | None = None
    ports: PortOptions | None = None
    listen: Text = "127.0.0.1"
    probe: CheckOptions | SplitProbe | None = None
    start_timeout: Duration = 300.0
    stop_timeout: Duration = 30.0
    stop_signal: SignalName = "SIGTERM"
    drain_timeout: Duration = 0.0
    vram: Size | None = None
    on_foreign: Literal["block", "wait", "ignore"] = "block"
    user: Text | None = None
    working_dir: Annotated[str, Field(pattern=r"^/")] | None = None
    limits: LimitOptions = LimitOptions()
    mounts: list[MountOptions] = []
    shm_size: Size | None = None
    network: Literal["bridge", "host"] = "bridge"
    container_port: PortNumber | None = None
    rollout: RolloutOptions = RolloutOptions()
    runtime: Literal["docker", "process"] | None = None

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
    def _one_way_to_name_ports(self) -> Self:
        if self.port is not None and self.ports is not None:
            raise ValueError("give either port or ports, not both")
        return self
