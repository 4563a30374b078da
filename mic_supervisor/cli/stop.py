"""mic-supervisor stop"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import operate, wiring
from mic_supervisor.cli.session import reach
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.config.document import GpuKey


@click.command(name="stop")
@click.argument("model", required=False)
@operate.gpu_option
def command(model: str | None, keys: tuple[GpuKey, ...]) -> int:
    """Have gpus.yaml keep a GPU empty, and wait until it is.

    The file keeps its comments and its layout; a range is split, and the GPU gets `none`. With
    MODEL nothing happens if another one is there. Exits with 0 when the GPU is empty of ours.
    """
    from mic_supervisor.config.names import composed

    found = wiring.settings()
    where = operate.shown(keys)
    what = f"stop {model} on {where}" if model else f"stop what is on {where}"
    reach()
    with operate.opened(found, keys, what) as file:
        if model is not None and composed(model) != file.model:
            has = file.model or ("none" if file.entry is not None else "no entry")
            raise MicError(
                f"cannot {what}: {found.config} has {has} there",
                hint="see `mic-supervisor status`",
            )
        operate.check_paused(found, file, file.model)
        if file.entry is not None and file.model is None:
            click.echo(f"{found.config}: {where} is none already.")
        else:
            before = file.model
            file.put(None)
            operate.told_edit(found.config, where, before, "none")
    document = operate.apply_edit(found, "stop", file.uuids)
    if not file.uuids:
        raise MicError(
            f"cannot tell whether {where} is empty: that GPU is not to be seen",
            hint="see `mic-supervisor gpus`",
        )
    left = operate.on(document, file.uuids)
    if left:
        operate.show(left, document)
        return 1
    click.echo(f"{where} is empty.")
    operate.tell_left_out(document)
    return 0
