"""What start, stop, restart and retry have in common: one entry or instance, and its outcome."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import wiring
from mic_supervisor.cli.session import order
from mic_supervisor.errors import ConfigError, LockHeld, MicError

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config, GpuEntry, GpuKey
    from mic_supervisor.config.edit import LockedFile
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.model import GpuInventory


class GpuParameter(click.ParamType["tuple[GpuKey, ...]"]):
    """One GPU by index, UUID or PCI bus id, or all of a group, as in 3,4."""

    name = "gpu"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[GpuKey, ...]:
        from mic_supervisor.config.names import BadKey, parse_gpu_key

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
        from mic_supervisor.config.document import WAY_OUT
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
    from mic_supervisor.config.edit import locked

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
    from mic_supervisor.desired.bind import bind

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
    from mic_supervisor.desired.bind import bind

    if inventory.error is not None:
        raise MicError(
            f"cannot {action}: which GPU that is, is unknown: {inventory.told}",
            hint="name it as the file does, or see `mic-supervisor gpus`",
        )
    binding = bind([GpuEntry((key,), None, Place("", 0, 0))], inventory, kept)
    if binding.unsatisfiable:
        lost = binding.unsatisfiable[0]
        raise MicError(f"cannot {action}: {lost.reason}", hint=lost.hint)
    return binding.entries[0].gpus[0].uuid


# --- the machine --------------------------------------------------------------------------------


def apply_edit(found: Settings, command: str, uuids: Collection[str]) -> dict[str, Any]:
    """Have the machine follow the edited file on these GPUs: the document of `apply`.

    Confirms no removal. What else the file asks for is left to `apply`, or to the daemon, which
    does it anyhow. Where it is not known which GPUs these are, the whole file is followed.
    """
    params = {"path": str(found.config), "targets": [*uuids]}
    try:
        return order("edited", params, command=command)
    except LockHeld as error:
        raise LockHeld(
            error.message, hint="the file is edited; when that is over: mic-supervisor apply"
        ) from error


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
