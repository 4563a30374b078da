"""The machine that is disturbed: a daemon, an engine behind a proxy, a mock NVML, a small disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import docker

from tests.chaos.script import FIRST, HELD_CALLS, SLOTS, Act, Assignment, Entry
from tests.integration.daemon_world import (
    DaemonWorld,
    Run,
    by_instance,
    container,
    daemon_world,
    process,
    start_time,
)
from tests.integration.engine_proxy import EngineProxy, engine_proxy
from tests.integration.gpu_watcher import Watcher
from tests.mock_nvml import GIB, MockGpu, MockNvml, MockProcess, Rules, mock_uuid
from tests.support import scopes
from tests.support.require import program
from tests.support.set_clock import SetClock

GPUS = 6  # the last is nobody's
OF_SLOT = ((0,), (1,), (2,), (3, 4))
CLOCK_STEPS = (-86400, -3600, -30, 30, 3600, 86400)  # seconds
HANGS = "nvmlDeviceGetMemoryInfo_v2"
IMAGE = "mic-test/busybox:1"

_DISK = """
mount -t tmpfs -o size=4m,mode=700 none "$1" && echo mounted && exec sleep infinity
"""
_SERVER_ERROR = (
    b"HTTP/1.1 500 X\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b'Content-Length: 20\r\n\r\n{"message": "chaos"}'
)


class Driver(Watcher):
    """Shows the daemon's NVML what really runs on which GPU, as the kernel's driver does, with what
    is foreign or lost. Looking so often, it also sees who holds a GPU twice.
    """

    PAUSE = 0.2

    def __init__(self, world: DaemonWorld, nvml: MockNvml) -> None:
        super().__init__(world)
        self.foreign: dict[int, int] = {}  # GPU: PID
        self.lost: set[int] = set()
        self.hangs = False
        self._nvml = nvml
        self._ours: dict[str, set[int]] = {}
        self._turn = threading.Lock()

    @property
    def looks_on(self) -> bool:
        return self._thread.is_alive()

    def show(self) -> None:
        with self._turn:
            gpus = []
            for number in range(GPUS):
                pids = sorted(self._ours.get(mock_uuid(number), set()))
                pids += [self.foreign[number]] if number in self.foreign else []
                gpus.append(
                    MockGpu(
                        memory_used=len(pids) * GIB,
                        processes=[MockProcess(pid) for pid in pids],
                        lost=number in self.lost,
                        rules=Rules(hangs=[HANGS] if self.hangs and number == 0 else []),
                    )
                )
            if [gpu.lines(n) for n, gpu in enumerate(gpus)] != [
                gpu.lines(n) for n, gpu in enumerate(self._nvml.gpus)
            ]:
                self._nvml.set(gpus)

    def _twice(self) -> str | None:
        runs = self._world.runs()
        ours: dict[str, set[int]] = {}
        for run in runs:
            for uuid in run.gpus:
                ours.setdefault(uuid, set()).add(run.mark[2])
        self._ours = ours
        self.show()
        try:
            by_instance(runs)
        except AssertionError as error:
            return str(error)
        return None


@dataclass
class Machine:
    """What the storms meet. `disturb` does one thing to it, `calm` undoes everything."""

    world: DaemonWorld
    nvml: MockNvml
    clock: SetClock
    proxy: EngineProxy
    driver: Driver
    disk: Path
    foreigners: list[subprocess.Popen[bytes]]
    foreign_container: str
    paused: dict[int, list[Run]] = field(default_factory=dict)

    # --- what runs --------------------------------------------------------------------------

    def on_slot(self, slot: int) -> list[Run]:
        gpus = {mock_uuid(number) for number in OF_SLOT[slot]}
        for _ in range(5):
            with contextlib.suppress(docker.errors.NotFound):  # removed while it was looked at
                return [run for run in self.world.runs() if gpus & {*run.gpus}]
        return []

    def foreign_marks(self) -> list[object]:
        """What of others is there; it must be the same at all times."""
        assert self.world.engine is not None
        state = self.world.engine.inspect_container(self.foreign_container)["State"]
        processes = [(one.pid, start_time(one.pid), one.poll()) for one in self.foreigners]
        return [*processes, (state["Pid"], state["StartedAt"], state["Running"])]

    # --- the file ---------------------------------------------------------------------------

    def text(self, to: Assignment) -> str:
        """A model for each slot and runtime, so that an edit never takes one away."""
        gpus: dict[int | str, str] = {GPUS - 1: "none"}
        for slot, entry in enumerate(to):
            key: int | str = int(SLOTS[slot]) if SLOTS[slot].isdigit() else SLOTS[slot]
            gpus[key] = "none" if entry is None else name(slot, entry)
            if entry is not None:
                self.world.models[name(slot, entry)] = model(entry)
        return self.world.text(gpus)

    # --- disturbances -----------------------------------------------------------------------

    def disturb(self, act: Act) -> None:
        """Does it, and waits as long as it says."""
        gpu = OF_SLOT[act.slot][-1]
        match act.kind:
            case "kill the daemon":
                self.kill()
                self.world.mic.start("run")
            case "damage the memory" | "lose the memory":
                self.kill()
                self._damage(act)
                self.world.mic.start("run")
            case "kill an instance":
                for run in self.on_slot(act.slot):
                    if start_time(run.mark[2]) == run.mark[3]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(run.mark[2], signal.SIGKILL)
            case "edit" | "edit to one that fails":
                assert act.to is not None
                self.world.mic.write(self.text(act.to))
            case "break the file":
                broken = ("models: {", "version: 2\n", "gpus: {0: nobody}\n", "\0", "")
                self.world.mic.write(broken[act.amount % len(broken)])
            case "cut the file":  # in place, before `gpus`: no valid file comes of it
                text = self.world.mic.config.read_text()
                end = text.find("gpus:") * act.amount // 1000
                self.world.mic.config.write_text(text[: max(end, 0)])
            case "pause":
                answer = self.world.mic.ask("pause", timeout=5, names=[str(gpu)])
                if "result" in answer:
                    self.paused.setdefault(act.slot, self.on_slot(act.slot))
            case "foreign process":
                self.driver.foreign[gpu] = self.foreigners[act.slot].pid
                self.driver.show()
            case "lose a GPU":
                self.driver.lost.add(gpu)
                self.driver.show()
            case "hang the driver":
                self.driver.hangs = True
                self.driver.show()
            case "set the clock":
                self.clock.set(self.clock.ahead + CLOCK_STEPS[act.amount % len(CLOCK_STEPS)])
            case "fill the disk":
                self._fill()
            case "cut the engine":
                self.proxy.cut()
                time.sleep(act.amount / 250)  # up to 4 s
                self.proxy.up()
            case "slow the engine":
                self.proxy.delay = act.amount / 1000
            case "hold the engine":
                pattern = HELD_CALLS[act.amount % len(HELD_CALLS)]
                self.proxy.release()
                self.proxy.hold(pattern, "after" if act.amount % 2 else "before")
            case "have the engine answer 500":
                pattern = HELD_CALLS[act.amount % len(HELD_CALLS)]
                self.proxy.answer(pattern, _SERVER_ERROR)
        time.sleep(act.after)

    def kill(self) -> None:
        daemon = self.world.mic.daemons[-1]
        daemon.process.kill()
        daemon.process.wait()

    def _damage(self, act: Act) -> None:
        memory = self.disk / self.world.mic.scope / "memory.json"
        with contextlib.suppress(OSError):  # none was written yet, or the disk is full
            if act.kind == "lose the memory":
                memory.with_name("memory.json.old").unlink()
            whole = memory.read_bytes()
            memory.write_bytes(whole[: len(whole) * act.amount // 1000])

    def _fill(self) -> None:
        with (self.disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def calm(self, last: Assignment) -> None:
        """Everything as it should be; only the clock stays as it was set."""
        self.proxy.honest()
        self.proxy.release()
        self.proxy.delay = 0.0
        (self.disk / "filler").unlink(missing_ok=True)
        self.driver.foreign.clear()
        self.driver.lost.clear()
        self.driver.hangs = False
        self.driver.show()
        self.paused.clear()
        self.world.mic.write(self.text(last))

    def log(self, lines: int = 60) -> str:
        """The end of what the last two daemons said."""
        texts = [daemon.text().splitlines() for daemon in self.world.mic.daemons[-2:]]
        return "\n".join(line for text in texts for line in text[-lines:])


def name(slot: int, entry: Entry) -> str:
    return f"{entry.runtime}{slot}"


def instance(slot: int, entry: Entry) -> str:
    gpus = OF_SLOT[slot]
    return (
        f"{name(slot, entry)}-{mock_uuid(gpus[0])[4:12]}{'' if len(gpus) == 1 else f'x{len(gpus)}'}"
    )


def model(entry: Entry) -> str:
    """Its tag stands in its environment, where it is read from outside."""
    if entry.runtime == "c":
        text = container("stop_timeout: 2s", f'env: {{TAG: "{entry.tag}"}}')
    else:
        text = process().replace("env: {", f'env: {{TAG: "{entry.tag}", ')
    return text.replace("100000", "no time") if entry.fails else text


@contextlib.contextmanager
def machine(engine: docker.APIClient) -> Iterator[Machine]:
    """One with a daemon that has started what FIRST says. It is root that can make one."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mic-chaos-")))
        nvml, clock = MockNvml(home), SetClock(home)
        proxy = stack.enter_context(engine_proxy(home))
        world = stack.enter_context(daemon_world(home, engine, nvml=nvml))
        world.mic.env |= {"MIC_DOCKER_HOST": proxy.url, "MIC_RESYNC": "1s", **clock.env()}
        holder = stack.enter_context(_disk(world.mic.state_dir))
        world.mic.within = [
            *(program("nsenter", "util-linux"), f"--target={holder}", "--mount"),
            f"--wdns={home}",
        ]
        foreigners = [stack.enter_context(_foreigner()) for _ in SLOTS]
        driver = Driver(world, nvml)
        made = Machine(
            world,
            nvml,
            clock,
            proxy,
            driver,
            Path(f"/proc/{holder}/root{world.mic.state_dir}"),
            foreigners,
            stack.enter_context(_foreign_container(engine)),
        )
        driver.show()
        stack.enter_context(driver)
        world.mic.write(made.text(FIRST))
        world.mic.run(timeout=60, http=False)
        yield made


@contextlib.contextmanager
def _disk(directory: Path) -> Iterator[int]:
    """A small disk of its own there, for who enters the mounts of the process that is returned."""
    unshare = program("unshare", "util-linux")
    with subprocess.Popen(
        [unshare, "--mount", "sh", "-c", _DISK, "sh", str(directory)], stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"mounted\n", "only root can mount"
            yield holder.pid
        finally:
            holder.kill()


@contextlib.contextmanager
def _foreigner() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "infinity"]) as made:
        try:
            yield made
        finally:
            made.kill()


@contextlib.contextmanager
def _foreign_container(engine: docker.APIClient) -> Iterator[str]:
    """One that looks like ours, and is of another scope."""
    scope = scopes.new_scope()
    labels = {"io.mic.scope": scope, "io.mic.instance": "c0-a0000000", "io.mic.model": "c0"}
    made = engine.create_container(IMAGE, ["sleep", "100000"], labels=labels)["Id"]
    try:
        engine.start(made)
        yield made
    finally:
        scopes.remove_containers(engine, scope)


def environment(pid: int) -> dict[str, str]:
    """Of a process; empty when it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def keyed(events: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    """Events by what makes each one unique."""
    return {json.dumps(event, sort_keys=True): event for event in events}
