"""The machine: its GPUs, ports and clock, systemd, the daemon, and Docker."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mic_supervisor.clocks import local
from mic_supervisor.config.settings import Address, PortRange, Settings
from mic_supervisor.doctor import Finding, fail, ok, warn
from mic_supervisor.doctor.installation import program_of, unusable
from mic_supervisor.errors import MicError, RuntimeUnavailable
from mic_supervisor.host import SYSTEMD, programs, start_daemon
from mic_supervisor.host.lock import lock_holder
from mic_supervisor.host.processes import environ, processes
from mic_supervisor.model import Gpu, GpuInventory, Listener
from mic_supervisor.plan import selection
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.words import IGNORED_HINT
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.runtime import DockerRuntime

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_PORTS_PER_GPU = 6  # three for an instance and three for its successor
_PLAUSIBLE = 1735689600.0  # 2025-01-01, before this program was written
_TIMEOUT = 5.0  # seconds for one question to a program
_LAST_WORDS = 5.0  # seconds for a unit that is started again and again to say why
_WRITTEN = ("memory.json", "history.jsonl")
UNIT, _SLICE = "mic.service", "mic.slice"
_USERS = Path("/run/user")  # $XDG_RUNTIME_DIR of each user, where systemd is PID 1
_TOOLKIT = Path("/etc/nvidia-container-runtime/config.toml")


# --- GPUs ---------------------------------------------------------------------------------------


def gpus(read_gpus: Callable[[], GpuInventory]) -> Iterator[Finding]:
    inventory = read_gpus()
    if inventory.source == "none":
        yield warn(
            "gpus", "switched off by MIC_GPU_SOURCE=none: every entry is blocked", "unset it"
        )
        return
    if inventory.error is not None:
        yield fail("gpus", inventory.error, inventory.hint)
        return
    count = len(inventory.indices)
    if inventory.source == "simulated":
        yield ok("gpus", f"{count} simulated by MIC_GPU_SOURCE")
        return
    if not count and not inventory.unopened:
        yield fail("gpus", "the driver counts none", "look for them with: lspci -d 10de:")
        return
    names = sorted({gpu.name for gpu in inventory.gpus if gpu.parent is None})
    driver = f", driver {inventory.driver}" if inventory.driver else ""
    yield ok("gpus", f"{count} of them ({', '.join(names)}){driver}")
    for lost in inventory.unopened:
        yield fail(f"gpu {lost.index}", lost.error, lost.hint)
    for gpu in inventory.gpus:
        if gpu.trouble is not None:
            yield fail(
                f"gpu {gpu.number}",
                f"is unhealthy: {gpu.trouble}; nothing is started on it",
                f"stop what uses it, then: nvidia-smi --gpu-reset -i {gpu.index}; or reboot",
            )
        if gpu.processes is None and gpu.unlisted is None:
            yield warn(
                f"gpu {gpu.number}",
                "its holders cannot be read, so nothing is started on it",
                "check it with: nvidia-smi",
            )
        elif gpu.processes is None:
            yield warn(
                f"gpu {gpu.number}",
                "the driver does not say who is on it, so only a model that ignores foreign "
                "processes is started there",
                "set `on_foreign: ignore` for a model that has this GPU to itself",
            )
    yield from _modes(inventory.gpus)


def _modes(found: tuple[Gpu, ...]) -> Iterator[Finding]:
    if asleep := [item.index for item in found if item.persistence is False]:
        yield warn(
            "persistence mode",
            f"is off on GPU {_list(asleep)}: each start wakes the driver first, for seconds",
            "switch it on with: systemctl enable --now nvidia-persistenced",
        )
    elif any(item.persistence for item in found):
        yield ok("persistence mode", "is on")
    parents = {item.parent for item in found if item.parent is not None}
    if parted := [item.index for item in found if item.uuid in parents]:
        yield ok(
            "mig",
            f"is on for GPU {_list(parted)}, with {sum(bool(item.parent) for item in found)} "
            "slices; power and utilization of a slice are unknown",
        )
    if empty := [item.index for item in found if item.mig and item.uuid not in parents]:
        yield warn(
            "mig",
            f"is on for GPU {_list(empty)}, which has no slices: no model can have it",
            "make slices with `nvidia-smi mig`, or switch MIG off with: nvidia-smi -i "
            f"{_list(empty).replace(' ', '')} -mig 0",
        )


def _list(indices: Iterable[int]) -> str:
    return ", ".join(map(str, indices))


# --- ports and the clock -----------------------------------------------------------------------


def ports(
    within: PortRange,
    listeners: Callable[[], tuple[Listener, ...] | None],
    gpus: int,
    *,
    ephemeral: Path = _EPHEMERAL,
    reserved: Path = _RESERVED,
) -> Iterator[Finding]:
    found = listeners()
    if found is None:
        yield fail("ports", "the ports in use cannot be read", "check that /proc is mounted")
        return
    taken = {item.port for item in found if within.first <= item.port <= within.last}
    total = within.last - within.first + 1
    free = total - len(taken)
    text = f"{free} of {total} free in {within.first}-{within.last}"
    if free < _PORTS_PER_GPU * gpus:
        yield warn(
            "ports",
            f"{text}, and {gpus} GPUs may need {_PORTS_PER_GPU * gpus}",
            "widen MIC_PORT_RANGE",
        )
    else:
        yield ok("ports", text)
    yield from _outgoing(within, ephemeral, reserved)


def listen(
    address: Address, lock_path: Path, owner: Callable[[int], Listener | None]
) -> Iterator[Finding]:
    """Whether the daemon can answer where it is told to."""
    found = owner(address.port)
    holder = lock_holder(lock_path)
    if found is None:
        yield ok("http", f"{address} is free")
    elif holder is not None and found.pid == holder.pid:
        yield ok("http", f"the daemon answers at {address}")
    else:
        who = "somebody" if found.pid is None else f"PID {found.pid} ({found.name or '?'})"
        yield fail("http", f"{who} listens at port {address.port}", "change MIC_LISTEN")
    if not address.is_loopback:
        yield warn("http", f"{address} can be reached from elsewhere", "see MIC_HTTP_TOKEN_FILE")


def _outgoing(within: PortRange, ephemeral: Path, reserved: Path) -> Iterator[Finding]:
    try:
        first, last = map(int, ephemeral.read_text().split())
        kept = _numbers(reserved.read_text())
    except (OSError, ValueError):
        return
    shared = range(max(first, within.first), min(last, within.last) + 1)
    if any(port not in kept for port in shared):
        yield warn(
            "ports",
            f"the kernel gives ports of {within.first}-{within.last} to outgoing connections "
            f"({first}-{last})",
            "sysctl net.ipv4.ip_local_reserved_ports="
            f"{within.first}-{within.last}, or change MIC_PORT_RANGE",
        )


def _numbers(text: str) -> Collection[int]:
    """ "8080,9000-9010" as a set."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def clock(state: Path, *, systemd: bool, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Times that are remembered decide when something is tried again."""
    at = now()
    if at < _PLAUSIBLE:
        yield fail("clock", "it says a year before 2025", "set it, and enable NTP")
        return
    newest = max((_mtime(state / name) for name in _WRITTEN), default=0.0)
    if newest > at + 60:
        yield warn(
            "clock",
            f"it went back: {state} was written {newest - at:.0f} s in the future",
            "enable NTP",
        )
        return
    synchronized = ""
    if systemd:
        with suppress(MicError):  # a machine that cannot tell is in no trouble by that
            synchronized = _ask("timedatectl", "show", "--property=NTPSynchronized", "--value")
    if synchronized.strip() == "no":
        yield warn("clock", "it is not synchronised", "timedatectl set-ntp true")
        return
    yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at)))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# --- systemd and the daemon ----------------------------------------------------------------------


def systemd(
    marker: Path = SYSTEMD,
    program: str = "systemctl",
    last_words: float = _LAST_WORDS,
) -> Iterator[Finding]:
    """`last_words`: seconds in which a unit that is started again and again may say why."""
    if not marker.is_dir():
        yield warn(
            "systemd",
            "is not PID 1: host processes run below keepers, and nothing starts the daemon",
            "start it from whatever supervises this machine: mic-supervisor run",
        )
        return
    version = _ask(program, "--version").split("\n", 1)[0]
    yield ok("systemd", version or "is PID 1")
    unit = show(UNIT, program)
    # Its last words are there between an end and the next start, for a tenth of a second.
    end = time.monotonic() + last_words
    while _is_looping(unit) and not unit.get("StatusText") and time.monotonic() < end:
        time.sleep(0.03)
        unit = show(UNIT, program)
    if unit.get("LoadState") != "loaded":
        yield warn(
            UNIT,
            "is not installed" if unit.get("LoadState") == "not-found" else "cannot be loaded",
            "install it with: mic-supervisor install",
        )
    else:
        yield from _unit(unit)
    if (tasks := show(_SLICE, program).get("TasksCurrent", "")).isdigit():
        yield ok(_SLICE, f"{tasks} tasks in it")


def _is_looping(unit: dict[str, str]) -> bool:
    starting = unit.get("ActiveState") == "activating"
    return starting and (unit.get("SubState") == "auto-restart" or unit.get("NRestarts") != "0")


def _unit(unit: dict[str, str]) -> Iterator[Finding]:
    state, restarts = unit.get("ActiveState", "?"), unit.get("NRestarts", "0")
    said = unit.get("StatusText") or f"exit status {unit.get('ExecMainStatus', '?')}"
    program = program_of(unit)
    if program is not None and (why := unusable(Path(program))) is not None:
        yield fail(
            UNIT, f"starts {program}, which {why}", "install it anew: mic-supervisor install"
        )
    elif state == "failed":
        result = unit.get("Result", "?")
        yield fail(UNIT, f"has failed ({result}): {said}", "see more: journalctl -u mic -e")
    elif _is_looping(unit):
        yield fail(
            UNIT,
            f"does not stay up, and was started {restarts} times again: {said}",
            "see more: journalctl -u mic -e",
        )
    elif state != "active":
        yield warn(UNIT, f"is {state}", "start it with: systemctl start mic")
    else:
        yield ok(UNIT, "runs" if restarts == "0" else f"runs, after {restarts} restarts")
    if unit.get("UnitFileState") not in ("enabled", "enabled-runtime", "static"):
        yield warn(
            UNIT,
            f"is {unit.get('UnitFileState') or 'not enabled'}: it does not come back after a boot",
            "enable it with: systemctl enable mic",
        )


def daemon(
    ask: Callable[[], Mapping[str, Any] | None], path: Path, lock_path: Path
) -> Iterator[Finding]:
    """`ask` gives the daemon's status document; None: nobody listens at `path`. Raises MicError."""
    status = ask()
    holder = lock_holder(lock_path)
    who = "nobody"
    if holder is not None:
        since = local(holder.since).strftime("%Y-%m-%d %H:%M:%S")
        who = f"PID {holder.pid} ({holder.command}, by {holder.user}) since {since}"
    if status is None:
        if holder is not None:
            yield warn("daemon", f"does not listen at {path}, and {who} holds the lock")
        else:
            yield warn("daemon", f"none listens at {path}", f"start it with: {start_daemon()}")
        return
    yield ok("daemon", f"answers at {path}; the lock is held by {who}")
    config = status["config"]
    if not config["last_reload_ok"]:
        yield warn(
            "daemon",
            f"rejected {config['path']} as it is now; what was good before keeps running",
            "see why: mic-supervisor check",
        )
    for text in status["warnings"]:
        yield warn("daemon", f"it warns: {text}")


def drained(memory: Memory, ask: Callable[[], Mapping[str, Any] | None]) -> Iterator[Finding]:
    """A daemon that runs warns of it itself."""
    if memory.drained is not None and ask() is None:
        why = selection.drained(memory.drained, time.time())
        yield warn("drained", f"nothing is started: {why}", f"end it with: {why.hint}")


def show(unit: str, program: str = "systemctl") -> dict[str, str]:
    """What systemd says of a unit, by property. Raises MicError where it cannot be asked."""
    names = (
        "LoadState,ActiveState,SubState,UnitFileState,FragmentPath,Result,NRestarts,TasksCurrent,"
        "ExecStart,ExecMainStatus,StatusText"
    )
    lines = _ask(program, "show", unit, f"--property={names}").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _ask(*command: str) -> str:
    try:
        done = programs.run(command, _TIMEOUT, apart=True)
    except OSError as error:
        raise MicError(f"cannot ask {command[0]}: {error.strerror}") from error
    if done.code is None:
        raise MicError(f"cannot ask {command[0]}: it gives no answer within {_TIMEOUT:g} s")
    return done.output.decode(errors="replace")


# --- Docker: whether it answers, gives GPUs away, and lets containers live -----------------------

_HOOK = "nvidia-container-runtime-hook"


def questions(found: Settings) -> tuple[Callable[[], Mapping[str, Any]], Callable[[str], bool]]:
    """What the engine tells of itself, asked once, and whether it has an image."""
    runtime = DockerRuntime(
        found.scope, "", base_url=found.docker_host, docker_config=None, timeout=10.0
    )
    client = Engine(found.docker_host, timeout=10.0, work_timeout=10.0)

    def has_image(image: str) -> bool:
        return client.image(f"cannot look for the image {image}", image) is not None

    return cache(runtime.version), has_image


def engine(
    facts: Callable[[], Mapping[str, Any]],
    *,
    real_gpus: bool,
    users: Path = _USERS,
    toolkit: Path = _TOOLKIT,
) -> Iterator[Finding]:
    """`facts` is DockerRuntime.version."""
    try:
        found = facts()
    except RuntimeUnavailable as error:
        yield fail("docker", error.message, error.hint)
        yield from _of_users(users)
        return
    name = found["podman"] or f"Engine {found['version'] or '?'}"
    yield ok("docker", f"{name} (API {found['api'] or '?'}) answers at {found['address']}")
    if found["podman"] is not None:
        if real_gpus:
            yield fail(
                "docker gpus",
                f"{found['podman']} takes a request for a GPU and ignores it: no model that needs "
                "one is started there",
                IGNORED_HINT,
            )
        return
    yield _life(found)
    if found["rootless"] and found["cgroup_driver"] in (None, "none"):
        yield warn(
            "docker cgroups",
            "it is rootless and has no control groups: `limits` of memory and CPUs do nothing",
            "use control groups version 2, and delegate memory and cpu to the user: "
            "https://docs.docker.com/engine/security/rootless/",
        )
    if not real_gpus:
        return
    cdi = [name for name in found["cdi_devices"] if name.startswith("nvidia.com/gpu=")]
    named = [name for name in cdi if name.partition("=")[2].startswith(("GPU-", "MIG-"))]
    yield _gpus(found, named)
    if cdi and not named:
        yield warn(
            "docker gpus",
            f"{len(cdi)} CDI devices are named by index only, so they are not used",
            "nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml",
        )
    if found["rootless"]:
        yield from _rootless_gpus(named, toolkit)
    elif found["cgroup_driver"] == "systemd" and not named:
        yield warn(
            "docker cgroups",
            "`systemctl daemon-reload` takes the GPUs from running containers (legacy mode, "
            "cgroup driver systemd)",
            "use CDI: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml, with Engine 25 or "
            'later; or set "exec-opts": ["native.cgroupdriver=cgroupfs"] in '
            "/etc/docker/daemon.json",
        )
    else:
        yield ok("docker cgroups", f"driver {found['cgroup_driver'] or 'unknown'}")
    if found["default_runtime"] == "nvidia":
        yield warn(
            "docker runtime",
            "nvidia is the default runtime: a container that asks for no GPU may see all of them",
            'remove "default-runtime" from /etc/docker/daemon.json and restart Docker',
        )


def _of_users(users: Path) -> Iterator[Finding]:
    """The sockets of rootless engines, which are where nobody looks by default."""
    sockets: list[Path] = []
    with suppress(OSError):  # who is not root sees their own
        sockets += sorted(path for path in users.glob("*/docker.sock") if path.is_socket())
    for path in sockets:
        yield warn(
            "docker rootless",
            f"a rootless engine has its socket at {path}",
            f"use it: put MIC_DOCKER_HOST=unix://{path} into /etc/mic/mic.env",
        )


def _rootless_gpus(named: list[str], toolkit: Path) -> Iterator[Finding]:
    """The older way of giving GPUs writes into control groups, which a user may not."""
    try:
        text = toolkit.read_text()
    except (OSError, UnicodeDecodeError):
        text = ""
    if not named and re.search(r"(?m)^\s*no-cgroups\s*=\s*true", text) is None:
        yield warn(
            "docker rootless",
            "the NVIDIA runtime wants control groups, which a rootless engine may not change: no "
            "container with a GPU starts",
            "nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place",
        )


def _path_of_dockerd() -> str | None:
    """Where the engine looks for programs; None: as here."""
    for stat in processes().values():
        if stat.name == "dockerd" and (environment := environ(stat.pid)):
            return environment.get("PATH")
    return None


def _life(found: Mapping[str, Any]) -> Finding:
    if found["live_restore"]:
        return ok("docker live-restore", "containers outlive a restart of Docker")
    return warn(
        "docker live-restore",
        "is off: every container ends when Docker is restarted or upgraded",
        'set "live-restore": true in /etc/docker/daemon.json, then: systemctl reload docker',
    )


def _gpus(found: Mapping[str, Any], cdi: list[str]) -> Finding:
    if cdi:
        return ok("docker gpus", f"{len(cdi)} CDI devices of nvidia.com/gpu, by UUID")
    if "nvidia" in (found["runtimes"] or ()):
        return ok("docker gpus", "the NVIDIA runtime is there")
    if shutil.which(_HOOK, path=_path_of_dockerd()):
        return ok("docker gpus", f"{_HOOK} is there; Docker looks for it only when it starts")
    return fail(
        "docker gpus",
        "Docker has no NVIDIA runtime and no CDI devices: no container gets a GPU",
        "install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker "
        "and systemctl restart docker",
    )
