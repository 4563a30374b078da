"""Claims that Slurm holds: Debian's, on two hosts, with the files of examples/slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fleet import namespaces
from tests.fleet.gpu_hosts import GPUS, GpuHosts
from tests.fleet.host import Service
from tests.fleet.namespaces import ADDRESSES
from tests.fleet.pool import timed
from tests.fleet.watcher import Seen
from tests.setup import fleet
from tests.setup.steps import CHECKOUT
from tests.support.waiting import until

EXAMPLES = CHECKOUT / "examples" / "slurm"
HOSTS = ("gpu1", "gpu2")
CONTROLLER = HOSTS[0]

# What a real cluster has in slurm.conf already. Everything runs as root, and no control groups are
# used: they are this machine's.
BASE = """\
ClusterName=pool
SlurmctldHost=gpu1
SlurmUser=root
AuthInfo=cred_expire=10
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PartitionName=pool Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


@dataclass
class Slurm(GpuHosts):
    """slurmctld on the first host, slurmd on both."""

    def set_up(self) -> None:
        self.connect_all()
        for host in HOSTS:
            daemon = self.prepare(host)
            self.put(f"{host}/etc/slurm/slurm.conf", BASE + self.example())
            self.put(f"{host}/etc/slurm/gres.conf", (EXAMPLES / "gres.conf").read_text())
            names = "".join(f"{ADDRESSES[name]} {name}\n" for name in HOSTS)
            self.put(f"{host}/etc/hosts", f"127.0.0.1 localhost\n{names}")
            (self.home / host / "disk" / "spool").mkdir()
            script = (EXAMPLES / "claim.sh").read_text().replace("claim chat ", "claim chat-1 ")
            self.put(f"{host}/claim.sh", script)
            self.start(host, ADDRESSES[host], *self.services(host), daemon)
        until(lambda: self.idle(*HOSTS), "two hosts", timeout=60)

    def example(self) -> str:
        """The lines of examples/slurm, with hosts and times of a test."""
        text = (EXAMPLES / "slurm.conf").read_text()
        for shown, meant in (
            ("NodeName=gpu[1-3]", "NodeName=gpu[1-2] CPUs=16 RealMemory=4000"),
            ("SlurmdTimeout=60", "SlurmdTimeout=10"),
        ):
            assert text.count(shown) == 1
            text = text.replace(shown, meant)
        return text

    def services(self, host: str) -> list[Service]:
        spool = str(self.home / host / "disk" / "spool")
        paths = (str(self.commands), str(CHECKOUT), sys.prefix, sys.base_prefix)
        binds = {"/var/spool": spool} | {path: path for path in paths}
        tree = str(fleet.slurm())
        env = {"PATH": f"{self.commands}:/usr/sbin:/usr/bin:/sbin:/bin"}
        words = (fleet.slurm() / "etc" / "passwd").read_text()
        ids = re.search(r"^munge:x:(\d+):(\d+):", words, re.MULTILINE)
        assert ids is not None
        made = f"mkdir -p /run/munge && chown {ids[1]}:{ids[2]} /run/munge"
        munged = ["setpriv", f"--reuid={ids[1]}", f"--regid={ids[2]}", "--clear-groups"]
        munged += ["munged", "--foreground", "--force"]
        socket = "/run/munge/munge.socket.2"
        found = [
            Service("munged", munged, env, before=made, tree=tree, binds=binds),
            Service("slurmd", ["slurmd", "-D", "-N", host], env, socket, "", tree, binds),
        ]
        if host == CONTROLLER:
            command = ["slurmctld", "-D"]
            found.append(Service("slurmctld", command, env, socket, "", tree, binds))
        return found

    def client(self, *words: str) -> list[str]:
        path = f"PATH={self.commands}:/usr/bin:/bin"
        return [*self.inside(CONTROLLER, fleet.slurm()), "env", path, *words]

    def ask(self, *words: str) -> str:
        return self.run(self.client(*words)).strip()

    def idle(self, *hosts: str) -> bool:
        words = self.client("sinfo", "-h", "-N", "-n", ",".join(hosts), "-o", "%t")
        said = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
        return said.split() == ["idle"] * len(hosts)

    def submit(self, *options: str, script: str = "claim.sh") -> str:
        """The number of the job."""
        where = ("--parsable", "--chdir=/tmp", "--output=/tmp/job-%A-%a")
        return self.ask("sbatch", *where, *options, f"{self.home}/{CONTROLLER}/{script}")

    def shown(self, job: str) -> str:
        return self.ask("scontrol", "show", "job", job)

    def jobs(self) -> dict[str, tuple[str, str]]:
        """(state or reason, host) of each job."""
        lines = self.ask("squeue", "-h", "-r", "-o", "%i|%T|%r|%N").splitlines()
        rows = (line.split("|") for line in lines)
        return {
            job: (reason if state == "PENDING" else state, node)
            for job, state, reason, node in rows
        }


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    namespaces.require()
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        made.set_up()
        yield made
    finally:
        made.close()


def test_a_job_holds_a_claim_until_it_is_cancelled(slurm: Slurm) -> None:
    job = slurm.submit("--array=1-3")
    print(f"three jobs ready: {timed(lambda: slurm.await_ready(3, *HOSTS)):.1f} s")
    holders = {claim["holder"] for host in HOSTS for claim in slurm.status(host)["claims"]}
    assert all(str(holder).startswith("job ") for holder in holders) and len(holders) == 3
    slurm.ask("scancel", job)
    until(lambda: not slurm.jobs(), "the jobs to end", timeout=60)
    assert all(slurm.seen(host) == Seen() for host in HOSTS)


def test_a_job_that_no_host_can_serve_is_held_for_a_person(slurm: Slurm) -> None:
    text = (slurm.home / CONTROLLER / "claim.sh").read_text()
    slurm.put(f"{CONTROLLER}/unknown.sh", text.replace("claim chat-1 ", "claim nobody "))
    job = slurm.submit(script="unknown.sh")
    until(lambda: "JobState=SPECIAL_EXIT" in slurm.shown(job), "the job", timeout=30)
    assert "Reason=JobHeldUser" in slurm.shown(job) and "ExitCode=78:0" in slurm.shown(job)
    slurm.ask("scancel", job)


def test_a_host_without_power_loses_its_jobs_to_the_other(slurm: Slurm) -> None:
    slurm.ask("scontrol", "update", "NodeName=gpu1", "State=DRAIN", "Reason=test")
    job = slurm.submit()
    slurm.await_ready(1, "gpu2")
    slurm.ask("scontrol", "update", "NodeName=gpu1", "State=RESUME")
    slurm.kill("gpu2")
    print(f"ready elsewhere: {timed(lambda: slurm.await_ready(1, 'gpu1')):.1f} s")
    slurm.start("gpu2", ADDRESSES["gpu2"])
    until(lambda: slurm.idle("gpu2"), "gpu2", timeout=90)
    slurm.ask("scancel", job)
    until(lambda: not slurm.jobs(), "the job to end", timeout=60)


def test_a_job_whose_claim_fails_is_put_back(slurm: Slurm) -> None:
    text = (slurm.home / CONTROLLER / "claim.sh").read_text()
    slurm.put(f"{CONTROLLER}/broken.sh", text.replace("claim chat-1 ", "claim broken "))
    job = slurm.submit(script="broken.sh")
    until(lambda: "Restarts=0" not in slurm.shown(job), "another try", timeout=60)
    slurm.ask("scancel", job)
    until(lambda: not slurm.jobs(), "the job to end", timeout=60)


def test_no_more_jobs_run_than_there_are_gpus(slurm: Slurm) -> None:
    job = slurm.submit(f"--array=1-{2 * GPUS + 1}")
    slurm.await_ready(2 * GPUS, *HOSTS)
    assert sorted(state for state, _ in slurm.jobs().values())[0] == "RUNNING"
    assert [state for state, _ in slurm.jobs().values()].count("Resources") == 1
    holder = slurm.seen("gpu1").holders
    before = slurm.seen("gpu1").models
    os.kill(slurm.supervisor("gpu1"), signal.SIGKILL)
    until(lambda: slurm.all_claims_ready("gpu1"), "its claims", timeout=60)
    assert (slurm.seen("gpu1").models, slurm.seen("gpu1").holders) == (before, holder)
    slurm.ask("scancel", job)
    until(lambda: not slurm.jobs(), "the jobs to end", timeout=60)
