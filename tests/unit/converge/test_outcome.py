"""What is kept, and passed on, of the events while an order is carried out."""

from __future__ import annotations

from mic_supervisor.converge.events import Event
from mic_supervisor.converge.outcome import Noted


def test_a_command_hears_of_instances_and_not_that_the_file_was_read() -> None:
    heard: list[Event] = []
    noted = Noted(heard.append)
    begun = Event("begin", 1.0, "a-1", "create", gpus=("GPU-1",))
    failed = Event("failed", 2.0, "a-1", "cannot start", hint="look at it")
    for event in (Event("config", 0.0, "configuration", "generation 2"), begun, failed):
        noted.emit(event)
    assert heard == [begun, failed]
    assert noted.begun == {"a-1": ("GPU-1",)}
    assert noted.failures["a-1"].hint == "look at it"
