"""vLLM, in a container or as a host process: one model over all the GPUs of an instance.

The image's entrypoint is taken to be `vllm serve`, as in vllm/vllm-openai: the command is a model
and flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, Self

from pydantic import Field, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, Recognised, common
from mic_supervisor.config.options import AbsolutePath, ModelOptions, Strict, Text
from mic_supervisor.config.types import PositiveDuration, Size
from mic_supervisor.model import HttpCall, HttpCheck, Instance, Mount, Port, Probe, Probes, Workload

_CACHE = "/cache"  # inside the container
_TOKEN = "/run/secrets/hf_token"  # inside the container
_API_KEY = "VLLM_API_KEY"
_OWN_FLAGS = {
    "--host": "use the key listen",
    "--port": "use the key port",
    "--model": "use the key model",
    "--uds": "it is asked over HTTP on its port",
    "--ssl-keyfile": "it is probed over plain HTTP; let a proxy do TLS",
    "--ssl-certfile": "it is probed over plain HTTP; let a proxy do TLS",
}
# How a model is spread over GPUs, by whoever knows better than one number.
_PARALLEL = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"),
    *("--data-parallel-size", "-dp"),
)
_IN_FLIGHT = re.compile(
    r"^vllm:num_requests_(running|waiting)(?:\{[^}\n]*\})?\s+(\S+)", re.MULTILINE
)
_CONTAINERS_ONLY = "a host process has no container; remove the key, or use runtime: docker"


class Settings(Strict):
    """`backends.vllm`."""

    image: Text = Field(
        default="vllm/vllm-openai:latest",
        description="An image whose entrypoint is vllm serve, for runtime: docker.",
    )
    executable: AbsolutePath | None = Field(
        default=None,
        description="The program vllm of this host, as in /opt/vllm/bin/vllm, for runtime: "
        "process.",
    )
    cache: AbsolutePath | None = Field(
        default=None,
        description="A directory of this host for downloaded models (huggingface/) and compiled "
        "kernels (vllm/); without it every new container fetches and compiles anew.",
    )
    hf_token_file: AbsolutePath | None = Field(
        default=None,
        description="A file of this host that holds a Hugging Face token and nothing else. Whom "
        "the server runs as has to be able to read it.",
    )
    shm_size: Size = Field(default=8 << 30, description="The size of /dev/shm of a container.")


class Options(ModelOptions):
    """`args` are flags of `vllm serve`."""

    model: Text = Field(description="A Hugging Face model, or a path that the server can read.")
    runtime: Literal["docker", "process"] | None = Field(
        default="docker",
        description="A container of backends.vllm.image, or a process of backends.vllm.executable.",
    )
    start_timeout: PositiveDuration = Field(
        default=900.0, description="From the start until ready, loading included."
    )

    @model_validator(mode="after")
    def _own_flags(self) -> Self:
        for arg in self.args:
            if (flag := _flag(arg)) in _OWN_FLAGS:
                raise ValueError(f"args: {flag} is set by the supervisor: {_OWN_FLAGS[flag]}")
            if flag == "--disable-log-stats" and self.drain_timeout > 0:
                raise ValueError(
                    "drain_timeout: with --disable-log-stats vLLM does not report what is in "
                    "flight; remove one of them"
                )
        return self

    @model_validator(mode="after")
    def _fits_its_runtime(self) -> Self:
        common.refuse_container_port_on_host(self)
        if self.runtime == "process":
            for key in ("container_port", "shm_size", "mounts"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key}: {_CONTAINERS_ONLY}")
            if "network" in self.model_fields_set and self.network == "bridge":
                raise ValueError("network: a host process has no bridge; remove the key")
            common.refuse_engine_probe(self)
        return self


class VllmBackend(BackendBase):
    """Three things that vLLM does not make easy:

    1. It listens only once its model is loaded, and two servers may share a port unnoticed
       (SO_REUSEPORT): ready is that /v1/models lists this model. With an API key that path answers
       401 to a probe, and /health has to do.
    2. /health fails only once the engine is dead, and is slow under load. An engine that hangs is
       seen by a probe of your own.
    3. Some versions crash on a UUID in CUDA_VISIBLE_DEVICES (vllm-project/vllm #20939, #46132). A
       container sees its own devices only and needs no such variable; a process gets numbers, in
       the order of the PCI bus, which is the order that the driver's own numbers have.
    """

    name = "vllm"
    Settings = Settings
    Options = Options
    example = (
        "  vllm:\n    cache: /srv/cache                              # of downloaded models\n",
        "  qwen: {backend: vllm, model: Qwen/Qwen3-8B}\n",
    )

    def recognise(
        self,
        command: Sequence[str],
        directory: str,  # noqa: ARG002
        exists: Callable[[str], bool],  # noqa: ARG002
    ) -> Recognised | None:
        """It goes on as a host process: no one knows whether an image would serve the same."""
        programs = [PurePosixPath(arg).name for arg in command[:3]]
        if "vllm" not in programs or "serve" not in command[:4]:
            return None
        model = command[command.index("serve") + 1 :][:1]
        name = PurePosixPath(model[0]).name if model and not model[0].startswith("-") else "vllm"
        return Recognised("process", name, {"start_timeout": "15m", "probe": {"http": "/health"}})

    def compile(self, request: CompileRequest) -> Instance:
        """One server over the GPUs of the instance. Raises CompileError."""
        options: Options = request.options
        ports = common.ports(options)
        workload, probes = _workload(request, ports, options, request.settings)
        if options.probe is None:
            keyed = _API_KEY in dict((*workload.env, *workload.file_env)) or any(
                _flag(arg) == "--api-key" for arg in options.args
            )
            probes = _probes(options, keyed)
        drain = HttpCall("GET", "/metrics") if options.drain_timeout > 0 else None
        # Source: vLLM's documentation, "Production Metrics": on the port of the API, and asked for
        # no key.
        return common.instance(request, workload, probes, drain=drain, metrics_path="/metrics")

    def is_drained(self, status: int, body: str) -> bool:
        """Reads the two gauges of `GET /metrics`; there is one of each for every engine."""
        if status != 200:
            return False
        found = _IN_FLIGHT.findall(body)
        counted = {kind for kind, _ in found}
        return counted == {"running", "waiting"} and all(_is_zero(value) for _, value in found)


def _workload(
    request: CompileRequest, ports: tuple[Port, ...], options: Options, settings: Settings
) -> tuple[Workload, Probes]:
    cache, token = settings.cache, settings.hf_token_file
    own_mounts: list[Mount] = []
    env: dict[str, str] = {}
    if options.runtime == "process":
        if settings.executable is None:
            raise common.cannot(
                request,
                "runtime: process needs a program, and backends.vllm.executable names none",
                "set it, as in /opt/vllm/bin/vllm, or use runtime: docker",
            )
        # What vLLM compiles at run time it compiles with the tools of its own environment (ninja).
        tools = Path(settings.executable).parent
        env["PATH"] = f"{tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        if common.devices(request):
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "${gpu_indices}"}
        command = [settings.executable, "serve", *_command(options, request, options.listen)]
    else:
        host = "0.0.0.0" if options.network == "bridge" else options.listen
        port = "${port}" if options.container_port is None else str(options.container_port)
        command = _command(options, request, host, port)
        if cache is not None:
            own_mounts.append(Mount(cache, _CACHE))
            cache = _CACHE
        if token is not None:
            own_mounts.append(Mount(token, _TOKEN, read_only=True))
            token = _TOKEN
    if cache is not None:
        root = cache.rstrip("/")
        env |= {"HF_HOME": f"{root}/huggingface", "VLLM_CACHE_ROOT": f"{root}/vllm"}
    if settings.hf_token_file is not None and token is not None:
        _check_token(request, settings.hf_token_file)
        env["HF_TOKEN_PATH"] = token
    filled = common.texts(
        request,
        ports,
        command=command,
        env={**common.unless_in_file(request, env), **options.env},
        probes=common.probes(options),
    )
    if options.runtime == "process":
        return common.process(request, filled, ports), filled.probes
    workload = common.container(
        request,
        filled,
        ports,
        image=settings.image,
        own_mounts=own_mounts,
        shm_size=settings.shm_size,
    )
    return workload, filled.probes


def _check_token(request: CompileRequest, path: str) -> None:
    """That there is one. It goes to the server by the file's name, and nowhere else.

    Source: huggingface_hub's constants.py, HF_TOKEN_PATH; a variable HF_TOKEN wins over it.
    """
    if len(common.read(request, Path(path), "Hugging Face token").split()) != 1:
        raise common.cannot(
            request,
            f"its Hugging Face token {path} does not hold one word",
            "write the token into it, and nothing else",
        )


def _command(
    options: Options, request: CompileRequest, host: str, port: str = "${port}"
) -> list[str]:
    command = [options.model, f"--host={host}", f"--port={port}"]
    gpus = len(request.gpus)
    if gpus > 1 and not any(_flag(arg) in _PARALLEL for arg in options.args):
        command.append(f"--tensor-parallel-size={gpus}")
    return [*command, *options.args]


def _probes(options: Options, keyed: bool) -> Probes:
    alive = HttpCheck("/health")
    ready = alive
    if not keyed:
        ready = HttpCheck("/v1/models", listed=(("data[].id", _served_name(options)),))
    # An API server that is busy takes seconds to answer, and a restart costs minutes.
    return Probes(
        startup=Probe(ready, period=2.0),
        liveness=Probe(alive, period=10.0, timeout=10.0),
        readiness=Probe(ready, timeout=10.0),
    )


def _served_name(options: Options) -> str:
    """The name under which clients ask for the model; the first, where there are several."""
    args: Sequence[str] = options.args
    for index, arg in enumerate(args):
        if _flag(arg) == "--served-model-name":
            value = arg.partition("=")[2] or next(iter(args[index + 1 : index + 2]), "")
            return value or options.model
    return options.model


def _is_zero(value: str) -> bool:
    try:
        return float(value) == 0
    except ValueError:
        return False


def _flag(arg: str) -> str:
    # vLLM reads --tensor_parallel_size like --tensor-parallel-size.
    name = arg.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name
