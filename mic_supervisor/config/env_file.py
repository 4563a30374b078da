"""systemd's EnvironmentFile format, read strictly: what systemd would skip in silence is an error.

Source: systemd.exec(5), EnvironmentFile=, and parse_env_file_internal() in systemd 252.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mic_supervisor.records import dataclass

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANKS = " \t"
_LINE_ENDS = "\n\r"


@dataclass(frozen=True, slots=True)
class Assignment:
    name: str
    value: str
    line: int  # from 1


class BadLine(ValueError):
    """A line that is no assignment."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def parse_env_file(text: str) -> tuple[list[Assignment], list[BadLine]]:
    """The assignments in the order of the file, a later one wins, and the lines that are none.

    Comments begin with # or ; and take a whole line. A backslash at the end continues a line.
    Double quotes know the escapes of a shell, single quotes none; blanks around a value are cut.
    """
    found: list[Assignment] = []
    bad: list[BadLine] = []
    for number, line in _logical_lines(text):
        name, equals, rest = line.partition("=")
        name = name.strip(_BLANKS)
        if not equals:
            bad.append(BadLine(number, "is not NAME=VALUE"))
        elif not _NAME.fullmatch(name):
            problem = "cannot be the name of a variable"
            if name.startswith("export "):
                problem = "begins with export, which systemd does not know: remove it"
            bad.append(BadLine(number, f"{name[:64]!r} {problem}"))
        else:
            try:
                found.append(Assignment(name, _value(rest), number))
            except ValueError as error:
                bad.append(BadLine(number, str(error)))
    return found, bad


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their number; a quoted line end and one after a backslash do not end a line."""
    position, number = 0, 1
    while position < len(text):
        start = number
        char = text[position]
        if char in _BLANKS + _LINE_ENDS:
            number += char == "\n"
            position += 1
            continue
        comment = char in "#;"
        begin = position
        quote = ""
        in_value = fresh = False
        while position < len(text):
            char = text[position]
            if char == "\\" and quote != "'":
                number += text[position + 1 : position + 2] == "\n"
                position += 2
                fresh = False
                continue
            if char in _LINE_ENDS and not quote:
                break
            number += char == "\n"
            if quote:
                if char == quote:
                    quote, fresh = "", True
            elif not comment and char == "=" and not in_value:
                in_value = fresh = True
            elif in_value and fresh and char in "\"'":
                quote = char
            elif char not in _BLANKS:
                fresh = False
            position += 1
        if not comment:
            yield start, text[begin:position]


def _value(rest: str) -> str:
    """What stands right of the =, unquoted. Raises ValueError for a quote that is not closed.

    Quotes count at the beginning of a value and right after another quoted part, as in systemd.
    """
    out: list[str] = []
    kept = 0  # blanks after this length of `out` are cut
    position = 0
    fresh = True
    while position < len(rest):
        char = rest[position]
        if fresh and char in "\"'":
            end, part = _quoted(rest, position)
            out += part
            kept = len(out)
            position = end
            continue
        if fresh and char in _BLANKS:
            position += 1
            continue
        fresh = False
        if char == "\\":
            following = rest[position + 1 : position + 2]
            if following not in _LINE_ENDS:
                out.append(following)
            kept = len(out)
            position += 2
            continue
        out.append(char)
        if char not in _BLANKS:
            kept = len(out)
        position += 1
    return "".join(out[:kept])


def _quoted(rest: str, position: int) -> tuple[int, list[str]]:
    """The characters of the quoted part at `position`, and where it has ended."""
    quote = rest[position]
    out: list[str] = []
    position += 1
    while position < len(rest) and rest[position] != quote:
        char = rest[position]
        if char == "\\" and quote == '"':
            following = rest[position + 1 : position + 2]
            if following in ('"', "\\", "`", "$"):
                out.append(following)
            elif following != "\n":
                out += [char, following]
            position += 2
        else:
            out.append(char)
            position += 1
    if position >= len(rest):
        raise ValueError("has a quote that is not closed")
    return position + 1, out
