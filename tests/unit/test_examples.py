"""Every file under examples/ that says which model runs where is one that `check` accepts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config import load
from mic_supervisor.desired import desired_state
from mic_supervisor.gpu.source import SimulatedSource
from mic_supervisor.model import DesiredState
from tests.support.mic import PROGRAM, Mic

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# Prometheus has its own, which tests/integration/test_prometheus.py holds against promtool.
OTHERS = {"mic.rules.yml", "prometheus.yml"}
FILES = sorted(p for p in EXAMPLES.iterdir() if p.suffix in (".yaml", ".yml"))
OURS = [path for path in FILES if path.name not in OTHERS]
SERVERS = ["llama-cpp", "llama-swap", "ollama", "sglang", "tei", "tgi", "vllm"]
SHARED = "triton-shared"
PROFILES = "day-and-night"

by_name = pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)


def test_there_is_one_for_every_server() -> None:
    others = ["compose-network", "gpus", PROFILES, SHARED]
    assert [path.stem for path in OURS] == sorted([*others, *SERVERS])


@by_name
def test_check_accepts_it(path: Path, mic: Mic) -> None:
    done = mic.here("check", path, rc=0)
    assert done.stderr == "" and f"{path}: valid: " in done.stdout


@by_name
def test_it_says_of_what_it_is_an_example(path: Path) -> None:
    head = path.read_text().partition("version: 1")[0]
    assert head.startswith("# ") and "mic-supervisor check" in head


def compiled(path: Path, tmp_path: Path) -> DesiredState:
    """What becomes of it where every file that it names is there."""
    tmp_path.mkdir(exist_ok=True)
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


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("name", ["mic-night", "mic-day", "claim"])
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path, name: str) -> None:
    units = [tmp_path / path.name for path in EXAMPLES.glob(f"{name}.*")]
    assert tmp_path / f"{name}.service" in units
    for unit in units:
        text = (EXAMPLES / unit.name).read_text()
        unit.write_text(text.replace("/usr/bin/mic-supervisor", str(PROGRAM)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True
    )
    # Of other units that are installed here nothing is to be said.
    said = [line for line in done.stderr.splitlines() if name in line]
    assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize(("name", "profile"), [("mic-night", "night"), ("mic-day", "none")])
def test_the_timers_switch_to_profiles_of_the_example(name: str, profile: str) -> None:
    text = (EXAMPLES / f"{name}.service").read_text()
    config = load.load(EXAMPLES / f"{PROFILES}.yaml", Registry(), environ={}, profile=profile)
    assert config.profile == (None if profile == "none" else profile)
    assert f"\nExecStart=/usr/bin/mic-supervisor switch {profile}\n" in text


def test_at_night_one_model_has_the_gpus_of_two(tmp_path: Path) -> None:
    path = EXAMPLES / f"{PROFILES}.yaml"
    night = tmp_path / path.name
    night.write_text(path.read_text().replace("\nprofile: none\n", "\nprofile: night\n"))
    day, night_state = compiled(path, tmp_path / "d"), compiled(night, tmp_path / "n")
    assert [(one.model, len(one.gpus)) for one in day.instances] == [("chat", 1)] * 4
    found = sorted((one.model, len(one.gpus)) for one in night_state.instances)
    assert found == [("batch", 2), ("chat", 1)] and len(night_state.kept_empty) == 1
