"""The daemon as a whole, on runtimes in memory."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.settings import load_settings
from mic_supervisor.converge.observe import Sources
from mic_supervisor.converge.state import StateDir
from mic_supervisor.daemon.supervisor import Supervisor
from tests.unit.converge.rig import TIMEOUT, Engine, Gpus, run
from tests.unit.plan import builders as b

FILE = """\
version: 1
models: {a: {backend: container, image: a}}
gpus: {0: a}
"""


def daemon(home: Path, engine: Engine, **settings: str) -> Supervisor:
    """A daemon of its own scope, with a file that asks for one container."""
    (home / "gpus.yaml").write_text(FILE)
    given = {
        "MIC_CONFIG": str(home / "gpus.yaml"),
        "MIC_STATE_DIR": str(home / "state"),
        "MIC_RUN_DIR": str(home / "run"),
        "MIC_SOCKET": str(home / "mic.sock"),
        "MIC_SCOPE": "test",
        **settings,
    }
    found = load_settings(given, home / "mic.env")
    return Supervisor(
        settings=found,
        registry=Registry(),
        sources=Sources(Gpus(), {engine.name: engine}, lambda: ()),  # type: ignore[arg-type, dict-item]
        state=StateDir(found.scope_state_dir),
        context=b.CONTEXT,
        renew_lock=lambda: None,
    )


def test_a_file_that_is_still_read_when_everything_is_stopped_starts_nothing(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        engine = Engine()
        supervisor = daemon(tmp_path, engine, MIC_ON_STOP="stop")
        running = asyncio.create_task(supervisor.run())

        async def until(enough: Any) -> None:
            async with asyncio.timeout(TIMEOUT):
                while not enough():
                    await asyncio.sleep(0.01)

        await until(lambda: engine.running() == ["a-aaaaaaaa"])
        read, reading, over = supervisor._generations.reload, threading.Event(), threading.Event()

        def slowly(*given: Any, **more: Any) -> Any:
            reading.set()
            over.wait(TIMEOUT)
            return read(*given, **more)

        supervisor._generations.reload = slowly  # type: ignore[method-assign]
        engine.gates["stop a-aaaaaaaa"] = threading.Event()
        supervisor._hung_up()
        await until(reading.is_set)
        supervisor._stopping.set()
        await until(lambda: "stop a-aaaaaaaa" in engine.calls)
        over.set()
        await until(lambda: not supervisor._asked)
        engine.gates["stop a-aaaaaaaa"].set()
        await running
        assert engine.running() == []

    run(body)
