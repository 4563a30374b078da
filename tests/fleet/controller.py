"""Where ansible-playbook runs: an inventory, a key, and the collection of this checkout."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fleet.namespaces import make_key
from tests.setup import fleet
from tests.setup.steps import CHECKOUT

ANSIBLE = """\
[defaults]
inventory = {home}/hosts.yaml
collections_path = {home}/collections
host_key_checking = false
remote_user = root
private_key_file = {home}/key
interpreter_python = /usr/bin/python3
forks = 10
timeout = 5
nocows = true
[ssh_connection]
pipelining = true
ssh_args = -F none -o ControlMaster=auto -o ControlPersist=60s -o UserKnownHostsFile=/dev/null
  -o ServerAliveInterval=5 -o ServerAliveCountMax=3
"""


def put_collection(path: Path) -> None:
    """As `ansible-galaxy collection install` would put it, for ANSIBLE_COLLECTIONS_PATH."""
    collection = path / "ansible_collections" / "mic" / "supervisor"
    collection.parent.mkdir(parents=True)
    collection.symlink_to(CHECKOUT / "ansible")


@dataclass(frozen=True)
class Played:
    """How ansible-playbook ended."""

    rc: int
    text: str
    seconds: float

    def recap(self, host: str) -> dict[str, int]:
        """Its counters: ok, changed, unreachable, failed."""
        line = next(line for line in self.text.splitlines() if line.startswith(f"{host} "))
        return {key: int(n) for key, _, n in (w.partition("=") for w in line.split() if "=" in w)}

    def __str__(self) -> str:
        return f"exit {self.rc} after {self.seconds:.1f} s\n{self.text}"


@dataclass
class Controller:
    """`home` holds the inventory, ansible.cfg and the key."""

    home: Path

    @property
    def prefix(self) -> list[str]:
        """A command before ansible-playbook, which runs it elsewhere."""
        return []

    def configure(self) -> None:
        put_collection(self.home / "collections")
        make_key(self.home / "key")
        (self.home / "ansible.cfg").write_text(ANSIBLE.format(home=self.home))

    def write(self, path: str, text: str) -> None:
        target = self.home / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))

    def playing(self, playbook: str, *arguments: str) -> subprocess.Popen[bytes]:
        """ansible-playbook, which goes on; its output goes to `self.log`."""
        environment = {
            "PATH": f"{fleet.ansible()}/bin:{os.environ['PATH']}",
            "HOME": str(self.home),
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_CONFIG": str(self.home / "ansible.cfg"),
        }
        with self.log.open("wb") as output:
            return subprocess.Popen(
                [*self.prefix, "ansible-playbook", playbook, *arguments],
                env=environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        return self.home / "playbook.log"

    def play(self, playbook: str, *arguments: str, rc: int | None = 0) -> Played:
        begun = time.monotonic()
        process = self.playing(playbook, *arguments)
        try:
            process.wait(900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"no end:\n{self.log.read_text()}") from None
        played = Played(process.returncode, self.log.read_text(), time.monotonic() - begun)
        print(f"$ ansible-playbook {' '.join((playbook, *arguments))}\n{played}")
        assert rc is None or played.rc == rc, str(played)
        return played
