"""vLLM, in a container or as a host process: one model over all the GPUs of an instance.

The image's entrypoint is taken to be `vllm serve`, as in vllm/vllm-openai: the command is a model
and flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, Recognised, common
from mic_supervisor.config.options import AbsolutePath, Advice, ModelOptions, Strict, Text
from mic_supervisor.config.types import PositiveDuration, Size
from mic_supervisor.model import (
    HttpCall,
    HttpCheck,
    Instance,
    Mount,
    Port,
    Probe,
    Probes,
    Progress,
    Workload,
)

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
_LONGEST_CONFIG = 64 << 10  # characters; a list of flags has a few hundred
# What the command says, too, and it wins over a file of --config.
_OVERRIDDEN = ("--host", "--port", "--model", "--tensor-parallel-size")
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

    def advice(self) -> Iterable[Advice]:
        return common.advise_tag(self.image)


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
    hang_timeout: PositiveDuration | None = Field(
        default=None,
        description="How long its engine may make no step, the second half of it with a request "
        "of one token, until it counts as hanging.",
    )
    on_hang: Literal["report", "restart"] = Field(
        default="report",
        description="What becomes of an instance that hangs: report it as degraded, or restart it.",
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
            if flag == "--disable-log-stats" and self.hang_timeout is not None:
                raise ValueError(
                    "hang_timeout: with --disable-log-stats vLLM does not count what it does; "
                    "remove one of them"
                )
        return self

    @model_validator(mode="after")
    def _one_way_to_see_a_hang(self) -> Self:
        if self.hang_timeout is None and "on_hang" in self.model_fields_set:
            raise ValueError("on_hang: it needs a hang_timeout, as in `hang_timeout: 5m`")
        if self.hang_timeout and any(check.progress for check in common.checks(self)):
            raise ValueError("hang_timeout: the probe has a progress; remove one of them")
        return self

    @model_validator(mode="after")
    def _fits_its_runtime(self) -> Self:
        common.refuse_container_port_on_host(self)
        if self.runtime == "process":
            for key in common.CONTAINERS_ONLY:
                if key in self.model_fields_set and key != "network":
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
       seen by its counters, and by a request where they stand still: `hang_timeout`.
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
        args = [*_from_config(request, options, request.settings), *options.args]
        workload, probes = _workload(request, ports, options, request.settings, args)
        keyed = _API_KEY in dict((*workload.env, *workload.file_env)) or any(
            _flag(arg) == "--api-key" for arg in args
        )
        if options.probe is None:
            probes = _probes(_served_name(options.model, args), keyed)
        if options.hang_timeout is not None:
            probes = _with_progress(request, probes, args, keyed)
        drain = HttpCall("GET", "/metrics") if options.drain_timeout > 0 else None
        # Source: vLLM's documentation, "Production Metrics": on the port of the API, and asked for
        # no key.
        return common.instance(
            request,
            workload,
            probes,
            drain=drain,
            metrics_path="/metrics",
            openai_model=_served_name(options.model, args),
        )

    def is_drained(self, status: int, body: str) -> bool:
        """Reads the two gauges of `GET /metrics`; there is one of each for every engine."""
        if status != 200:
            return False
        found = _IN_FLIGHT.findall(body)
        counted = {kind for kind, _ in found}
        return counted == {"running", "waiting"} and all(_is_zero(value) for _, value in found)


def _from_config(request: CompileRequest, options: Options, settings: Settings) -> list[str]:
    """The flags that a file of `--config` sets, as arguments; nothing where it cannot be read.

    vLLM puts them before those of the command line, which win: its documentation, "vllm serve",
    "Arguments from a configuration file". A file inside of the image is the image's own.
    """
    path = _value(options.args, "--config")
    if path is None:
        return []
    named = PurePosixPath(options.working_dir or "/") / path
    found: Path | None = Path(named)
    if options.runtime != "process":
        cache = [Mount(settings.cache, _CACHE)] if settings.cache is not None else []
        found = common.on_host(named, common.mounts(request, cache))
    if found is None:
        return []
    try:
        text = request.read_text(found)
        document = yaml.safe_load(text) if len(text) <= _LONGEST_CONFIG else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []  # the server says so itself
    args = []
    for key, value in (document if isinstance(document, dict) else {}).items():
        flag = _flag(f"--{key}")
        if flag in _OVERRIDDEN:
            continue
        if flag in _OWN_FLAGS and options.probe is None:
            hint = f"remove it there: {_OWN_FLAGS[flag]}; or give the model a `probe` that fits"
            raise common.cannot(request, f"{found} sets {key}", hint)
        first = value[0] if isinstance(value, list) and value else value
        args.append(f"{flag}={first}")
    return args


def _workload(
    request: CompileRequest,
    ports: tuple[Port, ...],
    options: Options,
    settings: Settings,
    args: Sequence[str],
) -> tuple[Workload, Probes]:
    cache, token = settings.cache, settings.hf_token_file
    own_mounts: list[Mount] = []
    env: dict[str, str] = {}
    spread = any(_flag(arg) in _PARALLEL for arg in args)  # by whoever knows better
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
            # vLLM reads indices, and UUIDs only of late; a slice has no index.
            sliced = any(gpu.parent is not None for gpu in request.gpus)
            visible = "${gpu_uuids}" if sliced else "${gpu_indices}"
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
        command = _command(options, request, spread, options.listen)
        command = [settings.executable, "serve", *command]
    else:
        host = "0.0.0.0" if options.network == "bridge" else options.listen
        port = "${port}" if options.container_port is None else str(options.container_port)
        command = _command(options, request, spread, host, port)
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
    options: Options, request: CompileRequest, spread: bool, host: str, port: str = "${port}"
) -> list[str]:
    """`spread`: somebody says how the model is spread over the GPUs."""
    command = [options.model, f"--host={host}", f"--port={port}"]
    gpus = len(request.gpus)
    if gpus > 1 and not spread:
        command.append(f"--tensor-parallel-size={gpus}")
    return [*command, *options.args]


def _served_name(model: str, args: Sequence[str]) -> str:
    """Under which clients ask for it; the first, where there are several."""
    return _value(args, "--served-model-name") or model


def _probes(name: str, keyed: bool) -> Probes:
    alive = HttpCheck("/health")
    ready = alive
    if not keyed:
        ready = HttpCheck("/v1/models", listed=(("data[].id", name),))
    # An API server that is busy takes seconds to answer, and a restart costs minutes.
    return Probes(
        startup=Probe(ready, period=2.0),
        liveness=Probe(alive, period=10.0, timeout=10.0),
        readiness=Probe(ready, timeout=10.0),
    )


def _with_progress(
    request: CompileRequest, probes: Probes, args: Sequence[str], keyed: bool
) -> Probes:
    """Half the time for the counter, which grows with every step of the engine, half for a token.

    A gauge of what runs read 0 in a real hang (vllm-project/vllm #46811).
    """
    options: Options = request.options
    if keyed:
        raise common.cannot(
            request,
            "hang_timeout asks for a token, and the server wants an API key for that",
            "remove hang_timeout, or the key, and let a proxy ask for one; or write a probe of "
            "your own with `exec`, which has the key",
        )
    assert options.hang_timeout is not None  # else nobody asks
    half = options.hang_timeout / 2
    body = json.dumps({"model": _served_name(options.model, args), "prompt": "1", "max_tokens": 1})
    call = HttpCall("POST", "/v1/completions", body, half)
    moves = Progress("vllm:iteration_tokens_total_count", call, within=half)
    if options.on_hang == "restart":
        live = probes.liveness or Probe(None, progress=moves)
        return replace(probes, liveness=replace(live, progress=moves))
    ready = probes.readiness or Probe(None, progress=moves)
    return replace(probes, readiness=replace(ready, progress=moves))


def _value(args: Sequence[str], flag: str) -> str | None:
    """What a flag is set to; the last time counts, and of several values the first."""
    found = None
    for index, arg in enumerate(args):
        if _flag(arg) == flag:
            found = arg.partition("=")[2] or next(iter(args[index + 1 : index + 2]), "") or None
    return found


def _is_zero(value: str) -> bool:
    try:
        return float(value) == 0
    except ValueError:
        return False


def _flag(arg: str) -> str:
    # vLLM reads --tensor_parallel_size like --tensor-parallel-size.
    name = arg.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name
