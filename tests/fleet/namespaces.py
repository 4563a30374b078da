"""Hosts made of namespaces of this machine, joined by a bridge, with a proxy among them.

The bridge is in a network namespace of its own, the controller's. Nothing is changed in the
machine's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fleet.host import Service
from tests.setup import fleet
from tests.setup.steps import CHECKOUT
from tests.support.mic import PROGRAM
from tests.support.require import missing, program
from tests.support.waiting import until

HERE = Path(__file__).parent
SERVER = CHECKOUT / "mic_supervisor" / "demo" / "server.py"
GPU_HOSTS = ("gpu1", "gpu2", "gpu3")
ADDRESSES = {"gpu1": "10.77.0.11", "gpu2": "10.77.0.12", "gpu3": "10.77.0.13", "proxy": "10.77.0.2"}
NETWORK = "10.77.0.1/24"
SSHD = """\
HostKey {files}/host_key
AuthorizedKeysFile {home}/key.pub
StrictModes no
PidFile none
Subsystem sftp internal-sftp
SetEnv PATH={commands}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
"""


def make_key(path: Path) -> None:
    """`path`, and `path`.pub."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True)


@dataclass
class Machines:
    """`home` holds a folder for each host; its files outlive the host."""

    home: Path
    machines: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def within(self, name: str, *kinds: str) -> list[str]:
        """A command before another one, which runs it in a namespace of a machine."""
        return ["nsenter", "-t", str(self.first(name)), *(kinds or ("-n",)), "--"]

    def first(self, name: str) -> int:
        """The PID here of the first process of a machine."""
        parent = self.machines[name].pid
        children = Path(f"/proc/{parent}/task/{parent}/children")
        return int(until(lambda: children.read_text().split(), f"{name} to start")[0])

    def inside(self, name: str, tree: Path) -> list[str]:
        """A command before another one, which runs it in the tree of a machine's services."""
        pid = self.home / name / f"{tree.name}.pid"
        until(pid.exists, f"{tree.name} of {name}")
        return [*self.within(name, "-a"), "nsenter", "--mount", "--target", pid.read_text(), "--"]

    def boot(self, name: str, *command: str | Path) -> None:
        """To be called by the thread that lives longest: the machine ends with its thread."""
        kinds = ["--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc", "--fork"]
        kinds.append("--kill-child")
        files = self.home / name
        files.mkdir(exist_ok=True)
        with (files / "console.log").open("ab") as log:
            self.machines[name] = subprocess.Popen(
                # However the test ends, its machines end with it.
                ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={k: v for k, v in os.environ.items() if not k.startswith("MIC_")},
            )

    def run(self, command: list[str], timeout: float = 60, given: str = "") -> str:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    @property
    def commands(self) -> Path:
        """The folder of the programs that every host finds first."""
        return self.home / "bin"

    def connect_all(self) -> None:
        """The controller, with the bridge in its network namespace."""
        self.commands.mkdir()
        (self.commands / "mic-supervisor").symlink_to(PROGRAM)
        self.boot("controller", "sleep", "infinity")
        # unshare has made the namespaces when its child runs another program than it.
        until(lambda: self.program_of("controller") == "sleep", "the controller")
        for line in ("link add br0 type bridge", f"addr add {NETWORK} dev br0", "link set br0 up"):
            self.run([*self.within("controller"), "ip", *line.split()])
        self.run([*self.within("controller"), "ip", "link", "set", "lo", "up"])

    def program_of(self, name: str) -> str:
        return Path(f"/proc/{self.first(name)}/comm").read_text().strip()

    def sshd(self, name: str) -> Service:
        """An OpenSSH server that lets the key in `home` in."""
        files = self.home / name
        files.mkdir(exist_ok=True)
        make_key(files / "host_key")
        text = SSHD.format(files=files, home=self.home, commands=self.commands)
        (files / "sshd_config").write_text(text)
        root = fleet.sshd()
        return Service(
            "sshd",
            [f"{root}/usr/sbin/sshd", "-D", "-e", "-f", str(files / "sshd_config")],
            {"LD_LIBRARY_PATH": f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"},
        )

    def start(self, name: str, address: str, *services: Service) -> None:
        """A host that runs these; the same ones as before where none are given."""
        files = self.home / name
        (files / "root").mkdir(parents=True, exist_ok=True)
        if services:
            listed = json.dumps([asdict(service) for service in services])
            (files / "services.json").write_text(listed)
        self.boot(name, sys.executable, HERE / "host.py", name, files, self.commands)
        until(lambda: self.program_of(name).startswith("python"), name)
        link = f"link add to-{name} type veth peer name eth0 netns {self.first(name)}"
        self.run([*self.within("controller"), "ip", *link.split()])
        self.run([*self.within("controller"), "ip", "link", "set", f"to-{name}", "master", "br0"])
        self.connect(name)
        for line in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self.run([*self.within(name), "ip", *line.split()])

    def connect(self, name: str, *, up: bool = True) -> None:
        """Plug a host's cable in, or pull it."""
        state = "up" if up else "down"
        self.run([*self.within("controller"), "ip", "link", "set", f"to-{name}", state])

    def kill(self, name: str) -> None:
        """Cut a host's power: every process there ends at once."""
        machine = self.machines.pop(name)
        machine.kill()
        machine.wait()
        # The kernel takes its time to do so, and the next boot needs the name.
        link = [*self.within("controller"), "ip", "link", "del", f"to-{name}"]
        subprocess.run(link, capture_output=True)

    def close(self) -> None:
        for machine in self.machines.values():
            machine.kill()
        for machine in self.machines.values():
            machine.wait()

    def mic(self, host: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*self.within(host, "-a"), str(PROGRAM), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")

    # --- requests -------------------------------------------------------------------------------

    @contextmanager
    def nginx(self) -> Iterator[None]:
        nginx = program("nginx", "nginx-light")
        command = [*self.within("proxy", "-a"), nginx, "-g", "daemon off; user root;"]
        process = subprocess.Popen(command, cwd="/")
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)

    @contextmanager
    def load(self) -> Iterator[dict[str, int]]:
        """Requests through nginx all the while; afterwards the dict says what became of them."""
        counted: dict[str, int] = {}
        url = f"http://{ADDRESSES['proxy']}/infer?delay=0.2"
        process = subprocess.Popen(
            [*self.within("controller"), sys.executable, str(HERE / "load.py"), url],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield counted
        finally:
            process.terminate()
            said, _ = process.communicate(timeout=90)
            counted |= json.loads(said)


def answered(counted: dict[str, int]) -> int:
    """How many requests there were; one that failed fails the test."""
    failed = {said: count for said, count in counted.items() if said != "200"}
    print(f"requests: {counted.get('200', 0)}, and failed: {sum(failed.values())}")
    assert not failed, list(failed)[:5]
    return counted["200"]


def require() -> None:
    """Ends the test where hosts of namespaces cannot be made."""
    if os.geteuid() != 0:
        missing("only root can make hosts of namespaces")
    if not fleet.ready():
        missing("what tests/fleet needs is not set up", "make test-fleet")
