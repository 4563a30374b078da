"""mic-supervisor doctor"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.config.diagnostics import printable
from mic_supervisor.errors import ConfigError, MicError, RuntimeUnavailable

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.doctor import Check, Finding
    from mic_supervisor.model import DesiredState, GpuInventory

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> int:
    """Look this machine over, and say how to mend what is amiss.

    Docker and its NVIDIA side, the driver and the GPUs, systemd and the unit, the daemon, ports,
    the configuration with its files and images, backends of other packages, directories, the clock.
    Nothing is changed. Each check is on its own, and has 15 seconds.

    Exits with 0 when nothing fails (warnings are no failure), 1 otherwise.
    """
    from mic_supervisor.doctor import examine, fail

    try:
        found = wiring.settings()
    except ConfigError as error:
        findings = [fail("settings", error.message, "mend it: everything else depends on it")]
    else:
        findings = examine(checks(found))
    if as_json:
        click.echo(json.dumps(document(findings), indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        from shutil import get_terminal_size

        colours = not os.environ.get("NO_COLOR")
        for line in table(findings, get_terminal_size().columns, colours=colours):
            click.echo(line)
    else:
        for line in lines(findings):
            click.echo(line)
    return 1 if any(item.level == "fail" for item in findings) else 0


def checks(found: Settings) -> list[Check]:
    """Every check of this machine, in the order in which they are shown."""
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.settings import NO_DOCKER
    from mic_supervisor.converge.state import StateDir
    from mic_supervisor.doctor import (
        Check,
        engine,
        files,
        gpus,
        host,
        plug_ins,
        service,
        warn,
    )
    from mic_supervisor.gpu.modes import read_modes
    from mic_supervisor.gpu.source import open_source
    from mic_supervisor.host.processes import listener_owners, listeners

    real = found.gpu_source.kind == "nvml"
    systemd = Path("/run/systemd/system").is_dir()
    source = open_source(found.gpu_source.kind, found.gpu_source.count)
    registry = Registry()

    def load() -> Config:
        return wiring.load_config(found, None, registry)

    @cache
    def inventory() -> GpuInventory:
        return source.observe()

    def bindings() -> Mapping[str, str]:
        with suppress(MicError):  # the state may be another user's
            return StateDir(found.scope_state_dir).memory().bindings
        return {}

    def compiled(config: Config) -> DesiredState:
        from mic_supervisor.desired import desired_state

        return desired_state(config, inventory(), bindings(), registry, found.instance_data)

    def ask_daemon() -> Any:
        from mic_supervisor.daemon.client import Client

        client = Client.connect(found.socket)
        return None if client is None else client.call("status", timeout=10.0)

    def no_docker() -> Iterator[Finding]:
        yield warn("docker", "switched off by MIC_DOCKER_HOST=none: no container runs", "unset it")

    docker = [Check("docker", no_docker)]
    if found.docker_host != NO_DOCKER:
        facts, present = _engine(found)
        docker = [
            Check("docker", lambda: engine.engine(facts, real_gpus=real)),
            Check("docker disk", lambda: _unless_away(files.docker_disk(lambda: facts()["root"]))),
            Check("images", lambda: _unless_away(files.images(load, compiled, present))),
        ]
    return [
        Check("settings", lambda: files.settings(found)),
        Check("config", lambda: files.config(found, load)),
        Check("models", lambda: files.models(load, compiled)),
        *(
            Check(f"plug-in {name}", partial(plug_ins.plug_in, registry, name))
            for name in registry.plug_ins()
        ),
        Check("gpus", lambda: gpus.gpus(inventory, read_modes if real else lambda: ())),
        *docker,
        Check("systemd", service.systemd),
        Check("daemon", lambda: service.daemon(ask_daemon, found.socket, found.lock_path)),
        Check("ports", lambda: host.ports(found.port_range, listeners, len(inventory().gpus))),
        Check("http", lambda: host.listen(found.listen, found.lock_path, listener_owners().get)),
        Check("directories", lambda: files.directories(found)),
        Check("clock", lambda: host.clock(found.scope_state_dir, systemd=systemd)),
    ]


def _unless_away(findings: Iterator[Finding]) -> Iterator[Finding]:
    """An engine that cannot be reached is said once, by the check of the engine itself."""
    with suppress(RuntimeUnavailable):
        yield from findings


def _engine(found: Settings) -> tuple[Callable[[], Any], Callable[[str], bool]]:
    """What the engine tells of itself, and whether it has an image."""
    from mic_supervisor.runtimes.docker.engine import Engine
    from mic_supervisor.runtimes.docker.runtime import DockerRuntime

    runtime = DockerRuntime(
        found.scope, "", base_url=found.docker_host, docker_config=None, timeout=10.0
    )
    images = Engine(found.docker_host, timeout=10.0, patience=10.0)

    def present(image: str) -> bool:
        return images.image(f"cannot look for the image {image}", image) is not None

    return cache(runtime.version), present


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    from mic_supervisor.host.identity import host_name

    return {
        "version": 1,
        "host": host_name(),
        "ok": not any(item.level == "fail" for item in findings),
        "findings": [
            {"level": item.level, "subject": item.subject, "text": item.text, "mend": item.mend}
            for item in findings
        ],
    }


def lines(findings: Sequence[Finding]) -> list[str]:
    """ "warn  docker live-restore: is off: …; mend: set …"."""
    return [
        f"{item.level:4}  {printable(item.subject)}: {printable(item.text)}"
        + (f"; mend: {printable(item.mend)}" if item.mend and item.level != "ok" else "")
        for item in findings
    ]


def table(findings: Sequence[Finding], width: int, *, colours: bool = True) -> list[str]:
    """The same for people: in columns, broken at `width`, the way to mend on lines of its own."""
    from textwrap import wrap

    indent = 6 + max((len(item.subject) for item in findings), default=0) + 2
    room = max(30, width - indent)
    out = []
    for item in findings:
        texts = wrap(printable(item.text), room, break_on_hyphens=False) or [""]
        mend = f"mend: {printable(item.mend)}" if item.mend and item.level != "ok" else ""
        texts += wrap(mend, room, subsequent_indent="      ", break_on_hyphens=False)
        level = f"{item.level:4}"
        if colours:
            level = click.style(level, fg=_COLOURS[item.level])
        out.append(f"{level}  {printable(item.subject):{indent - 6}}{texts[0]}")
        out += [" " * indent + text for text in texts[1:]]
    return out
