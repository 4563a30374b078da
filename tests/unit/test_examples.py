"""Every file under examples/ that says which model runs where is one that `check` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config import load
from mic_supervisor.desired import desired_state
from mic_supervisor.gpu.source import SimulatedSource
from mic_supervisor.model import DesiredState
from tests.support.mic import Mic

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# Prometheus has its own, which tests/integration/test_prometheus.py holds against promtool.
OTHERS = {"mic.rules.yml", "prometheus.yml"}
FILES = sorted(p for p in EXAMPLES.iterdir() if p.suffix in (".yaml", ".yml"))
OURS = [path for path in FILES if path.name not in OTHERS]
SERVERS = ["llama-cpp", "ollama", "sglang", "tei", "tgi", "vllm"]
SHARED = "triton-shared"

by_name = pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)


def test_there_is_one_for_every_server() -> None:
    assert [path.stem for path in OURS] == sorted(["gpus", SHARED, *SERVERS])


@by_name
def test_check_accepts_it(path: Path, mic: Mic) -> None:
    done = mic("check", path, rc=0)
    assert done.stderr == "" and f"{path}: valid: " in done.stdout


@by_name
def test_it_says_of_what_it_is_an_example(path: Path) -> None:
    head = path.read_text().partition("version: 1")[0]
    assert head.startswith("# ") and "mic-supervisor check" in head


def compiled(path: Path, tmp_path: Path) -> DesiredState:
    """What becomes of it where every file that it names is there."""
    text = path.read_text()
    for name in ("/etc/mic/huggingface.env", "/etc/mic/hf-token"):
        there = tmp_path / Path(name).name
        there.write_text("HF_TOKEN=x\n" if name.endswith(".env") else "x\n")
        text = text.replace(name, str(there))
    repository = tmp_path / "models"
    for name in ("MAM", "FastFitAll"):
        (repository / name).mkdir(parents=True, exist_ok=True)
        (repository / name / "config.pbtxt").touch()
    text = text.replace("/srv/triton/model_repository", str(repository))
    copy = tmp_path / path.name
    copy.write_text(text)
    registry = Registry()
    config = load.load(copy, registry, environ={})
    return desired_state(config, SimulatedSource(8).observe(), {}, registry, tmp_path)


@pytest.mark.parametrize("name", SERVERS)
def test_every_model_in_it_can_be_run_and_probed(name: str, tmp_path: Path) -> None:
    path = EXAMPLES / f"{name}.yaml"
    state = compiled(path, tmp_path)
    assert state.unsatisfiable == ()
    assert {one.model for one in state.instances} == set(yaml.safe_load(path.read_text())["models"])
    for one in state.instances:
        probes = one.probes
        assert None not in (probes.startup, probes.liveness, probes.readiness), one.model
        texts = (*one.workload.command, *(value for _, value in one.workload.env))
        assert any("${port}" in text for text in texts), one.model


def test_one_server_has_every_model(tmp_path: Path) -> None:
    state = compiled(EXAMPLES / f"{SHARED}.yaml", tmp_path)
    assert state.unsatisfiable == ()
    (one,) = state.instances
    assert [item.model for item in one.placements] == ["MAM", "FastFitAll"]
    assert len(one.gpus) == 4
