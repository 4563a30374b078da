"""Claims: who gets which GPUs, who waits, and what becomes of what a holder left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mic_supervisor.desired.claims import (
    ORIGIN,
    RECONNECT,
    Claims,
    Ground,
    Running,
    ask,
    end,
    follow,
    gone,
    is_over,
    refusal,
    turn,
    vanish,
)
from mic_supervisor.model import Claim, Ending, FleetEntry

GRACE = 120.0
RELEASED = Ending("released", "its claim was released")


def fleet(*groups: str, trouble: str | None = None) -> tuple[FleetEntry, ...]:
    """fleet("0", "12") hands over GPU 0, and the GPUs 1 and 2 together."""
    return tuple(
        FleetEntry(tuple(f"GPU-{d}" for d in group), tuple(group), len(group), trouble)
        for group in groups
    )


def ground(*groups: str, **more: Any) -> Ground:
    entries = more.pop("entries", fleet(*groups))
    named = {uuid for entry in entries for uuid in entry.gpus}
    given = {"running": (), "now": 100.0, "grace": GRACE, "models": {"a", "b"}, "named": named}
    return Ground(entries=entries, **{**given, **more})


def claim(token: str, model: str = "a", size: int = 1, **more: Any) -> Claim:
    return Claim(**{"token": token, "model": model, "size": size, "asked_at": 10.0, **more})


def runs(gpus: str, model: str = "a", origin: str = ORIGIN, *, alive: bool = True) -> Running:
    suffix = gpus[0] if len(gpus) == 1 else f"{gpus[0]}x{len(gpus)}"
    return Running(f"{model}-{suffix}", model, tuple(f"GPU-{d}" for d in gpus), origin, alive)


def had(claims: Claims) -> dict[str, str | None]:
    """The digits of the GPUs that each has, by token."""
    return {
        one.token: None if one.gpus is None else "".join(u[4:] for u in one.gpus) for one in claims
    }


def held(*tokens: str, on: str = "01234", **more: Any) -> Claims:
    """Claims of model a that have a GPU each."""
    return tuple(
        claim(token, gpus=(f"GPU-{digit}",), instance=f"a-{digit}", got_at=20.0, **more)
        for token, digit in zip(tokens, on, strict=False)
    )


def test_who_asked_first_has_its_turn_first() -> None:
    waiting = (claim("late", asked_at=12.0), claim("early", asked_at=11.0), claim("b", "b"))
    found = follow(waiting, ground("0", "1"))
    assert had(found) == {"late": None, "early": "1", "b": "0"}
    (late,) = (one for one in found if one.gpus is None)
    assert turn(found, late) == (1, 1)


def test_a_group_goes_to_who_asks_for_so_many() -> None:
    waiting = (claim("one"), claim("two", size=2), claim("three", size=3))
    found = follow(waiting, ground("01", "2"))
    assert had(found) == {"one": "2", "two": "01", "three": None}
    assert [one.ending and one.ending.kind for one in found] == [None, None, "refused"]
    assert is_over(found[2])


def test_a_gpu_that_something_speaks_against_comes_last_and_one_in_trouble_never() -> None:
    lost = fleet("2", trouble="GPU 2 is not there")
    look = ground(entries=(*fleet("0", "1"), *lost), avoided={"GPU-0"})
    waiting = tuple(claim(str(n), asked_at=float(n)) for n in range(3))
    assert had(follow(waiting, look)) == {"0": "1", "1": "0", "2": None}


@pytest.mark.parametrize("there", [runs("0", "b", "file"), runs("0", alive=False)])
def test_a_gpu_is_free_when_nothing_of_ours_is_on_it_any_more(there: Running) -> None:
    assert had(follow((claim("x"),), ground("0", running=(there,)))) == {"x": None}
    assert had(follow((claim("x"),), ground("0"))) == {"x": "0"}


def test_nothing_is_given_or_found_while_a_runtime_cannot_be_read() -> None:
    waiting = (claim("x"), claim("back", instance="a-1"))
    assert follow(waiting, ground("0", "1", running=None)) == waiting


def test_who_vanished_while_waiting_is_forgotten_and_who_has_gpus_keeps_them() -> None:
    there = (*held("x"), claim("y"))
    left = vanish(vanish(vanish(there, "y", 50.0), "x", 50.0), "nobody", 50.0)
    assert had(left) == {"x": "0"}
    assert left[0].vanished_at == 50.0
    assert ask(left, claim("x", by="alice"))[0] == replace(held("x")[0], by="alice")


def test_a_new_claim_of_the_model_takes_over_what_a_vanished_one_has() -> None:
    there = (*held("x", vanished_at=90.0), claim("other", "b"), claim("y", asked_at=11.0))
    found = follow(there, ground("0", running=(runs("0"),)))
    assert had(found) == {"other": None, "y": "0"}
    (taken,) = (one for one in found if one.token == "y")
    assert (taken.instance, taken.vanished_at, taken.got_at) == ("a-0", None, 20.0)


def test_what_vanished_first_is_taken_over_first_and_what_ends_never() -> None:
    two = (*held("x", vanished_at=95.0), *held("y", on="1", vanished_at=90.0))
    gone_for_good = end(held("z", on="2", vanished_at=80.0), "z", RELEASED)
    running = tuple(runs(digit) for digit in "012")
    found = follow((*two, *gone_for_good, claim("n")), ground("0", "1", "2", running=running))
    assert had(found) == {"x": "0", "z": "2", "n": "1"}


def test_nobody_new_takes_over_what_is_on_a_gpu_that_fell_off_the_bus() -> None:
    entries = (*fleet("0", trouble="GPU 0 is not there"), *fleet("1"))
    there = (*held("x", vanished_at=90.0), claim("n"))
    assert had(follow(there, ground(entries=entries, running=(runs("0"),)))) == {"x": "0", "n": "1"}


def test_when_the_grace_is_over_the_claim_ends_and_says_since_when() -> None:
    there = held("x", vanished_at=10.0)
    assert follow(there, ground("0", now=129.9))[0].ending is None
    why = follow(there, ground("0", now=130.0))[0].ending
    assert why == Ending("vanished", "its holder vanished 120 s ago")


def test_what_runs_for_a_claim_is_found_by_a_supervisor_that_has_just_come() -> None:
    running = (runs("0"), runs("1", alive=False), runs("2", origin="file"), runs("34"))
    found = follow((), ground("0", "1", "2", "34", running=running))
    assert had(found) == {"of a-0": "0", "of a-3x2": "34"}
    assert {(one.found, one.vanished_at) for one in found} == {(True, 100.0)}
    everything = follow((), ground("0", "1", "2", "34", running=running), ended=True)
    assert had(everything) == {"of a-0": "0", "of a-1": "1", "of a-3x2": "34"}


def test_what_the_file_merely_lacks_is_found_too_until_a_word() -> None:
    """Else its holder would get a second instance."""
    look = ground("1", running=(runs("0"), runs("2", alive=False), runs("34")), confirmed=False)
    assert had(follow((), look)) == {"of a-0": "0", "of a-3x2": "34"}
    there = follow((claim("x", instance="a-0"),), look)
    assert had(there) == {"of a-3x2": "34", "x": "0"}
    assert had(follow((), replace(look, named={"GPU-1", "GPU-4"}))) == {"of a-0": "0"}
    assert had(follow((), replace(look, confirmed=True))) == {}
    assert had(follow(there, replace(look, confirmed=True, running=())))["x"] == "1"


def test_after_a_restart_each_gets_back_what_it_had_whoever_comes_first() -> None:
    look = ground("0", "1", running=(runs("0"), runs("1")))
    claims = follow((), look)
    claims = ask(claims, claim("new", asked_at=1.0))
    claims = follow(ask(claims, claim("x", instance="a-1", asked_at=5.0)), look)
    assert had(claims) == {"of a-0": "0", "new": None, "x": "1"}
    late = replace(look, now=100.0 + RECONNECT)
    assert had(follow(claims, late)) == {"new": "0", "x": "1"}


def test_who_comes_back_for_what_is_not_there_any_more_gets_another() -> None:
    there = (claim("x", instance="a-0"),)
    assert had(follow(there, ground("0", "1", running=(runs("0", "b", "file"),)))) == {"x": "1"}


def test_who_releases_what_it_had_before_a_restart_has_it_ended() -> None:
    there = (claim("x", instance="a-0", ending=RELEASED),)
    (found,) = follow(there, ground("0", running=(runs("0"),)))
    assert (found.gpus, found.ending) == (("GPU-0",), RELEASED)
    (left,) = follow(there, ground("0"))
    assert is_over(left)


def test_the_file_takes_a_gpu_back_and_its_claim_is_the_next() -> None:
    there = (claim("early", asked_at=1.0), *held("x", "y"))
    found = follow(there, ground("1", named={"GPU-0", "GPU-1"}))
    assert had(found) == {"early": None, "x": None, "y": "1"}
    later = follow(gone(found, {"y"}), ground("1", named={"GPU-0", "GPU-1"}))
    assert had(later) == {"early": None, "x": "1"}


def test_a_claim_ends_where_no_gpus_of_its_size_are_left_or_its_model_is_gone() -> None:
    (found,) = follow(held("x"), ground("12", named={"GPU-0", "GPU-1", "GPU-2"}))
    assert is_over(found) and found.ending is not None
    assert found.ending.text == "cannot claim a: the file hands over 2 at a time, not 1"
    (left,) = follow(held("x"), ground("0", models={"b"}, running=(runs("0"),)))
    assert left.gpus and left.ending and left.ending.text.endswith("the file has no model a")


def test_what_the_file_merely_lacks_waits_for_a_word() -> None:
    there = (*held("x"), claim("y", "gone"))
    assert follow(there, ground(confirmed=False, models=set())) == there
    # What it says of the GPU is a word.
    (found, _) = follow(there, ground("1", confirmed=False, named={"GPU-0", "GPU-1"}))
    assert found.gpus == ("GPU-1",)
    (found, _) = follow(there, ground("12", confirmed=False, named={"GPU-0", "GPU-1"}))
    assert is_over(found)


def test_what_a_file_brings_that_waits_for_a_word_is_waited_for() -> None:
    waiting = (claim("x"), claim("y", "b"), claim("z", "b", size=2))
    now = ground("0", models={"a"}, coming=fleet("0", "1"), coming_models={"b"})
    found = follow(waiting, now)
    assert had(found) == {"x": "0", "y": None, "z": None}
    assert [one.token for one in found if one.ending is not None] == ["z"]
    assert had(follow(waiting[1:2], ground("0", "1", models={"b"}))) == {"y": "0"}
    # What runs is not kept for a file that nobody has confirmed.
    (over,) = follow(held("x"), ground("0", models=(), coming=fleet("0"), coming_models={"a"}))
    assert over.ending is not None


def test_what_the_file_says_of_one_gpu_of_a_group_takes_the_group_back() -> None:
    """Else a model of the file and the claim's would both be desired on that GPU."""
    there = claim("x", size=2, gpus=("GPU-0", "GPU-1"), instance="a-0x2", got_at=20.0)
    now = ground("23", confirmed=False, named={"GPU-0", "GPU-2", "GPU-3"})
    assert had(follow((there,), now)) == {"x": "23"}


def test_a_release_is_not_lost_with_its_holder() -> None:
    """Whoever waits for its end would wait for ever, and what runs for it would have the grace."""
    there = (claim("x", instance="a-0", ending=RELEASED), claim("y", ending=RELEASED))
    left = vanish(vanish(there, "x", 50.0), "y", 50.0)
    assert [is_over(one) for one in left] == [False, True]
    (found, _) = follow(left, ground("0", running=(runs("0"),)))
    assert (found.gpus, found.ending) == (("GPU-0",), RELEASED)


def test_a_claim_without_a_holder_goes_with_its_gpu() -> None:
    assert follow(held("x", vanished_at=90.0), ground("1", named={"GPU-0", "GPU-1"})) == ()


@pytest.mark.parametrize(
    ("model", "size", "sizes", "text", "hint"),
    [
        ("c", 1, [1], "the file has no model c", "describe it under models:; it has a, s"),
        ("s", 1, [1], "s is part of a server of several models, which the file alone gives GPUs "
         "to", "give its backend a server for each GPU, or put the model under gpus:"),
        ("a", 1, [], "the file hands no GPU over", "hand one over under gpus:, as in `0: fleet`"),
        ("a", 2, [1], "the file hands over 1 at a time, not 2",
         'hand them over together, as in `"0,1": fleet`'),
        ("a", 1, [2, 4], "the file hands over 2 or 4 at a time, not 1",
         "claim 2 or 4, or hand over single GPUs"),
    ],
)  # fmt: skip
def test_what_can_never_be_had_says_why(
    model: str, size: int, sizes: list[int], text: str, hint: str
) -> None:
    assert refusal(model, size, {"a", "s"}, {"a"}, sizes) == Ending(
        "refused", f"cannot claim {model}: {text}", hint
    )
    assert refusal("a", 1, {"a"}, {"a"}, [1]) is None


# --- any order of events ------------------------------------------------------------------------

GROUPS = ("0", "1", "2", "34", "56")


class Machine(RuleBasedStateMachine):
    """Holders, a file and a machine that do as they like; and a supervisor that dies."""

    def __init__(self) -> None:
        super().__init__()
        self.claims: Claims = ()
        self.groups: tuple[str, ...] = GROUPS
        self.running: dict[tuple[str, ...], Running] = {}  # by its GPUs
        self.now = 100.0
        self.count = 0
        self.holders: dict[str, Claim] = {}  # what each that lives says of itself, by token
        self.away: set[str] = set()  # of those, who is not connected

    def look(self, **more: Any) -> None:
        """One round: claims are followed, what they ask for is started, what ended is stopped."""
        running = tuple(self.running.values())
        everything = {f"GPU-{digit}" for group in GROUPS for digit in group}
        given = {"running": running, "now": self.now, "named": everything, **more}
        self.claims = follow(self.claims, ground(*self.groups, **given))
        wanted = {}
        for one in self.claims:
            if one.gpus is not None and one.ending is None and one.instance is not None:
                wanted[one.gpus] = Running(one.instance, one.model, one.gpus, ORIGIN, True)
                if one.token in self.holders:
                    self.holders[one.token] = replace(one, vanished_at=None)
        for gpus in [*self.running]:
            if self.running[gpus].instance != getattr(wanted.get(gpus), "instance", None):
                del self.running[gpus]
        over = set()
        for one in self.claims:
            if one.ending is not None and (one.gpus is None or one.gpus not in self.running):
                over.add(one.token)
        for token in over & self.holders.keys() - self.away:
            del self.holders[token]
        self.claims = gone(self.claims, over)
        for gpus, one in wanted.items():
            self.running.setdefault(gpus, one)

    @rule(model=st.sampled_from("ab"), size=st.sampled_from([1, 1, 2]))
    def asks(self, model: str, size: int) -> None:
        self.count += 1
        made = claim(f"t{self.count}", model, size, asked_at=self.now)
        self.holders[made.token] = made
        self.claims = ask(self.claims, made)

    @rule()
    def a_round(self) -> None:
        self.look()

    @rule()
    def a_round_that_reads_nothing(self) -> None:
        self.look(running=None)

    @precondition(lambda self: self.holders.keys() - self.away)
    @rule(data=st.data())
    def is_killed(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.holders.keys() - self.away)))
        del self.holders[token]
        self.claims = vanish(self.claims, token, self.now)

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def comes_back(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.away)))
        self.away.remove(token)
        known = self.holders[token]
        self.claims = ask(self.claims, replace(known, gpus=None, got_at=None))

    @precondition(lambda self: self.holders.keys() - self.away)
    @rule(data=st.data())
    def releases(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.holders.keys() - self.away)))
        self.claims = end(self.claims, token, RELEASED)

    @rule(seconds=st.sampled_from([0.5, 5.0, 30.0, 130.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def the_supervisor_dies(self) -> None:
        self.claims = ()
        self.away |= self.holders.keys()
        offered = {entry.gpus for entry in fleet(*self.groups)}
        before = {gpus: one for gpus, one in self.running.items() if gpus in offered}
        self.look()
        assert self.running == before, "a restart changed what runs"

    @rule(groups=st.sets(st.sampled_from(GROUPS), min_size=1))
    def the_file_changes(self, groups: set[str]) -> None:
        self.groups = tuple(group for group in GROUPS if group in groups)

    @invariant()
    def no_gpu_has_two_claims(self) -> None:
        given = [uuid for one in self.claims for uuid in one.gpus or ()]
        assert len(given) == len({*given})

    @invariant()
    def no_claim_is_lost(self) -> None:
        known = {one.token for one in self.claims}
        assert self.holders.keys() - self.away <= known

    @invariant()
    def nobody_waits_beside_a_free_gpu_after_a_round(self) -> None:
        before = (self.claims, {**self.running}, {**self.holders})
        self.look()
        self.look()
        waiting = {one.size for one in self.claims if one.gpus is None and one.ending is None}
        given = {uuid for one in self.claims for uuid in one.gpus or ()}
        free = {e.size for e in fleet(*self.groups) if given.isdisjoint(e.gpus)}
        assert not waiting & free
        self.claims, self.running, self.holders = before

    def teardown(self) -> None:
        """When everybody who has one gives it back, everybody has had one."""
        self.groups = GROUPS
        for token in sorted(self.away):
            self.claims = ask(self.claims, replace(self.holders[token], gpus=None, got_at=None))
        self.away = set()
        self.now += RECONNECT
        for _ in range(2 * self.count + 3):
            self.look()
            for one in self.claims:
                if one.gpus is not None:
                    self.claims = end(self.claims, one.token, RELEASED)
        assert (self.claims, self.holders, self.running) == ((), {}, {})


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
