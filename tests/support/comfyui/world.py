"""One installation of the stand-in, and a file that serves it on simulated GPUs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.support.mic import Mic
from tests.support.waiting import http, until

STAND_IN = Path(__file__).with_name("main.py")


class Comfy:
    """`models` are the options of models of the backend, by name; `gpus` is what the file says."""

    def __init__(self, mic: Mic, path: Path) -> None:
        self.mic = mic
        self.path = path
        path.mkdir()
        shutil.copy(STAND_IN, path / "main.py")
        mic.env["MIC_DOCKER_HOST"] = "none"
        self.models: dict[str, dict[str, Any]] = {"face": {}}
        self.gpus: dict[Any, str] = {}

    def write(self, **gpus: str) -> None:
        """Replaces what the file says of some GPUs: `write(gpu0="face", gpu1="none")`."""
        self.gpus |= {int(name.removeprefix("gpu")): model for name, model in gpus.items()}
        models = {
            name: {"backend": "comfyui", "env": {}, **given} for name, given in self.models.items()
        }
        settings = {"path": str(self.path), "python": sys.executable}
        document = {
            "version": 1,
            "backends": {"comfyui": settings},
            "models": models,
            "gpus": {str(key): model for key, model in self.gpus.items()},
        }
        self.mic.write(json.dumps(document, indent=1) + "\n")  # which is YAML, too

    def set(
        self, model: str = "face", /, env: dict[str, str] | None = None, **options: Any
    ) -> None:
        """Options of a model; `env` is what the stand-in is told."""
        told = {f"STANDIN_{name}": value for name, value in (env or {}).items()}
        self.models[model] = {"env": told, **options}

    def rows(self) -> dict[int, dict[str, Any]]:
        """The instances of `status --json` by the index of their GPU."""
        rows = self.mic.status()["instances"]
        return {row["gpus"][0]["index"]: row for row in rows}

    def own(self, row: dict[str, Any]) -> Path:
        """The directory of an instance."""
        return self.mic.state_dir / "instance_data" / self.mic.scope / str(row["id"])

    def queue(self, row: dict[str, Any], *jobs: float) -> list[str]:
        """Hands in jobs of so many seconds; their ids."""
        url = row["endpoints"]["http"] + "/prompt"
        answers = [http(url, "POST", {"prompt": {"seconds": job}}) for job in jobs]
        return [str(answer.json()["prompt_id"]) for answer in answers]

    def argv(self, row: dict[str, Any]) -> list[str]:
        """The arguments that an instance says it was started with."""
        answer = http(row["endpoints"]["http"] + "/system_stats").json()
        return list(answer["system"]["argv"])

    def tree(self, own: Path, count: int) -> list[int]:
        """The PIDs of the children and grandchildren of the instance with this directory."""
        file = own / "user" / "tree"

        def all_there() -> list[int]:
            pids = [int(line) for line in file.read_text().split()] if file.exists() else []
            return pids if len(pids) == count else []

        return until(all_there, f"{count} processes in {file}")
