"""What instances are called: their ids, and what people are shown and type instead.

Imports little: each command needs it, also where a daemon does the work.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


def composed(name: str) -> str:
    """Names are compared in composed form: two keyboards spell é differently."""
    return unicodedata.normalize("NFC", name)


def safe_name(model: str) -> str:
    """A model's name where it is plain, short ASCII; else what is left of it, and a digest."""
    if _SAFE.fullmatch(model):
        return model
    digest = hashlib.sha256(model.encode()).hexdigest()[:8]
    kept = re.sub(r"[^A-Za-z0-9_.-]+", "-", model).strip("-_.")[:30]
    return f"{kept}-{digest}" if kept else f"m{digest}"


def shown_id(instance: str, model: str) -> str:
    """What people are shown instead of an id: the model's name as it is, in whatever script.

    Containers, units and everything that programs read have the id itself: what runs keeps it.
    """
    safe = safe_name(model)
    return model + instance[len(safe) :] if instance.startswith(f"{safe}-") else instance


def with_shown_ids(text: str, models: Mapping[str, str]) -> str:
    """`text` with every id, the keys of `models`, as people are shown it.

    Not in the names of containers and units, which hold an id between dashes.
    """
    shown = {instance: shown_id(instance, model) for instance, model in models.items()}
    other = [re.escape(instance) for instance, name in shown.items() if name != instance]
    if not other:
        return text
    return re.sub(rf"(?<![\w.-])({'|'.join(other)})(?![\w-])", lambda m: shown[m[1]], text)


def is_called(name: str, instance: str, models: Iterable[str]) -> bool:
    """Whether a person means this instance: by its id, as it is shown too, or one of its models."""
    models = tuple(models)
    names = {instance, *models, *(shown_id(instance, model) for model in models)}
    return composed(name) in names
