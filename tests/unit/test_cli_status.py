"""What `status` says of claims on a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from mic_supervisor.cli.status import _claim, _remarks


def claim(**values: Any) -> dict[str, Any]:
    given = {
        "model": "MAM",
        "instance": "MAM-51000000",
        "by": "alice",
        "holder": "",
        "reason": None,
    }
    return {**given, "state": "ready", "until": None, **values}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "MAM-51000000: claimed by alice, ready"),
        ({"holder": "task 3"}, "MAM-51000000: claimed by alice (task 3), ready"),
        ({"by": "", "state": "vanished"}, "MAM-51000000: claimed, vanished"),
        (
            {
                "instance": None,
                "state": "waiting",
                "reason": "a GPU: it is number 1 of 2 in the queue",
            },
            "MAM: claimed by alice, waits for a GPU: it is number 1 of 2 in the queue",
        ),
    ],
)
def test_a_line_for_each_claim(values: dict[str, Any], text: str) -> None:
    assert _claim(claim(**values)) == text


def test_one_that_vanished_says_until_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    line = _claim(claim(state="vanished", until=1_795_300_000.0))
    assert line.startswith("MAM-51000000: claimed by alice, vanished until ")


def test_gpus_that_are_handed_over_and_free_are_named() -> None:
    gpus = [{"uuid": f"GPU-{n}", "index": n, "state": "fleet"} for n in (2, 3)]
    found = _remarks({"instances": [], "gpus": gpus, "claims": [claim()]})
    assert found == [
        "MAM-51000000: claimed by alice, ready",
        "Handed over, and not claimed: GPU 2,3",
    ]
