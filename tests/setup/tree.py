"""Small Debian trees, packed once and kept in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.setup.steps import Missing, cache_dir, fingerprint, run, say

SUITE = "bookworm"
PYTHON = ("python3-minimal", "libpython3.11")
SYSTEMD = ("systemd", "systemd-sysv", "dbus", "python3", "nginx-light")
NEXT_SUITE = "trixie"
NEXT_SYSTEMD = ("systemd", "systemd-sysv", "dbus", "python3")

# Nothing that runs reads these; they are more than half of the tree.
STRIPPED = (
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache",
    "var/lib/apt/lists",
)


def key(packages: tuple[str, ...], suite: str = SUITE) -> str:
    return fingerprint(suite, packages, STRIPPED)


KEY = key(PYTHON)


def _mirror() -> str | None:
    """The mirror that this machine's apt uses for SUITE, which has the others as well.

    None: debootstrap's own choice.
    """
    try:
        asked = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    for line in asked.stdout.splitlines():
        uri, _, codename = line.partition(" ")
        if codename == SUITE and uri.startswith("http") and "debian.org" in uri:
            return uri
    return None


def _leave_no_mounts(target: Path) -> None:
    """debootstrap mounts /proc in the tree; deleting through such a mount must not happen."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{target}/")), reverse=True):
        run(["umount", mount], f"unmount {mount}")


def packed(name: str = "python", packages: tuple[str, ...] = PYTHON, suite: str = SUITE) -> Path:
    """The tree as a tar file, made if need be (about half a minute). Raises Missing."""
    kept = cache_dir() / "images"
    kept.mkdir(exist_ok=True)
    archive = kept / f"{name}-{key(packages, suite)}.tar"
    if archive.exists():
        return archive
    if os.geteuid() != 0:
        raise Missing("cannot make a Debian tree: not root", hint="run make test as root once")
    say(f"images: bootstrapping Debian {suite} with {', '.join(packages)}")
    downloads = cache_dir() / "debs"
    downloads.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="tree-", dir=kept))
    target = work / "root"
    try:
        run(
            [
                *["debootstrap", "--variant=minbase", f"--include={','.join(packages)}"],
                *[f"--cache-dir={downloads}", suite, str(target)],
                *filter(None, [_mirror()]),
            ],
            "make a Debian tree",
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )
        for path in STRIPPED:
            shutil.rmtree(target / path, ignore_errors=True)
            (target / path).mkdir(parents=True)
        run(["tar", "-C", str(target), "-cf", str(work / "tar"), "."], "pack the Debian tree")
        for old in kept.glob(f"{name}-*.tar"):
            old.unlink()
        (work / "tar").rename(archive)
    finally:
        _leave_no_mounts(target)
        shutil.rmtree(work)
    return archive
