"""start, stop and switch: they edit the file, and wait until the machine follows it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.apply import report
from mic_supervisor.cli.common import completes
from mic_supervisor.cli.progress import named, on, print_left_out, show
from mic_supervisor.cli.session import Alone, ask, order, reach
from mic_supervisor.config.document import NONE
from mic_supervisor.config.names import composed
from mic_supervisor.errors import ConfigError, LockHeld, MicError

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config, GpuEntry, GpuKey, Location
    from mic_supervisor.config.edit import LockedFile
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.model import GpuInventory


class GpuParameter(click.ParamType["tuple[GpuKey, ...]"]):
    """One GPU by index, UUID or PCI bus id, or all of a group, as in 3,4."""

    name = "gpu"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[GpuKey, ...]:
        from mic_supervisor.config.document import BadKey, parse_gpu_key

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
    shell_complete=completes("gpus"),
    help="Its index, UUID or PCI bus id; 3,4 for an instance over both.",
)


@click.command(name="start")
@click.argument("model", shell_complete=completes("models"))
@gpu_option
def start(model: str, keys: tuple[GpuKey, ...]) -> int:
    """Give a GPU to MODEL in gpus.yaml, and wait until it is ready.

    The file keeps its comments and its layout; a range is split. A GPU that another model has is
    not taken from it: stop that one first. What else the file asks for is shown as left out, and is
    up to apply, or to the daemon. Exits with 0 when the model is ready, 1 otherwise.
    """
    found = wiring.settings()
    model, where, written = composed(model), shown(keys), ""
    reach()
    with opened(found, keys, f"start {model} on {where}") as file:
        _check_model(file, model)
        _check_in_service(file)
        _check_free(file, model, where)
        check_paused(file, model)
        before = file.entry.value if file.entry is not None else None
        if file.model == model:
            click.echo(f"{found.config}: {where} is {model} already.")
        else:
            _check_unlisted(file, model, where)
            written = file.put(model)
            print_edit(found.config, where, before, model, file.entry)
    document = apply_edit(found, f"start {model}", file.uuids, written)
    rows = on(document, file.uuids) or named(document, model)
    code = show(rows, document)
    print_left_out(document)
    return code


@click.command(name="stop")
@click.argument("model", required=False, shell_complete=completes("models"))
@gpu_option
def stop(model: str | None, keys: tuple[GpuKey, ...]) -> int:
    """Have gpus.yaml keep a GPU empty, and wait until it is.

    The file keeps its comments and its layout; a range is split, and the GPU gets `none`. With
    MODEL nothing happens if another one is there. Exits with 0 when the GPU is empty of ours.
    """
    found = wiring.settings()
    where = shown(keys)
    what, written = (f"stop {model} on {where}" if model else f"stop what is on {where}"), ""
    reach()
    with opened(found, keys, what) as file:
        if model is not None and composed(model) != file.model:
            has = file.entry.value if file.entry is not None else "no entry"
            raise MicError(
                f"cannot {what}: {found.config} has {has} there", hint="see `mic-supervisor status`"
            )
        check_paused(file, file.model)
        if file.entry is not None and file.entry.value == NONE:
            click.echo(f"{found.config}: {where} is none already.")
        else:
            before = file.entry.value if file.entry is not None else None
            written = file.put(None)
            print_edit(found.config, where, before, "none", file.entry)
    document = apply_edit(found, f"stop on {where}", file.uuids, written)
    if not file.uuids:
        raise MicError(
            f"cannot find out whether {where} is empty: the driver does not list that GPU",
            hint="see `mic-supervisor gpus`",
        )
    left = on(document, file.uuids)
    if left:
        show(left, document)
        return 1
    if unknown := document.get("unreadable"):  # an earlier daemon does not say
        raise MicError(
            f"cannot find out whether {where} is empty: {'; '.join(unknown)}",
            hint="the file is edited, and is followed once that can be read",
        )
    click.echo(f"{where} is empty.")
    print_left_out(document)
    return 0


@click.command(name="switch")
@click.argument(
    "profile", metavar="[PROFILE|none]", required=False, shell_complete=completes("profiles")
)
def switch(profile: str | None) -> int:
    """Put a profile of gpus.yaml on, and wait until the machine follows it.

    Sets the key `profile` of the file, which keeps its comments and its layout, shows the plan and
    carries it out. `none` puts no profile on: then `gpus:` alone counts. A removal that has nothing
    to do with a profile is left to apply. Without a name it lists the profiles, and changes
    nothing. Exits as apply does.
    """
    if profile is None:
        return _list_profiles()
    from mic_supervisor.config.edit import locked, put_profile
    from mic_supervisor.config.profiles import no_profile

    found, name, written = wiring.settings(), composed(profile), ""
    action = f"switch to {name}"
    reach()
    machine = wiring.machine(found, create_key=False)
    with locked(found.config) as file:
        config = load_data(machine, file.data)
        path, before = config.path, config.profile or NONE
        if name not in (NONE, *config.profiles):
            raise no_profile(action, path, name, config.profiles)
        if name == before:
            click.echo(f"{path}: the profile is {name} already.")
        else:
            refuse_doubt(doubt_of(machine, config), action)
            if config.profile_at is not None:
                _check_own(path, config.profile_at, "`profile`", action)
            try:
                data = file.encode(put_profile(file.text, name))
            except MicError as error:
                raise MicError(f"cannot {action}: {error.message}", hint=error.hint) from error
            config = load_edited(machine, data)
            answer = Alone(config=config).call("plan", {"hash": config.hash})
            click.echo(answer["text"], nl=False)
            file.replace(data)
            written = config.hash
            click.echo(f"{path}: the profile is {name} now, was {before}.")
    with hint_at_apply():
        params = {"path": str(path), "hash": written}
        document = order("edited", params, command=f"switch {name}")
    report(document, limited=False)
    return int(document["exit_code"])


def _list_profiles() -> int:
    """Which profiles there are. The one that is on has a mark."""
    from mic_supervisor.backends.registry import Registry

    config = wiring.load_config(wiring.settings(), None, Registry())
    for name in (NONE, *config.profiles):
        click.echo(f"{'*' if name == (config.profile or NONE) else ' '} {name}")
    return 0


def _check_model(file: Opened, model: str) -> None:
    from mic_supervisor.config import diagnostics

    if model in file.config.models:
        return
    meant = diagnostics.closest(model, file.config.models)
    known = ", ".join(sorted(file.config.models)) or "none"
    raise MicError(
        f"cannot {file.action}: {file.config.path} has no model {diagnostics.show(model)}",
        hint=f"did you mean {meant}?" if meant is not None else f"known are {known}",
    )


def _check_in_service(file: Opened) -> None:
    """Refuse to write what would not be followed. Raises MicError."""
    from mic_supervisor.plan.selection import drained

    if (order := file.machine.state.memory().drained) is not None:
        why = drained(order, time.time())
        raise MicError(f"cannot {file.action}: {why}", hint=why.hint)


def _check_free(file: Opened, model: str, where: str) -> None:
    if file.model in (None, model):
        return
    assert file.entry is not None  # it has a model
    holds = shown(file.entry.keys)
    raise MicError(
        f"cannot {file.action}: {where} is taken by {file.model}"
        + (f", which has {holds}" if len(file.entry.keys) > 1 else ""),
        hint=way_out(file.entry.keys),
    )


def _check_unlisted(file: Opened, model: str, where: str) -> None:
    """What runs there and the file no longer names would be stopped: that is for `stop` to say."""
    for row in on(ask("status"), file.uuids):
        alive = row["container_id"] or row["unit"] or row["pid"]
        if alive and row["model"] != model and file.entry is None:
            raise MicError(
                f"cannot {file.action}: {where} is taken by {row['model']} ({row['id']}), "
                "which the file no longer names",
                hint=way_out(file.keys),
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

    machine: wiring.Machine
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

    def put(self, model: str | None) -> str:
        """Have the file say so: the hash of the document. Raises MicError, changing nothing."""
        from mic_supervisor.config.edit import assign

        path = self.config.path
        refuse_doubt(self.doubt, self.action)
        if self.entry is not None:
            _check_own(path, self.entry.location, "it", self.action)
        text = self.file.text
        try:
            after = assign(text, self.entry, self.keys, model)
        except MicError as error:
            raise MicError(f"cannot {self.action}: {error}", hint=error.hint) from error
        if after == text:
            return self.config.hash
        data = self.file.encode(after)
        config = load_edited(self.machine, data)
        self.file.replace(data)
        return config.hash


def refuse_doubt(doubt: str | None, action: str) -> None:
    """With an edit in it, a file would not look cut any more. Raises MicError."""
    from mic_supervisor.config.document import WAY_OUT

    if doubt is not None:
        raise MicError(f"cannot {action}: {doubt}", hint=WAY_OUT)


def _check_own(path: Path, at: Location, what: str, action: str) -> None:
    """Refuse to edit in the file what a drop-in sets. Raises MicError."""
    if at.file != str(path):
        raise MicError(
            f"cannot {action}: {at} sets {what}, and drop-ins win over {path}",
            hint=f"edit {at.file}, then: mic-supervisor apply",
        )


def load_edited(machine: wiring.Machine, data: bytes) -> Config:
    """The configuration as it is with `data` in the file. Raises ConfigError, for an edit."""
    try:
        return load_data(machine, data)
    except ConfigError as error:
        raise ConfigError(
            error.message,
            rendered=error.rendered,
            outline=error.outline,
            hint=f"{machine.settings.config} was left as it was",
        ) from error


def check_paused(file: Opened, model: str | None) -> None:
    """Refuse to write what would not be followed. Raises MicError."""
    from mic_supervisor.plan.selection import pause_on

    machine = file.machine
    paused = machine.state.memory().paused
    if not paused:
        return
    indices = machine.sources.gpus.observe().indices
    held = pause_on(paused, model or "", file.uuids, indices, time.time())
    if held is not None:
        raise MicError(f"cannot {file.action}: {held[0]}", hint=held[1])


@contextmanager
def opened(found: Settings, keys: tuple[GpuKey, ...], action: str) -> Iterator[Opened]:
    """Lock, read and check the file, and find the GPUs in it, however they are spelled there.

    `action` is what is to be done, for errors: "start MAM on GPU 1".
    """
    from mic_supervisor.config.edit import locked

    machine = wiring.machine(found, create_key=False)
    with locked(found.config) as file:
        config = load_data(machine, file.data)
        entry, keys, uuids = _find(machine, config, keys, action)
        doubt = doubt_of(machine, config)
        yield Opened(machine, file, config, entry, keys, uuids, action, doubt)


def doubt_of(machine: wiring.Machine, config: Config) -> str | None:
    """Why the file, which is as `config` now, is not what is followed; None: it is."""
    from mic_supervisor.daemon.generations import unconfirmed, waits_for_word

    state, found = machine.state, machine.settings
    if not waits_for_word(state, found):
        return None
    return unconfirmed(state, config, machine.registry, found)


def load_data(machine: wiring.Machine, data: bytes) -> Config:
    from mic_supervisor.config.load import load

    found = machine.settings
    return load(found.config, machine.registry, environ=found.environ, data=data)


def _find(
    machine: wiring.Machine, config: Config, keys: tuple[GpuKey, ...], action: str
) -> tuple[GpuEntry | None, tuple[GpuKey, ...], tuple[str, ...]]:
    """The entry of these GPUs, how it spells them, and their UUIDs."""
    from mic_supervisor.desired.bind import bind

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
    from mic_supervisor.config.document import GpuEntry, Location
    from mic_supervisor.desired.bind import bind

    if inventory.error is not None:
        raise MicError(
            f"cannot {action}: it is not known which GPU that is: {inventory.error_line}",
            hint="name it as the file does, or see `mic-supervisor gpus`",
        )
    binding = bind([GpuEntry((key,), None, Location("", 0, 0))], inventory, kept)
    if binding.unsatisfiable:
        lost = binding.unsatisfiable[0]
        raise MicError(f"cannot {action}: {lost.reason}", hint=lost.hint)
    return binding.entries[0].gpus[0].uuid


# --- the machine --------------------------------------------------------------------------------


def apply_edit(
    found: Settings, command: str, uuids: Collection[str], written: str
) -> dict[str, Any]:
    """Have the machine follow the edited file on these GPUs: the document of `apply`.

    `written` is the hash of the document that the edit made, "" where there was nothing to edit.

    Confirms no removal. What else the file asks for is left to `apply`, or to the daemon, which
    does it anyhow. Where it is not known which GPUs these are, the whole file is followed.
    """
    params = {"path": str(found.config), "targets": [*uuids], "hash": written}
    with hint_at_apply():
        return order("edited", params, command=command)


@contextmanager
def hint_at_apply() -> Iterator[None]:
    """Say what is left to do when the file is edited, and another command has the lock."""
    try:
        yield
    except LockHeld as error:
        raise LockHeld(
            error.message, hint="the file is edited; when that is over: mic-supervisor apply"
        ) from error


def print_edit(
    path: Path, where: str, before: str | None, after: str, entry: GpuEntry | None
) -> None:
    """`entry` is the one that was edited; a profile that it stands in is named."""
    was = f"was {before}" if before is not None else "was not listed"
    there = f" in profile {entry.profile}" if entry is not None and entry.profile else ""
    click.echo(f"{path}: {where} is {after} now{there}, {was}.")
