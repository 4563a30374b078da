"""The border for texts from outside: what is shown of them, and what nobody sees in them."""

from __future__ import annotations

import re
import unicodedata

_OTHER_QUOTES = str.maketrans("“”", '""')
_QUOTED = re.compile("“[^”]*(?:”|$)")
_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode's categories of controls, formats, separators


LONGEST = 2000  # characters of a sentence that somebody else wrote


def printable(text: str) -> str:
    """`text` without anything that a terminal would obey, and without half a surrogate."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def one_line(text: str, longest: int = LONGEST) -> str:
    """What another program, a server or a person said, as one printable line of bounded length."""
    words = text if text.isprintable() else " ".join(text.split())
    return printable(words if len(words) <= longest else f"{words[: longest - 1]}…")


def quoted(said: str, longest: int = LONGEST) -> str:
    """What another program said, between quotes that it cannot end: “no space left on device”.

    HTTP leaves out what stands between them: `without_quotes`.
    """
    return f"“{one_line(said.translate(_OTHER_QUOTES), longest)}”"


def without_quotes(text: str, instead: str) -> str:
    """Our own words of a sentence; it may have been cut within a quote."""
    return _QUOTED.sub(instead, text)


def unseen(text: str) -> str | None:
    """The first character that nobody sees, "U+200B (ZERO WIDTH SPACE)"; None: there is none.

    Plain blanks, tabs and line ends are meant to be there.
    """
    if text.isascii() and text.isprintable():
        return None
    for char in text:
        if char not in " \t\r\n" and unicodedata.category(char) in _UNSEEN:
            return f"U+{ord(char):04X} ({unicodedata.name(char, 'a control character')})"
    return None
