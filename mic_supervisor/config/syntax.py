"""What a YAML parser's complaints mean, and what another keyboard makes of YAML's marks."""

from __future__ import annotations

import re

import yaml

from mic_supervisor.config.diagnostics import At, Report
from mic_supervisor.config.document import Location

COLON_AND_BLANK = "a colon and a blank must stand between a key and its value"
_UNSPACED = re.compile(r"([^\s:：,{}\[\]#]+)(?::(?=\S)(?!//)|：\s*)(\S.*?)(?:\s+#.*)?")


def unspaced(text: str) -> str | None:
    """ "0: MAM" for "0:MAM", and where the colon is the full-width one of a Chinese keyboard; the
    first line only. None: nothing is missing."""
    found = _UNSPACED.fullmatch(text.strip().partition("\n")[0])
    return None if found is None else f"{found[1]}: {found[2]}"


_OTHERS = {"，": ", ", "：": ": ", **dict(zip("｛｝［］【】“”‘’", "{}[][]\"\"''", strict=True))}
_MARKS = str.maketrans(_OTHERS)
_WIDE = "a full-width mark or quote stands here, which is none of YAML's"


def meant(text: str, brackets: str) -> str | None:
    """A value with YAML's own marks, where it stands in these then: `[a, b]` for `【a，b】`."""
    plain = _plain(text)
    return plain if plain and plain[0] + plain[-1] == brackets else None


_ASIDE = re.compile(r"\"[^\"]*\"|'[^']*'|#.*")  # texts and comments may hold any mark
_LONGEST = 400  # characters of a line to write anew


def _plain(source: str) -> str | None:
    """A line with YAML's own marks instead of the full-width ones of a Chinese keyboard; None:
    they are not what is wrong with it."""
    if source.isascii() or len(source) > _LONGEST:
        return None
    bare = _ASIDE.sub("", source)
    plain = re.sub("([,:]) +", r"\1 ", source.translate(_MARKS)).strip()
    try:
        list(yaml.parse(plain, yaml.SafeLoader))
    except yaml.YAMLError:
        return None
    return plain if bare.translate(_MARKS) != bare else None


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
_PERHAPS_UNSPACED = {"mapping values are not allowed here", "could not find expected ':'"}
_SPECIAL = re.compile(r"found character '(.)' that cannot start any token")


def report_syntax_error(
    error: yaml.MarkedYAMLError, opened: yaml.Mark | None, file: str, report: Report
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
    if problem in _PERHAPS_UNSPACED:
        # The parser reads on, and stumbles over the next key's colon.
        filled = [n for n, text in enumerate(lines[:line], 1) if text.split("#")[0].strip()]
        for number in reversed(filled[-2:]):
            text = lines[number - 1].lstrip(" -")
            if (pair := unspaced(text)) is not None:
                at = At(Location(file, number, len(lines[number - 1]) - len(text) + 1))
                report.add(at, COLON_AND_BLANK, hint=f"write `{pair}`")
                return
    source = lines[line - 1] if line <= len(lines) else ""
    if (plain := _plain(source)) is not None:
        column, message = len(source) - len(source.lstrip()) + 1, _WIDE
        hint = f"write `{plain}`"
    # Inside brackets a brace ends an unquoted text: "$" is one, and "{port}" no part of it.
    elif opened is not None and source[column - 2 : column] == "${":
        hint = 'inside brackets, quote a text that holds ${…}: "${port}"'
    report.add(At(Location(file, line, column)), message, hint=hint)
