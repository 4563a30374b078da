"""What `status --json` says of claims, and of GPUs that are handed over."""

from __future__ import annotations

from dataclasses import asdict, replace

from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.model import Ending
from mic_supervisor.views.status import claims, gpu_rows
from tests.unit.http import views_of
from tests.unit.plan import builders as b

NOW = views_of.NOW


def seen() -> Snapshot:
    found = views_of.claimed().snapshot
    assert found is not None
    return found


def test_a_row_for_each_claim_those_with_gpus_first() -> None:
    gpu = [{"uuid": b.uuid(0), "index": 0}]
    mam, qwen, whisper = (asdict(one) for one in claims(seen()))
    assert mam == {
        "model": "MAM",
        "size": 1,
        "gpus": gpu,
        "instance": "MAM-aaaaaaaa",
        "state": "ready",
        "reason": None,
        "by": "alice",
        "holder": "task 3",
        "since": NOW - 600,
        "until": None,
    }
    assert (qwen["state"], qwen["since"], qwen["until"]) == ("vanished", NOW - 20, NOW + 100)
    assert (whisper["gpus"], whisper["instance"], whisper["since"]) == ([], None, NOW - 60)
    turn = "a GPU: it is number 1 of 1 in the queue"
    assert (whisper["state"], whisper["reason"]) == ("waiting", turn)


def test_one_that_is_over_says_why() -> None:
    found = seen()
    over = replace(found.desired.claims[0], ending=Ending("failed", "cannot serve MAM: it broke"))
    found = replace(found, desired=replace(found.desired, claims=(over,)))
    (row,) = claims(found)
    assert (row.state, row.reason) == ("releasing", "cannot serve MAM: it broke")


def test_times_are_the_wall_clocks() -> None:
    found = replace(seen(), offset=1000.0)
    assert [one.since for one in claims(found)] == [NOW + 400, NOW + 980, NOW + 940]
    assert claims(found)[1].until == NOW + 1100


def test_a_gpu_that_is_handed_over_and_not_claimed_has_a_state_of_its_own() -> None:
    found = seen()
    states = [row.state for row in gpu_rows(found.desired, found.observed)]
    assert states == ["managed", "managed", "fleet", "fleet"]
    foreign = b.observed(gpus=[views_of.gpu(2, processes=(views_of.foreign(7),))])
    assert next(row.state for row in gpu_rows(found.desired, foreign)) == "foreign"
