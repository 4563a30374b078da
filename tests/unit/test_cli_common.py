"""What several commands share: a question, and what a shell completes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mic import here

FILE = """\
version: 1
models:
  人脸: {backend: process, command: [/bin/a, "${port}"]}
  MAM: {backend: process, command: [/bin/a, "${port}"]}
gpus: {"0-1": MAM, 10: none, GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10: 人脸}
"""


ASKS = """
from mic_supervisor.cli.common import confirm
confirm("Kill it?", yes=False, otherwise="not killed")
print("done")
"""


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_the_answer_no_is_said_and_ends_the_command(answer: str) -> None:
    terminal, other = os.openpty()
    os.write(terminal, f"{answer}\n".encode())
    done = subprocess.run(
        [sys.executable, "-c", ASKS], stdin=other, capture_output=True, text=True, check=False
    )
    os.close(terminal)
    os.close(other)
    assert ("done" in done.stdout) == (answer == "y")
    assert ("not killed" in done.stderr) == (answer != "y")


def completed(words: str, directory: Path, config: str = FILE) -> list[str]:
    """What bash is told for what was typed; the last word is completed."""
    path = directory / "gpus.yaml"
    path.write_text(config)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MIC_")}
    asked = {
        "_MIC_SUPERVISOR_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "MIC_CONFIG": str(path),
        "MIC_SOCKET": str(directory / "no.sock"),
    }
    done = here(env={**inherited, **asked})
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mic-supervisor restart M", ["MAM"]),
        ("mic-supervisor logs 人", ["人脸"]),
        ("mic-supervisor pause 1", ["1", "10"]),
        ("mic-supervisor start ", ["MAM", "人脸"]),
        ("mic-supervisor stop --gpu GPU", ["GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10"]),
        ("mic-supervisor apply --target MA", ["MAM"]),
        ("mic-supervisor history x", []),
        ("mic-supervisor res", ["restart", "resume"]),
    ],
)
def test_models_and_gpus_of_the_file_are_completed(
    words: str, expected: list[str], tmp_path: Path
) -> None:
    assert completed(words, tmp_path) == expected


def test_a_broken_file_completes_nothing_and_says_nothing(tmp_path: Path) -> None:
    assert completed("mic-supervisor restart M", tmp_path, "version: 2\n") == []
