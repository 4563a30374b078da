"""The shapes of the answers, for /openapi.json. What is served is held against them in tests."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel


class Shape(BaseModel):
    """Members may be added: a client ignores those that it does not know."""

    model_config = ConfigDict(extra="allow")


class Problem(Shape):
    detail: str


class Refusal(Problem):
    command: str = Field(description="the command line that does it")


class Root(Shape):
    status: Literal["ok"]
    message: str


class GpuProcess(Shape):
    pid: int
    name: str | None
    gpu_memory_usage: int | None = Field(description="MiB")
    owner: Literal["managed", "container", "unit", "orphan", "unknown"]
    instance: str | None


class Gpu(Shape):
    id: int = Field(description="the driver's index of today")
    memory_usage: float | None = Field(description="percent")
    power_draw: float | None = Field(description="watts")
    processes: list[GpuProcess] | None = Field(description="null: they cannot be read")
    uuid: str
    name: str
    memory_used: int | None = Field(description="MiB")
    memory_total: int | None = Field(description="MiB")
    power_limit: float | None = Field(description="watts")
    utilization: float | None = Field(description="percent")
    temperature: float | None = Field(description="degrees Celsius")
    state: str
    instance: str | None


class Gpus(RootModel[list[Gpu]]):
    pass


class RunningModel(Shape):
    model_name: str
    model_type: str = Field(description="the backend")
    gpu_id: int | None = Field(description="null: the GPU is not there now")
    gpu_uuid: str
    instance: str
    phase: str
    endpoint: str | None


class RunningModels(RootModel[list[RunningModel]]):
    pass


class ServingInstance(Shape):
    instance: str
    endpoints: dict[str, str]


class ServedBy(Shape):
    """A model that nobody serves has an empty list."""

    version: Literal[1]
    host: str
    models: dict[str, list[ServingInstance]]


class SupportedModels(RootModel[dict[str, str]]):
    """Name of the model to its backend."""


class GpuRef(Shape):
    uuid: str
    index: int | None


class ConfigInUse(Shape):
    path: str
    hash: str
    generation: int
    loaded_at: float | None
    last_reload_ok: bool
    error: str | None


class StatusModel(Shape):
    """One model in a server of several."""

    model: str
    gpus: list[GpuRef]
    phase: str
    reason: str | None
    next_retry: float | None


class StatusInstance(Shape):
    id: str
    origin: str
    model: str
    backend: str
    gpus: list[GpuRef]
    phase: str
    sync: Literal["in_sync", "out_of_sync", "unknown"]
    health: str
    reason: str | None
    since: float | None
    restarts: int
    next_retry: float | None
    endpoints: dict[str, str]
    container_id: str | None
    unit: str | None
    pid: int | None
    spec_hash: str | None
    as_desired: bool
    serving: bool | None = Field(description="what its probes say; null: nothing")
    models: list[StatusModel] = Field(description="of a server of several models; else empty")


class Holder(Shape):
    """A process on a GPU, and whose it is."""

    pid: int
    name: str | None
    used_memory: int | None = Field(description="bytes")
    since: float | None = Field(description="when it was started, seconds since the epoch")
    owner: Literal["managed", "container", "unit", "orphan", "unknown"]
    ref: str | None = Field(description="the container's id, or the unit's name")
    instance: str | None


class StatusGpu(Shape):
    uuid: str
    index: int | None
    name: str | None
    instance: str | None
    state: str
    trouble: str | None = Field(description="what speaks against it; null: nothing")
    holders: list[Holder] | None = Field(description="null: they cannot be read")


class Pause(Shape):
    """Of a model, or of a GPU; the other one is null."""

    model: str | None
    gpu: GpuRef | None
    since: float
    reason: str | None


class Status(Shape):
    version: Literal[1]
    host: str
    at: float = Field(description="when the machine was looked at, seconds since the epoch")
    config: ConfigInUse
    instances: list[StatusInstance]
    gpus: list[StatusGpu]
    paused: list[Pause]
    unreadable: list[str]
    warnings: list[str]


class FieldDiff(Shape):
    path: str
    before: Any
    after: Any


class PlanAction(Shape):
    action: str
    instance: str
    model: str
    gpus: list[str]
    cause: str
    diff: list[FieldDiff]


class PlanBlocked(Shape):
    instance: str
    reason: str
    paused: bool


class PlanLeftOut(Shape):
    instance: str
    model: str
    gpus: list[str]
    action: str
    cause: str


class Plan(Shape):
    version: Literal[1]
    host: str
    config_hash: str
    changes: int
    actions: list[PlanAction]
    blocked: list[PlanBlocked]
    left_out: list[PlanLeftOut]
    warnings: list[str]


class Target(BaseModel):
    model_config = ConfigDict(extra="forbid")

    targets: list[str]
    labels: dict[str, str]


class Targets(RootModel[list[Target]]):
    pass


class Liveness(Shape):
    status: Literal["ok", "starting", "stalled", "broken"]
    detail: str | None
    age: float = Field(description="seconds since the last round")


class Waiting(Shape):
    instance: str
    phase: str
    reason: str | None


class Readiness(Shape):
    status: Literal["ready", "not ready"]
    reason: str | None
    waiting: list[Waiting]
