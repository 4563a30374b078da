"""What is to be known of a text that comes from outside."""

from __future__ import annotations

import unicodedata

_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode's categories of controls, formats, separators


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
