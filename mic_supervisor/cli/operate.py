"""What start, stop, restart and retry have in common: one entry or instance, and its outcome."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import wiring
from mic_supervisor.errors import ConfigError, LockHeld, MicError
from mic_supervisor.records import dataclass

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config, GpuEntry, GpuKey
    from mic_supervisor.config.edit_file import LockedFile
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.daemon.client import Client
    from mic_supervisor.model import GpuInventory
    from mic_supervisor.plan.memory import Paused
    from mic_supervisor.plan.selection import Names

_ASK_TIMEOUT = 10.0  # seconds for the daemon to answer a question


class GpuParameter(click.ParamType["tuple[GpuKey, ...]"]):
    """One GPU by index, UUID or PCI bus id, or all of a group, as in 3,4."""

    name = "gpu"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[GpuKey, ...]:
        from mic_supervisor.config.gpu_keys import BadKey, parse_gpu_key

        if isinstance(value, tuple):
            return value
        try:
            selection = parse_gpu_key(value)
        except BadKey as error:
            self.fail(f"{value}: {error}" + (f"; {error.hint}" if error.hint else ""), param, ctx)
        if selection.each and len(selection.keys) > 1:
            self.fail(f"{value} is a range: name one GPU at a time", param, ctx)
        return selection.keys


gpu_option = click.option(
    "--gpu",
    "keys",
    type=GpuParameter(),
    required=True,
    metavar="GPU",
    help="Its index, UUID or PCI bus id; 3,4 for an instance over both.",
)


def shown(keys: Iterable[GpuKey]) -> str:
    """ "GPU 1", "GPU 3,4", "GPU-f15ae561-…"."""
    keys = tuple(keys)
    if all(key.kind == "index" for key in keys):
        return "GPU " + ",".join(key.value for key in keys)
    return ",".join(key.value for key in keys)


def way_out(keys: Iterable[GpuKey]) -> str:
    return f"stop it first: mic-supervisor stop --gpu {','.join(key.value for key in keys)}"


# --- the file -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """The file while nobody else may edit it, and what it says of the GPUs in question.

    `entry` holds any of them, None where none is listed; `keys` are the GPUs as the file spells
    them, `uuids` what is known of their identity. `doubt` says why the file as it is now is not
    what is followed.
    """

    file: LockedFile
    config: Config
    entry: GpuEntry | None
    keys: tuple[GpuKey, ...]
    uuids: tuple[str, ...]
    action: str
    doubt: str | None

    @property
    def model(self) -> str | None:
        """What the file has there; None for `none`, and for what is not listed."""
        return self.entry.model if self.entry is not None else None

    def put(self, model: str | None) -> bool:
        """Have the file say so; False where it does already. Raises MicError, changing nothing."""
        from mic_supervisor.config.doubt import WAY_OUT
        from mic_supervisor.config.edit import assign

        path = self.config.path
        if self.doubt is not None:
            # With this edit in it, the file would not look cut any more.
            raise MicError(f"cannot {self.action}: {self.doubt}", hint=WAY_OUT)
        if self.entry is not None and self.entry.place.file != str(path):
            raise MicError(
                f"cannot {self.action}: {self.entry.place} sets it, and drop-ins win over {path}",
                hint=f"edit {self.entry.place.file}, then: mic-supervisor apply",
            )
        text = self.file.text
        try:
            after = assign(text, self.entry, self.keys, model)
        except MicError as error:
            raise MicError(f"cannot {self.action}: {error}", hint=error.hint) from error
        if after == text:
            return False
        data = self.file.encode(after)
        found = wiring.settings()
        try:
            _load(found, data)
        except ConfigError as error:
            raise ConfigError(
                error.message, rendered=error.rendered, hint=f"{path} was left as it was"
            ) from error
        self.file.replace(data)
        return True


def check_paused(found: Settings, file: Opened, model: str | None) -> None:
    """Refuse to write what would not be followed. Raises MicError."""
    from mic_supervisor.plan.pauses import held_by

    machine = wiring.machine(found, create_key=False)
    paused = machine.state.memory().paused
    if not paused:
        return
    indices = {gpu.uuid: gpu.index for gpu in machine.sources.gpus.observe().gpus}
    held = held_by(paused, model or "", file.uuids, indices, time.time())
    if held is not None:
        raise MicError(f"cannot {file.action}: {held[0]}", hint=held[1])


@contextmanager
def opened(found: Settings, keys: tuple[GpuKey, ...], action: str) -> Iterator[Opened]:
    """Lock, read and check the file, and find the GPUs in it, however they are spelled there.

    `action` is what is to be done, for errors: "start MAM on GPU 1".
    """
    from mic_supervisor.config.edit_file import locked

    with locked(found.config) as file:
        config = _load(found, file.data)
        entry, keys, uuids = _find(found, config, keys, action)
        why = _doubt(wiring.machine(found, create_key=False), config)
        yield Opened(file, config, entry, keys, uuids, action, why)


def _doubt(machine: wiring.Machine, config: Config) -> str | None:
    """Why the file is not to be followed as it is. A first file has nothing to lose."""
    from mic_supervisor.daemon.generations import has_accepted

    return wiring.unconfirmed(machine, config) if has_accepted(machine.state) else None


def _load(found: Settings, data: bytes) -> Config:
    from mic_supervisor.config.load import load

    return load(found.config, Registry(), environ=found.environ, data=data)


def _find(
    found: Settings, config: Config, keys: tuple[GpuKey, ...], action: str
) -> tuple[GpuEntry | None, tuple[GpuKey, ...], tuple[str, ...]]:
    """The entry of these GPUs, how it spells them, and their UUIDs."""
    from mic_supervisor.plan.bind import bind

    machine = wiring.machine(found, create_key=False)
    inventory = machine.sources.gpus.observe()
    bindings = machine.state.memory().bindings
    of_file = {
        gpu.uuid: (bound.entry, key)
        for bound in bind(config.entries, inventory, bindings).entries
        for key, gpu in zip(bound.entry.keys, bound.gpus, strict=True)
    }
    by_key = {key: uuid for uuid, (_, key) in of_file.items()}
    entry: GpuEntry | None = None
    spelled: list[GpuKey] = []
    uuids: list[str] = []
    for key in keys:
        same = next((one for one in config.entries if key in one.keys), None)
        uuid = by_key.get(key)
        if same is None:
            uuid = _uuid(key, inventory, bindings, action)
            same, key = of_file.get(uuid, (None, key))
        entry = entry or same
        spelled.append(key)
        uuids += [uuid] if uuid is not None else []
    return entry, tuple(spelled), tuple(uuids)


def _uuid(key: GpuKey, inventory: GpuInventory, kept: Any, action: str) -> str:
    from mic_supervisor.config.document import GpuEntry, Place
    from mic_supervisor.plan.bind import bind

    if inventory.error is not None:
        raise MicError(
            f"cannot {action}: which GPU that is, is unknown: {inventory.error}",
            hint="name it as the file does, or see `mic-supervisor gpus`",
        )
    binding = bind([GpuEntry((key,), None, Place("", 0, 0))], inventory, kept)
    if binding.unsatisfiable:
        lost = binding.unsatisfiable[0]
        raise MicError(f"cannot {action}: {lost.reason}", hint=lost.hint)
    return binding.entries[0].gpus[0].uuid


# --- the machine --------------------------------------------------------------------------------


def daemon(found: Settings) -> Client | None:
    from mic_supervisor.daemon.client import Client

    return Client.connect(found.socket)


def check_daemon(found: Settings) -> bool:
    """Whether one runs. Before the file is edited: one that cannot be asked is an error."""
    client = daemon(found)
    if client is not None:
        client.call("ping", timeout=_ASK_TIMEOUT)
    return client is not None


def apply_edit(found: Settings, command: str, uuids: Collection[str]) -> dict[str, Any]:
    """Have the machine follow the edited file on these GPUs: the document of `apply`.

    Confirms no removal. What else the file asks for is left to `apply`, or to the daemon, which
    does it anyhow. Where it is not known which GPUs these are, the whole file is followed.
    """
    client = daemon(found)
    if client is not None:
        params = {"path": str(found.config), "targets": [*uuids]}
        return ask(found, client, "edited", params)
    try:
        return alone(found, command, forgive=(), gpus=uuids)
    except LockHeld as error:
        raise LockHeld(
            error.message, hint="the file is edited; when that is over: mic-supervisor apply"
        ) from error


def ask(found: Settings, client: Client, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Through the daemon, with progress."""
    from mic_supervisor.cli.apply import indices_of
    from mic_supervisor.cli.progress import follow

    with follow(indices_of(found), quiet=False) as told:
        document: dict[str, Any] = client.call(method, params, tell=told)
    return document


def alone(
    found: Settings,
    command: str,
    *,
    forgive: Collection[str],
    force: Collection[str] = (),
    gpus: Collection[str] = (),
) -> dict[str, Any]:
    """Without a daemon. `force` are instances to restart, `forgive` those to be tried anew.

    With `gpus` only what is on these is changed.
    """
    from mic_supervisor.cli.apply import converge_once
    from mic_supervisor.config.doubt import WAY_OUT
    from mic_supervisor.converge.lock import writer
    from mic_supervisor.converge.state import host_name
    from mic_supervisor.daemon.generations import accept
    from mic_supervisor.plan.selection import Selection
    from mic_supervisor.views.apply import apply_document

    with writer(found.lock_path, f"mic-supervisor {command}", 30.0):
        machine = wiring.machine(found, create_key=True)
        targets = Selection(gpus=frozenset(gpus)) if gpus else None
        context = replace(
            machine.context, confirmed=False, forced=frozenset(force), targets=targets
        )
        config = wiring.load_config(found, None, machine.registry)
        why = _doubt(machine, config)
        if why is not None:
            raise MicError(f"cannot {command}: {why}", hint=WAY_OUT)
        accept(machine.state, config, confirmed=False)
        snapshot, errors = converge_once(replace(machine, context=context), config, forgive=forgive)
    document = apply_document(snapshot, errors, host_name(), targets, snapshot.plan.left_out)
    return asdict(document)


@dataclass(slots=True)
class Kept:
    """What is paused, to be changed, and what there is to be named."""

    paused: Paused
    names: Names
    indices: dict[str, int]


@contextmanager
def memory(found: Settings, command: str) -> Iterator[Kept]:
    """Change what is paused, without a daemon: for as long as nobody else may converge."""
    from mic_supervisor.converge.lock import writer

    with writer(found.lock_path, command, 30.0):
        machine = wiring.machine(found, create_key=True)
        before = machine.state.memory()
        names = wiring.names(machine, wiring.load_config(found, None, machine.registry), before)
        indices = {gpu.uuid: gpu.index for gpu in names.inventory.gpus}
        kept = Kept(before.paused, names, indices)
        yield kept
        if kept.paused != before.paused:
            machine.state.save_memory(replace(before, paused=kept.paused))


def instances(found: Settings, name: str, action: str) -> list[str]:
    """The ids of the instances that the file has under this name or id, but for paused ones.

    Raises MicError; also where all of them are paused.
    """
    from mic_supervisor.config.names import composed
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.plan.pauses import free_of_pauses

    machine = wiring.machine(found, create_key=False)
    config = wiring.load_config(found, None, machine.registry)
    provider = FileDesired(config, machine.registry, found.instance_data)
    kept, inventory = machine.state.memory(), machine.sources.gpus.observe()
    state = provider.state(inventory, kept.bindings)
    chosen = [
        (item.id, item.model, item.gpus)
        for item in state.instances
        if composed(name) in (item.id, item.model)
    ]
    if not chosen:
        known = ", ".join(item.id for item in state.instances)
        raise MicError(
            f"cannot {action}: there is no instance {name!r}",
            hint=f"there is {known}" if known else None,
        )
    indices = {gpu.uuid: gpu.index for gpu in inventory.gpus}
    return free_of_pauses(chosen, kept.paused, action, indices, time.time())


def failed(found: Settings, chosen: Collection[str]) -> list[str]:
    """Those of these instances that failed since they were last well for long."""
    kept = wiring.machine(found, create_key=False).state.memory()
    return [name for name in chosen if kept.of(name).troubled]


def on(document: dict[str, Any], uuids: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a document that have any of these GPUs."""
    return [
        row for row in document["instances"] if {gpu["uuid"] for gpu in row["gpus"]} & set(uuids)
    ]


def named(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of an instance, or of a model."""
    from mic_supervisor.config.names import composed

    return [row for row in document["instances"] if composed(name) in (row["id"], row["model"])]


def show(rows: list[dict[str, Any]], document: dict[str, Any]) -> int:
    """Print how these ended; the exit status: 0 all well, 3 some, 1 none."""
    from mic_supervisor.cli.apply import show_rows

    show_rows(rows, document)
    good = [row["as_desired"] for row in rows]
    return 0 if good and all(good) else 3 if any(good) else 1


def tell_left_out(document: dict[str, Any]) -> None:
    """What else the file asks for; a daemon sees to that by itself."""
    from mic_supervisor.plan.render import left_out_line

    for item in document["left_out"]:
        click.echo(left_out_line(item["instance"], item["action"], item["cause"]))


def told_edit(path: Path, where: str, before: str | None, after: str) -> None:
    was = f"was {before}" if before is not None else "was not listed"
    click.echo(f"{path}: {where} is {after} now, {was}.")
