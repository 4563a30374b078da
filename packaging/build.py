"""Builds packages: `python packaging/build.py deb 3.11 3.13` makes one for each of these Pythons.

The program goes into /usr/lib/mic-supervisor, as a virtual environment of the distribution's own
Python. Libraries with compiled parts are bound to a minor version of Python, hence a package for
each. Any Python builds for all of them: the libraries come as wheels.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from mic_supervisor import __version__
from mic_supervisor.cli.install import files

CHECKOUT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")  # Debian 12; Ubuntu 24.04; Debian 13 and Fedora
HOME = Path("usr/lib/mic-supervisor")
PROGRAM = """\
#!/usr/lib/mic-supervisor/bin/python3 -I
from mic_supervisor.cli import main
main()
"""
# Its dependencies are numpy and more, three times as large as all else; we read one file of it.
ALONE = "tritonclient"
GLIBC = (5, 12, 17, 24, 27, 28, 31, 34)  # minor versions that wheels are built for; Debian 12: 36
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", "--no-input", *arguments], check=True)


def libraries(python: str, kept: Path) -> Path:
    """site-packages for `python` without the program itself, made once for what is required."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    required = [one for one in project["dependencies"] if not one.startswith(ALONE)]
    alone = [one for one in project["dependencies"] if one.startswith(ALONE)]
    key = hashlib.sha256(repr((python, required, alone)).encode()).hexdigest()[:16]
    target = kept / f"libraries-{python}-{key}"
    if target.is_dir():
        return target
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as name:
        scratch = Path(name)
        # Where there is no wheel: it is of Python alone, and this one builds it for all.
        pip("wheel", "--no-deps", "--wheel-dir", scratch / "wheels", "sdnotify")
        into = ("install", "--no-compile", "--target", scratch / "site")
        machine = platform.machine()
        tags = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC]
        tags += [f"manylinux{year}_{machine}" for year in ("1", "2010", "2014")]
        wheels = ("--only-binary", ":all:", "--python-version", python, "--implementation", "cp")
        found = ("--find-links", scratch / "wheels", *(f"--platform={tag}" for tag in tags))
        pip(*into, *wheels, *found, *required)
        pip(*into, "--no-deps", *alone)
        shutil.rmtree(scratch / "site" / "bin", ignore_errors=True)
        (scratch / "site").rename(target)
    return target


def stage(root: Path, python: str, site: Path, wheel: Path) -> None:
    """Everything that the package holds, as it lies on the machine, but for the settings."""
    packages = root / HOME / "lib" / f"python{python}" / "site-packages"
    shutil.copytree(site, packages)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (root / HOME / "bin").mkdir()
    (root / HOME / "bin" / "python3").symlink_to(f"/usr/bin/python{python}")
    (root / HOME / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\n"
    )
    write(root / HOME / "bin" / "mic-supervisor", PROGRAM)
    (root / "usr/bin").mkdir()
    (root / "usr/bin/mic-supervisor").symlink_to("../lib/mic-supervisor/bin/mic-supervisor")
    for name, text in files("/usr/bin/mic-supervisor").items():
        write(root / "usr" / name, text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755 if text.startswith("#!") else 0o644)


def own_wheel(directory: Path) -> Path:
    shutil.rmtree(CHECKOUT / "build/lib", ignore_errors=True)  # may hold what is gone since
    pip("wheel", "--no-deps", "--wheel-dir", directory, CHECKOUT)
    [wheel] = directory.glob("mic_supervisor-*.whl")
    return wheel


def build(
    kind: str, python: str, wheel: Path, *, kept: Path, out: Path, version: str = __version__
) -> Path:
    """The path of the package. `kept` is where libraries are kept for the next time."""
    site = libraries(python, kept)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        stage(root, python, site, wheel)
        environ = {
            "ROOT": str(root),
            "ARCH": ARCHITECTURES[platform.machine()],
            "VERSION": version,
            "RELEASE": f"1+py{python.replace('.', '')}",
            "PYTHON": python,
        }
        nfpm = Path(sys.executable).with_name("nfpm")
        said = subprocess.run(
            [
                *[nfpm, "package", "--config=packaging/nfpm.yaml"],
                *[f"--packager={kind}", f"--target={out.resolve()}"],
            ],
            cwd=CHECKOUT,
            env={**os.environ, **environ},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return Path(said.rpartition("created package: ")[2].strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=["deb", "rpm"])
    parser.add_argument("pythons", nargs="*", default=PYTHONS, metavar="PYTHON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        wheel = own_wheel(Path(name))
        for python in given.pythons:
            kept, out = CHECKOUT / "build/packages", CHECKOUT / "dist"
            made = build(given.kind, python, wheel, kept=kept, out=out)
            size = made.stat().st_size / (1 << 20)
            print(f"{made.relative_to(CHECKOUT)}: {size:.1f} MiB, for Python {python}")


if __name__ == "__main__":
    main()
