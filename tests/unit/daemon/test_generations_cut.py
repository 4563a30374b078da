"""Files that may be no more than a part of what somebody meant: none of them stops anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mic_supervisor.config.load import load
from mic_supervisor.daemon.generations import Generations, Reloaded, accept
from mic_supervisor.desired import desired_state
from mic_supervisor.gpu.source import SimulatedSource
from mic_supervisor.model import (
    DesiredState,
    GpuInventory,
    ObservedState,
    ObservedWorkload,
    RunState,
    RuntimeView,
)
from mic_supervisor.plan.actions import Remove, Start, Stop
from mic_supervisor.plan.assess import Context, assess
from mic_supervisor.plan.launch import launch
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.reconcile import reconcile
from mic_supervisor.plan.spec import SpecKey
from tests.unit.daemon.files import MODELS, ORDERS, REGISTRY, Files, hash_of

CONTEXT = Context(
    scope="test",
    host="h0",
    key=SpecKey(b"key"),
    port_range=(20000, 20099),
    process_runtime="subprocess",
)

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
    drop_in = files.drop_in("gpus:\n  1: a\n  4: b\n")
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
    text = "models: {c: {backend: process, command: [/bin/c]}}\ngpus: {6: c, 7: c}\n"
    drop_in = files.drop_in(text)
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


def desired_of(
    generations: Generations, inventory: GpuInventory, bindings: Mapping[str, str]
) -> DesiredState:
    assert generations.config is not None
    return desired_state(generations.config, inventory, bindings, REGISTRY, Path("/data"))


def world_of(generations: Generations) -> tuple[ObservedState, Memory]:
    """A machine on which everything runs that a configuration names."""
    inventory = SimulatedSource(8).observe()
    desired = desired_of(generations, inventory, {})
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
        desired = desired_of(found, observed.inventory, memory.bindings)
        context = replace(CONTEXT, confirmed=found.confirms(desired.config_hash))
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
    desired = desired_of(found, observed.inventory, memory.bindings)
    assert found.confirms(desired.config_hash)
    plan = reconcile(desired, observed, memory, 10.0, CONTEXT)
    assert any(change.kind == "remove" for change in plan.changes)
