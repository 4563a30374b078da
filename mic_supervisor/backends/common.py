"""From the keys that every model may have to the pieces of a workload."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field

from mic_supervisor.backends import CompileRequest
from mic_supervisor.backends.probe import checks as checks
from mic_supervisor.backends.probe import metrics_port as metrics_port
from mic_supervisor.backends.probe import over as over
from mic_supervisor.backends.probe import probes as probes
from mic_supervisor.backends.probe import refuse_engine_probe as refuse_engine_probe
from mic_supervisor.backends.probe import refuse_own_startup as refuse_own_startup
from mic_supervisor.backends.probe import refuse_unprobed_warm_up as refuse_unprobed_warm_up
from mic_supervisor.backends.probe import warm_up
from mic_supervisor.config import container as container_keys
from mic_supervisor.config.env_file import parse_env_file
from mic_supervisor.config.options import (
    AbsolutePath,
    Advice,
    ModelOptions,
    Strict,
)
from mic_supervisor.errors import CompileError
from mic_supervisor.model import (
    ContainerSpec,
    ExecCheck,
    HttpCall,
    Instance,
    Limits,
    Mount,
    Pairs,
    Placement,
    Port,
    Preparation,
    Probe,
    Probes,
    ProcessSpec,
    Workload,
)

NO_DRAIN = (
    "nothing is known of its requests that could be waited for; remove the key, and raise "
    "stop_timeout for a server that finishes them after its stop signal"
)
ONE_RUNTIME = "there is one way to run it; remove the key"
CONTAINERS_ONLY = (
    *("network", "container_port", "shm_size", "mounts"),
    *container_keys.KEYS,
)
"""The keys that a backend refuses which runs host processes."""

_PLACEHOLDER = re.compile(r"\$\{([^{}]*)(\}?)")
_NAMED_PORT = re.compile(r"\$\{port:(http|grpc|metrics)\}")
_KNOWN = "${port}, ${port:NAME}, ${gpu_uuids}, ${gpu_indices}, ${model}, ${instance}, ${env:NAME}"
_ENV_NAME = re.compile(r"[^\s=]+")  # a container may have names that systemd would not take


MetricsPath = Annotated[
    AbsolutePath | None, Field(description="The path of metrics for Prometheus on its port.")
]


class NoSettings(Strict):
    """This backend has no settings of its own."""


# For the validators of Options; each raises ValueError.


def refuse_container_port_on_host(options: ModelOptions) -> None:
    if options.network == "host" and options.container_port is not None:
        raise ValueError(
            "container_port: with network: host there is nothing to publish; "
            "remove the key and let the command listen on ${port}"
        )


# For `advice` of Options and Settings.


def advise_port(options: ModelOptions, *texts: str) -> Iterator[Advice]:
    """That nothing tells the server its port. `texts` are its command."""
    given = checks(options)
    if given and not any(check.http or check.tcp or check.progress for check in given):
        return  # it may be no server at all
    everything = (*texts, *options.args, *options.env.values())
    told = any("${port" in text for text in everything)
    if told or options.port or options.ports or options.container_port or options.env_file:
        return
    inside = "container_port" not in options.unavailable and options.network == "bridge"
    key = "container_port" if inside else "port"
    yield Advice(
        "command",
        "nothing tells the server which port to listen on: ${port} stands nowhere in its command "
        "and its environment",
        'give it the port, in its own way: add `args: [--port, "${port}"]`; or, if it always '
        f"listens on the same one, add `{key}: 8000` with that number",
    )


def advise_tag(image: str | None) -> Iterator[Advice]:
    """That an image has neither a tag nor a digest."""
    if image and ":" not in image.rpartition("/")[2] and "@" not in image and "${" not in image:
        yield Advice(
            "image",
            f"{image} has no tag, and is another image whenever somebody pushes a new one",
            f"write its tag or its digest as well, as in `{image}:1.0`",
        )


def cannot(request: CompileRequest, cause: str, hint: str | None = None) -> CompileError:
    return CompileError(f"cannot configure {request.model}: {cause}", hint=hint)


# --- Texts: commands and environments ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Texts:
    """What compiling leaves of commands and environment; `variables` are those they refer to."""

    command: tuple[str, ...]
    entrypoint: tuple[str, ...] | None
    env: Pairs
    probes: Probes
    variables: Pairs


def texts(
    request: CompileRequest,
    ports: Sequence[Port],
    *,
    command: Iterable[str],
    env: Mapping[str, str],
    entrypoint: Iterable[str] | None = None,
    probes: Probes = Probes(),  # noqa: B008 (frozen)
    called: str = "command",
) -> Texts:
    """Fills in what is known now: the model, the instance and the GPUs' UUIDs.

    Ports, indices and variables stay as they are written, for the launch. Raises CompileError for
    any other `${…}`, for a port that the model does not have and for a variable without a value.
    """
    known = {
        "model": request.model,
        "instance": request.instance,
        "gpu_uuids": ",".join(gpu.uuid for gpu in request.gpus),
    }
    names = {port.name for port in ports}
    used: set[str] = set()

    def fill(text: str, where: str) -> str:
        def one(match: re.Match[str]) -> str:
            name, end = match[1], match[2]
            kind, colon, argument = name.partition(":")
            hint = None
            if not end:
                raise cannot(request, f"{where} has a ${{ without its }}")
            if name in known:
                return known[name]
            if name == "gpu_indices" or (name == "port" and "http" in names):
                return match[0]
            if kind == "port" and colon:
                if argument in names:
                    return match[0]
                fault = f"and its ports are: {', '.join(sorted(names)) or 'none'}"
            elif kind == "env" and colon:
                if argument in request.variables:
                    used.add(argument)
                    return match[0]
                fault = "which has no value"
                hint = "set the variable in the supervisor's environment or in /etc/mic/mic.env"
            else:
                fault, hint = "which is unknown", f"use one of {_KNOWN}"
            raise cannot(request, f"{where} refers to {match[0]}, {fault}", hint)

        return _PLACEHOLDER.sub(one, text)

    def fill_all(items: Iterable[str], where: str) -> tuple[str, ...]:
        return tuple(fill(item, f"{where}[{index}]") for index, item in enumerate(items))

    def fill_probe(kind: str) -> Probe | None:
        probe: Probe | None = getattr(probes, kind)
        if probe is None or not isinstance(probe.check, ExecCheck):
            return probe
        return replace(probe, check=ExecCheck(fill_all(probe.check.command, f"probe.{kind}.exec")))

    return Texts(
        command=fill_all(command, called),
        entrypoint=None if entrypoint is None else fill_all(entrypoint, "entrypoint"),
        env=tuple((name, fill(env[name], f"env.{name}")) for name in sorted(env)),
        probes=Probes(*map(fill_probe, ("startup", "liveness", "readiness"))),
        variables=tuple((name, request.variables[name]) for name in sorted(used)),
    )


def file_env(request: CompileRequest) -> Pairs:
    """What `env_file` holds, sorted by name. Raises CompileError with the line, never its text."""
    path = request.options.env_file
    if path is None:
        return ()
    found, bad = parse_env_file(read(request, Path(path), "env_file"), _ENV_NAME)
    if bad and bad[0].unseen is not None:
        raise cannot(
            request,
            f"{path}:{bad[0].line} holds {bad[0].unseen}, which nobody sees",
            "remove it: it would be part of the name or of the value",
        )
    if bad:
        raise cannot(
            request,
            f"{path}:{bad[0].line} is not KEY=VALUE",
            "write one KEY=VALUE a line, without `export`, and close every quote",
        )
    out: dict[str, str] = {}
    for one in found:
        if one.name in out:
            raise cannot(request, f"{path}:{one.line} sets {one.name} a second time")
        out[one.name] = one.value
    return tuple(sorted(out.items()))


def read(request: CompileRequest, path: Path, what: str) -> str:
    """The text of a file that must be there; CompileError says what it is for and why not."""
    try:
        return request.read_text(path)
    except OSError as error:
        cause = error.strerror or str(error) or type(error).__name__
        hint = f"create {path}, or name another file"
        if isinstance(error, TimeoutError):
            hint = f"find out why the file system of {path} does not answer"
        elif isinstance(error, PermissionError):
            hint = f"let the supervisor's user read {path}"
        raise cannot(request, f"its {what} {path} cannot be read: {cause}", hint) from error
    except UnicodeDecodeError as error:
        raise cannot(
            request, f"its {what} {path} is not UTF-8 at byte {error.start}", "save it as UTF-8"
        ) from error


# --- Pieces -----------------------------------------------------------------------------------


def ports(
    options: ModelOptions, *, container: Mapping[str, int] | None = None, also: Iterable[str] = ()
) -> tuple[Port, ...]:
    """The ports of a model: always "http", and those that the file or the backend names.

    `container` are numbers inside the container, by name, and names that are always there; `also`
    are more of those.
    """
    inside = dict(container or {})
    fixed = options.ports.model_dump(exclude_none=True) if options.ports else {}
    if options.port is not None:
        fixed["http"] = options.port
    if options.container_port is not None:
        inside["http"] = options.container_port
    wanted = {"http", *fixed, *inside, *also}
    names = [name for name in ("http", "grpc", "metrics") if name in wanted]
    return tuple(Port(name, fixed.get(name), inside.get(name)) for name in names)


def ports_in(options: ModelOptions, *texts: str) -> set[str]:
    """The ports that these texts, `env` and exec probes refer to as `${port:NAME}`."""
    commands = (item for check in checks(options) for item in check.exec or ())
    found = (*texts, *options.args, *options.env.values(), *commands)
    return {name for text in found for name in _NAMED_PORT.findall(text)}


def devices(request: CompileRequest) -> tuple[str, ...]:
    """UUIDs to ask for; a simulated GPU is no device."""
    return tuple(gpu.uuid for gpu in request.gpus if not gpu.simulated)


def visible_gpus(request: CompileRequest) -> dict[str, str]:
    """The variables that show a host process its own GPUs and no other.

    By UUID, which means the same GPU whatever the driver's order is today. Nothing for simulated
    GPUs, nor what `env_file` sets: at launch `env` wins over the file.
    """
    uuids = devices(request)
    if not uuids:
        return {}
    env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids)}
    return unless_in_file(request, env)


def unless_in_file(request: CompileRequest, env: Mapping[str, str]) -> dict[str, str]:
    """`env`, a backend's own defaults, without what the model's `env_file` sets."""
    in_file = dict(file_env(request))
    return {name: value for name, value in env.items() if name not in in_file}


def mounts(request: CompileRequest, own: Sequence[Mount] = ()) -> tuple[Mount, ...]:
    """The backend's mounts, then the model's. Raises CompileError when two have one target."""
    out = list(own)
    for given in request.options.mounts:
        if any(mount.target.rstrip("/") == given.target.rstrip("/") for mount in out):
            raise cannot(request, f"two mounts have the target {given.target}")
        out.append(Mount(given.source, given.target, given.read_only))
    return tuple(out)


def on_host(path: PurePosixPath, mounts: Iterable[Mount]) -> Path | None:
    """Where a path of a container is on this host; None: it is the container's own."""
    for mount in sorted(mounts, key=lambda one: len(one.target), reverse=True):
        if path.is_relative_to(mount.target):
            return Path(mount.source) / path.relative_to(mount.target)
    return None


# --- Whole ------------------------------------------------------------------------------------


def container(
    request: CompileRequest,
    filled: Texts,
    ports: tuple[Port, ...],
    *,
    image: str,
    own_mounts: Sequence[Mount] = (),
    shm_size: int | None = None,
) -> ContainerSpec:
    """A container from its own parts and the model's common keys.

    `shm_size` is the backend's default.
    """
    options: ModelOptions = request.options
    if options.shm_size is not None:
        shm_size = options.shm_size
    return ContainerSpec(
        **_of_any_workload(request, filled, ports),
        image=image,
        entrypoint=filled.entrypoint,
        devices=devices(request),
        mounts=mounts(request, own_mounts),
        network=options.network,
        # With the host's, or without any, there is nothing whose size it would be.
        shm_size=None if options.ipc in ("host", "none") else shm_size,
        **_container_keys(request),
    )


def _container_keys(request: CompileRequest) -> dict[str, Any]:
    options: ModelOptions = request.options
    found = {key: _frozen(getattr(options, key)) for key in container_keys.KEYS}
    found["host_devices"] = found.pop("devices")
    if options.networks:
        if options.network == "host":  # of a server for all models, whose network is a default
            cause = "with network: host it joins no other network"
            raise cannot(request, cause, "remove networks, or say network: bridge")
        # As in Compose, where a service is reached by its name.
        found["network_aliases"] = tuple(dict.fromkeys((request.model, *options.network_aliases)))
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted(value.items()))
    return tuple(value) if isinstance(value, list) else value


def process(request: CompileRequest, filled: Texts, ports: tuple[Port, ...]) -> ProcessSpec:
    """A host process from its command and the model's common keys. Raises CompileError for a key
    that only a container has, of a backend whose Options do not refuse it.
    """
    for key in container_keys.KEYS:
        if key in request.options.model_fields_set:
            cause = f"it runs as a host process, and {key} is a key of containers"
            raise cannot(request, cause, f"remove {key}")
    return ProcessSpec(**_of_any_workload(request, filled, ports))


def _of_any_workload(
    request: CompileRequest, filled: Texts, ports: tuple[Port, ...]
) -> dict[str, Any]:
    options: ModelOptions = request.options
    return {
        "command": filled.command,
        "env": filled.env,
        "env_file": options.env_file,
        "file_env": file_env(request),
        "variables": filled.variables,
        "ports": ports,
        "listen": options.listen,
        "user": options.user,
        "working_dir": options.working_dir,
        "limits": Limits(**dict(options.limits)),
        "stop_signal": options.stop_signal,
        "stop_timeout": options.stop_timeout,
    }


def _preparation(request: CompileRequest, ports: Sequence[Port]) -> Preparation | None:
    """Its texts are its own: they are no part of what runs."""
    options: ModelOptions = request.options
    if options.prepare is None:
        return None
    filled = texts(request, ports, command=options.prepare, env={}, called="prepare")
    return Preparation(filled.command, filled.variables, options.prepare_timeout)


def instance(
    request: CompileRequest,
    workload: Workload,
    probes: Probes,
    placements: tuple[Placement, ...] = (),
    *,
    drain: HttpCall | None = None,
    metrics_path: str | None = None,
    openai_model: str | None = None,
) -> Instance:
    """The instance around a workload, with the model's common keys."""
    options: ModelOptions = request.options
    return Instance(
        id=request.instance,
        model=request.model,
        backend=options.backend,
        gpus=tuple(gpu.uuid for gpu in request.gpus),
        workload=workload,
        probes=probes,
        placements=placements,
        warm_up=warm_up(options),
        start_timeout=options.start_timeout,
        drain_timeout=options.drain_timeout,
        rollback=options.rollout.rollback,
        max_unavailable=options.rollout.max_unavailable,
        vram=options.vram,
        on_foreign=options.on_foreign,
        foreign_threshold=options.foreign_threshold,
        drain=drain,
        prepare=_preparation(request, workload.ports),
        metrics_path=metrics_path,
        openai_model=openai_model,
    )
