"""The image that holds claims, made by examples/swarm/Dockerfile of this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.setup import tree
from tests.setup.steps import CHECKOUT, cache_dir, fingerprint, run
from tests.support import wheel
from tests.support.require import missing

DOCKERFILE = CHECKOUT / "examples" / "swarm" / "Dockerfile"
BASE = "mic-test/python-venv:1"
BASE_PACKAGES = ("python3-venv",)
TAG = "localhost/mic-claim:1"


def archive() -> Path:
    """What `docker load` takes; made with the machine's engine. The same one a second time."""
    if sys.version_info[:2] != (3, 11):
        missing("the wheels of the image are for Python 3.11", "make PYTHON=python3.11 test-fleet")
    own = wheel.build()
    # The wheel's folder is named after the sources. Two wheels of them differ in their times.
    key = fingerprint(own.parent.name, DOCKERFILE, tree.key(BASE_PACKAGES))
    kept = cache_dir() / "images" / f"claim-{key}.tar"
    if kept.exists():
        return kept
    base = tree.packed("pythonvenv", BASE_PACKAGES)
    with tempfile.TemporaryDirectory() as scratch:
        wheels = cache_dir() / "claim-wheels"
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-input"]
        run([*pip, "--wheel-dir", str(wheels), str(own)], "get the wheels of the project")
        for old in wheels.glob("mic_supervisor-*.whl"):
            old.unlink()
        shutil.copytree(wheels, scratch, dirs_exist_ok=True)
        shutil.copy(own, scratch)
        run(["docker", "import", str(base), BASE], "import the image's base")
        building = [*["docker", "build", "-q", "--network", "none", "--build-arg", f"BASE={BASE}"]]
        run([*building, "-t", TAG, "-f", str(DOCKERFILE), scratch], "build the image")
    for stale in kept.parent.glob("claim-*.tar"):
        stale.unlink()
    fresh = kept.with_suffix(".new")
    subprocess.run(["docker", "save", "-o", str(fresh), TAG], check=True)
    subprocess.run(["docker", "image", "rm", TAG], check=True, capture_output=True)
    return fresh.rename(kept)
