"""Lanes: connected sets of GPUs. What happens in one lane never waits for another."""

from __future__ import annotations

from collections.abc import Iterable


class Lanes:
    """Union-find over GPUs, and over fixed ports, which tie GPUs together just the same.

    A lane's name is the smallest of its members, so that it does not depend on the order in which
    they were joined.
    """

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def join(self, members: Iterable[str]) -> None:
        first: str | None = None
        for member in members:
            root = self.of(member)
            if first is None:
                first = root
            elif root != first:
                low, high = sorted((first, root))
                self._parent[high] = low
                first = low

    def of(self, member: str) -> str:
        self._parent.setdefault(member, member)
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member
