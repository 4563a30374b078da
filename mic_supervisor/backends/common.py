"""From the keys that every model may have to the pieces of a workload."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mic_supervisor.config.env_file import parse_env_file
from mic_supervisor.config.options import CheckOptions, ModelOptions
from mic_supervisor.errors import CompileError
from mic_supervisor.model import (
    Check,
    ContainerSpec,
    EngineCheck,
    ExecCheck,
    HttpCheck,
    Instance,
    Limits,
    Mount,
    Pairs,
    Placement,
    Port,
    Probe,
    Probes,
    ProcessSpec,
    TcpCheck,
    Workload,
)

if TYPE_CHECKING:
    from mic_supervisor.backends import CompileRequest

NO_DRAIN = (
    "nothing is known of its requests that could be waited for; remove the key, and raise "
    "stop_timeout for a server that finishes them after its stop signal"
)
ONE_RUNTIME = "there is one way to run it; remove the key"

_PLACEHOLDER = re.compile(r"\$\{([^{}]*)(\}?)")
_NAMED_PORT = re.compile(r"\$\{port:(http|grpc|metrics)\}")
_KNOWN = "${port}, ${port:NAME}, ${gpu_uuids}, ${gpu_indices}, ${model}, ${instance}, ${env:NAME}"
_ENV_NAME = re.compile(r"[^\s=]+")  # a container may have names that systemd would not take


def refuse_container_port_on_host(options: ModelOptions) -> None:
    """For the validators of Options: raises ValueError."""
    if options.network == "host" and options.container_port is not None:
        raise ValueError(
            "container_port: with network: host there is nothing to publish; "
            "remove the key and let the command listen on ${port}"
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
    variables: Pairs
    probes: Probes


def texts(
    request: CompileRequest,
    ports: Sequence[Port],
    *,
    command: Iterable[str],
    env: Mapping[str, str],
    entrypoint: Iterable[str] | None = None,
    probes: Probes = Probes(),  # noqa: B008 (frozen)
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
            if not end:
                raise cannot(request, f"{where} has a ${{ without its }}")
            if name in known:
                return known[name]
            if name == "gpu_indices" or (name == "port" and "http" in names):
                return match[0]
            if kind == "port" and colon:
                if argument not in names:
                    has = ", ".join(sorted(names)) or "none"
                    raise cannot(request, f"{where} refers to {match[0]}, and its ports are: {has}")
                return match[0]
            if kind == "env" and colon:
                if argument not in request.variables:
                    raise cannot(
                        request,
                        f"{where} refers to {match[0]}, which has no value",
                        "set the variable in the supervisor's environment or in /etc/mic/mic.env",
                    )
                used.add(argument)
                return match[0]
            raise cannot(request, f"{where} refers to {match[0]}, which is unknown", _known_hint())

        return _PLACEHOLDER.sub(one, text)

    def fill_all(items: Iterable[str], where: str) -> tuple[str, ...]:
        return tuple(fill(item, f"{where}[{index}]") for index, item in enumerate(items))

    def fill_probe(probe: Probe | None, where: str) -> Probe | None:
        if probe is None or not isinstance(probe.check, ExecCheck):
            return probe
        check = ExecCheck(fill_all(probe.check.command, where))
        return Probe(check, probe.period, probe.timeout, probe.failures)

    filled_command = fill_all(command, "command")
    filled_entrypoint = None if entrypoint is None else fill_all(entrypoint, "entrypoint")
    filled_env = tuple((name, fill(env[name], f"env.{name}")) for name in sorted(env))
    filled_probes = Probes(
        startup=fill_probe(probes.startup, "probe.startup.exec"),
        liveness=fill_probe(probes.liveness, "probe.liveness.exec"),
        readiness=fill_probe(probes.readiness, "probe.readiness.exec"),
    )
    return Texts(
        filled_command,
        filled_entrypoint,
        filled_env,
        tuple((name, request.variables[name]) for name in sorted(used)),
        filled_probes,
    )


def _known_hint() -> str:
    return f"use one of {_KNOWN}"


def file_env(request: CompileRequest) -> Pairs:
    """What `env_file` holds, sorted by name. Raises CompileError with the line, never its text."""
    path = request.options.env_file
    if path is None:
        return ()
    found, bad = parse_env_file(read(request, Path(path), "env_file"), _ENV_NAME)
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
        if isinstance(error, PermissionError):
            hint = f"let the supervisor's user read {path}"
        raise cannot(request, f"its {what} {path} cannot be read: {cause}", hint) from error
    except UnicodeDecodeError as error:
        raise cannot(
            request, f"its {what} {path} is not UTF-8 at byte {error.start}", "save it as UTF-8"
        ) from error


# --- Pieces -----------------------------------------------------------------------------------


def ports(
    options: ModelOptions,
    *,
    container: Mapping[str, int] | None = None,
    also: Iterable[str] = (),
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


def probes(options: ModelOptions) -> Probes:
    """A single `probe:` is all three.

    Where a split one leaves `startup` out, the liveness or readiness check is the startup check
    too: otherwise a server that is slow to start would be restarted before it is up.
    """
    given = options.probe
    if given is None:
        return Probes()
    if isinstance(given, CheckOptions):
        probe = probe_of(given)
        return Probes(probe, probe, probe)
    startup = given.startup or given.liveness or given.readiness
    return Probes(probe_of(startup), probe_of(given.liveness), probe_of(given.readiness))


def probe_of(options: CheckOptions | None) -> Probe | None:
    if options is None:
        return None
    check: Check
    if options.http is not None:
        check = HttpCheck(options.http)
    elif options.exec is not None:
        check = ExecCheck(tuple(options.exec))
    elif options.tcp:
        check = TcpCheck()
    else:
        check = EngineCheck()
    return Probe(check, options.period, options.timeout, options.failures)


def checks(options: ModelOptions) -> tuple[CheckOptions, ...]:
    """Every check that a model's `probe:` names."""
    if options.probe is None or isinstance(options.probe, CheckOptions):
        return () if options.probe is None else (options.probe,)
    split = (options.probe.startup, options.probe.liveness, options.probe.readiness)
    return tuple(check for check in split if check is not None)


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


def limits(options: ModelOptions) -> Limits:
    given = options.limits
    return Limits(given.memory, given.cpus, given.nofile, given.memlock)


def mounts(request: CompileRequest, own: Sequence[Mount] = ()) -> tuple[Mount, ...]:
    """The backend's mounts, then the model's. Raises CompileError when two have one target."""
    out = list(own)
    for given in request.options.mounts:
        if any(mount.target.rstrip("/") == given.target.rstrip("/") for mount in out):
            raise cannot(request, f"two mounts have the target {given.target}")
        out.append(Mount(given.source, given.target, given.read_only))
    return tuple(out)


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
    return ContainerSpec(
        image=image,
        command=filled.command,
        entrypoint=filled.entrypoint,
        env=filled.env,
        env_file=options.env_file,
        file_env=file_env(request),
        variables=filled.variables,
        devices=devices(request),
        mounts=mounts(request, own_mounts),
        ports=ports,
        listen=options.listen,
        network=options.network,
        shm_size=shm_size if options.shm_size is None else options.shm_size,
        user=options.user,
        working_dir=options.working_dir,
        limits=limits(options),
        stop_signal=options.stop_signal,
        stop_timeout=options.stop_timeout,
    )


def process(request: CompileRequest, filled: Texts, ports: tuple[Port, ...]) -> ProcessSpec:
    """A host process from its command and the model's common keys."""
    options: ModelOptions = request.options
    return ProcessSpec(
        command=filled.command,
        env=filled.env,
        env_file=options.env_file,
        file_env=file_env(request),
        variables=filled.variables,
        ports=ports,
        listen=options.listen,
        user=options.user,
        working_dir=options.working_dir,
        limits=limits(options),
        stop_signal=options.stop_signal,
        stop_timeout=options.stop_timeout,
    )


def instance(
    request: CompileRequest,
    workload: Workload,
    probes: Probes,
    placements: tuple[Placement, ...] = (),
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
        start_timeout=options.start_timeout,
        drain_timeout=options.drain_timeout,
        rollback=options.rollout.rollback,
        max_unavailable=options.rollout.max_unavailable,
        vram=options.vram,
        on_foreign=options.on_foreign,
        foreign_threshold=options.foreign_threshold,
    )
