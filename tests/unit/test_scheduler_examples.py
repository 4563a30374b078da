"""What schedulers of claims are told under examples/: its parts fit each other and the program."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mic_supervisor.cli.claim import command as claim
from mic_supervisor.config.settings import Settings
from mic_supervisor.config.types import parse_duration

EXAMPLES = Path(__file__).parents[2] / "examples"
SWARM, SLURM = EXAMPLES / "swarm", EXAMPLES / "slurm"


def options() -> set[str]:
    return {name for parameter in claim.params for name in parameter.opts}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_engine_of_the_swarm(tmp_path: Path) -> None:
    text = (SWARM / "mic-swarm.service").read_text()
    for program in ("dockerd ", "ip "):
        text = re.sub(rf"^(Exec\w+=-?){program}", r"\1/bin/true ", text, flags=re.MULTILINE)
    unit = tmp_path / "mic-swarm.service"
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "mic-swarm" in line]
    assert (done.returncode, said) == (0, [])


def test_a_task_of_the_swarm_holds_a_claim_and_is_told_of_the_supervisor() -> None:
    task = yaml.safe_load((SWARM / "stack.yaml").read_text())["services"]["chat"]
    assert task["command"][0] == claim.name
    assert task["healthcheck"]["test"][2:] == [claim.name, "--check"]
    assert "--check" in options()
    assert 'ENTRYPOINT ["/opt/mic/bin/mic-supervisor"]' in (SWARM / "Dockerfile").read_text()
    assert task["healthcheck"]["test"][1] == "/opt/mic/bin/mic-supervisor"
    (mount,) = task["volumes"]
    assert Path(Settings.model_validate({}).socket).parent == Path(mount["target"])
    assert mount["source"] == mount["target"]


def test_the_stack_waits_longer_than_an_instance_may_take_to_start_and_stop() -> None:
    task = yaml.safe_load((SWARM / "stack.yaml").read_text())["services"]["chat"]
    longest = parse_duration("15m")  # vLLM's start_timeout, the longest default
    assert parse_duration(task["healthcheck"]["start_period"]) > longest
    assert parse_duration(task["stop_grace_period"]) > 2 * parse_duration("30s")


def test_engine_and_stack_count_the_same_resource() -> None:
    (given,) = json.loads((SWARM / "daemon.json").read_text())["node-generic-resources"]
    task = yaml.safe_load((SWARM / "stack.yaml").read_text())["services"]["chat"]
    (asked,) = task["deploy"]["resources"]["reservations"]["generic_resources"]
    assert given == f"{asked['discrete_resource_spec']['kind']}=4"


def test_jobs_of_slurm_ask_for_what_its_hosts_have() -> None:
    conf, script = (SLURM / "slurm.conf").read_text(), (SLURM / "claim.sh").read_text()
    found = re.search(r"^NodeName=\S+ Gres=(\w+):(\d+)$", conf, re.MULTILINE)
    assert found is not None
    assert (
        f"\nName={found[1]} Count={found[2]} Flags=CountOnly\n" in (SLURM / "gres.conf").read_text()
    )
    assert f"\nGresTypes={found[1]}\n" in conf and f"\n#SBATCH --gres={found[1]}:1\n" in script
    words = script.rstrip().rpartition("\n")[2].split()
    assert words[:3] == ["exec", "mic-supervisor", claim.name] and words[4] in options()


@pytest.mark.parametrize(
    "path",
    [SLURM / "claim.sh", EXAMPLES / "endpoints-to-proxy", EXAMPLES / "endpoints-gathered"],
    ids=lambda path: path.name,
)
def test_the_shell_takes_it(path: Path) -> None:
    subprocess.run(["sh", "-n", path], check=True)
    assert path.stat().st_mode & 0o111
