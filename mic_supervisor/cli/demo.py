"""mic-supervisor demo"""

from __future__ import annotations

import click


@click.command(name="demo")
@click.option("--once", is_flag=True, help="End after the tour, with 0 if every step worked.")
def command(once: bool) -> None:
    """A guided tour on four simulated GPUs, with a small model server for each model.

    Everything is real but the GPUs and the models: the same commands, daemon and processes. It
    needs no root, no Docker and no GPU, uses a scope, directories and ports of its own, and removes
    all of it at the end. After the tour it stays up until Ctrl-C.
    """
    from mic_supervisor.demo.tour import play

    play(once=once)
