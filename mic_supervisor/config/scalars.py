"""Which unquoted scalars are what they look like."""

from __future__ import annotations

import re

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]{0,17})\.[0-9]{1,17}")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False}
_BOOLEANS["FALSE"] = False

# Each is read as something else than text by YAML 1.1 or 1.2; the words say what as.
# Sources: yaml.org/type (bool, int, float, timestamp, value), YAML 1.2.2 chapter 10.3.
_SURPRISES = [
    (re.compile(r"y|Y|yes|Yes|YES|n|N|no|No|NO|on|On|ON|off|Off|OFF"), "a truth value"),
    (re.compile(r"~|null|Null|NULL"), "no value"),
    (re.compile(r"[-+]?0[0-9_]+"), "an octal number"),
    (re.compile(r"[-+]?0o[0-7_]+"), "an octal number"),
    (re.compile(r"[-+]?0x[0-9a-fA-F_]+"), "a hexadecimal number"),
    (re.compile(r"[-+]?0b[01_]+"), "a binary number"),
    (re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"), "a number to base 60"),
    (re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"), "a number that is none"),
    (
        re.compile(
            r"[0-9]{4}-[0-9][0-9]?-[0-9][0-9]?"
            r"(?:(?:[Tt]|[ \t]+)[0-9][0-9]?:[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?"
            r"(?:[ \t]*(?:Z|[-+][0-9][0-9]?(?::?[0-9]{2})?))?)?"
        ),
        "a date",
    ),
    (re.compile(r"="), "a default value"),
    (re.compile(r"[-+]?[0-9][0-9_]*"), "a number"),
    (
        re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"),
        "a number",
    ),
]


def resolve(text: str) -> tuple[str | int | float | bool | None, str | None]:
    """The value of an unquoted scalar, and what is surprising about it, None if nothing is.

    An empty text is None. A surprising one keeps its text as its value.
    """
    if text == "":
        return None, None
    if text in _BOOLEANS:
        return _BOOLEANS[text], None
    if len(text) > 64:  # nothing that long is read as anything but text, and the rules stay cheap
        return text, None
    if _INTEGER.fullmatch(text):
        return int(text), None
    if _DECIMAL.fullmatch(text):
        return float(text), None
    for pattern, what in _SURPRISES:
        if pattern.fullmatch(text):
            return text, f"{text} is read as {what} by some YAML readers"
    return text, None
