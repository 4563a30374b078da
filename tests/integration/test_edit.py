"""mic-supervisor edit on a terminal, with an editor that is a script."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

import pytest

from tests.support.mic import Mic
from tests.support.terminal import Terminal, terminal
from tests.support.waiting import until

FILE = """\
version: 1   # of this machine
models:
  a: {backend: process, command: [/bin/sleep, "100000"], stop_timeout: 1s}
gpus:
  0: none
"""
USE_A = "sed -i 's/0: none/0: a/' \"$1\""
A0 = "a-51000000"


@pytest.fixture
def world(mic: Mic) -> Mic:
    mic.env |= {"MIC_DOCKER_HOST": "none", "VISUAL": ""}
    mic.config.write_text(FILE)
    return mic


@pytest.fixture(params=["alone", "daemon"])
def either(world: Mic, request: pytest.FixtureRequest) -> Mic:
    if request.param == "daemon":
        world.env["MIC_WATCH"] = "plan"
        world.run(http=False)
        world("apply", rc=0)
    return world


def edit_with(mic: Mic, *steps: str) -> None:
    """The editor does a step each time that it is called. `$1` is its file."""
    home = mic.home / "my editor"  # a word with a blank in it, and an option, as people have them
    home.mkdir()
    for number, step in enumerate(steps):
        (home / f"{number}.sh").write_text(step)
    program = home / "ed"
    program.write_text(
        textwrap.dedent("""\
        #!/bin/sh
        test "$1" = --wait || exit 90
        cd "$(dirname "$0")" && for next in [0-9].sh; do break; done
        mv "$next" done.sh && exec sh -e done.sh "$2"
        """)
    )
    program.chmod(0o755)
    mic.env["EDITOR"] = f"{shlex.quote(str(program))} --wait"


def copies(mic: Mic) -> list[Path]:
    return sorted(mic.config.parent.glob("*edit-*"))


def refused(shown: Terminal, code: int = 1) -> str:
    """What it said at its end, which was this exit code."""
    found, text = shown.ends()
    assert found == code, text
    return text


def test_a_change_is_checked_shown_and_applied(either: Mic) -> None:
    edit_with(either, USE_A)
    with terminal(either, "edit") as shown:
        plan = shown.shows("Apply it?")
        assert f"+ create   {A0}" in plan and "Plan: 1 to create." in plan
        assert either.status()["instances"] == []
        assert either.config.read_text() == FILE
        shown.type("y\n")
        code, text = shown.ends()
    assert (code, "Apply: 1 as desired." in text) == (0, True), text
    assert either.config.read_text() == FILE.replace("0: none", "0: a")
    assert [row["id"] for row in either.status()["instances"]] == [A0]
    assert copies(either) == []
    assert either.status()["config"]["unconfirmed"] is None


def test_errors_lead_back_into_the_editor(world: Mic) -> None:
    edit_with(world, "sed -i 's/0: none/0: b/' \"$1\"", "sed -i 's/0: b/0: a/' \"$1\"")
    with terminal(world, "edit") as shown:
        errors = shown.shows("What now?")
        assert f"{world.config}:5:6: error: gpus.0: unknown model 'b'" in errors
        shown.type("e\n")
        assert "to create" in shown.shows("Apply it?")
        shown.type("d\n")
        assert f"Not applied: {world.config} is as it was." in refused(shown)
    assert (world.config.read_text(), copies(world)) == (FILE, [])


@pytest.mark.parametrize("step", [USE_A, "echo 'gpus: [' >> \"$1\""], ids=["valid", "broken"])
def test_a_text_that_is_not_used_is_kept_and_named(world: Mic, step: str) -> None:
    edit_with(world, step, "true")
    with terminal(world, "edit") as shown:
        shown.shows("(k)eep")
        shown.type("k\n")
        text = refused(shown)
    (kept,) = copies(world)
    assert f"Your text is kept in {kept}." in text
    assert kept.read_text() != FILE == world.config.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600
    # The next edit says that it is there.
    with terminal(world, "edit") as shown:
        text = refused(shown, 0)
    assert f"note: {kept} has the text of another edit" in text
    assert f"Nothing was changed: {world.config} is as it was." in text
    assert copies(world) == [kept]


@pytest.mark.parametrize("step", ["exit 3", f"{USE_A}; exit 3"], ids=["as it was", "changed"])
def test_an_editor_that_fails_changes_nothing(world: Mic, step: str) -> None:
    edit_with(world, step)
    with terminal(world, "edit") as shown:
        text = refused(shown)
    assert f"error: cannot edit {world.config}: " in text
    assert "hint: name an editor that works in VISUAL or EDITOR" in text
    assert world.config.read_text() == FILE
    assert len(copies(world)) == (step != "exit 3")


@pytest.mark.parametrize("editor", ["/nowhere/ed", "'ed"])
def test_an_editor_that_there_is_not(world: Mic, editor: str) -> None:
    world.env["VISUAL"] = editor  # before EDITOR
    edit_with(world, USE_A)
    with terminal(world, "edit") as shown:
        text = refused(shown)
    assert "hint: name an editor that works in VISUAL or EDITOR" in text
    assert "Traceback" not in text
    assert copies(world) == []


@pytest.mark.parametrize("what", ["file", "drop-in"])
def test_what_somebody_changed_meanwhile_is_not_overwritten(world: Mic, what: str) -> None:
    drop_in = world.config.with_name("gpus.yaml.d") / "10.yaml"
    drop_in.parent.mkdir()
    drop_in.write_text("gpus: {1: none}\n")
    edit_with(world, USE_A)
    with terminal(world, "edit") as shown:
        assert f"note: what {drop_in} sets wins over this file" in shown.shows("Apply it?")
        if what == "file":
            world.config.write_text(FILE + "  1: a\n")
        else:
            drop_in.write_text("gpus: {1: a}\n")
        before = world.config.read_text()
        shown.type("y\n")
        text = refused(shown)
    assert "somebody has changed" in text
    (kept,) = copies(world)
    assert f"Your text is kept in {kept}." in text
    assert world.config.read_text() == before
    assert world.status()["instances"] != [A0]


def test_ctrl_c_is_the_editors_own_and_at_the_question_keeps_the_text(world: Mic) -> None:
    wait = "until test $heard; do sleep 0.1 || :; done"
    edit_with(world, f"trap 'heard=1; echo heard' INT; echo open; {wait}; {USE_A}")
    with terminal(world, "edit") as shown:
        shown.shows("open")
        shown.type("\x03")
        assert "heard" in shown.shows("Apply it?")
        shown.interrupt()
        text = refused(shown, 130)
    (kept,) = copies(world)
    assert f"Your text is kept in {kept}." in text
    assert "interrupted" in text and "Traceback" not in text
    assert world.config.read_text() == FILE


def test_a_terminal_that_goes_away_leaves_the_text(world: Mic) -> None:
    edit_with(world, USE_A)
    with terminal(world, "edit") as shown:
        shown.shows("Apply it?")
    (kept,) = copies(world)
    assert kept.read_text() == FILE.replace("0: none", "0: a")
    assert world.config.read_text() == FILE


def test_without_a_terminal_it_has_to_be_told_to_go_on(world: Mic) -> None:
    edit_with(world, USE_A, "echo 'gpus: [' >> \"$1\"")
    told = world("edit", rc=1).stderr
    assert told == ("error: cannot ask whether to go on: this is no terminal\nhint: say --yes\n")
    assert copies(world) == []
    done = world("edit", "--yes", rc=0).stdout
    assert "Plan: 1 to create." in done and "Apply: 1 as desired." in done
    assert [row["id"] for row in world.status()["instances"]] == [A0]
    broken = world("edit", "--yes", rc=1).stderr
    (kept,) = copies(world)
    assert "error: " in broken and f"Your text is kept in {kept}." in broken
    assert "gpus: [" not in world.config.read_text()


def test_a_text_without_a_line_end_gets_one(world: Mic) -> None:
    edit_with(world, "printf 'version: 1\\nmodels: {}\\ngpus: {0: none}' > \"$1\"")
    world("edit", "--yes", rc=0)
    assert world.config.read_text() == "version: 1\nmodels: {}\ngpus: {0: none}\n"


def test_without_a_file_it_says_how_to_write_one(world: Mic) -> None:
    world.config.unlink()
    with terminal(world, "edit") as shown:
        text = refused(shown)
    assert f"error: cannot edit {world.config}: no such file or directory\n" in text
    assert "hint: run `mic-supervisor init` to write a first one" in text


def test_a_link_stays_one_and_its_file_gets_the_text(world: Mic) -> None:
    real = world.home / "git" / "host-1.yaml"
    real.parent.mkdir()
    world.config.rename(real)
    world.config.symlink_to(real)
    edit_with(world, USE_A)
    world("edit", "--yes", rc=0)
    assert world.config.is_symlink()
    assert real.read_text() == FILE.replace("0: none", "0: a")
    until(lambda: world.status()["instances"], "it to run")
