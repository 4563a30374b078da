"""What gpus.yaml says, after loading: typed, with locations, and not yet bound to any hardware.

And how models and GPUs are named: text of any script, an index, a UUID, a PCI bus id, a range.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import category, normalize

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

    from mic_supervisor.config.options import Hooks

NONE = "none"
"""The value under `gpus:` that keeps a GPU empty."""

FLEET = "fleet"
"""The value under `gpus:` that hands GPUs over: claims say what runs there."""


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """Where something stands; line and column count from 1, and 0 is the whole file or line."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part != 0)


@dataclass(frozen=True, slots=True)
class GpuKey:
    """One GPU as the file spells it.

    `value` is normalised: "3" for an index, "GPU-…" or "MIG-…" in lower case after it for a UUID,
    "00000000:3b:00.0" (8-digit domain, lower case) for a PCI bus id.
    """

    kind: Literal["index", "uuid", "pci"]
    value: str

    def __str__(self) -> str:
        return f"GPU {self.value}" if self.kind == "index" else self.value


@dataclass(frozen=True, slots=True)
class GpuEntry:
    """One entry under `gpus:`. A range is already expanded to one entry per GPU.

    `model` None is `none`: kept empty; with `fleet` it is `fleet`: handed over to a claim. More
    than one key: one instance over all of them. `profile` is the one that the entry stands in;
    None: in none.
    """

    keys: tuple[GpuKey, ...]
    model: str | None
    location: Location
    profile: str | None = None
    fleet: bool = False

    @property
    def value(self) -> str:
        """As the file has it."""
        return self.model or (FLEET if self.fleet else NONE)


@dataclass(frozen=True, slots=True)
class ModelDefinition:
    """`fault` says why its backend cannot be used, where that was tolerated; `options` is None."""

    name: str
    backend: str
    options: BaseModel | None  # the backend's Options
    location: Location
    fault: str | None = None
    hint: str | None = None  # the way out of the fault


@dataclass(frozen=True, slots=True)
class Config:
    """A valid configuration. `hash` is of the merged document: comments and order do not enter it.

    `backends` holds the Settings of every backend that a model uses, defaults included.
    `variables` are the values of all `${env:NAME}` the document refers to. `entries` are those that
    count with the profile that is on; `aside` has the GPUs that only other profiles name, one by
    one, with each of their models.
    """

    path: Path
    files: tuple[Path, ...]  # path, then the drop-ins that were merged, in order
    hash: str
    entries: tuple[GpuEntry, ...]
    models: Mapping[str, ModelDefinition]
    backends: Mapping[str, BaseModel]
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    hooks: Hooks | None = None
    servers: Mapping[str, str] = field(default_factory=dict)  # of models that share one, by name
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)  # merged, plain data
    warnings: tuple[str, ...] = ()  # what `check` says of it, although it is valid
    texts: tuple[str, ...] = field(default=(), repr=False)  # of `files`, each line end as "\n"
    profile: str | None = None  # that is on
    profile_at: Location | None = None  # where the key `profile` stands
    profiles: tuple[str, ...] = ()  # all that the file has, by name
    aside: tuple[GpuEntry, ...] = ()
    down: bool = False  # a person asked for everything to be removed, whatever the file says

    @classmethod
    def nothing(cls, path: Path, *, asked: bool = False) -> Config:
        """One that asks for nothing: what a file must never say, and a person may (`asked`)."""
        return cls(path=path, files=(), hash="", entries=(), models={}, backends={}, down=asked)

    @property
    def claimable(self) -> frozenset[str]:
        """The models that a claim can be of: those that share no server."""
        return frozenset(self.models.keys() - self.servers.keys())


# --- doubt: may files that changed be no more than a part of what somebody meant? -----------------
#
# A killed program, a full disk or a copy under way leaves a file that is cut, or none. Such
# a file may be valid and say another thing: `0: m10` cut to `0: m1`. A person's word is above it.

CONFIRM = "confirm with `mic-supervisor apply` or `mic-supervisor reload`"
WAY_OUT = f"finish it, or {CONFIRM}"


def doubt(accepted: Config | None, found: Config, *, prune: bool = False) -> str | None:
    """Why `found` must wait until a person confirms it; None: it may be used.

    `accepted` was used last; None where nothing was. With `prune`, files and entries may go
    unasked, as MIC_PRUNE_ON_WATCH says.
    """
    if accepted is not None and accepted.hash == found.hash:
        return None
    for file, text in zip(found.files, found.texts, strict=True):
        if not text.endswith("\n"):
            what = "does not end with a line end" if text else "is empty"
            return f"{file} {what}; it may have been cut"
    if accepted is None or prune or _only_takes_away(accepted.document, found.document):
        return None
    now = {file.name: text for file, text in zip(found.files[1:], found.texts[1:], strict=True)}
    if _is_cut(found.texts[0], accepted.texts[0]):
        return f"{found.path} is the beginning of what it was; it may have been cut"
    for file, text in zip(accepted.files[1:], accepted.texts[1:], strict=True):
        path = found.path.with_name(f"{found.path.name}.d") / file.name
        if file.name not in now and text not in found.texts:
            return f"{path} is gone, and what it said is something else now"
        if _is_cut(now.get(file.name, text), text):
            return f"{path} is the beginning of what it was; it may have been cut"
    return None


def unapplied(path: Path) -> str:
    """Why a file waits that nothing is wrong with."""
    return f"{path} is not applied yet (MIC_WATCH=plan)"


def _is_cut(text: str, before: str) -> bool:
    return text != before and before.startswith(text)


def _only_takes_away(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether entries are gone, or `none`, and all else is as it was: the plan sees to those."""
    gpus, models = before["gpus"], before.get("models", {})
    return (
        all(before.get(part) == now.get(part) for part in {*before, *now} - {"gpus", "models"})
        and all(models.get(name) == model for name, model in now.get("models", {}).items())
        and all(value == NONE or gpus.get(key) == value for key, value in now["gpus"].items())
    )


# --- names: models, and GPUs under `gpus:` ------------------------------------------------------

MAX_NAME = 128
"""Characters of a model's name."""


def is_model_name(name: str) -> bool:
    """Whether `name` holds only letters, marks and digits of any script, "-", "_" and "."."""
    kinds = {category(char) for char in name if char not in "-_."}
    letters = {kind for kind in kinds if kind[0] == "L" or kind in ("Nd", "Nl")}
    return bool(letters) and all(kind in letters or kind[0] == "M" for kind in kinds)


MAX_INDEX = 127
"""No machine has more GPUs than this; a larger number is a slip of the hand."""

_INDEX = re.compile(r"[0-9]+")
_RANGE = re.compile(r"([0-9]+)\s*-\s*([0-9]+)")
_UUID = re.compile(r"(?i)(GPU|MIG)-([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})")
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
    if len(keys) > 1 and any(one.value.startswith("MIG-") for one in keys):
        raise BadKey(
            "a MIG slice cannot be in a group: CUDA shows a process one slice and no other GPU",
            "write an entry for each slice",
        )
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
        return GpuKey("uuid", f"{match[1].upper()}-{match[2].lower()}")
    if match := _PCI.fullmatch(text):
        domain = (match["domain"] or "0").lower().zfill(8)
        address = f"{domain}:{match['bus']}:{match['device']}.{match['function']}"
        return GpuKey("pci", address.lower())
    if (upper := text[:4].upper()) in ("GPU-", "MIG-"):
        raise BadKey(
            "this is not a whole UUID", f"nvidia-smi -L prints it: {upper} and 36 characters"
        )
    raise BadKey("this names no GPU", _meant(text))


def _meant(text: str) -> str:
    """How to write the GPU that was meant, as far as one can tell."""
    # What a Chinese keyboard makes of digits, dashes and commas, and an editor of quotes.
    plain = normalize("NFKC", text).replace("、", ",").strip("“”‘’\"' ")
    numbered = re.fullmatch(r"(?i)(?:/dev/)?(?:gpu|cuda|nvidia|device)[ :#_-]*([0-9]+)", plain)
    if numbered is not None:
        plain = numbered[1]
    if plain != text:
        try:
            parse_gpu_key(plain)
            return f"write `{plain}`" if plain.isdigit() else f'write `"{plain}"`'
        except BadKey:
            pass
    if plain.lower() in ("all", "any", "*", "auto", "each", "every"):
        return 'say which: write `"0-3"` for an instance on each of the GPUs 0 to 3'
    return _FORMS
