"""MIC_WATCH=plan: every other document waits until a person asks for it."""

from __future__ import annotations

import pytest

from mic_supervisor.config.load import load
from mic_supervisor.config.settings import Settings
from mic_supervisor.daemon.generations import (
    Generations,
    accept,
    last_good,
    unconfirmed,
    waits_for_word,
)
from tests.unit.daemon.files import ORDERS, REGISTRY, Files, hash_of

OTHER = ORDERS["one line"]
SETTINGS = Settings(watch="plan")


def why(files: Files) -> str:
    return f"{files.path} is not applied yet (MIC_WATCH=plan)"


def document(files: Files) -> str:
    """The hash of what the file says now."""
    return load(files.path, REGISTRY, environ={}).hash


def apply(files: Files) -> str:
    """As `apply` does it where no daemon runs; the hash of what it applied."""
    config = load(files.path, REGISTRY, environ={})
    accept(files.state, config, confirmed=True)
    return config.hash


def applied(files: Files) -> Generations:
    found = files.start(plan_first=True)
    found.reload(1.0, confirm=True)
    return found


def test_a_first_file_waits_as_well(files: Files) -> None:
    for found in (files.start(plan_first=True), files.start(plan_first=True)):
        assert (found.config, found.unconfirmed) == (None, why(files))
        assert found.waiting is not None
        assert found.current() == document(files)
    assert waits_for_word(files.state, SETTINGS)
    assert not waits_for_word(files.state, Settings())


@pytest.mark.parametrize("restart", [False, True])
def test_a_change_waits_and_what_was_applied_runs(files: Files, restart: bool) -> None:
    found = applied(files)
    good = hash_of(found)
    files.path.write_text(OTHER)
    if restart:
        found = files.start(plan_first=True)
    else:
        assert found.reload(2.0, confirm=False).unconfirmed == why(files)
    assert (hash_of(found), found.number) == (good, 1)
    assert found.current() == document(files) != good
    assert found.reload(3.0, confirm=True).changed
    assert (hash_of(found), found.unconfirmed, found.waiting) == (document(files), None, None)


def test_what_says_the_same_waits_for_nobody(files: Files) -> None:
    found = applied(files)
    files.path.write_text("# a comment\n" + ORDERS["GPUs first"])
    for seen in (found, files.start(plan_first=True)):
        seen.reload(2.0, confirm=False)
        assert (seen.unconfirmed, seen.number) == (None, 1)


def test_what_is_put_back_waits_no_more(files: Files) -> None:
    found = applied(files)
    files.path.write_text(OTHER)
    found.reload(2.0, confirm=False)
    files.path.write_text(ORDERS["GPUs last"])
    found.reload(3.0, confirm=False)
    assert (found.unconfirmed, found.waiting) == (None, None)


def test_an_error_takes_the_place_of_what_waits(files: Files) -> None:
    found = applied(files)
    good = hash_of(found)
    files.path.write_text(OTHER)
    found.reload(2.0, confirm=False)
    files.path.write_text("gpus: [")
    found.reload(3.0, confirm=False)
    assert (hash_of(found), found.waiting, found.current()) == (good, None, None)
    assert found.error is not None


def test_only_what_a_command_has_written_is_followed_without_a_word(files: Files) -> None:
    found = applied(files)
    files.path.write_text(OTHER)
    assert found.reload(2.0, confirm=False, written="f00d").unconfirmed == why(files)
    outcome = found.reload(3.0, confirm=False, written=document(files))
    assert (outcome.changed, outcome.unconfirmed) == (True, None)
    # It was asked for, and no removal was.
    assert not found.confirms(hash_of(found))


def test_what_may_be_cut_says_so_rather(files: Files) -> None:
    found = applied(files)
    files.path.write_text(OTHER.rstrip("\n"))
    found.reload(2.0, confirm=False)
    assert "may have been cut" in str(found.unconfirmed)


def test_a_command_without_a_daemon_counts_for_the_next_one(files: Files) -> None:
    applied(files)
    files.path.write_text(OTHER)
    good = apply(files)
    again = files.start(plan_first=True)
    assert (hash_of(again), again.unconfirmed) == (good, None)


def test_a_start_takes_back_nothing_that_a_command_has_applied(files: Files) -> None:
    """The file is another one again, or broken: what the command applied last is what runs."""
    applied(files)
    files.path.write_text(OTHER)
    good = apply(files)
    for text in (ORDERS["GPUs last"], "gpus: ["):
        files.path.write_text(text)
        for plan_first in (True, False) if text == "gpus: [" else (True,):
            assert hash_of(files.start(plan_first=plan_first)) == good


def test_an_older_document_on_the_disk_is_not_run(files: Files) -> None:
    """Where the record is newer than the copy, as earlier versions left it."""
    applied(files)
    older = files.kept.read_bytes()
    files.path.write_text(OTHER)
    apply(files)
    files.kept.write_bytes(older)
    files.path.write_text(ORDERS["GPUs last"].replace("0: a", "0: b"))
    again = files.start(plan_first=True)
    assert (again.config, again.unconfirmed) == (None, why(files))


def test_a_lost_record_makes_nothing_wait_that_ran(files: Files) -> None:
    good = hash_of(applied(files))
    (files.state.path / "generation.json").unlink()
    again = files.start(plan_first=True)
    assert (hash_of(again), again.unconfirmed) == (good, None)


def test_the_copy_is_what_was_read(files: Files) -> None:
    files.path.write_bytes(b"\xef\xbb\xbf" + ORDERS["GPUs last"].replace("\n", "\r\n").encode())
    drop_in = files.drop_in("gpus: {1: a}\n")
    found = applied(files)
    drop_in.write_text("gpus: {1: b}\n")  # as if it had been saved while the copy was made
    kept = last_good(files.state, REGISTRY, {})
    assert kept is not None
    assert kept.hash == hash_of(found)


def test_commands_without_a_daemon_go_by_the_same_rule(files: Files) -> None:
    def asks(written: str = "") -> str | None:
        config = load(files.path, REGISTRY, environ={})
        return unconfirmed(files.state, config, REGISTRY, SETTINGS, written=written)

    assert asks() == why(files)
    assert asks(document(files)) is None
    apply(files)
    assert asks() is None
    files.path.write_text(OTHER)
    assert asks() == why(files)
