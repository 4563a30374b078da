"""Xid events, as the mock driver reports them."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pynvml
import pytest

from mic_supervisor.gpu.events import (
    NvmlUsers,
    RecoveryAction,
    XidEvent,
    XidRecord,
    XidSeverity,
    XidWatcher,
    counted,
    severity,
    watcher_of,
)
from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.gpu.source import NoSource, SimulatedSource
from tests.mock_nvml import MockGpu, MockNvml, mock_uuid
from tests.support.waiting import until


class Followed:
    """A watcher in a thread, as the daemon has one."""

    def __init__(self, watcher: XidWatcher) -> None:
        self.seen: queue.Queue[XidEvent] = queue.Queue()
        self.stop = threading.Event()

        def follow() -> None:
            for event in watcher.events(self.stop):
                self.seen.put(event)

        self.thread = threading.Thread(target=follow, name="xid", daemon=True)
        self.thread.start()

    def one(self, timeout: float = 5.0) -> XidEvent:
        return self.seen.get(timeout=timeout)

    def close(self) -> None:
        self.stop.set()
        self.thread.join(5)
        assert not self.thread.is_alive()


Follow = Callable[[NvmlSource], Followed]


@pytest.fixture
def follow(mock: MockNvml, open_nvml: object) -> Iterator[Follow]:
    """Follows a source's Xids; returns once the watcher waits for events."""
    followed: list[Followed] = []

    def start(source: NvmlSource) -> Followed:
        waits = mock.calls("nvmlEventSetWait_v2")
        watcher = XidWatcher(source.nvml_users, clock=lambda: 1234.5, retry=0.02, partial=0.2)
        followed.append(Followed(watcher))
        if source._session is not None:
            until(lambda: mock.calls("nvmlEventSetWait_v2") > waits, "the first wait")
        return followed[-1]

    yield start
    mock.set()
    for one in followed:
        one.close()


@pytest.fixture
def two(mock: MockNvml, source: NvmlSource) -> NvmlSource:
    mock.set([MockGpu(), MockGpu()])
    assert len(source.observe().gpus) == 2
    return source


def test_an_xid_says_which_gpu_how_bad_and_what_the_driver_advises(
    mock: MockNvml, two: NvmlSource, follow: Follow
) -> None:
    followed = follow(two)
    mock.change(1, recovery_action=1)
    mock.add_event(1, 48)
    assert followed.one() == XidEvent(
        mock_uuid(1), 48, 1234.5, XidSeverity.CRITICAL, RecoveryAction.RESET
    )
    mock.add_event(0, 31)
    assert followed.one() == XidEvent(
        mock_uuid(0), 31, 1234.5, XidSeverity.APP, RecoveryAction.NONE
    )


def test_events_of_other_types_are_not_asked_for(
    mock: MockNvml, two: NvmlSource, follow: Follow
) -> None:
    followed = follow(two)
    mock.add_event(0, 1, type=1)
    mock.add_event(0, 13)
    assert followed.one().xid == 13
    assert followed.seen.empty()


@pytest.mark.parametrize(
    ("number", "action"),
    [
        (0, RecoveryAction.NONE),
        (2, RecoveryAction.REBOOT),
        (3, RecoveryAction.DRAIN_P2P),
        (4, RecoveryAction.DRAIN_AND_RESET),
        (6, RecoveryAction.BUS_RESET),
        (99, None),  # of a driver newer than this program
        (None, None),  # of a driver older than the field
    ],
)
def test_recovery_actions(
    mock: MockNvml, two: NvmlSource, follow: Follow, number: int | None, action: object
) -> None:
    followed = follow(two)
    mock.change(0, recovery_action=number)
    mock.add_event(0, 79)
    assert followed.one().action is action


def test_a_gpu_that_fell_off_the_bus_is_still_named(
    mock: MockNvml, two: NvmlSource, follow: Follow
) -> None:
    """Asked now it would not answer who it is: its UUID is from the registration."""
    followed = follow(two)
    mock.gpus[1] = MockGpu(uuid=mock_uuid(1), lost=True)
    mock.add_event(1, 79)
    event = followed.one()
    assert (event.uuid, event.xid, event.action) == (mock_uuid(1), 79, None)


@pytest.mark.slow
def test_a_library_that_fails_is_tried_again(
    mock: MockNvml, two: NvmlSource, follow: Follow
) -> None:
    followed = follow(two)
    made = mock.calls("nvmlEventSetCreate")
    mock.set_rules(errors={"nvmlEventSetWait_v2": 999})
    until(lambda: mock.calls("nvmlEventSetCreate") > made + 2, "three tries")
    mock.set_rules()
    waits = mock.calls("nvmlEventSetWait_v2")
    until(lambda: mock.calls("nvmlEventSetWait_v2") > waits + 1, "a wait that works")
    mock.add_event(0, 43)
    assert followed.one().xid == 43


@pytest.mark.parametrize(
    "function",
    ["nvmlInitWithFlags", "nvmlEventSetCreate", "nvmlDeviceGetCount_v2", "nvmlEventSetFree"],
)
@pytest.mark.slow
def test_no_failure_ends_the_watch(
    mock: MockNvml, two: NvmlSource, follow: Follow, function: str
) -> None:
    mock.set_rules(errors={function: 999})
    calls = mock.calls("nvmlInitWithFlags")
    watcher = Followed(XidWatcher(two.nvml_users, retry=0.01))
    until(lambda: mock.calls("nvmlInitWithFlags") > calls, "a try")
    mock.set_rules()
    waits = mock.calls("nvmlEventSetWait_v2")
    until(lambda: mock.calls("nvmlEventSetWait_v2") > waits, "the watch")
    mock.add_event(0, 13)
    assert watcher.one().xid == 13
    watcher.close()


def test_a_gpu_that_cannot_be_followed_leaves_the_others_and_is_tried_again(
    mock: MockNvml, source: NvmlSource, follow: Follow
) -> None:
    mock.set([MockGpu(supported_events=1), MockGpu()])
    source.observe()
    followed = follow(source)
    mock.add_event(1, 13)
    assert followed.one().uuid == mock_uuid(1)

    mock.change(0, supported_events=0x1F)

    def follows_the_first() -> bool:
        mock.add_event(0, 13)
        with contextlib.suppress(queue.Empty):
            return followed.one(timeout=0.1).uuid == mock_uuid(0)
        return False

    until(follows_the_first, "a new registration")


def test_without_any_gpu_to_follow_the_library_is_left_alone(
    mock: MockNvml, source: NvmlSource, follow: Follow
) -> None:
    mock.set([])
    source.observe()
    before = mock.calls("nvmlEventSetWait_v2")
    followed = Followed(XidWatcher(source.nvml_users))
    time.sleep(0.1)
    assert mock.calls("nvmlEventSetWait_v2") == before
    followed.close()


@pytest.mark.slow
def test_it_lets_the_source_enumerate_anew(
    mock: MockNvml, two: NvmlSource, follow: Follow, clock: object
) -> None:
    """NVML enumerates with its first user only: a watcher that stayed would hide the third GPU."""
    followed = follow(two)
    mock.set([MockGpu(), MockGpu(lost=True), MockGpu()])
    inventory = two.observe()
    assert [gpu.uuid for gpu in inventory.gpus] == [mock_uuid(0), mock_uuid(2)]

    waits = mock.calls("nvmlEventSetWait_v2")
    until(lambda: mock.calls("nvmlEventSetWait_v2") > waits, "the watcher is back")
    mock.add_event(2, 13)
    assert followed.one().uuid == mock_uuid(2)


def test_before_the_source_looked_and_after_it_was_closed_nothing_is_called(
    mock: MockNvml, source: NvmlSource, follow: Follow
) -> None:
    mock.set([MockGpu()])
    calls = mock.calls("nvmlInitWithFlags")
    followed = follow(source)
    time.sleep(0.1)
    assert mock.calls("nvmlInitWithFlags") == calls
    source.observe()
    until(lambda: mock.calls("nvmlInitWithFlags") == calls + 2, "the watcher's own reference")
    source.close()
    with pytest.raises(pynvml.NVMLError_Uninitialized):  # neither holds it any more
        pynvml.nvmlDeviceGetCount()
    mock.add_event(0, 13)
    with pytest.raises(queue.Empty):
        followed.one(timeout=0.2)


def test_who_does_not_leave_in_time_is_not_waited_for() -> None:
    nvml_users = NvmlUsers()
    nvml_users.admit()
    assert nvml_users.enter(0)
    began = time.monotonic()
    assert not nvml_users.send_away(0.05)
    assert time.monotonic() - began < 2
    assert not nvml_users.enter(0.01)
    nvml_users.leave()
    assert nvml_users.send_away(0)


@pytest.mark.parametrize("source", [SimulatedSource(2), NoSource()])
def test_gpus_that_are_none_have_no_watcher(source: SimulatedSource | NoSource) -> None:
    assert watcher_of(source) is None


def test_without_the_driver_library_there_is_nothing_and_no_error() -> None:
    program = (
        "import threading\n"
        "from mic_supervisor.gpu.nvml import NvmlSource\n"
        "from mic_supervisor.gpu.events import watcher_of\n"
        "source = NvmlSource()\n"
        "assert source.observe().error\n"
        "stop = threading.Event()\n"
        "threading.Timer(0.2, stop.set).start()\n"
        "print(list(watcher_of(source).events(stop)))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30
    )
    if "assert source.observe().error" in done.stderr:
        pytest.skip("this machine has a driver")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_severities() -> None:
    by_kind = {kind: {n for n in range(200) if severity(n) is kind} for kind in XidSeverity}
    assert by_kind[XidSeverity.APP] == {13, 31, 43, 45, 68, 94, 109}
    assert by_kind[XidSeverity.CRITICAL] == {48, 62, 64, 74, 79, 95, 119, 120}


def test_records_count_by_gpu_and_number() -> None:
    app, bad = XidSeverity.APP, XidSeverity.CRITICAL
    records: tuple[XidRecord, ...] = ()
    for event in (
        XidEvent("GPU-b", 13, 1.0, app, RecoveryAction.NONE),
        XidEvent("GPU-a", 79, 2.0, bad),
        XidEvent(None, 13, 3.0, app),
        XidEvent("GPU-b", 13, 4.0, app, RecoveryAction.RESET),
    ):
        records = counted(records, event)
    assert records == (
        XidRecord(None, 13, 1, 3.0, app, None),
        XidRecord("GPU-a", 79, 1, 2.0, bad, None),
        XidRecord("GPU-b", 13, 2, 4.0, app, RecoveryAction.RESET),
    )
