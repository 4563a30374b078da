"""Where what a command asks and orders goes: to the daemon, or to a session of this process.

The daemon is looked for first. What is needed without one is imported only then: most of what a
command costs is imports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mic_supervisor.config.env_file import DEFAULT_SCOPE, setting, socket_of
from mic_supervisor.daemon.client import Client
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.cli.wiring import Machine
    from mic_supervisor.config.document import Config
    from mic_supervisor.converge.events import Event

_ASK_TIMEOUT = 10.0  # seconds for the daemon to answer a question
_COMPLETION_TIMEOUT = 2.0  # seconds that somebody who types waits for it


class Alone:
    """A session in this process, for a machine without a daemon.

    `file` or `config` replace the configured file. What changes anything holds the scope's lock,
    under the name `command`, which is waited for for `lock_timeout` seconds.
    """

    def __init__(
        self,
        *,
        file: Path | None = None,
        config: Config | None = None,
        command: str = "",
        lock_timeout: float = 30.0,
    ) -> None:
        self._file = file
        self._config = config
        self._command = f"mic-supervisor {command}"
        self._lock_timeout = lock_timeout
        self._machine: Machine | None = None  # kept between questions: it holds NVML open

    def machine(self) -> Machine:
        from mic_supervisor.cli import wiring

        if self._machine is None:
            self._machine = wiring.machine(wiring.settings(), create_key=False)
        return self._machine

    def call(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        *,
        emit: Callable[[Event], None] = lambda _event: None,
        timeout: float | None = None,  # noqa: ARG002 - as a daemon's client has it
    ) -> Any:
        """The method's result, as from a daemon. Raises MicError."""
        import asyncio

        from mic_supervisor.cli import wiring
        from mic_supervisor.converge.session import QUESTIONS
        from mic_supervisor.daemon.generations import unconfirmed
        from mic_supervisor.host.lock import writer

        orders = method not in QUESTIONS
        found = self.machine().settings
        lock = writer(found.lock_path, self._command, self._lock_timeout)
        with lock if orders else nullcontext():
            machine = wiring.machine(found, create_key=True) if orders else self.machine()
            config = self._config or wiring.load_config(found, self._file, machine.registry)
            doubt = None
            if config.path.resolve() == found.config.resolve() and config.hash:
                written = str((params or {}).get("hash", ""))
                state, registry = machine.state, machine.registry
                doubt = unconfirmed(state, config, registry, found, written=written)
            return asyncio.run(_call(machine, config, doubt, method, params or {}, emit, orders))


async def _call(
    machine: Machine,
    config: Config,
    doubt: str | None,
    method: str,
    params: Mapping[str, Any],
    emit: Callable[[Event], None],
    orders: bool,
) -> Any:
    import asyncio

    from mic_supervisor.clocks import Clock
    from mic_supervisor.converge.claims import ClaimDesk
    from mic_supervisor.converge.events import Event, Events, Order
    from mic_supervisor.converge.loop import Converger
    from mic_supervisor.converge.outcome import Snapshots
    from mic_supervisor.converge.session import Session
    from mic_supervisor.converge.snapshot import ConfigState, Reloaded
    from mic_supervisor.daemon.generations import accept, number_of, waits_for_word
    from mic_supervisor.daemon.log import History
    from mic_supervisor.desired import FileDesired
    from mic_supervisor.host import who_asks

    clock, events = Clock(), Events()
    desired = FileDesired(config, machine.registry, machine.settings.instance_data)
    converger = Converger(
        sources=machine.sources,
        desired=desired,
        context=machine.context,
        memory=machine.state.memory(),
        save=machine.state.save_memory if orders else lambda _memory: None,
        events=events,
        clock=clock,
    )
    if orders:  # as a daemon does; who only asks may not even read it
        history = History(machine.state.path / "history.jsonl")

        def record(event: Event) -> None:
            try:
                history.add(event)
            except MicError as error:
                converger.amiss.note("history", error.message)

        events.listeners.append(record)
    converger.claims = ClaimDesk(desired, None, events, clock, converger.wake)
    converger.unconfirmed = lambda: doubt
    confirmed = False
    converger.removal_confirmed = lambda _hash: confirmed or not orders
    snapshots = Snapshots(converger, clock.steady, complete=True)
    converger.observers.append(snapshots.on_snapshot)
    state = ConfigState(
        path=str(config.path),
        hash=config.hash,
        generation=number_of(machine.state, config.hash),
        loaded_at=clock.wall(),
        last_reload_ok=True,
        error=None,
        error_at=None,
        unconfirmed=doubt,
        profile=config.profile,
        models={name: model.backend for name, model in config.models.items()},
    )

    async def reload(confirm: bool, _written: str, order: Order) -> Reloaded:
        nonlocal confirmed, doubt
        waits = waits_for_word(machine.state, machine.settings)
        if doubt is not None and not confirm and waits:
            return Reloaded(changed=False, generation=0, unconfirmed=doubt)
        if config.hash:
            try:
                accept(machine.state, config, confirmed=confirm)
            except MicError as error:
                converger.amiss.note("generation", error.message)
        confirmed, doubt = confirm, None
        text = f"{order.command}, without a daemon"
        about = ("configuration", text)
        events.emit(Event("config", clock.wall(), *about, cause=order.command, by=order.by))
        return Reloaded(changed=False, generation=0)

    session = Session(
        scope=machine.settings.scope,
        path=config.path,
        converger=converger,
        events=events,
        snapshots=snapshots,
        config=lambda: state,
        history=tuple,
        reload=reload,
        by=who_asks(os.getuid(), os.getpid()),
        runtimes=machine.sources.runtimes,
        own=True,
    )
    answer = asyncio.ensure_future(session.methods()[method](params, emit))
    rounds = asyncio.create_task(converger.run())
    try:
        await asyncio.wait({answer, rounds}, return_when=asyncio.FIRST_COMPLETED)
        if rounds.done():
            rounds.result()  # a defect
        result = await answer
        if orders:
            await converger.finish()
        return result
    finally:
        answer.cancel()
        rounds.cancel()
        await converger.close()


def daemon() -> Client | None:
    """One request to the daemon; None: none runs."""
    return Client.connect(daemon_socket(), setting("MIC_SCOPE", DEFAULT_SCOPE, os.environ))


def daemon_socket() -> Path:
    """Where the daemon of this scope listens, if it runs."""
    scope = setting("MIC_SCOPE", DEFAULT_SCOPE, os.environ)
    return Path(setting("MIC_SOCKET", socket_of(scope), os.environ))


def ask(method: str, params: Mapping[str, Any] | None = None) -> Any:
    """What the daemon answers to a question; without one, what this machine shows."""
    return (daemon() or Alone()).call(method, params, timeout=_ASK_TIMEOUT)


def named_gpus(name: str, status: Mapping[str, Any]) -> frozenset[str]:
    """The UUIDs of the GPUs in a status document that a person calls so; empty: none."""
    from mic_supervisor.plan.selection import gpus_called

    # An older daemon does not say where a GPU is plugged in.
    there = [(gpu["uuid"], gpu["index"], gpu.get("pci_bus_id")) for gpu in status["gpus"]]
    return gpus_called(name, there)


def known_names() -> dict[str, list[str]]:
    """For completion: models, instances, GPUs and profiles, as the file and the daemon name them.

    Never raises, and says nothing: somebody is typing.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.cli import wiring
    from mic_supervisor.config.document import NONE
    from mic_supervisor.config.names import shown_id

    models, instances, gpus, profiles = set[str](), set[str](), set[str](), set[str]()
    with suppress(MicError, OSError):
        config = wiring.load_config(wiring.settings(), None, Registry())
        models |= {*config.models}
        gpus |= {key.value for entry in config.entries for key in entry.keys}
        profiles |= {NONE, *config.profiles}
    with suppress(MicError, OSError):
        if (client := daemon()) is not None:
            status = client.call("status", timeout=_COMPLETION_TIMEOUT)
            instances |= {shown_id(row["id"], row["model"]) for row in status["instances"]}
            models |= {row["model"] for row in status["instances"]}
            gpus |= {str(gpu["index"]) for gpu in status["gpus"] if gpu["index"] is not None}
            gpus |= {gpu["uuid"] for gpu in status["gpus"] if gpu.get("parent") is not None}
    return {
        "models": sorted(models - {NONE}),
        "instances": sorted(instances),
        "gpus": sorted(gpus, key=lambda gpu: (len(gpu), gpu)),
        "profiles": sorted(profiles),
    }


def reach() -> None:
    """Before a file is edited: a daemon that runs and cannot be asked is an error."""
    if (client := daemon()) is not None:
        client.call("ping", timeout=_ASK_TIMEOUT)


def order(
    method: str,
    params: Mapping[str, Any],
    *,
    command: str,
    file: Path | None = None,
    config: Config | None = None,
    lock_timeout: float = 30.0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Have something done, with progress. `through_daemon` in the answer says who did it."""
    from mic_supervisor.cli.progress import follow

    client = daemon()
    alone = Alone(file=file, config=config, command=command, lock_timeout=lock_timeout)
    indices = {} if quiet else _indices(client, alone)
    with follow(indices, quiet=quiet) as shown:
        given = {**params, "command": command}
        document: dict[str, Any] = (client or alone).call(method, given, emit=shown)
    return document | {"through_daemon": client is not None}


def _indices(client: Client | None, alone: Alone) -> dict[str, int]:
    """What the GPUs are called. The daemon has one answer per connection, and may go meanwhile."""
    if client is None:
        return alone.machine().sources.gpus.observe().indices
    again = daemon()
    gpus = again.call("status", timeout=_ASK_TIMEOUT)["gpus"] if again is not None else ()
    return {gpu["uuid"]: gpu["index"] for gpu in gpus if gpu["index"] is not None}
