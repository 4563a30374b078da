"""The file is followed by what it holds, whatever way it changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from mic_supervisor.daemon import watch


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(watch, "POLL", 0.01)
    monkeypatch.setattr(watch, "_QUIET", 0.01)
    yield


def watched(stamps: Callable[[], str], changes: int) -> list[str]:
    """What each of the first `changes` calls found, with files that say `stamps`."""
    found: list[str] = []

    async def run() -> None:
        seen = "first"
        over = asyncio.Event()

        async def changed() -> None:
            nonlocal seen
            seen = stamps()
            found.append(seen)
            if len(found) == changes:
                over.set()

        follower = watch.FileWatch(stamps, lambda: stamps() != seen, changed, asyncio.Lock())
        task = asyncio.create_task(follower.follow())
        async with asyncio.timeout(20):
            await over.wait()
        task.cancel()

    asyncio.run(run())
    return found


def test_a_change_is_told_once() -> None:
    asked = iter(["first", "first", *["second"] * 5, "third"])
    last = "third"

    def stamps() -> str:
        return next(asked, last)

    assert watched(stamps, 2) == ["second", "third"]


def test_a_burst_is_one_change() -> None:
    asked = iter([f"{number}" for number in range(20)])

    def stamps() -> str:
        return next(asked, "over")

    assert watched(stamps, 1) == ["over"]


def test_a_file_that_never_stays_the_same_is_read_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "_LONGEST", 0.1)
    numbers = iter(range(10**6))

    assert len(watched(lambda: f"{next(numbers)}", 2)) == 2


def test_two_who_look_at_once_find_a_change_once() -> None:
    told: list[str] = []
    now = "new"

    async def run() -> None:
        async def changed() -> None:
            await asyncio.sleep(0.01)  # as long as reading takes
            told.append(now)

        files = watch.FileWatch(lambda: now, lambda: told[-1:] != [now], changed, asyncio.Lock())
        await asyncio.gather(files.look(), files.look())

    asyncio.run(run())
    assert told == ["new"]


def test_a_look_waits_for_who_reads_the_files_already() -> None:
    """Else a claim would be refused for good by the file of before."""

    async def run() -> None:
        async def changed() -> None:
            pytest.fail("it was read twice")

        reads = asyncio.Lock()
        files = watch.FileWatch(lambda: "", lambda: False, changed, reads)
        async with reads:
            look = asyncio.create_task(files.look())
            await asyncio.sleep(0.1)
            assert not look.done()
        await look

    asyncio.run(run())


def test_what_a_command_reads_meanwhile_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the history would say that a file confirmed what a person did."""
    monkeypatch.setattr(watch, "_QUIET", 0.2)

    async def run() -> None:
        seen = "old"

        async def changed() -> None:
            pytest.fail("it was read twice")

        reads = asyncio.Lock()
        files = watch.FileWatch(lambda: "new", lambda: seen != "new", changed, reads)
        look = asyncio.create_task(files.look())
        await asyncio.sleep(0.05)
        async with reads:
            await asyncio.sleep(0.5)
            seen = "new"
        await look

    asyncio.run(run())
