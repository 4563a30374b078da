"""mic-supervisor start"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import operate, wiring
from mic_supervisor.cli.session import ask, reach
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.cli.operate import Opened
    from mic_supervisor.config.document import GpuKey


@click.command(name="start")
@click.argument("model")
@operate.gpu_option
def command(model: str, keys: tuple[GpuKey, ...]) -> int:
    """Give a GPU to MODEL in gpus.yaml, and wait until it is ready.

    The file keeps its comments and its layout; a range is split. A GPU that another model has is
    not taken from it: stop that one first. What else the file asks for is told as left out, and is
    up to apply, or to the daemon. Exits with 0 when the model is ready, 1 otherwise.
    """
    from mic_supervisor.config.names import composed

    found = wiring.settings()
    model, where = composed(model), operate.shown(keys)
    reach()
    with operate.opened(found, keys, f"start {model} on {where}") as file:
        _check_model(file, model)
        _check_free(file, model, where)
        operate.check_paused(found, file, model)
        before = "none" if file.entry is not None else None
        if file.model == model:
            click.echo(f"{found.config}: {where} is {model} already.")
        else:
            _check_unlisted(file, model, where)
            file.put(model)
            operate.told_edit(found.config, where, before, model)
    document = operate.apply_edit(found, f"start {model}", file.uuids)
    rows = operate.on(document, file.uuids) or operate.named(document, model)
    code = operate.show(rows, document)
    operate.tell_left_out(document)
    return code


def _check_model(file: Opened, model: str) -> None:
    from mic_supervisor.config.diagnostics import closest, show

    if model in file.config.models:
        return
    meant = closest(model, file.config.models)
    known = ", ".join(sorted(file.config.models)) or "none"
    raise MicError(
        f"cannot {file.action}: {file.config.path} has no model {show(model)}",
        hint=f"did you mean {meant}?" if meant is not None else f"known are {known}",
    )


def _check_free(file: Opened, model: str, where: str) -> None:
    if file.model in (None, model):
        return
    assert file.entry is not None  # it has a model
    holds = operate.shown(file.entry.keys)
    raise MicError(
        f"cannot {file.action}: {where} is taken by {file.model}"
        + (f", which has {holds}" if len(file.entry.keys) > 1 else ""),
        hint=operate.way_out(file.entry.keys),
    )


def _check_unlisted(file: Opened, model: str, where: str) -> None:
    """What runs there and the file no longer names would be stopped: that is for `stop` to say."""
    for row in operate.on(ask("status"), file.uuids):
        alive = row["container_id"] or row["unit"] or row["pid"]
        if alive and row["model"] != model and file.entry is None:
            raise MicError(
                f"cannot {file.action}: {where} is taken by {row['model']} ({row['id']}), "
                "which the file no longer names",
                hint=operate.way_out(file.keys),
            )
