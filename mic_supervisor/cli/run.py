"""mic-supervisor run"""

from __future__ import annotations

import asyncio
import os

import click

from mic_supervisor.cli import wiring

_LOCK_PATIENCE = 60.0  # seconds: an apply that runs now is let finish


@click.command(name="run")
def command() -> int:
    """The daemon: keep this machine as the file says, for as long as it is up.

    What systemd starts. Ends with SIGTERM; instances keep running unless MIC_ON_STOP=stop.
    """
    from mic_supervisor.daemon.log import set_up
    from mic_supervisor.daemon.supervisor import Supervisor
    from mic_supervisor.host.lock import writer
    from mic_supervisor.http.server import serving

    found = wiring.settings()
    serve = serving(found)
    set_up(found.log_level, found.log_format, journal="JOURNAL_STREAM" in os.environ)
    with writer(found.lock_path, "mic-supervisor run", _LOCK_PATIENCE):
        machine = wiring.machine(found, create_key=True)

        async def supervise() -> None:
            supervisor = Supervisor(
                settings=found,
                registry=machine.registry,
                sources=machine.sources,
                state=machine.state,
                context=machine.context,
            )
            await supervisor.run(serve)

        # Not asyncio.run, which waits without an end for threads that hang.
        asyncio.new_event_loop().run_until_complete(supervise())
    return 0
