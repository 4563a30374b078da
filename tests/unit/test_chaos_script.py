"""The storms of a seed: see tests/chaos."""

from __future__ import annotations

from itertools import islice

from tests.chaos.script import FIRST, Act, Entry, Storm, storms


def first(seed: int, count: int) -> list[Storm]:
    return list(islice(storms(seed), count))


def test_a_seed_gives_the_same_storms_again() -> None:
    assert first(7, 200) == first(7, 200)
    assert first(7, 20) != first(8, 20)


def test_every_disturbance_comes_in_half_an_hour() -> None:
    seen = {act.kind for storm in first(1, 100) for act in storm.acts}
    assert len(seen) == 18


def test_every_storm_ends_with_what_can_run() -> None:
    before = FIRST
    for storm in first(3, 300):
        assert not any(entry.fails for entry in storm.last if entry is not None)
        for slot, entry in enumerate(storm.last):
            assert slot in storm.touched(before) or entry == before[slot]
        before = storm.last


def test_in_each_storm_of_three_something_is_to_be_kept() -> None:
    before = FIRST
    kept = 0
    for storm in first(5, 300):
        kept += len(storm.touched(before)) < len(FIRST)
        before = storm.last
    assert kept > 250


def test_who_was_edited_or_killed_is_touched_and_nobody_else() -> None:
    entry = Entry("p", 1)
    last = (FIRST[0], FIRST[1], entry, FIRST[3])
    acts = (
        Act("kill an instance", 1, 0, 0.0),
        Act("edit", 2, 0, 0.0, last),
        Act("pause", 3, 0, 0.0),
    )
    assert Storm(1, acts, last).touched(FIRST) == {1, 2}
