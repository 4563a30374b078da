"""Programs to be measured against, each set up once in the cache: `python -m tests.setup.peers`.

Docker Compose v2 is one static binary out of Debian 13's package. Ansible and supervisord are in a
virtual environment of their own, with two collections out of Ansible's wheel, which has a hundred.
"""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

from tests.setup.steps import IN_CI, Missing, cache_dir, die, fingerprint, locked, run, say

_SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources"))
COLLECTIONS = "ansible==12.3.0"
REQUIREMENTS = ("ansible-core==2.19.*", "requests", "supervisor==4.3.0")
_WANTED = tuple(
    f"ansible_collections/community/{name}/"
    for name in ("docker", "library_inventory_filtering_v1")
)
_DONE = ".installed"


def compose() -> Path:
    """The `docker-compose` program, downloaded once. Raises Missing."""
    found = cache_dir() / "compose" / "docker-compose"
    if found.is_file():
        return found
    say("Docker Compose v2: downloading it from Debian 13")
    work = found.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    (work / "lists" / "partial").mkdir(parents=True)
    sources = next((path for path in _SOURCES if path.is_file()), None)
    if sources is None:
        raise Missing("cannot find Debian's package sources", hint="install docker-compose 2")
    text = re.sub(r"\bbookworm\b(-\w+)?", lambda m: "" if m[1] else "trixie", sources.read_text())
    listed = work / sources.name
    listed.write_text("\n\n".join(p for p in text.split("\n\n") if "security" not in p) + "\n")
    apt = ["-o", f"Dir::Etc::SourceList={listed}", "-o", "Dir::Etc::SourceParts=/dev/null"]
    apt += ["-o", f"Dir::State::Lists={work / 'lists'}", "-o", "APT::Sandbox::User=root"]
    run(["apt-get", *apt, "update"], "read Debian 13's package lists")
    run(["apt-get", *apt, "download", "docker-compose"], "download docker-compose", cwd=work)
    (package,) = work.glob("docker-compose_*.deb")
    run(["dpkg", "-x", str(package), str(work / "tree")], "unpack docker-compose")
    program = work / "tree/usr/libexec/docker/cli-plugins/docker-compose"
    program.rename(found)
    shutil.rmtree(work)
    return found


def _environment() -> Path:
    """The virtual environment of what comes from PyPI, made once. Raises Missing."""
    home = cache_dir() / f"peers-{fingerprint(COLLECTIONS, REQUIREMENTS, sys.version)}"
    if (home / _DONE).is_file():
        return home
    for old in cache_dir().glob("peers-*"):
        shutil.rmtree(old)
    say(f"Ansible and supervisord: setting them up in {home}")
    pip = [str(home / "bin" / "python"), "-m", "pip"]
    wheels = home / "wheels"
    run([sys.executable, "-m", "venv", str(home)], "create a virtual environment for the peers")
    run([*pip, "install", "--no-input", "-q", *REQUIREMENTS], "install Ansible and supervisord")
    run(
        [*pip, "download", "--no-input", "-q", "--no-deps", "-d", str(wheels), COLLECTIONS],
        "download Ansible's collections",
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as members:
        names = [name for name in members.namelist() if name.startswith(_WANTED)]
        members.extractall(home / "collections", names)
    shutil.rmtree(wheels)
    (home / _DONE).touch()
    return home


def ansible() -> tuple[Path, Path]:
    """The `ansible-playbook` program, and the directory of collections. Raises Missing."""
    home = _environment()
    return home / "bin" / "ansible-playbook", home / "collections"


def supervisord() -> Path:
    """The `supervisord` program; `supervisorctl` is beside it. Raises Missing."""
    return _environment() / "bin" / "supervisord"


if __name__ == "__main__":
    try:
        with locked("peers"):
            compose()
            _environment()
    except Missing as error:
        if IN_CI:
            die(str(error), hint=error.hint)
        say(f"NOT SET UP: {error}")
        say(f"  way out: {error.hint}")
