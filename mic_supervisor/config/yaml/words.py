"""Tables of words: which unquoted scalars surprise, and what a parser's complaints mean."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mic_supervisor.config.diagnostics import At, Report
from mic_supervisor.config.document import Place

if TYPE_CHECKING:
    from yaml import Mark, MarkedYAMLError


_WORDS = {
    "mapping values are not allowed here": (
        "a ':' that ends a key cannot stand here",
        "quote the text that holds it, or check the indentation",
    ),
    "could not find expected ':'": ("a ':' is missing after this key", None),
    "found character '\\t' that cannot start any token": (
        "a tab cannot stand here",
        "indent with spaces",
    ),
    "found unexpected end of stream": ("the quote that opens here is not closed", None),
    "found unexpected document separator": ("the quote that opens here is not closed", None),
    "expected <block end>, but found '<block mapping start>'": (
        "this line is indented more than the one that it belongs to",
        "give the keys of one map the same indentation",
    ),
    "expected <block end>, but found '<block sequence start>'": (
        "this item is indented more than the one that it belongs to",
        "give the items of one list the same indentation",
    ),
    "expected <block end>, but found '<scalar>'": (
        "a text follows where the value had ended",
        "quote the whole value",
    ),
    "expected <block end>, but found ':'": ("a key is missing before the ':'", None),
    "expected <block end>, but found '-'": ("a list's item cannot stand here", None),
}
_FROM_START = {
    "could not find expected ':'",
    "found unexpected end of stream",
    "found unexpected document separator",
}
_SPECIAL = re.compile(r"found character '(.)' that cannot start any token")


def report_syntax_error(
    error: MarkedYAMLError, opened: Mark | None, file: str, report: Report
) -> None:
    """`opened` is where the innermost bracket stands that was open when the parser gave up."""
    problem = error.problem or "the text is not YAML"
    mark = error.problem_mark or error.context_mark
    if opened is not None and problem.endswith("'<stream end>'"):
        message, hint = "the bracket that opens here is not closed", None
        mark = opened
    elif problem in _WORDS:
        message, hint = _WORDS[problem]
        if problem in _FROM_START:
            mark = error.context_mark or mark
    elif special := _SPECIAL.fullmatch(problem):
        message, hint = f"a text cannot begin with {special[1]} unless it is quoted", "quote it"
    else:
        message, hint = problem.replace("'<stream end>'", "the end of the file"), None
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    lines = report.lines.get(file, [])
    # Inside brackets a brace ends an unquoted text: "$" is one, and "{port}" no part of it.
    if opened is not None and line <= len(lines) and lines[line - 1][column - 2 : column] == "${":
        hint = 'inside brackets, quote a text that holds ${…}: "${port}"'
    report.add(At(Place(file, line, column)), message, hint=hint)


_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]{0,17})\.[0-9]{1,17}")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False}
_BOOLEANS["FALSE"] = False

# Each is read as something else than text by YAML 1.1 or 1.2; the words say what as.
# Sources: yaml.org/type (bool, int, float, timestamp, value), YAML 1.2.2 chapter 10.3.
_SURPRISES = [
    (re.compile(pattern), what)
    for pattern, what in (
        (r"y|Y|yes|Yes|YES|n|N|no|No|NO|on|On|ON|off|Off|OFF", "a truth value"),
        (r"~|null|Null|NULL", "no value"),
        (r"[-+]?0[0-9_]+|[-+]?0o[0-7_]+", "an octal number"),
        (r"[-+]?0x[0-9a-fA-F_]+", "a hexadecimal number"),
        (r"[-+]?0b[01_]+", "a binary number"),
        (r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?", "a number to base 60"),
        (r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "a number that is none"),
        (
            r"[0-9]{4}-[0-9][0-9]?-[0-9][0-9]?"
            r"(?:(?:[Tt]|[ \t]+)[0-9][0-9]?:[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?"
            r"(?:[ \t]*(?:Z|[-+][0-9][0-9]?(?::?[0-9]{2})?))?)?",
            "a date",
        ),
        (r"=", "a default value"),
        (r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?", "a number"),
    )
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
