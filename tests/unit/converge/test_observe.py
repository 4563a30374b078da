"""What is made of the sources' answers: unexpected ones, and none at all."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from mic_supervisor.converge.observe import LastViews, Source
from mic_supervisor.model import RunState, RuntimeView
from mic_supervisor.plan.actions import Restart, Start
from mic_supervisor.plan.launch import launch
from tests.unit.plan.builders import CONTEXT, assessment, on, workload

MAM, FACE = on("MAM", 0), on("face", 2)
GONE = RuntimeView("docker", error="connection refused")


# --- a reader that dies -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError("9" * 5000), RecursionError("too deep"), TypeError("NoneType"), OSError(5)]
)
def test_a_reader_that_raises_is_unreadable_and_is_read_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    broken = True

    def read() -> RuntimeView:
        if broken:
            raise error
        return RuntimeView("docker")

    async def looks() -> list[RuntimeView]:
        nonlocal broken
        with ThreadPoolExecutor() as pool:
            source: Source[RuntimeView] = Source(
                "docker",
                read,
                lambda text: RuntimeView("docker", error=text),
                lambda view: view.error is None,
                pool,
                lambda: None,
            )
            found = [await source.get(), await source.get()]
            broken = False
            return [*found, await source.get()]

    with caplog.at_level(logging.ERROR, logger="mic"):
        *unreadable, read_again = asyncio.run(looks())
    for view in unreadable:
        assert (view.error or "").startswith(
            f"its answer is not what was expected: “{type(error).__name__}: "
        )
        assert len(view.error or "") < 400
    assert read_again == RuntimeView("docker")
    # Once, with its traceback.
    (record,) = [one for one in caplog.records if "docker cannot be read" in one.message]
    assert record.exc_info is not None and record.exc_info[1] is error


# --- what a runtime may run while it cannot be read ---------------------------------------------


def last(views: LastViews) -> list[str] | None:
    found = views.noted(GONE, ()).last
    return None if found is None else [item.name for item in found]


def test_of_what_could_never_be_read_nothing_is_known() -> None:
    assert last(LastViews()) is None
    assert LastViews().noted(GONE, ()) is GONE


def test_what_was_alive_when_it_could_be_read_may_run() -> None:
    views = LastViews()
    unknown = workload(on("other", 3), RunState.UNKNOWN)
    read = RuntimeView("docker", (workload(MAM), workload(FACE, RunState.EXITED), unknown))
    assert views.noted(read, ()) is read
    assert last(views) == [workload(MAM).name, unknown.name]
    assert views.noted(RuntimeView("systemd", error="no answer"), ()).last is None


def test_what_was_begun_since_may_run_until_a_look_began_after_it() -> None:
    views = LastViews()
    views.noted(RuntimeView("docker"), ())
    target = launch(assessment(MAM), {"http": 20000}, {}, CONTEXT)
    ended = workload(FACE, RunState.EXITED)
    views.begins(Start("start", MAM.id, target))
    views.begins(Restart("restart", FACE.id, ended))
    assert last(views) == [target.name, ended.name]
    # This look may have begun before the start of an instance that was busy then.
    views.noted(RuntimeView("docker"), {MAM.id})
    assert last(views) == [target.name]
    views.noted(RuntimeView("docker"), ())
    assert last(views) == []
