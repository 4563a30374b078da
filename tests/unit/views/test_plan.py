"""A plan as people read it."""

from __future__ import annotations

import pytest

from mic_supervisor.plan.actions import FieldDiff
from mic_supervisor.plan.memory import InstanceMemory
from mic_supervisor.views.plan import diff_lines
from tests.unit.plan.builders import (
    NOW,
    assessment,
    changed,
    knows,
    observed,
    on,
    plan_for,
    text,
    workload,
)

LONG = ["/usr/bin/python3", *[f"--flag-{number}={'x' * 20}" for number in range(25)]]


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (["a", "1"], ["a", "2"], ['command: ["a", "1"] -> ["a", "2"]']),
        (
            [*LONG, "--max-model-len", "8192", "--x"],
            [*LONG, "--max-model-len", "16384", "--x"],
            ["command: --max-model-len 8192 -> --max-model-len 16384"],
        ),
        (
            [*LONG, "--len=8192"],
            [*LONG, "--len=16384"],
            ["command: --len=8192 -> --len=16384"],
        ),
        (LONG, [*LONG, "--enable-metrics"], ["command: --enable-metrics added"]),
        ([*LONG, "--dtype", "bf 16"], LONG, ["command: --dtype 'bf 16' removed"]),
        (
            ["--a", "1", *LONG, "--b", "2"],
            ["--a", "3", *LONG, "--c", "2"],
            ["command: --a 1 -> --a 3", "command: --b -> --c"],
        ),
        (
            [f"--config={'y' * 300}one{'z' * 300}"],
            [f"--config={'y' * 300}two{'z' * 300}"],
            [f"command: …{'y' * 16}one{'z' * 16}… -> …{'y' * 16}two{'z' * 16}…"],
        ),
        (
            "p" * 400 + "1",
            "p" * 400 + "2",
            [f'command: …{"p" * 16}1" -> …{"p" * 16}2"'],
        ),
        (None, "p" * 200, [f'command: null -> "{"p" * 200}"']),
    ],
)
def test_of_a_long_list_or_text_only_what_differs_is_shown(
    before: object, after: object, lines: list[str]
) -> None:
    assert diff_lines(FieldDiff("command", before, after)) == lines


def test_a_name_in_any_script_is_shown_as_it_is() -> None:
    face = on("人脸", 0)
    assert face.id == "m5235f749-aaaaaaaa"
    assert text(plan_for([face, on("MAM", 1)], observed())) == (
        "+ create   人脸-aaaaaaaa  GPU 0  nothing runs for it yet\n"
        "+ create   MAM-bbbbbbbb   GPU 1  nothing runs for it yet\n"
        "\n"
        "Plan: 2 to create.\n"
    )


def test_reasons_and_hints_show_names_as_they_are_and_names_of_containers_stay() -> None:
    new, other = (changed(on("人脸", index), image="mam:2") for index in (0, 1))
    failed = InstanceMemory(
        failures=1,
        reason="it exited with 1",
        attempt=assessment(new).hash,
        failed=assessment(new).hash,
        failed_reason="it exited with 1",
        ready="then",
        ready_workload=workload(on("人脸", 0)).name,
        retry_at=NOW,
    )
    running = observed(workload(on("人脸", 0)), workload(on("人脸", 1)))
    told = text(plan_for([new, other], running, knows(**{new.id: failed})))
    assert (
        "! blocked  人脸-bbbbbbbb on GPU 1: the new specification failed on 人脸-aaaaaaaa" in told
    )
    assert "hint: change the file, or: mic-supervisor retry 人脸-aaaaaaaa" in told
    assert "m5235f749" not in told
    moved = text(plan_for([], running))
    assert "- remove   人脸-aaaaaaaa  GPU 0  the file no longer names it" in moved
    assert "removes mic-test-m5235f749-aaaaaaaa-" in moved
