"""What `mic-supervisor init` has written."""

from __future__ import annotations

from typing import Any

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.load import load
from tests.support.mic import Mic


def model_of(mic: Mic, name: str) -> dict[str, Any]:
    models: dict[str, dict[str, Any]] = load(mic.config, Registry(), environ={}).document["models"]
    return models[name]


def comments_of(mic: Mic, name: str) -> list[str]:
    """What stands above a model, a line for each item that no key says."""
    above, _, _ = mic.config.read_text().partition(f"\n  {name}:\n")
    words = " ".join(line.strip("# ") for line in above.rpartition("\n\n")[2].splitlines())
    return words.split(" - ")
