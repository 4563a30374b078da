"""Which configuration runs, whatever becomes of its files."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import pytest

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.document import Config
from mic_supervisor.config.load import load
from mic_supervisor.daemon import generations
from mic_supervisor.daemon.generations import accept
from mic_supervisor.desired import desired_state
from mic_supervisor.errors import MicError
from mic_supervisor.gpu.source import SimulatedSource
from tests.unit.daemon.files import ORDERS, REGISTRY, Files, hash_of


def full(*_: object) -> None:
    raise MicError("cannot write: no space left on device")


# --- accepting ----------------------------------------------------------------------------------


def test_only_another_document_is_a_new_generation(files: Files) -> None:
    found = files.start()
    assert (found.number, found.loaded_at, found.error) == (1, 1.0, None)
    files.path.write_text("# a comment\n" + ORDERS["GPUs first"])
    assert found.differs()
    outcome = found.reload(2.0, confirm=False)
    assert (outcome.changed, outcome.generation, found.loaded_at) == (False, 1, 1.0)
    assert not found.differs()
    files.path.write_text(ORDERS["one line"])
    assert found.reload(3.0, confirm=False).changed
    assert (found.number, found.loaded_at) == (2, 3.0)


def test_while_a_file_is_loaded_what_was_known_before_counts(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of that moment would call a changed file done, and a warning would come and go."""
    found = files.start(plan_first=True)
    files.path.write_text(ORDERS["one line"])
    found.reload(2.0, confirm=False)
    why = found.unconfirmed
    assert why is not None and found.waiting is not None

    def loads(*given: Any, **more: Any) -> Config:
        assert (found.current(), found.unconfirmed) == (None, why)
        return load(*given, **more)

    monkeypatch.setattr(generations, "load", loads)
    files.path.write_text(ORDERS["GPUs last"])
    found.reload(3.0, confirm=False)
    assert not found.differs()


def test_numbers_go_on_after_a_restart(files: Files) -> None:
    first = files.start()
    files.path.write_text(ORDERS["one line"])
    first.reload(2.0, confirm=False)
    assert files.start().number == 2
    files.path.write_text(ORDERS["GPUs last"])
    assert files.start().number == 3


def test_a_rejected_file_changes_nothing(files: Files) -> None:
    found = files.start()
    before = found.config
    files.path.write_text("gpus: [")
    outcome = found.reload(5.0, confirm=True)
    assert (outcome.changed, outcome.generation) == (False, 1)
    assert outcome.error is not None
    assert outcome.error.startswith(f"{files.path}:1:")
    assert (found.config, found.error, found.error_at) == (before, outcome.error, 5.0)
    files.path.write_text(ORDERS["GPUs last"])
    found.reload(6.0, confirm=False)
    assert (found.error, found.error_at) == (None, None)


# --- confirming ---------------------------------------------------------------------------------


def test_a_word_is_for_one_document(files: Files) -> None:
    found = files.start()
    first = hash_of(found)
    assert not found.confirms(first)
    assert found.reload(2.0, confirm=True).confirmed
    assert found.confirms(first)
    assert not found.reload(2.5, confirm=True).confirmed  # it was before
    files.path.write_text(ORDERS["one line"])
    found.reload(3.0, confirm=False)
    assert not found.confirms(hash_of(found))
    assert not files.start().confirms(hash_of(found))
    assert not files.start().confirms(first)  # another one was accepted since
    files.path.write_text(ORDERS["GPUs last"])
    found.reload(4.0, confirm=False)
    assert hash_of(found) == first
    assert not found.confirms(first)


def test_a_word_outlasts_comments_errors_and_a_restart(files: Files) -> None:
    found = files.start()
    found.reload(2.0, confirm=True)
    for text in ("gpus: [", "# a comment\n" + ORDERS["GPUs first"]):
        files.path.write_text(text)
        found.reload(3.0, confirm=False)
        assert found.confirms(hash_of(found))
    files.path.write_text("gpus: [")
    again = files.start()  # what runs is the last good one
    assert again.confirms(hash_of(again))


def test_a_word_ends_on_the_disk_before_the_files_are_kept(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = files.start()
    found.reload(2.0, confirm=True)
    first = hash_of(found)
    files.path.write_text(ORDERS["one line"])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generations, "_keep", die)
        found.reload(3.0, confirm=False)
    files.path.write_text(ORDERS["GPUs last"])
    again = files.start()
    assert (hash_of(again), again.confirms(first)) == (first, False)


def test_a_word_ends_although_the_record_cannot_be_written(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = files.start()
    found.reload(2.0, confirm=True)
    first = hash_of(found)
    files.path.write_text(ORDERS["one line"])
    with monkeypatch.context() as patch:
        patch.setattr(files.state, "write", full)
        assert found.reload(3.0, confirm=False).warning is not None
    files.path.write_text(ORDERS["GPUs last"])
    assert not files.start().confirms(first)


def test_a_word_ends_when_another_document_is_applied_without_the_daemon(files: Files) -> None:
    found = files.start()
    found.reload(2.0, confirm=True)
    first = hash_of(found)
    files.path.write_text(ORDERS["one line"])
    other = load(files.path, REGISTRY, environ={})
    accept(files.state, other, confirmed=True)
    assert files.start().confirms(other.hash)
    files.path.write_text(ORDERS["GPUs last"])
    assert not files.start().confirms(first)


def test_no_document_is_never_confirmed(files: Files) -> None:
    assert not files.start(prune_on_watch=True).confirms("")
    assert not files.start().confirms("")


def test_the_setting_confirms_all(files: Files) -> None:
    found = files.start(prune_on_watch=True)
    assert found.confirms(hash_of(found))


# --- the last good one --------------------------------------------------------------------------


def test_a_link_to_another_file_shows_nothing_of_it(files: Files) -> None:
    files.start()
    secret = files.path.with_name("shadow")
    secret.write_text("root:$y$j9T$canary:20000:0:99999:7:::\n")
    for path in (files.path, files.kept):
        path.unlink()
        path.symlink_to(secret)
    found = files.start()
    assert found.error is not None and str(files.path) in found.error
    assert "and the configuration that ran before cannot be used" in found.error
    assert "canary" not in found.error


def test_the_last_good_one_runs_when_the_file_is_broken(files: Files) -> None:
    drop_in = files.drop_in("gpus: {7: a}\n")
    good = hash_of(files.start())
    files.path.unlink()
    drop_in.write_text("[")
    again = files.start()
    assert hash_of(again) == good
    assert again.error is not None
    kept = files.kept.parent
    assert [path.stat().st_mode & 0o777 for path in kept.rglob("*.yaml")] == [0o600, 0o600]
    assert kept.stat().st_mode & 0o777 == 0o700


def test_a_last_good_one_that_is_bad_too_is_told(files: Files) -> None:
    files.start()
    files.path.write_text("[")
    files.kept.write_text("{")
    found = files.start()
    assert found.config is None
    assert found.error is not None
    assert "and the configuration that ran before cannot be used" in found.error


def test_of_the_last_good_one_a_lost_plug_in_takes_its_own_models_only(files: Files) -> None:
    files.start()
    text = """
        version: 1
        defaults: {drain_timeout: 1m}
        backends: {gone: {path: /opt/gone}}
        models:
          a: {backend: process, command: [/bin/sleep, "600"]}
          b: {backend: gone, anything: 1}
        gpus: {0: a, 1: b}
        """
    for path in (files.path, files.kept):
        path.write_text(textwrap.dedent(text))
    found = files.start()
    assert found.error is not None and "models.b.backend: is not valid" in found.error
    assert found.config is not None and set(found.config.models) == {"a", "b"}
    fault = found.config.models["b"]
    assert (fault.options, fault.fault) == (None, "unknown backend 'gone'")
    desired = desired_state(
        found.config, SimulatedSource(2).observe(), {}, Registry(lambda: ()), files.path.parent
    )
    assert [one.model for one in desired.instances] == ["a"]
    (lost,) = desired.unsatisfiable
    assert (lost.model, lost.reason, len(lost.gpus)) == ("b", "unknown backend 'gone'", 1)
    assert str(lost.hint).startswith("known are ")


def test_a_crash_between_the_renames_loses_nothing(files: Files) -> None:
    good = hash_of(files.start())
    kept = files.kept.parent
    kept.rename(kept.with_name(".last-good.old"))
    files.path.write_text("[")
    assert hash_of(files.start()) == good


def test_what_was_read_is_kept_although_the_file_changed_since(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = files.start()

    def load_and_lose(*args: object, **options: object) -> object:
        config = load(*args, **options)  # type: ignore[arg-type]
        files.path.write_text("cut sho")
        return config

    files.path.write_text(ORDERS["one line"])
    with monkeypatch.context() as patch:
        patch.setattr("mic_supervisor.daemon.generations.load", load_and_lose)
        outcome = found.reload(2.0, confirm=False)
    assert outcome.changed
    assert files.kept.read_text() == ORDERS["one line"]
    assert found.differs()


def test_a_full_disk_holds_up_no_change(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    found = files.start()
    files.path.write_text(ORDERS["one line"])
    with monkeypatch.context() as patch:
        patch.setattr(files.state, "write", full)
        outcome = found.reload(2.0, confirm=True)
    assert (outcome.changed, outcome.error) == (True, None)
    assert outcome.warning == "cannot write: no space left on device"
    assert found.confirms(hash_of(found))
    assert found.reload(3.0, confirm=False).warning is None
    assert files.start().number == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"generation": "x"}', '{"hash": null}'])
def test_a_record_that_is_none(files: Files, text: str) -> None:
    first = files.start()
    first.reload(2.0, confirm=True)
    (files.state.path / "generation.json").write_text(text)
    again = files.start()
    assert (again.number, again.error) == (1, None)
    assert not again.confirms(hash_of(again))
    assert json.loads((files.state.path / "generation.json").read_text())["generation"] == 1
