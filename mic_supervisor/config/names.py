"""Names of models."""

from __future__ import annotations

MAX_NAME = 128
"""Characters of a model's name."""


def is_model_name(name: str) -> bool:
    """Whether `name` holds only letters, marks and digits of any script, "-", "_" and "."."""
    if name.isascii():
        return any(map(str.isalnum, name)) and all(c.isalnum() or c in "-_." for c in name)
    from unicodedata import category

    kinds = {category(char) for char in name if char not in "-_."}
    letters = {kind for kind in kinds if kind[0] == "L" or kind in ("Nd", "Nl")}
    return bool(letters) and all(kind in letters or kind[0] == "M" for kind in kinds)


def composed(name: str) -> str:
    """Names are compared in composed form: two keyboards spell é differently."""
    if name.isascii():
        return name
    from unicodedata import normalize

    return normalize("NFC", name)
