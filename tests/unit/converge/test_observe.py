"""What is made of the sources' answers."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from mic_supervisor.converge.observe import Source
from mic_supervisor.model import RuntimeView

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
            f"its answer is not what was expected: {type(error).__name__}: "
        )
        assert len(view.error or "") < 400
    assert read_again == RuntimeView("docker")
    # Once, with its traceback.
    (record,) = [one for one in caplog.records if "docker cannot be read" in one.message]
    assert record.exc_info is not None and record.exc_info[1] is error
