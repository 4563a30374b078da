"""What tests/fleet needs besides: Ansible, programs of a host, a newer Docker Engine, and Slurm.

`python -m tests.setup.fleet` sets them up, unpacked and not installed: an installed sshd would be
started by systemd, on the machine's own addresses. The engine is Debian 13's, in a tree of that
Debian, since Swarm in Debian 12's does not count generic resources.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.setup import tree
from tests.setup.steps import IN_CI, Missing, cache_dir, die, fingerprint, locked, run, say

REQUIREMENTS = ("ansible-core==2.19.*", "ansible-lint==26.*")
# The server with what it loads, and what Ansible needs on a host to install a package.
_DEBS = ("openssh-server", "libwrap0", "python3-apt", "python-apt-common")
ENGINE = ("docker.io", "docker-cli", "iptables")
SLURM = ("slurmctld", "slurmd", "slurm-client", "munge")
_DONE = ".installed"


def sshd() -> Path:
    """The root of the unpacked packages; `usr/sbin/sshd` below it."""
    return cache_dir() / f"unpacked-{fingerprint(_DEBS)}"


def ansible() -> Path:
    """The virtual environment with Ansible: one for each version and interpreter."""
    return cache_dir() / f"ansible-{fingerprint(REQUIREMENTS, sys.version)}"


def engine() -> Path:
    """A Debian tree with Docker Engine 26.1.5."""
    return cache_dir() / f"engine26-{tree.key(ENGINE, tree.NEXT_SUITE)}"


def slurm() -> Path:
    """A Debian tree with Slurm 22.05."""
    return cache_dir() / f"slurm-{tree.key(SLURM)}"


def ready() -> bool:
    return all((home / _DONE).is_file() for home in (sshd(), ansible(), engine(), slurm()))


def _unpack(home: Path) -> None:
    run(["apt-get", "update"], "update the package lists")
    work = home / "work"
    work.mkdir(parents=True)
    # As root, apt downloads as a user who may not write there.
    download = ["apt-get", "-o", "APT::Sandbox::User=root", "download", *_DEBS]
    run(download, "download the programs of a host", cwd=work)
    for package in work.glob("*.deb"):
        run(["dpkg", "-x", str(package), str(home)], f"unpack {package.name}")
    shutil.rmtree(work)


def _install(home: Path) -> None:
    python = str(home / "bin" / "python")
    run([sys.executable, "-m", "venv", str(home)], "create a virtual environment for Ansible")
    run([python, "-m", "pip", "install", "--no-input", "-q", *REQUIREMENTS], "install Ansible")


def _grow(home: Path, packages: tuple[str, ...], suite: str) -> None:
    home.mkdir()
    archive = tree.packed(home.name.partition("-")[0], packages, suite)
    run(["tar", "-C", str(home), "-xf", str(archive)], f"unpack {archive.name}")
    archive.unlink()


def ensure() -> None:
    """Raises Missing."""
    steps: tuple[tuple[str, Path, Callable[[Path], None]], ...] = (
        ("programs of a host", sshd(), _unpack),
        ("Ansible", ansible(), _install),
        ("Docker Engine", engine(), lambda home: _grow(home, ENGINE, tree.NEXT_SUITE)),
        ("Slurm", slurm(), lambda home: _grow(home, SLURM, tree.SUITE)),
    )
    for name, home, make in steps:
        if (home / _DONE).is_file():
            say(f"{name}: up to date")
            continue
        for old in cache_dir().glob(f"{home.name.partition('-')[0]}*"):
            if old.is_dir():
                shutil.rmtree(old)
        say(f"{name}: setting it up in {home}")
        make(home)
        (home / _DONE).touch()


if __name__ == "__main__":
    try:
        with locked("fleet"):
            ensure()
    except Missing as error:
        if IN_CI:
            die(str(error), hint=error.hint)
        say(f"NOT SET UP: {error}")
        say(f"  way out: {error.hint}")
