"""Which port an instance serves on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.model import Port
from mic_supervisor.plan.launch import assign, choose
from tests.unit.plan.builders import assessment, changed, on, workload

RANGE = (20000, 20009)
HTTP, GRPC = Port("http"), Port("grpc")


def chosen(instance: str, *ports: Port, **values: object) -> dict[str, int] | None:
    values.setdefault("recorded", {})
    values.setdefault("taken", ())
    values.setdefault("port_range", RANGE)
    return choose(instance, ports, **values)  # type: ignore[arg-type]


def test_the_same_id_gets_the_same_port() -> None:
    assert chosen("MAM-a", HTTP) == chosen("MAM-a", HTTP)
    assert chosen("MAM-a", HTTP) == {"http": 20009}
    assert chosen("MAM-b", HTTP) == {"http": 20004}


def test_the_next_free_number_after_the_ids_own_and_around_the_end() -> None:
    assert chosen("MAM-b", HTTP, taken={20004, 20005}) == {"http": 20006}
    assert chosen("MAM-b", HTTP, taken=set(range(20004, 20010))) == {"http": 20000}


def test_names_of_one_instance_get_numbers_of_their_own() -> None:
    assert chosen("MAM-b", HTTP, GRPC) == {"http": 20004, "grpc": 20005}


def test_a_fixed_port_stays_whoever_has_it() -> None:
    assert chosen("MAM-b", Port("http", 9000), taken={9000}) == {"http": 9000}
    assert chosen("MAM-b", GRPC, Port("http", 20004)) == {"http": 20004, "grpc": 20005}
    recorded = {"grpc": 20004}
    assert chosen("MAM-b", GRPC, Port("http", 20004), recorded=recorded) == {
        "http": 20004,
        "grpc": 20005,
    }


def test_a_recorded_number_is_kept_even_outside_the_range() -> None:
    assert chosen("MAM-b", HTTP, recorded={"http": 31000}) == {"http": 31000}
    assert chosen("MAM-b", HTTP, recorded={"http": 31000}, taken={31000}) == {"http": 20004}


def test_none_is_left() -> None:
    assert chosen("MAM-b", HTTP, taken=set(range(20000, 20010))) is None
    assert chosen("MAM-b", HTTP, GRPC, taken=set(range(20001, 20010))) is None


@given(
    st.text(min_size=1),
    st.sets(st.integers(20000, 20009)),
    st.lists(st.sampled_from(["http", "grpc", "metrics"]), unique=True),
)
def test_numbers_are_free_different_and_in_the_range(
    instance: str, taken: set[int], names: list[str]
) -> None:
    numbers = chosen(instance, *(Port(name) for name in names), taken=taken)
    if numbers is None:
        assert len(names) > 10 - len(taken)
        return
    assert list(numbers) == names
    assert len(set(numbers.values())) == len(names)
    assert not set(numbers.values()) & taken
    assert all(20000 <= number <= 20009 for number in numbers.values())


def test_what_is_assigned_does_not_depend_on_the_order_and_respects_what_is_fixed() -> None:
    fixed = changed(on("B", 1), ports=(Port("http", 20004),))
    items = [assessment(on(name, place)) for place, name in enumerate("ACDE") if place != 1]
    items.append(assessment(fixed))
    numbers = assign(items, lambda _: (), RANGE)
    assert numbers == assign(items[::-1], lambda _: (), RANGE)
    assert numbers["B-bbbbbbbb"] == {"http": 20004}
    values = [number["http"] for number in numbers.values() if number]
    assert len(set(values)) == len(items)


def test_what_runs_keeps_its_number() -> None:
    mam = on("MAM", 0)
    running = assessment(mam, workload(mam, ports={"http": 20001}))
    assert assign([running], lambda _: {20001}, RANGE) == {"MAM-aaaaaaaa": {"http": 20001}}


def test_what_runs_does_not_share_its_number() -> None:
    mam, other = on("MAM", 0), on("MAM", 1)
    own = chosen(other.id, HTTP)
    assert own is not None
    running = assessment(mam, workload(mam, ports=own))
    numbers = assign([running, assessment(other)], lambda _: (), RANGE)
    assert numbers[mam.id] == own
    assert numbers[other.id] != own
