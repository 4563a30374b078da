"""Who is measured: the same jobs, written as the file of each, and the commands that each has.

| Contender | Its file | Brings the machine to it | Shows only | Tells what runs |
|---|---|---|---|---|
| mic-supervisor | gpus.yaml | `apply` | `plan` | `status` |
| Docker Compose | compose.yaml | `up -d` | `--dry-run up -d` | `ps` |
| Ansible | a playbook of community.docker | `ansible-playbook` | `--check` | |
| supervisord | supervisord.conf | `supervisorctl update` | `supervisorctl reread` | `… status` |
| one by one | | starts one, waits until it answers, starts the next | | |

The last is what the earlier service did, which started models on request, one at a time.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import docker
import yaml

from benchmarks._common import installed, machine
from benchmarks.sheets import Outcome
from tests.integration.job_world import World
from tests.setup import peers
from tests.setup.steps import Missing
from tests.support.mic import PROGRAM
from tests.support.waiting import http, until

LABEL = "mic-bench"
NOWHERE = "/nowhere/mic.sock"


@dataclass(frozen=True)
class Job:
    """One thing to be run. Without an image it is a process of the host.

    `port`: it serves there, and `path` answers 200 once it is ready; 0: it serves nothing.
    `ours` is a model of gpus.yaml instead of a container or a process like the others'.
    """

    name: str
    command: tuple[str, ...]
    image: str = ""
    port: int = 0
    path: str = "/health"
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[str, ...] = ()
    shm: str = "64m"
    ours: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def changed(self, version: int) -> Job:
        return replace(self, env={**self.env, "VERSION": str(version)})


# --- the files --------------------------------------------------------------------------------


def gpus_yaml(jobs: Sequence[Job], settings: str = "") -> str:
    """One model for each job, on a GPU of its own; without a job the first is kept empty.

    `settings` are further keys of the file.
    """
    document = {
        "version": 1,
        **(yaml.safe_load(settings) or {}),
        "models": {job.name: yaml.safe_load(job.ours) or _model(job) for job in jobs},
        "gpus": {index: job.name for index, job in enumerate(jobs)} or {0: "none"},
    }
    return yaml.safe_dump(document, sort_keys=False)


def _model(job: Job) -> dict[str, object]:
    model: dict[str, object] = {"backend": "process", "command": list(job.command)}
    if job.image:
        model |= {"backend": "container", "image": job.image}
    if job.port:
        model |= {"port": job.port, "probe": {"http": job.path}}
    return model | ({"env": dict(job.env)} if job.env else {})


def compose_yaml(jobs: Sequence[Job]) -> str:
    services = {
        job.name: {
            "image": job.image,
            "command": list(job.command),
            "init": True,
            "environment": dict(job.env),
            "ports": _published(job),
            "volumes": list(job.mounts),
            "shm_size": job.shm,
        }
        for job in jobs
    }
    return json.dumps({"services": services})


def playbook(jobs: Sequence[Job], scope: str) -> str:
    """One task over all jobs, as one writes it for many containers."""
    items = [
        {
            "name": f"{scope}-{job.name}",
            "image": job.image,
            "command": list(job.command),
            "env": dict(job.env),
            "ports": _published(job),
            "volumes": list(job.mounts),
            "shm": job.shm,
        }
        for job in jobs
    ]
    container = {
        "name": "{{ item.name }}",
        "image": "{{ item.image }}",
        "command": "{{ item.command }}",
        "command_handling": "correct",
        "env": "{{ item.env }}",
        "published_ports": "{{ item.ports }}",
        "volumes": "{{ item.volumes }}",
        "shm_size": "{{ item.shm }}",
        "init": True,
        "labels": {LABEL: scope},
        "state": "started",
    }
    task = {
        "name": "containers",
        "community.docker.docker_container": container,
        "loop": items,
        "loop_control": {"label": "{{ item.name }}"},
    }
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [task]}
    return json.dumps([play])


def _published(job: Job) -> list[str]:
    return [f"127.0.0.1:{job.port}:{job.port}"] if job.port else []


def one_by_one_sh(jobs: Sequence[Job], scope: str) -> str:
    """A shell script, so that no interpreter's start counts: the earlier service was up already."""
    lines = []
    for job in jobs:
        words = ["docker", "run", "-d", "--init", "--name", f"{scope}-{job.name}"]
        words += ["--label", f"{LABEL}={scope}", "--shm-size", job.shm]
        for option, values in (("-p", _published(job)), ("-v", job.mounts)):
            words += [word for value in values for word in (option, value)]
        words += [word for key, value in job.env.items() for word in ("-e", f"{key}={value}")]
        lines.append(shlex.join([*words, job.image, *job.command]))
        lines.append(f"until busybox wget -q -O /dev/null {job.url}; do sleep 0.1; done")
    return "\n".join(lines) + "\n"


def supervisord_conf(jobs: Sequence[Job], home: Path, port: int) -> str:
    """supervisord's own defaults, but for where it keeps its files. `port` is for its scrape."""
    lines = [
        f"[unix_http_server]\nfile={home}/sock",
        f"[inet_http_server]\nport=127.0.0.1:{port}",
        f"[supervisord]\nlogfile={home}/log\npidfile={home}/pid\nchildlogdir={home}\nnodaemon=true",
        "[rpcinterface:supervisor]\n"
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        f"[supervisorctl]\nserverurl=unix://{home}/sock",
    ]
    for job in jobs:
        pairs = ",".join(f'{key}="{value}"' for key, value in job.env.items())
        command = shlex.join(job.command)
        lines.append(f"[program:{job.name}]\ncommand={command}\nenvironment={pairs}")
    return "\n".join(lines) + "\n"


# --- the contenders ---------------------------------------------------------------------------


@dataclass
class Contender:
    """`write` puts jobs into its file. `act`, `dry` and `status` are commands; empty: it has none.

    `clear` removes what it started. `pid` is its daemon's; None: none stays.
    `scrape` is where a monitor asks it by XML-RPC.
    """

    name: str
    home: Path
    environment: dict[str, str]
    write: Callable[[Sequence[Job]], object]
    act: list[str]
    clear: Callable[[], object]
    dry: list[str] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    pid: int | None = None
    scrape: str = ""

    def start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words,
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, words: Sequence[str]) -> str:
        """What it printed. A failure ends the measurement with the output."""
        return self.ended(self.start(words))

    def ended(self, process: subprocess.Popen[bytes]) -> str:
        printed = process.communicate()[0].decode(errors="replace")
        if process.returncode:
            said = f"{process.args!r}: exit {process.returncode}"
            raise AssertionError(f"{self.name}: {said}:\n{printed}")
        return printed


Making = Callable[[int], AbstractContextManager[Contender]]
"""Takes how many jobs there will be."""


@contextmanager
def ours(count: int, *, daemon: bool = True, name: str = "mic-supervisor") -> Iterator[Contender]:
    """A scope of its own. Without a daemon each command does by itself what it is asked for."""
    with machine(gpus=max(1, count)) as job:
        yield supervised(job, daemon=daemon, name=name)


def supervised(job: World, *, daemon: bool, name: str) -> Contender:
    job.mic.write(gpus_yaml(()))
    environment = installed(job.mic.environment())

    def write(jobs: Sequence[Job]) -> None:
        job.mic.write(gpus_yaml(jobs, job.settings))

    program = str(PROGRAM)
    contender = Contender(
        name,
        job.mic.home,
        environment if daemon else {**environment, "MIC_SOCKET": NOWHERE},
        write,
        act=[program, "apply"],
        clear=lambda: None,
        dry=[program, "plan"],
        status=[program, "status"],
        pid=job.mic.run().pid if daemon else None,
    )
    contender.clear = lambda: contender.run([program, "down", "--yes"])
    return contender


@contextmanager
def compose(_count: int) -> Iterator[Contender]:
    program = str(peers.compose())
    with machine() as job:
        path = job.mic.home / "compose.yaml"
        command = [program, "-p", f"{job.mic.scope}-peer", "-f", str(path)]
        dry = [program, "--dry-run", *command[1:]]
        contender = Contender(
            f"Docker Compose {_said(program, 'version', '--short')}",
            job.mic.home,
            dict(os.environ),
            lambda jobs: path.write_text(compose_yaml(jobs)),
            act=[*command, "up", "-d"],
            clear=lambda: contender.run([*command, "down"]),
            dry=[*dry, "up", "-d"],
            status=[*command, "ps"],
        )
        try:
            yield contender
        finally:
            if path.exists():
                contender.clear()


@contextmanager
def ansible(_count: int) -> Iterator[Contender]:
    program, collections = peers.ansible()
    manifest = collections / "ansible_collections/community/docker/MANIFEST.json"
    version = json.loads(manifest.read_text())["collection_info"]["version"]
    core = _said(str(program), "--version").partition("[core ")[2].partition("]")[0]
    with machine() as job:
        path, scope = job.mic.home / "playbook.yaml", job.mic.scope
        environment = installed(os.environ) | {
            "ANSIBLE_COLLECTIONS_PATH": str(collections),
            "ANSIBLE_HOME": str(job.mic.home / "ansible"),
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_PYTHON_INTERPRETER": str(program.with_name("python")),
        }
        command = [str(program), "-i", "localhost,", str(path)]
        try:
            yield Contender(
                f"Ansible {core}, community.docker {version}",
                job.mic.home,
                environment,
                lambda jobs: path.write_text(playbook(jobs, scope)),
                act=command,
                clear=lambda: remove(job.engine, scope),
                dry=[*command, "--check"],
            )
        finally:
            remove(job.engine, scope)


@contextmanager
def one_by_one(_count: int) -> Iterator[Contender]:
    with machine() as job:
        path, scope = job.mic.home / "start.sh", job.mic.scope
        try:
            yield Contender(
                "one by one, as the earlier service",
                job.mic.home,
                dict(os.environ),
                lambda jobs: path.write_text(one_by_one_sh(jobs, scope)),
                act=["sh", "-e", str(path)],
                clear=lambda: remove(job.engine, scope),
            )
        finally:
            remove(job.engine, scope)


@contextmanager
def supervisord(_count: int) -> Iterator[Contender]:
    program = peers.supervisord()
    version = _said(str(program), "--version")
    with machine() as job:
        home = job.mic.home
        path, port = home / "supervisord.conf", job.mic.ports.take()

        def write(jobs: Sequence[Job]) -> None:
            path.write_text(supervisord_conf(jobs, home, port))

        write(())
        environment = installed(os.environ)
        control = [str(program.with_name("supervisorctl")), "-c", str(path)]
        process = subprocess.Popen(
            [str(program), "-c", str(path)],
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        contender = Contender(
            f"supervisord {version}",
            home,
            environment,
            write,
            act=[*control, "update"],
            clear=lambda: None,
            dry=[*control, "reread"],
            status=[*control, "status"],
            pid=process.pid,
            scrape=f"http://127.0.0.1:{port}/RPC2",
        )

        def clear() -> None:
            write(())
            contender.run(contender.act)

        contender.clear = clear
        try:
            until(lambda: http(f"http://127.0.0.1:{port}/").status, "supervisord to answer")
            yield contender
        finally:
            process.terminate()
            process.wait(60)


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def remove(engine: docker.APIClient, scope: str) -> None:
    """Removes the containers that carry the measurement's label with this scope, by id."""
    for container in engine.containers(all=True, filters={"label": f"{LABEL}={scope}"}):
        engine.remove_container(container["Id"], force=True)


OURS = "ours"
CONTAINERS: dict[str, Making] = {
    OURS: ours,
    "alone": lambda count: ours(count, daemon=False, name="mic-supervisor, without a daemon"),
    "compose": compose,
    "ansible": ansible,
}
PROCESSES: dict[str, Making] = {
    OURS: ours,
    "supervisord": supervisord,
}


@contextmanager
def entered(
    making: Mapping[str, Making], count: int, outcome: Outcome
) -> Iterator[dict[str, Contender]]:
    """All of them, by key. One whose program cannot be had is left out, and named."""
    with ExitStack() as stack:
        found = {}
        for key, make in making.items():
            try:
                found[key] = stack.enter_context(make(count))
            except Missing as error:
                outcome.left_out[f"{key}: {str(error).splitlines()[0]}"] = None
        yield found


def answers(jobs: Sequence[Job], contender: Contender, limit: float = 120.0) -> float:
    """Seconds from the call of its command until each job has answered, seen from outside."""
    contender.write(jobs)
    begun = time.perf_counter()
    process = contender.start(contender.act)
    missing = {job.url for job in jobs}
    while missing and time.perf_counter() - begun < limit:
        missing = {url for url in missing if http(url, timeout=0.2).status != 200}
        if process.poll() not in (None, 0):
            break
        time.sleep(0.02)
    taken = time.perf_counter() - begun
    contender.ended(process)
    if missing:
        raise AssertionError(f"{contender.name}: no answer from {sorted(missing)}")
    return taken
