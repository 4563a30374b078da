"""What is remembered outlives the program, the boot, and a clock that is set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mic_supervisor.clocks import Clock
from mic_supervisor.converge.state import StateDir
from mic_supervisor.plan import backoff
from mic_supervisor.plan.memory import Drained, InstanceMemory, Memory

EPOCH = 1_800_000_000.0
HOUR = 3600.0
ENTRY = InstanceMemory(
    failures=5,
    reason="it ended",
    retry_at=1030.0,
    started="a-1",
    started_at=900.0,
    ready_since=950.0,
    since=960.0,
    phase="backoff",
)


@dataclass
class Host:
    """A machine: how long it is up, what its wall clock adds to that, and which boot it is."""

    path: Path
    up: float = 1000.0
    offset: float = EPOCH
    boot: str = "first"

    def state(self) -> StateDir:
        clock = Clock(lambda: self.up, lambda: self.up + self.offset)
        return StateDir(self.path, clock, self.boot)

    def kept(self) -> InstanceMemory:
        return self.state().memory().of("a")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    found = Host(tmp_path)
    found.state().save_memory(Memory({"a": ENTRY}))
    return found


def left(entry: InstanceMemory, host: Host) -> float:
    assert entry.retry_at is not None
    return entry.retry_at - host.up


@pytest.mark.parametrize("jump", [HOUR, -HOUR, -EPOCH, 0.0])
def test_within_a_boot_a_clock_that_was_set_moves_nothing(host: Host, jump: float) -> None:
    host.up += 10
    host.offset += jump
    kept = host.kept()
    assert left(kept, host) == pytest.approx(20.0)
    found = (kept.started_at, kept.ready_since, kept.since)
    assert found == pytest.approx((900.0, 950.0, 960.0))


def test_after_a_reboot_a_wait_goes_on_and_nothing_is_ready(host: Host) -> None:
    # Up for 5 s, and 20 s after the save.
    host.up, host.offset, host.boot = 5.0, EPOCH + 1015.0, "second"
    kept = host.kept()
    assert left(kept, host) == pytest.approx(10.0)
    assert kept.ready_since is None
    assert kept.started_at is not None and kept.started_at <= host.up


@pytest.mark.parametrize("wrong", [-EPOCH, -HOUR, HOUR, 1e9])
def test_after_a_reboot_with_a_wrong_clock_a_wait_is_at_most_its_own_length(
    host: Host, wrong: float
) -> None:
    host.up, host.offset, host.boot = 5.0, EPOCH + 1015.0 + wrong, "second"
    assert left(host.kept(), host) <= backoff.delay(ENTRY.failures, 1.0)


def test_times_of_the_first_version_are_the_wall_clocks(tmp_path: Path) -> None:
    host = Host(tmp_path)
    entry = {"failures": 5, "retry_at": EPOCH + 1030.0, "started_at": EPOCH + 900.0}
    entry["ready_since"] = EPOCH + 950.0
    (tmp_path / "memory.json").write_text(json.dumps({"version": 1, "instances": {"a": entry}}))
    kept = host.kept()
    assert left(kept, host) == pytest.approx(30.0)
    assert (kept.started_at, kept.ready_since) == pytest.approx((900.0, 950.0))


def test_on_disk_times_are_the_wall_clocks_so_that_the_first_version_reads_them(
    host: Host,
) -> None:
    document = json.loads((host.path / "memory.json").read_text())
    assert document["instances"]["a"]["retry_at"] == pytest.approx(EPOCH + 1030.0)
    assert document["clock"] == {"boot_id": "first", "offset": EPOCH}


@pytest.mark.parametrize("clock", [None, 7, {}, {"boot_id": 3, "offset": 1.0}, {"boot_id": "first"},
                                   {"boot_id": "first", "offset": float("nan")}])  # fmt: skip
def test_a_clock_that_is_none_is_as_if_it_was_not_there(host: Host, clock: object) -> None:
    path = host.path / "memory.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clock": clock}))
    assert left(host.kept(), host) == pytest.approx(30.0)


@pytest.mark.parametrize(("boot", "after"), [(None, True), ("first", False)])
def test_a_drain_outlives_the_boot_unless_it_was_until_then(
    host: Host, boot: str | None, after: bool
) -> None:
    order = Drained(since=EPOCH, reason="a new riser", boot=boot)
    host.state().save_memory(Memory(drained=order))
    assert host.state().memory().drained == order  # as after a restart of the daemon
    host.up, host.offset, host.boot = 5.0, EPOCH + 1015.0, "second"
    assert host.state().memory().drained == (order if after else None)


def test_of_a_damaged_drain_it_is_known_that_there_is_one(host: Host) -> None:
    host.state().save_memory(Memory(drained=Drained(since=EPOCH)))
    path = host.path / "memory.json"
    path.write_text(path.read_text().replace(f'"since": {EPOCH}', '"since": "x"'))
    found = host.state().memory()
    assert found.drained == Drained() and "drained.since was lost" in (found.lost or "")
