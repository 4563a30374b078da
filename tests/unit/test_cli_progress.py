"""What a person sees of a command at work."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from mic_supervisor.cli import progress
from mic_supervisor.cli.progress import follow, line_of, named, outcome, table
from mic_supervisor.converge.events import Event
from mic_supervisor.plan.health import Phase

REASON = "cannot pull registry.example.com/team/embeddings:1.8: the registry does not answer"


def row(**values: Any) -> dict[str, Any]:
    return {
        "id": "m5235f749-51000000",
        "model": "人脸",
        "gpus": [{"uuid": "GPU-x", "index": 0}],
        "phase": "backoff",
        "reason": "backoff: it exited with 7",
        "endpoints": {},
        **values,
    }


def test_phases_that_are_no_news_are_phases() -> None:
    assert {*progress._QUIET, *progress._GOOD} <= {*Phase}


@pytest.mark.parametrize("name", ["embed-51000000", "a" * 120])
def test_gpu_and_time_are_kept_at_80_columns_and_the_reason_is_wrapped(name: str) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table({name: ("GPU 3,4", REASON, time.monotonic() - 4321)}))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert lines[1].startswith("GPU 3,4") and lines[1].rstrip().endswith("4321 s")
    if name.startswith("embed"):
        shown = "".join(line[25:72].strip() for line in lines[1:])
        assert shown.replace(" ", "") == REASON.replace(" ", "")


def test_a_phase_is_not_said_twice() -> None:
    assert outcome(row(id="a-1")) == "backoff    a-1  GPU 0  it exited with 7"
    event = Event("phase", 0.0, "a-1", "backoff: it exited with 7", "a", phase="backoff")
    assert line_of(event, set()) == "backoff: it exited with 7"


def test_texts_about_other_instances_show_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    with follow({"GPU-x": 0}, quiet=False) as told:
        told(
            Event("begin", 0.0, "m5235f749-51000000", "it ended", "人脸", ("GPU-x",), phase="start")
        )
        told(Event("progress", 0.0, "b-1", "waits for m5235f749-51000000", "b"))
    first, second = (line.partition(" s  ")[2] for line in capsys.readouterr().out.splitlines())
    assert first == "GPU 0    人脸-51000000: start: it ended"
    assert second == "-        b-1: waits for 人脸-51000000"


@pytest.mark.parametrize("name", ["人脸", "人脸-51000000", "m5235f749-51000000"])
def test_an_instance_is_found_by_each_of_its_names(name: str) -> None:
    assert named({"instances": [row()]}, name) == [row()]


def test_what_a_daemon_took_for_named_is_shown() -> None:
    document = {"instances": [row(), row(id="b-1", model="b")], "named": ["b-1"]}
    assert [one["id"] for one in named(document, "0")] == ["b-1"]
