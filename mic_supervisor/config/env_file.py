r"""Env files, `mic.env` and `env_file` of a model: one syntax, that of systemd's EnvironmentFile.

It is read strictly: what systemd would skip in silence is an error.
Source: systemd.exec(5), EnvironmentFile=, and parse_env_file_internal() in systemd 252.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mic_supervisor.host.files import read_text
from mic_supervisor.text import unseen

ENV_FILE = Path("/etc/mic/mic.env")
DEFAULT_SCOPE = "default"
SOCKET = "/run/mic/mic.sock"

SYSTEMD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_LINE = re.compile(
    r"""
    (?P<before> (?: [ \t\n\r] | [#;] (?: \\.? | [^\\\n\r] )*+ )*+ )
    (?P<name> [^=\n\r]*+ )
    (?:
        =
        (?P<quoted> (?: [ \t]*+ (?: '[^']*+' | "(?: \\. | [^"\\] )*+" ) )*+ ) [ \t]*+
        (?P<plain> (?: \\.? | [^\\ \t\n\r] | [ \t]++ (?! [\n\r] | \Z ) )*+ ) [ \t]*+
    )?
    """,
    re.VERBOSE | re.DOTALL,
)
_QUOTED = re.compile(r"""'([^']*)' | "((?:\\.|[^"\\])*)" """, re.VERBOSE | re.DOTALL)
_ESCAPE_IN_QUOTES = re.compile(r'\\(?:(["\\`$])|\n)')
_ESCAPE = re.compile(r"\\(?:[\n\r]|(.?))", re.DOTALL)
_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z0-9_.,:;/@%+=-]*")


@dataclass(frozen=True, slots=True)
class Assignment:
    name: str
    value: str
    line: int  # from 1


class BadLine(ValueError):
    """A line that is no assignment. `unseen` names a character in it that nobody sees."""

    def __init__(self, line: int, message: str, unseen: str | None = None) -> None:
        super().__init__(message)
        self.line = line
        self.unseen = unseen


def parse_env_file(
    text: str, names: re.Pattern[str] = SYSTEMD_NAME
) -> tuple[list[Assignment], list[BadLine]]:
    """The assignments in the order of the file, a later one wins, and the lines that are none.

    Comments begin with # or ; and take a whole line. A backslash at the end continues a line.
    Double quotes know the escapes of a shell, single quotes none; blanks around a value are cut.
    Quotes count at the beginning of a value and right after another quoted part.
    """
    found: list[Assignment] = []
    bad: list[BadLine] = []
    number = 1
    for match in _LINE.finditer(text):
        number += match["before"].count("\n")
        name, plain = match["name"].strip(" \t"), match["plain"]
        if plain is not None and (there := unseen(match["name"] + match["quoted"] + plain)):
            bad.append(BadLine(number, f"holds {there}, which nobody sees: remove it", there))
        elif plain is None:
            if name:  # else it is the end of the file
                bad.append(BadLine(number, "is not NAME=VALUE"))
        elif plain.startswith(("'", '"')):
            bad.append(BadLine(number, "has a quote that is not closed"))
            break  # it takes in the rest of the file
        elif not names.fullmatch(name):
            # Not quoted: in a file that is none of these, it may be a piece of a secret.
            problem = "does not begin with the name of a variable"
            if name.startswith("export "):
                problem = "begins with export, which systemd does not know: remove it"
            bad.append(BadLine(number, problem))
        else:
            value = _unquoted(match["quoted"]) + _ESCAPE.sub(r"\1", plain)
            found.append(Assignment(name, value, number))
        number += text.count("\n", match.end("before"), match.end())
    return found, bad


def _unquoted(quoted: str) -> str:
    parts = _QUOTED.finditer(quoted)
    return "".join(part[1] or _ESCAPE_IN_QUOTES.sub(r"\1", part[2] or "") for part in parts)


def format_env_file(variables: Mapping[str, str]) -> str:
    r"""The text that `parse_env_file` and systemd read back, with quotes where they are needed.

    Between double quotes only " \ ` and $ are special, and line ends stand for themselves.
    """
    return "".join(f"{name}={_shown(value)}\n" for name, value in variables.items())


def _shown(value: str) -> str:
    if _NEEDS_NO_QUOTES.fullmatch(value):
        return value
    return '"' + re.sub(r'["\\`$]', r"\\\g<0>", value) + '"'


def socket_of(scope: str) -> str:
    """Where the daemon of a scope listens unless MIC_SOCKET says so: two share no socket."""
    return SOCKET if scope == DEFAULT_SCOPE else f"/run/mic/{scope}.sock"


def setting(name: str, default: str, environ: Mapping[str, str], env_file: Path = ENV_FILE) -> str:
    """One setting as it is written, for who cannot wait until all of them are read and checked.

    What is wrong with `mic.env` is told by who reads it in full.
    """
    if name in environ:
        return environ[name]
    try:
        found, _ = parse_env_file(read_text(env_file))
    except (OSError, UnicodeDecodeError):
        return default
    return next((one.value for one in reversed(found) if one.name == name), default)
