"""Installs the Debian packages named in packages.txt, those that are missing and no others."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.setup.steps import Missing, run, say

LIST = Path(__file__).with_name("packages.txt")
POLICY = Path("/usr/sbin/policy-rc.d")


def wanted(text: str) -> list[str]:
    names = (line.partition("#")[0].strip() for line in text.splitlines())
    return [name for name in names if name]


def missing(names: Sequence[str]) -> list[str]:
    """Those of `names` that dpkg does not report as installed."""
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n", *names],
        capture_output=True,
        text=True,
        check=False,  # it fails when any name is unknown, and still lists the others
    )
    installed = {
        line.split()[1] for line in asked.stdout.splitlines() if line.startswith("installed ")
    }
    return [name for name in names if name not in installed]


@contextmanager
def _services_stay_down() -> Iterator[None]:
    """Packages start their services when installed, unless policy-rc.d says no.

    That is invoke-rc.d's rule, see its manual page. The tests start their own engine, with the
    PATH that it needs.
    """
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)


def install(names: Sequence[str]) -> None:
    """Installs `names` with apt-get, starting no service. Raises Missing."""
    command = "apt-get install -y --no-install-recommends " + " ".join(names)
    if shutil.which("apt-get") is None:
        raise Missing(
            f"cannot install {', '.join(names)}: there is no apt-get",
            hint="install the equivalent packages of this distribution by hand",
        )
    if os.geteuid() != 0:
        raise Missing(
            f"cannot install {', '.join(names)}: not root", hint=f"run once: sudo {command}"
        )
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    waits = ["-o", "DPkg::Lock::Timeout=300"]
    run(["apt-get", *waits, "update"], "update the package lists", env=quiet)
    with _services_stay_down():
        run([*command.split(), *waits], f"install {', '.join(names)}", env=quiet)


def ensure() -> None:
    lacking = missing(wanted(LIST.read_text()))
    if not lacking:
        say("Debian packages: all there")
        return
    say(f"Debian packages: installing {', '.join(lacking)}")
    install(lacking)
