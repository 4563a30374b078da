"""The settings of the program itself: MIC_* variables, from the environment and mic.env."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from mic_supervisor.config.diagnostics import InvalidConfig, closest, printable, show
from mic_supervisor.config.env_file import parse_env_file
from mic_supervisor.config.types import PositiveDuration
from mic_supervisor.records import dataclass

PREFIX = "MIC_"
ENV_FILE = Path("/etc/mic/mic.env")

NOT_SETTINGS = frozenset(
    {"MIC_INSTANCE", "MIC_IDENTITY", "MIC_RUN_ID", "MIC_CHECK_ID", "MIC_SPEC_HASH"}
)
"""What a runtime puts into the environment of an instance; a shell inside one has them."""

_SCOPE = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
_SIMULATED = re.compile(r"simulated:([0-9]{1,3})")
_PORTS = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
MAX_SIMULATED = 64
NO_DOCKER = "none"
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class GpuSourceSetting:
    """`count` is for "simulated" only."""

    kind: Literal["nvml", "simulated", "none"]
    count: int = 0


class PortRange(NamedTuple):
    """Both ends belong to it."""

    first: int
    last: int


class Address(NamedTuple):
    """An IP address and a port; as text "127.0.0.1:6004", "[::1]:6004"."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback


def _gpu_source(text: Any) -> GpuSourceSetting:
    if text in ("nvml", "none"):
        return GpuSourceSetting(text)
    match = _SIMULATED.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= MAX_SIMULATED:
        raise ValueError(
            f"{show(text)} is no source of GPUs: write nvml, none, or simulated:N "
            f"with N from 1 to {MAX_SIMULATED}"
        )
    return GpuSourceSetting("simulated", int(match[1]))


def _port_range(text: Any) -> PortRange:
    match = _PORTS.fullmatch(text)
    ends = (int(match[1]), int(match[2])) if match is not None else (0, 0)
    if not 1 <= ends[0] <= ends[1] <= 65535:
        raise ValueError(
            f"{show(text)} is no range of ports: write the first and the last, as in 20000-20999"
        )
    return PortRange(*ends)


def _address(text: Any) -> Address:
    host, _, port = text.rpartition(":")
    try:
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        # ip_address() would take a bare IPv6 address without its brackets, and misread the port.
        if (":" in bare) != host.startswith("[") or not re.fullmatch(r"[0-9]{1,5}", port):
            raise ValueError
        ipaddress.ip_address(bare)
        if not 1 <= int(port) <= 65535:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{show(text)} is no address and port: write them as in 127.0.0.1:6004 or [::1]:6004"
        ) from None
    return Address(bare, int(port))


def _scope(text: Any) -> str:
    if not _SCOPE.fullmatch(text):
        raise ValueError(
            f"{show(text)} is no scope: write a to z, 0 to 9 and -, at most 31 of them, "
            "and begin with no -"
        )
    return str(text)


def _path(text: Any) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ValueError(f"{show(text)} is not an absolute path: begin it with /")
    return path


def _config_path(text: Any) -> Path:
    # From a shell, a relative path is meant relative to where one stands.
    return Path(os.path.abspath(_nonempty(text)))  # noqa: PTH100 - a symlink stays as it is


def _nonempty(text: Any) -> str:
    if not text:
        raise ValueError("is empty: give it a value, or remove it")
    return str(text)


def _boolean(text: Any) -> bool:
    value = _BOOLEANS.get(text.lower())
    if value is None:
        raise ValueError(f"{show(text)} is neither true nor false")
    return value


def _docker_host(text: Any) -> str:
    if not re.fullmatch(rf"{NO_DOCKER}|(unix:///|tcp://|ssh://|https?://).+", text):
        raise ValueError(
            f"{show(text)} is no address of an engine: write it as in unix:///run/docker.sock, "
            f"or {NO_DOCKER} for a machine that is to be used without Docker"
        )
    return str(text)


AbsolutePath = Annotated[Path, PlainValidator(_path)]


class Settings(BaseModel):
    """One attribute for each MIC_* variable; the lower-case name without the prefix.

    `environ` is the environment to look `${env:NAME}` up in: the process's own, on top of what the
    env file sets. `unread` says why the env file could not be read, None if it could or is not
    there: a plain user may run `check` beside a file that only root may read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Annotated[Path, PlainValidator(_config_path)] = Path("/etc/mic/gpus.yaml")
    listen: Annotated[Address, PlainValidator(_address)] = Address("127.0.0.1", 6004)
    socket: AbsolutePath = Path("/run/mic/mic.sock")
    state_dir: AbsolutePath = Path("/var/lib/mic")
    run_dir: AbsolutePath = Path("/run/mic")
    docker_host: Annotated[str, PlainValidator(_docker_host)] | None = None
    gpu_source: Annotated[GpuSourceSetting, PlainValidator(_gpu_source)] = GpuSourceSetting("nvml")
    process_runtime: Literal["auto", "systemd", "subprocess"] = "auto"
    port_range: Annotated[PortRange, PlainValidator(_port_range)] = PortRange(20000, 20999)
    resync: PositiveDuration = 10.0
    scope: Annotated[str, PlainValidator(_scope)] = "default"
    on_stop: Literal["keep", "stop"] = "keep"
    docker_config: AbsolutePath | None = None
    http_token_file: AbsolutePath | None = None
    http_open: Annotated[bool, PlainValidator(_boolean)] = False
    prune_on_watch: Annotated[bool, PlainValidator(_boolean)] = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    environ: Mapping[str, str] = Field(default_factory=dict, repr=False, exclude=True)
    unread: str | None = None

    @property
    def scope_state_dir(self) -> Path:
        return self.state_dir / self.scope

    @property
    def instance_data(self) -> Path:
        """Where instances of the scope keep files of their own, each in a directory of its id.

        Not below `scope_state_dir`, which nobody else may enter; a scope's name has no `_`.
        """
        return self.state_dir / "instance_data" / self.scope

    @property
    def lock_path(self) -> Path:
        return self.run_dir / f"{self.scope}.lock"


_INTERNAL = frozenset({"environ", "unread"})
VARIABLES = tuple(
    f"{PREFIX}{name.upper()}" for name in Settings.model_fields if name not in _INTERNAL
)
"""Every variable that there is."""


def load_settings(environ: Mapping[str, str], env_file: Path = ENV_FILE) -> Settings:
    """The settings; the environment wins over the file. A file that is not there sets nothing.

    Raises InvalidConfig, a ConfigError, with one sentence for each variable that is unknown or has
    an invalid value.
    """
    errors: list[_Error] = []
    from_file, unread = _read(env_file, errors)
    origins = {name: (str(env_file), line) for name, (_, line) in from_file.items()}
    merged = {name: value for name, (value, _) in from_file.items()} | dict(environ)
    origins |= dict.fromkeys(environ, ("environment", 0))
    given: dict[str, Any] = {}
    for name, value in sorted(merged.items()):
        if name in VARIABLES:
            given[name.removeprefix(PREFIX).lower()] = value
        elif name.startswith(PREFIX) and name not in NOT_SETTINGS:
            errors.append(_Error(*origins[name], name, _unknown(name)))
    settings = None
    try:
        settings = Settings.model_validate({**given, "environ": merged, "unread": unread})
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            name = f"{PREFIX}{fault['loc'][0]}".upper()
            errors.append(_Error(*origins[name], name, _words(fault, merged[name])))
    if errors or settings is None:
        errors.sort()
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise InvalidConfig(
            f"cannot read the settings: {errors[0].place}: {errors[0].sentence}{more}",
            rendered="".join(f"{one.place}: error: {one.sentence}\n" for one in errors),
        )
    return settings


class _Error(NamedTuple):
    origin: str
    line: int
    name: str
    message: str

    @property
    def place(self) -> str:
        return f"{self.origin}:{self.line}" if self.line else self.origin

    @property
    def sentence(self) -> str:
        return f"{self.name}: {self.message}" if self.name else self.message


def _read(path: Path, errors: list[_Error]) -> tuple[dict[str, tuple[str, int]], str | None]:
    """name -> (value, line), and why the file could not be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        return {}, f"cannot read {path}: {cause}"
    except UnicodeDecodeError as error:
        errors.append(
            _Error(str(path), 0, "", f"cannot read the file: byte {error.start} is not UTF-8")
        )
        return {}, None
    found, bad = parse_env_file(text)
    errors += [_Error(str(path), one.line, "", printable(str(one))) for one in bad]
    return {one.name: (one.value, one.line) for one in found}, None


def _unknown(name: str) -> str:
    near = closest(name, VARIABLES)
    return "there is no such setting" + (f"; did you mean {near}?" if near is not None else "")


def _words(fault: Any, value: str) -> str:
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if fault["type"] == "literal_error":
        expected = str(fault["ctx"]["expected"]).replace("'", "")
        return f"{show(value)} is not known: write {expected}"
    return f"{show(value)} is not valid: {fault['msg']}"
