"""What the file says, for people and as the document of `models --json`."""

from __future__ import annotations

from typing import Any

from mic_supervisor.config.document import NONE, Config


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def summary(config: Config) -> str:
    """One line: "valid: 4 GPUs, 1 of them kept empty; 2 models; 1 profile, none is on"."""
    gpus = sum(len(entry.keys) for entry in config.entries)
    empty = sum(entry.value == NONE for entry in config.entries)
    given = sum(len(entry.keys) for entry in config.entries if entry.fleet)
    notes = [f"{empty} of them kept empty"] if empty else []
    notes += [f"{given} of them handed over"] if given else []
    parts = [", ".join([counted(gpus, "GPU"), *notes])]
    parts.append(counted(len(config.models), "model"))
    if config.profiles:
        on = f"{config.profile} is on" if config.profile is not None else "none is on"
        parts.append(f"{counted(len(config.profiles), 'profile')}, {on}")
    if len(config.files) > 1:
        parts.append(counted(len(config.files) - 1, "drop-in"))
    return f"valid: {'; '.join(parts)}"


def models_document(config: Config, host: str) -> dict[str, Any]:
    """A model's `gpus` has one text for each instance, "3,4" for one over two."""
    gpus_of: dict[str, list[str]] = {name: [] for name in config.models}
    for entry in config.entries:
        if entry.model is not None:
            gpus_of[entry.model].append(",".join(key.value for key in entry.keys))
    return {
        "version": 1,
        "host": host,
        "config_hash": config.hash,
        "models": [
            {"name": model.name, "backend": model.backend, "gpus": gpus_of[model.name]}
            for model in config.models.values()
        ],
    }
