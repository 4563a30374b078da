"""Writes model repositories for the real tritonserver of mic-test/triton:1."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The python stub ignores PYTHONPATH, and with numpy 2 it answers with empty outputs.
MODEL = """\
import sys

sys.path.insert(0, "/opt/numpy1")

import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        print("initialising {name}", flush=True)
        time.sleep({initialise_seconds})
        {failure}

    def execute(self, requests):
        time.sleep({infer_seconds})
        answers = []
        for request in requests:
            given = pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", given)]))
        return answers
"""

CONFIG = """\
# Echoes what it is given.
name: "{name}"
backend: "python"
max_batch_size: 0
input [ {{ name: "INPUT" data_type: TYPE_FP32 dims: [ -1 ] }} ]
output [ {{ name: "OUTPUT" data_type: TYPE_FP32 dims: [ -1 ] }} ]
"""


@dataclass(frozen=True)
class TritonRepository:
    path: Path

    def model(
        self,
        name: str = "MAM",
        *,
        initialise_seconds: float = 0.0,
        infer_seconds: float = 0.0,
        fails: bool = False,
        syntax_error: bool = False,
        config_name: str | None = "config.pbtxt.template",
        config: str | None = None,
    ) -> Path:
        """An identity model: INPUT and OUTPUT, FP32, any length. Returns its directory.

        `fails`: initialize raises. `syntax_error`: model.py does not parse. `config_name` None: no
        configuration file. `config`: another text for it, `{name}` filled in by the caller.
        """
        directory = self.path / name
        (directory / "1").mkdir(parents=True, exist_ok=True)
        text = MODEL.format(
            name=name,
            initialise_seconds=initialise_seconds,
            infer_seconds=infer_seconds,
            failure='raise RuntimeError("told to fail")' if fails else "pass",
        )
        (directory / "1" / "model.py").write_text(text + ("def (:\n" if syntax_error else ""))
        for old in directory.glob("config.pbtxt*"):
            old.unlink()
        if config_name is not None:
            (directory / config_name).write_text(config or CONFIG.format(name=name))
        return directory


def model_config(name: str = "MAM", count: int = 1, kind: str = "KIND_CPU") -> dict[str, Any]:
    """The whole configuration of an identity model, as JSON."""
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": [{"name": "INPUT", "data_type": "TYPE_FP32", "dims": [-1]}],
        "output": [{"name": "OUTPUT", "data_type": "TYPE_FP32", "dims": [-1]}],
        "instance_group": [{"count": count, "kind": kind}],
    }


def load_request(config: dict[str, Any]) -> dict[str, Any]:
    """The body of POST /v2/repository/models/X/load that overrides the file's configuration."""
    return {"parameters": {"config": json.dumps(config)}}


def infer_request(*values: float) -> dict[str, Any]:
    """The body of POST /v2/models/X/infer for an identity model."""
    tensor = {"name": "INPUT", "shape": [len(values)], "datatype": "FP32", "data": list(values)}
    return {"inputs": [tensor]}
