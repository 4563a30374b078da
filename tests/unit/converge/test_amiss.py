"""What cannot be saved ends nothing, is said once, and is saved as soon as that can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from mic_supervisor.converge.events import Event
from mic_supervisor.converge.state import StateDir
from mic_supervisor.errors import MicError
from mic_supervisor.plan.memory import Memory
from tests.unit.converge.rig import A, Engine, File, Rig, converging, on, run

FULL = MicError("cannot write memory.json: No space left on device")


def warnings(rig: Rig) -> list[Event]:
    return [event for event in rig.told if event.kind == "warning"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "cannot write memory.json: No space left on device; "),
        (OSError(30, "Read-only file system"), "cannot save what is remembered: “OSError: "),
    ],
)
def test_converging_goes_on_where_nothing_can_be_saved(error: Exception, said: str) -> None:
    """From a start over a replacement: the memory is saved before each stop, too."""
    refuses = True
    saved: list[Memory] = []

    def save(memory: Memory) -> None:
        if refuses:
            raise error
        saved.append(memory)

    async def body() -> None:
        nonlocal refuses
        engine, file = Engine(), File(A)
        async with converging(file, engine, save=save) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            new = on("a", 0, start_timeout=7.0)
            file.says(new)
            rig.converger.force([A.id])
            await rig.until(lambda: f"restart {A.id}" in engine.calls)
            await rig.phases(a_aaaaaaaa="ready")
            (event,) = warnings(rig)
            assert event.text.startswith(said)
            snapshot = rig.converger.snapshot
            assert snapshot is not None
            assert [text for text in snapshot.plan.warnings if text.startswith(said)]
            refuses = False
            await rig.until(lambda: saved and not rig.converger.snapshot.plan.warnings)
            assert saved[-1].of(A.id).started is not None

    run(body)


def test_a_key_that_cannot_be_kept_is_used_and_kept_with_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("")  # a file in its place: not even root can write into that
    state = StateDir(path)
    key = state.key(create=True)
    with pytest.raises(MicError, match="cannot write"):
        state.save_memory(Memory())
    path.unlink()
    state.save_memory(Memory())
    assert StateDir(path).key(create=True) == key
