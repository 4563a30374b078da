"""The daemon follows its file, however it is written, and restarts nothing that did not change."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from tests.integration.daemon_world import (
    DaemonWorld,
    container,
    daemon_world,
    identity,
    process,
)
from tests.support.waiting import until

pytestmark = pytest.mark.engine

P0, C1, P2, P3 = (identity("p", 0), identity("c", 1), identity("q", 2), identity("p", 3))
BASE: dict[int | str, str] = {0: "p", 1: "c", 2: "q", 3: "none"}
MORE: dict[int | str, str] = {**BASE, 3: "p"}


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient, busybox_image: str
) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path_factory.mktemp("watch"), engine) as made:
        made.write(BASE, p=process(), c=container(), q=process())
        made.mic.run(http=False)
        yield made


@pytest.fixture
def world(running: DaemonWorld) -> Iterator[DaemonWorld]:
    """The daemon with BASE, and at the end what runs of it is what ran before."""
    config = running.mic.config
    if config.is_symlink():
        config.unlink()
    shutil.rmtree(running.drop_ins, ignore_errors=True)
    running.write(BASE)
    running.converged(P0, C1, P2)
    running.mic("reload", "--wait", rc=0)
    before = running.marks()
    assert sorted(before) == sorted([P0, C1, P2])
    yield running
    after = running.marks()
    assert {name: after[name] for name in before} == before


# --- ways to save a file ------------------------------------------------------------------------


def by_rename(config: Path, text: str) -> None:
    fresh = config.with_name(".gpus.yaml.swp")
    fresh.write_text(text)
    fresh.replace(config)


def in_place(config: Path, text: str) -> None:
    config.write_text(text)


def byte_by_byte(config: Path, text: str) -> None:
    """Faster than anybody types, and slower than any program writes."""
    with config.open("w") as file:
        for place in range(0, len(text), 8):
            file.write(text[place : place + 8])
            file.flush()
            time.sleep(0.02)


def with_pauses(config: Path, text: str) -> None:
    """Halves of it are read, however patient the reader."""
    with config.open("w") as file:
        lines = text.splitlines(keepends=True)
        for first in range(0, len(lines), 3):
            file.writelines(lines[first : first + 3])
            file.flush()
            time.sleep(0.4)


def as_a_mounted_volume(config: Path, text: str) -> None:
    """What the kubelet does: a directory for each state, and a link that is swapped."""
    home = config.parent
    state = home / f"..{time.time_ns()}"
    state.mkdir()
    (state / config.name).write_text(text)
    link = home / "..data_tmp"
    link.symlink_to(state.name)
    link.replace(home / "..data")
    if not config.is_symlink():
        config.unlink()
        config.symlink_to(f"..data/{config.name}")


def unlinked_first(config: Path, text: str) -> None:
    config.unlink()
    time.sleep(0.1)
    config.write_text(text)


SAVES = [by_rename, in_place, byte_by_byte, with_pauses, as_a_mounted_volume, unlinked_first]


@pytest.mark.parametrize("save", SAVES)
def test_a_saved_change_is_made(world: DaemonWorld, save: Callable[[Path, str], None]) -> None:
    before = world.generation
    save(world.mic.config, world.text(MORE))
    world.converged(P0, C1, P2, P3)
    first = world.marks()[P3]
    save(world.mic.config, world.text(BASE))
    world.converged(P0, C1, P2)
    assert P3 not in world.marks()
    # A second change by the same means is seen, too: the link that was swapped is watched anew.
    save(world.mic.config, world.text(MORE))
    world.converged(P0, C1, P2, P3)
    assert world.marks()[P3] != first
    if save is not with_pauses:
        assert world.generation == before + 3


def test_a_drop_in_comes_changes_and_goes(world: DaemonWorld) -> None:
    before, folder = world.generation, world.drop_ins
    folder.mkdir()
    (folder / "50-more.yaml").write_text("gpus: {3: p}\n")
    world.converged(P0, C1, P2, P3)
    by_rename(folder / "50-more.yaml", "gpus: {3: q}\n")
    world.converged(P0, C1, P2, identity("q", 3))
    (folder / "50-more.yaml").unlink()
    world.converged(P0, C1, P2)
    assert world.generation == before + 3


def test_ten_saves_in_a_second_are_one_change(world: DaemonWorld) -> None:
    before, readings = world.generation, world.readings
    saves = []
    for turn in range(10):
        world.mic.config.write_text(world.text(MORE if turn % 2 else {**BASE, 3: "q"}))
        saves.append(time.monotonic())
        time.sleep(0.1)
    world.converged(P0, C1, P2, P3)
    # Where this process had to wait for its turn, a file stayed the same for long enough.
    rests = sum(later - earlier > 0.2 for earlier, later in itertools.pairwise(saves))
    assert world.generation <= before + 2 + rests
    assert world.readings <= readings + 2 + rests


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f"# of today\n{text}\n# end",
        lambda text: text.replace("gpus:\n", "gpus:   # all of them\n\n"),
        lambda text: "\n".join([*text.splitlines()[:-4], *reversed(text.splitlines()[-4:])]),
        lambda text: text.replace("\n", "\r\n"),
    ],
    ids=["comment", "blank line", "order", "line ends"],
)
def test_what_says_the_same_is_no_generation(
    world: DaemonWorld, change: Callable[[str], str]
) -> None:
    before, readings = world.status()["config"], world.readings
    text = world.text(BASE)
    world.mic.config.write_bytes(change(text).encode())
    world.read_again(readings)
    after = world.status()["config"]
    assert (after["generation"], after["hash"]) == (before["generation"], before["hash"])
    assert after["last_reload_ok"] is True


def test_a_broken_file_is_told_and_the_last_one_runs(world: DaemonWorld) -> None:
    before = world.generation
    world.mic.config.write_text(world.text({**BASE, 1: "d"}))
    error = world.rejected()
    assert error.splitlines()[0].startswith(f"{world.mic.config}:8:6: error: gpus.1: ")
    assert world.generation == before
    assert error.splitlines()[0] in str(world.mic("status", rc=0))
    log = world.mic.daemons[-1].text()
    assert error.splitlines()[0] in log
    assert f"configuration: rejected (the file changed); generation {before} keeps running" in log
    # Who mends it is back where he was, and nothing was a new generation.
    in_place(world.mic.config, world.text(BASE))
    until(lambda: world.status()["config"]["last_reload_ok"], "the file to be good again")
    assert world.generation == before


def test_a_broken_file_is_no_obstacle_to_the_watch_over_the_others(world: DaemonWorld) -> None:
    in_place(world.mic.config, "version: 1\nmodels: [")
    world.rejected()
    done = world.mic("reload", "--wait", rc=1)
    assert str(world.mic.config) in done.stderr
    assert "keeps running" in done.stderr


@pytest.mark.parametrize("way", ["unlink", "directory", "empty", "unreadable link"])
def test_a_file_that_is_away_stops_nothing(world: DaemonWorld, way: str) -> None:
    before, config = world.generation, world.mic.config
    config.unlink()
    if way == "directory":
        config.mkdir()
    elif way == "empty":
        config.touch()
    elif way == "unreadable link":
        config.symlink_to("/nowhere/gpus.yaml")
    assert str(config) in world.rejected()
    marks = world.marks()
    if way == "directory":
        config.rmdir()
    world.write(BASE)
    until(lambda: world.status()["config"]["last_reload_ok"], "the file to be back")
    assert world.generation == before
    assert world.marks() == marks


def test_cut_short_anywhere_it_stops_nothing(world: DaemonWorld) -> None:
    text = world.text(BASE)
    start = text.index("gpus:")
    cuts = {*range(start, len(text), 5), len(text) - 1, 0, 9, start // 2}
    before = world.marks()
    for cut in sorted(cuts):
        readings = world.readings
        world.mic.config.write_text(text[:cut])
        world.read_again(readings)
        assert world.marks() == before, text[:cut]
    world.write(BASE)
    world.converged(P0, C1, P2)


# --- removals -----------------------------------------------------------------------------------

WITHOUT: dict[int | str, str] = {key: model for key, model in BASE.items() if key != 3}


@pytest.fixture
def three(world: DaemonWorld) -> DaemonWorld:
    """P3 runs, and the file no longer names it."""
    world.write(MORE)
    world.converged(P0, C1, P2, P3)
    world.write(WITHOUT)
    until(lambda: world.phases().get(P3) == "blocked", f"{P3} to be held")
    return world


def test_a_removal_waits_for_a_word(three: DaemonWorld) -> None:
    row = three.rows()[P3]
    assert row["reason"] == "the file no longer names it; its removal waits to be confirmed"
    assert P3 in three.marks()
    plan = three.mic("plan").stdout
    assert "its removal waits to be confirmed" in plan
    assert "confirm with `mic-supervisor apply` or `mic-supervisor reload`" in plan


@pytest.mark.parametrize("command", [("reload", "--wait"), ("apply",)])
def test_a_word_confirms_it(three: DaemonWorld, command: tuple[str, ...]) -> None:
    three.mic(*command, rc=0)
    three.converged(P0, C1, P2)
    assert P3 not in three.marks()


def test_a_word_for_another_document_does_not(three: DaemonWorld) -> None:
    three.mic("reload", "--wait", rc=0)
    three.write(MORE)
    three.converged(P0, C1, P2, P3)
    three.write({**WITHOUT, 3: "q"})
    three.converged(P0, C1, P2, identity("q", 3))
    three.models["unused"] = process()
    three.write(WITHOUT)
    until(lambda: three.phases().get(identity("q", 3)) == "blocked", "it to be held")
    assert identity("q", 3) in three.marks()
    three.write(BASE)
    three.converged(P0, C1, P2)


def test_none_acts_at_once(three: DaemonWorld) -> None:
    three.write(BASE)
    three.converged(P0, C1, P2)
    assert P3 not in three.marks()
