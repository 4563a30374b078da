"""A configuration, and generations that start with it."""

from __future__ import annotations

from pathlib import Path

from mic_supervisor.backends.registry import Registry
from mic_supervisor.converge.state import StateDir
from mic_supervisor.daemon.generations import Generations

REGISTRY = Registry()
MODELS = """\
models:
  a: {backend: process, command: [/bin/sleep, "1"]}
  b: {backend: container, image: "busybox:1"}
"""
GPUS = """\
gpus:
  0: a
  1: b
  "2,3": b
  4-5: a
  6: none
"""
ORDERS = {
    "GPUs last": f"version: 1\n{MODELS}{GPUS}",
    "GPUs first": f"version: 1\n{GPUS}{MODELS}",
    "one line": "{version: 1, models: {a: {backend: process, command: [/bin/sleep]}}, "
    "gpus: {0: a, 1: a, 6: none}}\n",
}


class Files:
    """A configuration and a state directory, and generations that start with them."""

    def __init__(self, home: Path) -> None:
        self.path = home / "gpus.yaml"
        self.state = StateDir(home / "state")
        self.kept = self.state.path / "last-good" / "gpus.yaml"

    def drop_in(self, text: str) -> Path:
        """A drop-in that says this."""
        path = self.path.with_name("gpus.yaml.d") / "10.yaml"
        path.parent.mkdir()
        path.write_text(text)
        return path

    def start(self, *, prune_on_watch: bool = False, plan_first: bool = False) -> Generations:
        made = Generations(
            self.path,
            REGISTRY,
            {},
            self.state,
            prune_on_watch=prune_on_watch,
            plan_first=plan_first,
        )
        made.start(1.0)
        return made


def hash_of(generations: Generations) -> str:
    assert generations.config is not None
    return generations.config.hash
