"""Docker Compose v2, to be measured against: one static binary out of Debian 13's package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.setup.steps import Missing, cache_dir, run, say

_SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources"))


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
