"""The engine's byte streams: multiplexed logs as lines, JSON objects one a line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_HEADER = 8  # bytes: the stream's number, three of nothing, the length as big-endian 32 bits
_LONGEST = 1 << 20  # bytes of a line that does not end


def frames(read: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """(stream, bytes) from a multiplexed answer, until it ends.

    `read(n)` gives exactly n bytes, fewer only at the end. Format: Engine API reference,
    ContainerAttach, "Stream format". EOFError when the stream ends inside a frame.
    """
    while header := read(_HEADER):
        if len(header) < _HEADER:
            raise EOFError("the stream ends in the middle of a frame")
        number, length = struct.unpack(">BxxxL", header)
        data = read(length) if length else b""
        if len(data) < length:
            raise EOFError("the stream ends in the middle of a frame")
        yield number, data


def lines(parts: Iterable[tuple[int, bytes]]) -> Iterator[str]:
    """Lines in the order in which they end; standard output and error do not cut each other.

    Bytes that are not UTF-8 become U+FFFD. What a stream leaves without a line end comes last.
    """
    pending: dict[int, bytes] = {}
    for number, data in parts:
        *whole, rest = (pending.pop(number, b"") + data).split(b"\n")
        for line in whole:
            yield _text(line)
        if len(rest) > _LONGEST:
            yield _text(rest)
        elif rest:
            pending[number] = rest
    for _, rest in sorted(pending.items()):
        yield _text(rest)


def documents(raw: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line. ValueError for a line that is none."""
    for line in raw:
        if not line.strip():
            continue
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("a line of the stream is not a JSON object")
        yield value


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode(errors="replace")
