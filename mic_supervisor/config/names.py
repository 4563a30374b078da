"""How models and GPUs are named: text of any script, an index, a UUID, a PCI bus id, a range."""

from __future__ import annotations

import re
from dataclasses import dataclass
from unicodedata import category, normalize

from mic_supervisor.config.document import GpuKey

MAX_NAME = 128
"""Characters of a model's name."""


def is_model_name(name: str) -> bool:
    """Whether `name` holds only letters, marks and digits of any script, "-", "_" and "."."""
    kinds = {category(char) for char in name if char not in "-_."}
    letters = {kind for kind in kinds if kind[0] == "L" or kind in ("Nd", "Nl")}
    return bool(letters) and all(kind in letters or kind[0] == "M" for kind in kinds)


def composed(name: str) -> str:
    """Names are compared in composed form: two keyboards spell é differently."""
    return normalize("NFC", name)


MAX_INDEX = 127
"""No machine has more GPUs than this; a larger number is a slip of the hand."""

_INDEX = re.compile(r"[0-9]+")
_RANGE = re.compile(r"([0-9]+)\s*-\s*([0-9]+)")
_UUID = re.compile(r"(?i)GPU-([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})")
_PCI = re.compile(
    r"(?i)(?:(?P<domain>[0-9a-f]{4}|[0-9a-f]{8}):)?"
    r"(?P<bus>[0-9a-f]{2}):(?P<device>[01][0-9a-f])\.(?P<function>[0-7])"
)
_FORMS = 'write an index (0), a range ("0-3"), a group ("3,4"), a whole UUID or a PCI bus id'


class BadKey(ValueError):
    """The key names no GPU; `hint` says what does."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class GpuSelection:
    """What one key stands for: one instance over all `keys`, or, for a range, one for each."""

    keys: tuple[GpuKey, ...]
    each: bool = False

    def expand(self) -> list[tuple[GpuKey, ...]]:
        """The sets of GPUs that get an entry each."""
        return [(key,) for key in self.keys] if self.each else [self.keys]


def parse_gpu_key(key: str | int) -> GpuSelection:
    """What a key under `gpus:` stands for. Raises BadKey."""
    text = str(key).strip()
    parts = [part.strip() for part in text.split(",")]
    span = _RANGE.fullmatch(text)
    if span is not None:
        first, last = _index(span[1]), _index(span[2])
        if first > last:
            raise BadKey(f"the range {first}-{last} runs backwards", f'write "{last}-{first}"')
        return GpuSelection(
            tuple(GpuKey("index", str(index)) for index in range(first, last + 1)), each=True
        )
    if len(parts) > 1:
        if any(_RANGE.fullmatch(part) for part in parts):
            raise BadKey(
                "a range and a list do not mix",
                "a range is one instance for each GPU, a list is one instance over all of them: "
                "write two entries",
            )
        if "" in parts:
            raise BadKey("a GPU is missing beside a comma", _FORMS)
    if len(parts) > MAX_INDEX + 1:
        raise BadKey(f"a group of {len(parts)} GPUs is more than any machine has")
    keys = tuple(_one(part) for part in parts)
    for number, one in enumerate(keys):
        if one in keys[:number]:
            raise BadKey(f"{one} stands in this group twice")
    return GpuSelection(keys)


def _index(text: str) -> int:
    if len(text) > 1 and text.startswith("0"):
        raise BadKey(f"{text[:32]} has a leading zero", f"write {text.lstrip('0')[:32] or '0'}")
    if len(text) > 3 or int(text) > MAX_INDEX:
        raise BadKey(f"{text[:32]} is no GPU index: the largest is {MAX_INDEX}")
    return int(text)


def _one(text: str) -> GpuKey:
    if _INDEX.fullmatch(text):
        return GpuKey("index", str(_index(text)))
    if match := _UUID.fullmatch(text):
        return GpuKey("uuid", f"GPU-{match[1].lower()}")
    if match := _PCI.fullmatch(text):
        domain = (match["domain"] or "0").lower().zfill(8)
        address = f"{domain}:{match['bus']}:{match['device']}.{match['function']}"
        return GpuKey("pci", address.lower())
    upper = text[:4].upper()
    if upper == "MIG-":
        raise BadKey(
            "a MIG device cannot be given a model: MIG is not managed",
            "name the whole GPU, with MIG turned off",
        )
    if upper == "GPU-":
        raise BadKey("this is not a whole UUID", "nvidia-smi -L prints it: GPU- and 36 characters")
    raise BadKey("this names no GPU", _FORMS)
