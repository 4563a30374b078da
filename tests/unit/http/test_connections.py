"""Who makes room and who is dropped, with connections that are only said to be there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from mic_supervisor.http.connections import Connection, Connections
from tests.unit.http.views_of import Clock


@dataclass(eq=False)
class Client:
    """What `Connections` sees of a connection."""

    dropped: list[str]
    name: str
    unread: bool = False
    done: bool = field(default=False)

    @property
    def idle(self) -> bool:
        return self.done and not self.unread

    def drop(self) -> None:
        self.dropped.append(self.name)


class World:
    def __init__(self, limit: int = 3) -> None:
        self.clock = Clock()
        self.book = Connections(10.0, limit, self.clock)
        self.dropped: list[str] = []
        self.clients: dict[str, Client] = {}

    def open(self, name: str) -> Connection:
        self.clients[name] = Client(self.dropped, name)
        self.book.opened(self[name])
        return self[name]

    def __getitem__(self, name: str) -> Connection:
        return cast(Connection, self.clients[name])

    def answer(self, name: str, *, unread: bool = False) -> None:
        self.clients[name].done, self.clients[name].unread = True, unread
        self.book.answered(self[name])


def test_the_one_that_has_waited_longest_makes_room() -> None:
    world = World()
    for name in "abcd":
        world.open(name)
    assert (world.dropped, len(world.book)) == (["a"], 3)


def test_who_asks_properly_goes_to_the_end_of_the_line() -> None:
    world = World()
    for name in "abc":
        world.open(name)
    world.answer("a")
    world.answer("a")  # a second request on the same connection
    world.open("d")
    world.open("e")
    assert world.dropped == ["b", "c"]


def test_time_counts_from_the_first_byte_and_not_while_resting() -> None:
    world = World()
    world.open("a")
    world.answer("a")
    world.clock.now = 100
    world.book.sweep()
    world.clients["a"].done = False
    world.book.request_begins(world["a"])
    world.clock.now = 109
    world.book.request_begins(world["a"])  # it goes on sending, which buys no time
    world.book.sweep()
    assert world.dropped == []
    world.clock.now = 111
    world.book.sweep()
    assert (world.dropped, len(world.book)) == (["a"], 0)


def test_an_answer_counts_when_it_was_taken() -> None:
    world = World()
    world.open("slow")
    world.open("stuck")
    world.answer("slow", unread=True)
    world.answer("stuck", unread=True)
    world.clock.now = 5
    world.clients["slow"].unread = False
    world.book.sweep()
    world.clock.now = 11
    world.book.sweep()
    assert world.dropped == ["stuck"]


def test_what_is_closed_is_forgotten() -> None:
    world = World()
    world.book.closed(world.open("a"))
    world.book.request_begins(world["a"])
    world.book.answered(world["a"])
    assert len(world.book) == 0
    world.open("b")
    world.book.drop_all()
    assert world.dropped == ["b"]
