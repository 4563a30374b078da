"""Is everything as it should be, and if not, what, since when, and what comes next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor.gpu.events import RecoveryAction, XidRecord, XidSeverity
from mic_supervisor.http.documents import Published
from mic_supervisor.http.verdict import Level, Problem, overall_verdict
from mic_supervisor.model import GpuInventory
from tests.unit.http import views_of
from tests.unit.http.views_of import NOW
from tests.unit.plan import builders as b


def by_subject(published: Published) -> dict[str, Problem]:
    return {problem.subject: problem for problem in overall_verdict(published, None).problems}


def test_good_is_good() -> None:
    verdict = overall_verdict(views_of.good(), None)
    assert verdict.level is Level.GOOD
    assert (verdict.sentence, verdict.problems) == ("Everything is as it should be", ())


def test_everything_that_is_wrong_is_named_with_its_time_and_way_out() -> None:
    verdict = overall_verdict(views_of.bad(), None)
    assert verdict.level is Level.BAD
    assert verdict.sentence == "7 things are not as they should be, 1 more on the way"
    told = [(one.subject, one.text) for one in verdict.problems]
    assert told == [
        (
            "Configuration",
            f"/etc/mic/gpus.yaml:12:5: error: models.whisper.backend: {views_of.SAYS_WHY} "
            "(and 1 more); generation 5, the last good one, runs",
        ),
        ("GPU 6", "cannot open it: the GPU fell off the bus"),
        (f"embed on {b.uuid(5)}", "blocked: GPU 5 is not there"),
        ("MAM on GPU 0", "backoff: it exited with 1"),
        ("whisper on GPU 2", "blocked: GPU 2 is held by PID 4121 (python, 18.2 GiB), not ours"),
        ("GPU 3", "a foreign process is on it, and the file keeps it empty"),
        ("GPU 4", "its holders cannot be read"),
        ("slow on GPU 1", "starting: GET /health answers 503"),
    ]
    found = by_subject(views_of.bad())
    assert found["Configuration"].since == NOW - 600
    assert found["Configuration"].hint == "mic-supervisor check shows every error with its line"
    assert (found["MAM on GPU 0"].since, found["MAM on GPU 0"].next_try) == (NOW - 90, NOW + 25)
    assert found["slow on GPU 1"].level is Level.BUSY
    assert found["whisper on GPU 2"].hint is not None
    assert found["GPU 6"].hint == "then reboot"


def test_an_engine_that_cannot_be_read_is_one_thing() -> None:
    found = by_subject(views_of.bad(engine_gone=True))
    assert found["docker"].text == (
        f"cannot be read: {views_of.NO_ENGINE}; what it runs is left as it is"
    )


def test_what_is_on_its_way_is_not_wrong() -> None:
    slow = b.on("slow", 0)
    starting = b.workload(slow)
    observed = b.observed(starting, health={starting.ref: b.failing("startup", 1)})
    verdict = overall_verdict(
        views_of.published(views_of.snapshot(b.desired(slow), observed)), None
    )
    assert (verdict.level, verdict.sentence) == (Level.BUSY, "1 of 1 instance on the way")


def test_nothing_asked_for() -> None:
    verdict = overall_verdict(
        views_of.published(views_of.snapshot(b.desired(), b.observed())), None
    )
    assert (verdict.level, verdict.sentence) == (
        Level.GOOD,
        "Nothing is asked for, and nothing runs",
    )


def test_before_the_first_round() -> None:
    verdict = overall_verdict(views_of.published(None), "the first round is not done yet")
    assert (verdict.level, verdict.sentence) == (Level.BUSY, "Observing the machine")


def test_a_loop_that_stalls_makes_everything_old() -> None:
    verdict = overall_verdict(views_of.good(), "the loop has not finished a round for 75 s")
    assert verdict.level is Level.UNKNOWN
    assert verdict.sentence == ("What follows is old: the loop has not finished a round for 75 s")


@pytest.mark.parametrize(
    ("inventory", "text", "hint"),
    [
        (GpuInventory("nvml", error="cannot read: x", hint="do y"), "cannot read: x", "do y"),
        (GpuInventory("none"), "cannot read GPUs: MIC_GPU_SOURCE is none", None),
    ],
)
def test_gpus_that_cannot_be_read(inventory: GpuInventory, text: str, hint: str | None) -> None:
    observed = replace(b.observed(), inventory=inventory)
    found = by_subject(views_of.published(views_of.snapshot(b.desired(), observed)))
    assert (found["GPUs"].text, found["GPUs"].hint) == (text, hint)


@pytest.mark.parametrize(
    ("severity", "ago", "action", "hint"),
    [
        (XidSeverity.CRITICAL, 60, RecoveryAction.DRAIN_AND_RESET, "drain and reset"),
        (XidSeverity.CRITICAL, 60, RecoveryAction.NONE, "dmesg"),
        (XidSeverity.CRITICAL, 60, None, "dmesg"),
        (XidSeverity.CRITICAL, 4000, None, None),
        (XidSeverity.APP, 60, None, None),
    ],
)
def test_what_a_gpu_complained_of(
    severity: XidSeverity, ago: float, action: RecoveryAction | None, hint: str | None
) -> None:
    record = XidRecord(b.uuid(0), 79, 1, NOW - ago, severity, action)
    found = by_subject(views_of.good(xids=(record,)))
    if hint is None:
        assert found == {}
        return
    problem = found["GPU 0"]
    assert problem.text == "reported Xid 79, critical"
    assert problem.since == NOW - ago
    assert hint in (problem.hint or "")


def test_since_when_is_known_of_what_does_not_tell_itself() -> None:
    before = views_of.bad()
    assert before.snapshot is not None
    later = replace(before, snapshot=replace(before.snapshot, now=NOW + 100))
    views = views_of.views(views_of.good(), before, later)
    problems = {one.subject: one for one in overall_verdict(later, None, views.firsts).problems}
    assert problems["GPU 3"].since == NOW
    assert problems["MAM on GPU 0"].since == NOW - 90  # it tells itself
    gone = views_of.views(before, views_of.good(), later)
    problems = {one.subject: one for one in overall_verdict(later, None, gone.firsts).problems}
    assert problems["GPU 3"].since == NOW + 100  # it was well in between


def test_since_when_is_told_by_the_clock_as_it_is_set_now() -> None:
    before = views_of.bad()
    assert before.snapshot is not None
    # 100 s later, and the clock was set an hour back.
    at, offset = NOW + 100 - 3600, -3600.0
    later = replace(
        before, snapshot=replace(before.snapshot, now=at - offset, offset=offset), offset=offset
    )
    views = views_of.views(before, later)
    problems = {one.subject: one for one in overall_verdict(later, None, views.firsts).problems}
    assert problems["GPU 3"].since == NOW - 3600
    assert len(views.samples.of(b.uuid(0))) == 2  # and measuring goes on


def test_a_first_start_with_a_broken_file() -> None:
    found = by_subject(
        views_of.published(None, config={"error": "gpus.yaml: error: x", "generation": 0})
    )
    assert found["Configuration"].text == "gpus.yaml: error: x; nothing runs by it"


def test_reasons_are_scrubbed() -> None:
    secret = "canary-3f9a"
    model = b.on("m", 0, workload=b.program(env=(("TOKEN", secret),)))
    starting = b.workload(model)
    health = b.failing("startup", 1)
    assert health.startup is not None
    health = replace(health, startup=replace(health.startup, reason=f"it said {secret}"))
    observed = b.observed(starting, health={starting.ref: health})
    published = views_of.published(views_of.snapshot(b.desired(model), observed))
    (problem,) = overall_verdict(published, None).problems
    assert problem.text == "starting: it said (hidden)"
