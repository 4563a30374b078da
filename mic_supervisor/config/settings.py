"""The settings of the program itself: MIC_* variables, from the environment and mic.env."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

from pydantic import Field, PlainValidator, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from mic_supervisor.config.diagnostics import At, Report, closest, show
from mic_supervisor.config.document import Location
from mic_supervisor.config.env_file import (
    DEFAULT_SCOPE,
    ENV_FILE,
    SOCKET,
    Assignment,
    parse_env_file,
    socket_of,
)
from mic_supervisor.config.types import PositiveDuration
from mic_supervisor.host.files import read_text

PREFIX = "MIC_"

NOT_SETTINGS = frozenset(
    {"MIC_INSTANCE", "MIC_IDENTITY", "MIC_MAIN", "MIC_RUN_ID", "MIC_CHECK_ID", "MIC_SPEC_HASH"}
)
"""What a runtime puts into the environment of an instance; a shell inside one has them."""

MAX_SIMULATED = 64
NO_DOCKER = "none"


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


def _refuse(text: str, why: str) -> NoReturn:
    raise ValueError(f"{show(text)} {why}") from None


def _gpu_source(text: Any) -> GpuSourceSetting:
    if text in ("nvml", "none"):
        return GpuSourceSetting(text)
    match = re.fullmatch(r"simulated:([0-9]{1,3})", text)
    if match is None or not 1 <= int(match[1]) <= MAX_SIMULATED:
        kinds = f"nvml, none, or simulated:N with N from 1 to {MAX_SIMULATED}"
        _refuse(text, f"is no source of GPUs: write {kinds}")
    return GpuSourceSetting("simulated", int(match[1]))


def _port_range(text: str) -> PortRange:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= 65535:
        _refuse(text, "is no range of ports: write the first and the last, as in 20000-20999")
    return PortRange(int(match[1]), int(match[2]))


def _address(text: str) -> Address:
    match = re.fullmatch(r"(?:\[(?P<v6>.+)\]|(?P<v4>[0-9.]+)):(?P<port>[0-9]{1,5})", text)
    try:
        if match is None or not 1 <= int(match["port"]) <= 65535:
            raise ValueError
        if match["v6"]:
            ipaddress.IPv6Address(match["v6"])
        else:
            ipaddress.IPv4Address(match["v4"])
    except ValueError:
        _refuse(text, "is no address and port: write them as in 127.0.0.1:6004 or [::1]:6004")
    return Address(match["v6"] or match["v4"], int(match["port"]))


def _absolute(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        _refuse(text, "is not an absolute path: begin it with /")
    return path


def _from_here(text: str) -> Path:
    # From a shell, a relative path is meant relative to where one stands.
    if not text:
        raise ValueError("is empty: give it a value, or remove it")
    return Path(os.path.abspath(text))  # noqa: PTH100 - a symlink stays as it is


def _host_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().lower() for name in text.split(","))
    for name in names:
        if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
            raise ValueError(
                f"{show(name)} is no name of a host: write names without ports, with commas "
                "between them, as in gpu-01.example.com, status.example.com"
            )
    return names


def _scope(text: str) -> str:
    if not re.fullmatch("[a-z0-9][a-z0-9-]{0,30}", text):
        form = "a to z, 0 to 9 and -, at most 31 of them, and begin with no -"
        _refuse(text, f"is no scope: write {form}")
    return text


def _docker_host(text: str) -> str:
    if not re.fullmatch(rf"{NO_DOCKER}|(unix:///|tcp://).+", text):
        why = "is no address of an engine"
        if text.startswith(("ssh://", "http://", "https://")):
            why += " that is used (GPUs and processes are looked at on this machine alone)"
        forms = "unix:///run/docker.sock or tcp://127.0.0.1:2375"
        without = f"{NO_DOCKER} for a machine that is to be used without Docker"
        _refuse(text, f"{why}: write it as in {forms}, or {without}")
    return text


AbsolutePath = Annotated[Path, PlainValidator(_absolute)]


class Settings(BaseSettings):
    """One attribute for each MIC_* variable; the lower-case name without the prefix.

    `environ` is where the variables are read, and where `${env:NAME}` is looked up: the process's
    own environment, on top of what the env file sets. `unread` says why the env file could not be
    read, None if it could or is not there: a plain user may run `check` beside a file that only
    root may read.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        enable_decoding=False,  # no value is JSON
        extra="forbid",
        frozen=True,
        validate_default=False,
    )

    config: Annotated[Path, PlainValidator(_from_here)] = Path("/etc/mic/gpus.yaml")
    listen: Annotated[Address, PlainValidator(_address)] = Address("127.0.0.1", 6004)
    socket: AbsolutePath = Path(SOCKET)
    state_dir: AbsolutePath = Path("/var/lib/mic")
    run_dir: AbsolutePath = Path("/run/mic")
    docker_host: Annotated[str, PlainValidator(_docker_host)] | None = None
    gpu_source: Annotated[GpuSourceSetting, PlainValidator(_gpu_source)] = GpuSourceSetting("nvml")
    process_runtime: Literal["auto", "systemd", "subprocess"] = "auto"
    port_range: Annotated[PortRange, PlainValidator(_port_range)] = PortRange(20000, 20999)
    resync: PositiveDuration = 10.0
    scope: Annotated[str, PlainValidator(_scope)] = DEFAULT_SCOPE
    on_stop: Literal["keep", "stop"] = "keep"
    docker_config: AbsolutePath | None = None
    http_token_file: AbsolutePath | None = None
    http_open: bool = False
    http_hosts: Annotated[tuple[str, ...], PlainValidator(_host_names)] | None = None
    prune_on_watch: bool = False
    claim_grace: PositiveDuration = 120.0
    watch: Literal["apply", "plan"] = "apply"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    environ: Mapping[str, str] = Field(default_factory=dict, repr=False, exclude=True)
    unread: str | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """An unknown variable is handed on under its whole name, so that the model forbids it."""
        environ = init_settings().get("environ", {})
        names = {name for name in environ if name.startswith(PREFIX)} - NOT_SETTINGS
        known = EnvSettingsSource(settings_cls)
        known.env_vars = {name.lower(): environ[name] for name in names.intersection(VARIABLES)}
        unknown = {name: environ[name] for name in names.difference(VARIABLES)}
        return init_settings, known, InitSettingsSource(settings_cls, unknown)

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


VARIABLES = tuple(
    f"{PREFIX}{name.upper()}" for name in Settings.model_fields if name not in ("environ", "unread")
)
"""Every variable that there is."""


def load_settings(environ: Mapping[str, str], env_file: Path = ENV_FILE) -> Settings:
    """The settings; the environment wins over the file. A file that is not there sets nothing.

    Raises InvalidConfig, a ConfigError, with one sentence for each variable that is unknown or has
    an invalid value.
    """
    report = Report("read the settings", lines={str(env_file): [], "environment": []})
    from_file, unread = _read(env_file, report)
    merged = {name: one.value for name, one in from_file.items()} | dict(environ)
    try:
        settings = Settings(environ=merged, unread=unread)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            name = str(fault["loc"][0])
            if name in Settings.model_fields:
                name = f"{PREFIX}{name.upper()}"
            location = Location("environment")
            if name not in environ:
                location = Location(str(env_file), from_file[name].line)
            report.add(At(location, name), _words(fault, name, merged[name]))
    if report:
        report.fail()
    if "MIC_SOCKET" not in merged:
        return settings.model_copy(update={"socket": Path(socket_of(settings.scope))})
    return settings


def _read(path: Path, report: Report) -> tuple[dict[str, Assignment], str | None]:
    """What the file sets, by name, and why it could not be read."""
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except OSError as error:
        return {}, f"cannot read {path}: {(error.strerror or str(error)).lower()}"
    except UnicodeDecodeError as error:
        message = f"cannot read the file: byte {error.start} is not UTF-8"
        report.add(At(Location(str(path))), message)
        return {}, None
    found, bad = parse_env_file(text)
    for line in bad:
        report.add(At(Location(str(path), line.line)), str(line))
    return {one.name: one for one in found}, None


def _words(fault: Any, name: str, value: str) -> str:
    match fault["type"]:
        case "value_error":
            return str(fault["ctx"]["error"])
        case "literal_error":
            expected = str(fault["ctx"]["expected"]).replace("'", "")
            return f"{show(value)} is not known: write {expected}"
        case "bool_parsing":
            return f"{show(value)} is neither true nor false"
        case "extra_forbidden":
            near = closest(name, VARIABLES)
            return "there is no such setting" + (f"; did you mean {near}?" if near else "")
    return f"{show(value)} is not valid: {fault['msg']}"
