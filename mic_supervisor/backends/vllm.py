"""vLLM in a container: one model over all the GPUs of an instance.

The image's entrypoint is taken to be `vllm serve`, as in vllm/vllm-openai: the command is a model
and flags.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

from pydantic import Field, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, common
from mic_supervisor.config.options import AbsolutePath, ModelOptions, Strict, Text
from mic_supervisor.config.types import PositiveDuration, Size
from mic_supervisor.model import HttpCheck, Instance, Mount, Probe, Probes

_CACHE = "/cache"  # inside the container
_API_KEY = "VLLM_API_KEY"
# How a model is spread over GPUs, by whoever knows better than one number.
_PARALLEL = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"),
    *("--data-parallel-size", "-dp"),
)


class Settings(Strict):
    """`backends.vllm`."""

    image: Text = Field(
        default="vllm/vllm-openai:latest", description="An image whose entrypoint is vllm serve."
    )
    cache: AbsolutePath | None = Field(
        default=None,
        description="A directory of this host for downloaded models (huggingface/) and compiled "
        "kernels (vllm/); without it every new container fetches and compiles anew.",
    )
    shm_size: Size = Field(default=8 << 30, description="The size of /dev/shm of a server.")


class Options(ModelOptions):
    """`args` are flags of `vllm serve`. A Hugging Face token belongs into `env_file`."""

    unavailable: ClassVar[dict[str, str]] = common.NOT_YET

    model: Text = Field(description="A Hugging Face model, or a path inside the container.")
    start_timeout: PositiveDuration = Field(
        default=900.0, description="From the start until ready, loading included."
    )

    @model_validator(mode="after")
    def _own_flags(self) -> Self:
        for arg in self.args:
            flag = _flag(arg)
            if flag in ("--host", "--port", "--model"):
                raise ValueError(f"args: {flag} is set by the supervisor; remove it")
        return self

    @model_validator(mode="after")
    def _container_port_needs_a_bridge(self) -> Self:
        common.refuse_container_port_on_host(self)
        return self


class VllmBackend(BackendBase):
    """It listens only once its model is loaded, so `/health` is enough for the start.

    `/health` misses an engine that hangs, and with an API key `/v1/models` answers 401 to a probe:
    who needs more gives a `probe:` of his own.
    """

    name = "vllm"
    Settings = Settings
    Options = Options

    def compile(self, request: CompileRequest) -> Instance:
        options: Options = request.options
        settings: Settings = request.settings
        ports = common.ports(options)
        own_mounts = []
        env = dict(options.env)
        if settings.cache is not None:
            own_mounts.append(Mount(settings.cache, _CACHE))
            env = {"HF_HOME": f"{_CACHE}/huggingface", "VLLM_CACHE_ROOT": f"{_CACHE}/vllm", **env}
        filled = common.texts(
            request,
            ports,
            command=_command(options, len(request.gpus)),
            env=env,
            probes=common.probes(options),
        )
        workload = common.container(
            request,
            filled,
            ports,
            image=settings.image,
            own_mounts=own_mounts,
            shm_size=settings.shm_size,
        )
        probes = filled.probes
        if options.probe is None:
            keyed = _API_KEY in dict((*workload.env, *workload.file_env)) or any(
                _flag(arg) == "--api-key" for arg in options.args
            )
            probes = _probes(keyed)
        # Source: vLLM's documentation, "Production Metrics": on the port of the API, and asked for
        # no key.
        return replace(common.instance(request, workload, probes), metrics_path="/metrics")


def _command(options: Options, gpus: int) -> list[str]:
    bridge = options.network == "bridge"
    port = "${port}" if options.container_port is None else str(options.container_port)
    command = [options.model, f"--host={'0.0.0.0' if bridge else options.listen}", f"--port={port}"]
    if gpus > 1 and not any(_flag(arg) in _PARALLEL for arg in options.args):
        command.append(f"--tensor-parallel-size={gpus}")
    return [*command, *options.args]


def _probes(keyed: bool) -> Probes:
    health = HttpCheck("/health")
    ready = health if keyed else HttpCheck("/v1/models", expect=(("object", "list"),))
    return Probes(startup=Probe(health, period=2.0), liveness=Probe(health), readiness=Probe(ready))


def _flag(arg: str) -> str:
    # vLLM reads --tensor_parallel_size like --tensor-parallel-size.
    name = arg.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name
