"""Which configuration runs, whatever becomes of its files."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.load import load
from mic_supervisor.converge.state import StateDir
from mic_supervisor.daemon.generations import Generations, Reloaded, accept
from mic_supervisor.desired import desired_state
from mic_supervisor.errors import MicError
from mic_supervisor.gpu.source import SimulatedSource
from mic_supervisor.model import ObservedState, ObservedWorkload, RunState, RuntimeView
from mic_supervisor.plan.actions import Remove, Start, Stop
from mic_supervisor.plan.assess import Context, assess
from mic_supervisor.plan.launch import launch
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.reconcile import reconcile
from mic_supervisor.plan.spec import SpecKey

REGISTRY = Registry()
CONTEXT = Context(
    scope="test",
    host="h0",
    key=SpecKey(b"key"),
    port_range=(20000, 20099),
    process_runtime="subprocess",
)

MODELS = """\
models:
  a: {backend: process, command: [/bin/sleep, "1"]}
  b: {backend: container, image: "busybox:1"}
"""
GPUS = """\
gpus:
  0: a
  1: b
  "2,3": b
  4-5: a
  6: none
"""
ORDERS = {
    "GPUs last": f"version: 1\n{MODELS}{GPUS}",
    "GPUs first": f"version: 1\n{GPUS}{MODELS}",
    "one line": "{version: 1, models: {a: {backend: process, command: [/bin/sleep]}}, "
    "gpus: {0: a, 1: a, 6: none}}\n",
}


class Files:
    """A configuration and a state directory, and generations that start with them."""

    def __init__(self, home: Path) -> None:
        self.path = home / "gpus.yaml"
        self.state = StateDir(home / "state")

    def start(self, *, prune_on_watch: bool = False) -> Generations:
        made = Generations(self.path, REGISTRY, {}, self.state, prune_on_watch=prune_on_watch)
        made.start(1.0)
        return made


@pytest.fixture
def files(tmp_path: Path) -> Files:
    found = Files(tmp_path)
    found.path.write_text(ORDERS["GPUs last"])
    return found


def hash_of(generations: Generations) -> str:
    assert generations.config is not None
    return generations.config.hash


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
    found.reload(2.0, confirm=True)
    assert found.confirms(first)
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
        patch.setattr(Generations, "_keep", die)
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

    def full(*_: object) -> None:
        raise MicError("cannot write: no space left on device")

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


def test_the_last_good_one_runs_when_the_file_is_broken(files: Files) -> None:
    drop_in = files.path.with_name("gpus.yaml.d") / "10.yaml"
    drop_in.parent.mkdir()
    drop_in.write_text("gpus: {7: a}\n")
    good = hash_of(files.start())
    files.path.unlink()
    drop_in.write_text("[")
    again = files.start()
    assert hash_of(again) == good
    assert again.error is not None
    kept = files.state.path / "last-good"
    assert [path.stat().st_mode & 0o777 for path in kept.rglob("*.yaml")] == [0o600, 0o600]
    assert kept.stat().st_mode & 0o777 == 0o700


def test_a_last_good_one_that_is_bad_too_is_told(files: Files) -> None:
    files.start()
    files.path.write_text("[")
    (files.state.path / "last-good" / "gpus.yaml").write_text("{")
    found = files.start()
    assert found.config is None
    assert found.error is not None
    assert "and what ran before cannot be used" in found.error


def test_of_the_last_good_one_a_lost_plug_in_takes_its_own_models_only(files: Files) -> None:
    files.start()
    kept = files.state.path / "last-good" / "gpus.yaml"
    text = """
        version: 1
        defaults: {drain_timeout: 1m}
        backends: {gone: {path: /opt/gone}}
        models:
          a: {backend: process, command: [/bin/sleep, "600"]}
          b: {backend: gone, anything: 1}
        gpus: {0: a, 1: b}
        """
    for path in (files.path, kept):
        path.write_text(textwrap.dedent(text))
    found = files.start()
    assert found.error is not None and "models.b.backend: unknown backend 'gone'" in found.error
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
    kept = files.state.path / "last-good"
    kept.rename(kept.with_name(".last-good.old"))
    files.path.write_text("[")
    assert hash_of(files.start()) == good


def test_files_that_changed_since_they_were_read_are_not_kept(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = files.start()
    good = (files.state.path / "last-good" / "gpus.yaml").read_text()

    def load_and_lose(*args: object, **options: object) -> object:
        config = load(*args, **options)  # type: ignore[arg-type]
        files.path.write_text("cut sho")
        return config

    files.path.write_text(ORDERS["one line"])
    with monkeypatch.context() as patch:
        patch.setattr("mic_supervisor.daemon.generations.load", load_and_lose)
        outcome = found.reload(2.0, confirm=False)
    assert outcome.changed
    assert (files.state.path / "last-good" / "gpus.yaml").read_text() == good
    assert found.differs()
    files.path.write_text(ORDERS["one line"])
    found.reload(3.0, confirm=False)
    assert (files.state.path / "last-good" / "gpus.yaml").read_text() == ORDERS["one line"]


def test_a_full_disk_holds_up_no_change(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    found = files.start()

    def full(*_: object) -> None:
        raise MicError("cannot write: no space left on device")

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


# --- files that may be a part -------------------------------------------------------------------

SWAP = f"version: 1\n{MODELS}  a1: {{backend: process, command: [/bin/sleep, '2']}}\ngpus:\n  0: a1"


def test_a_file_without_a_line_end_waits(files: Files) -> None:
    files.path.write_text(SWAP + "\n")
    found = files.start()
    good = hash_of(found)
    cut = SWAP[:-1]  # `0: a1` says `0: a`
    files.path.write_text(cut)
    outcome = found.reload(2.0, confirm=False)
    why = f"{files.path} does not end with a line end; it may have been cut"
    assert outcome == Reloaded(False, 1, unconfirmed=why)
    assert (hash_of(found), found.unconfirmed, found.error) == (good, why, None)
    again = files.start()
    assert (hash_of(again), again.unconfirmed, again.number) == (good, why, 1)
    # Finished, or confirmed, it is used.
    files.path.write_text(cut + "\n")
    assert found.reload(3.0, confirm=False).changed
    assert found.unconfirmed is None
    files.path.write_text(SWAP)
    assert not found.reload(4.0, confirm=False).changed
    assert found.reload(5.0, confirm=True).changed
    assert (hash_of(found), found.unconfirmed) == (good, None)
    again = files.start()  # it runs already
    assert (hash_of(again), again.unconfirmed) == (good, None)


def test_without_a_line_end_a_first_file_starts_nothing(files: Files) -> None:
    files.path.write_text(SWAP)
    found = files.start()
    assert found.config is None
    assert found.unconfirmed is not None
    accept(files.state, load(files.path, REGISTRY, environ={}), confirmed=True)  # `apply`
    assert files.start().unconfirmed is None


def test_an_error_takes_the_place_of_a_doubt(files: Files) -> None:
    found = files.start()
    files.path.write_text(SWAP)
    assert found.reload(2.0, confirm=False).unconfirmed is not None
    files.path.write_text("gpus: [")
    assert found.reload(3.0, confirm=False).error is not None
    assert found.unconfirmed is None


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("prune_on_watch", [False, True])
@pytest.mark.parametrize("way", ["cut", "cut at a line", "empty", "gone", "folder gone"])
def test_a_drop_in_that_is_cut_or_gone_lets_nothing_else_run(
    files: Files, way: str, prune_on_watch: bool, at_start: bool
) -> None:
    drop_in = files.path.with_name("gpus.yaml.d") / "10.yaml"
    drop_in.parent.mkdir()
    drop_in.write_text("gpus:\n  1: a\n  4: b\n")
    found = files.start(prune_on_watch=prune_on_watch)
    good = hash_of(found)
    texts = {"cut": "gpus:\n  1: a", "cut at a line": "gpus:\n  1: a\n", "empty": ""}
    if way in texts:
        drop_in.write_text(texts[way])
    else:
        drop_in.unlink()
    if way == "folder gone":
        drop_in.parent.rmdir()
    if at_start:
        found = files.start(prune_on_watch=prune_on_watch)
    else:
        found.reload(2.0, confirm=False)
    if prune_on_watch and way not in ("cut", "empty"):
        assert hash_of(found) != good
        return
    assert hash_of(found) == good
    assert str(drop_in) in str(found.unconfirmed)
    found.reload(3.0, confirm=True)
    assert (hash_of(found) != good, found.unconfirmed) == (True, None)


def test_what_the_plan_holds_or_none_is_no_doubt(files: Files) -> None:
    drop_in = files.path.with_name("gpus.yaml.d") / "10.yaml"
    drop_in.parent.mkdir()
    drop_in.write_text("models: {c: {backend: process, command: [/bin/c]}}\ngpus: {6: c, 7: c}\n")
    found = files.start()
    drop_in.rename(drop_in.with_name("20.yaml"))
    found.reload(2.0, confirm=False)
    assert (found.number, found.unconfirmed) == (1, None)
    drop_in.with_name("20.yaml").unlink()  # 6 is `none` in the file, 7 is not in it
    assert found.reload(3.0, confirm=False).changed
    assert not found.confirms(hash_of(found))


def test_the_end_of_a_definition_that_is_gone_is_a_doubt(files: Files) -> None:
    text = (
        "version: 1\ngpus: {0: a}\nmodels:\n  a:\n    backend: process\n    command: [/bin/a]\n"
        "    env:\n      A: b\n      C: d\n"
    )
    files.path.write_text(text)
    found = files.start()
    files.path.write_text(text.removesuffix("      C: d\n"))
    outcome = found.reload(2.0, confirm=False)
    assert outcome.unconfirmed == (
        f"{files.path} is the beginning of what it was; it may have been cut"
    )
    # Somebody who edits changes more than the end, or adds to it.
    files.path.write_text(text.replace("C: d", "C: e"))
    assert found.reload(3.0, confirm=False).changed


def test_an_older_file_put_back_removes_nothing(files: Files) -> None:
    older = f"version: 1\n{MODELS}gpus:\n  0: a\n"
    files.path.write_text(older)
    found = files.start()
    found.reload(2.0, confirm=True)
    files.path.write_text(ORDERS["GPUs last"])
    found.reload(3.0, confirm=False)
    files.path.write_text(older)
    for seen in (found, files.start()):
        seen.reload(4.0, confirm=False)
        assert not seen.confirms(hash_of(seen))


# --- a file cut short ---------------------------------------------------------------------------


def world_of(generations: Generations) -> tuple[ObservedState, Memory]:
    """A machine on which everything runs that a configuration names."""
    inventory = SimulatedSource(8).observe()
    assert generations.config is not None
    desired = desired_state(generations.config, inventory, {}, REGISTRY, Path("/data"))
    nothing = ObservedState(inventory, (RuntimeView("docker"), RuntimeView("subprocess")))
    found: dict[str, list[ObservedWorkload]] = {"docker": [], "subprocess": []}
    for port, item in enumerate(assess(desired, nothing, CONTEXT), 20000):
        names = {item.name: port for item in item.instance.workload.ports}
        made = launch(item, names, {}, CONTEXT)
        found[item.runtime].append(
            ObservedWorkload(
                item.runtime, made.name, made.name, made.identity, RunState.RUNNING, pid=port
            )
        )
    views = tuple(RuntimeView(name, tuple(items)) for name, items in found.items())
    bindings = Memory(bindings=dict(desired.bindings))
    return ObservedState(inventory, views, listeners=()), bindings


def cuts(text: str) -> Iterator[bytes]:
    data = text.encode()
    for length in range(len(data)):
        yield data[:length]


@pytest.mark.parametrize("order", ORDERS)
def test_cut_short_at_every_byte_it_stops_nothing(files: Files, order: str) -> None:
    files.path.write_text(ORDERS[order])
    found = files.start()
    found.reload(1.0, confirm=True)  # a word for the whole is none for a part
    observed, memory = world_of(found)
    held = accepted = 0
    for data in cuts(ORDERS[order]):
        files.path.write_bytes(data)
        if found.reload(2.0, confirm=False).error is None:
            accepted += 1
        assert found.config is not None
        desired = desired_state(
            found.config, observed.inventory, memory.bindings, REGISTRY, Path("/data")
        )
        context = replace(CONTEXT, confirmed=found.confirms(found.config.hash))
        plan = reconcile(desired, observed, memory, 10.0, context)
        steps = [step for change in plan.changes for step in change.steps]
        assert not [step for step in steps if isinstance(step, Start | Stop | Remove)], data
        held += found.unconfirmed is not None or any(
            "waits to be confirmed" in item.reason for item in plan.blocked
        )
    if order == "GPUs last":
        assert accepted > 10
        assert held > 10
    # With a word, the same file removes them: what was held was held by the missing word alone.
    files.path.write_text(f"version: 1\n{MODELS}gpus:\n  0: a\n")
    found.reload(3.0, confirm=True)
    assert found.config is not None
    desired = desired_state(
        found.config, observed.inventory, memory.bindings, REGISTRY, Path("/data")
    )
    assert found.confirms(desired.config_hash)
    plan = reconcile(desired, observed, memory, 10.0, CONTEXT)
    assert any(change.kind == "remove" for change in plan.changes)
