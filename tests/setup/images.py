"""The images of the tests, built here: no registry is asked.

mic-test/busybox:1  static busybox, 2 MB, starts in a tenth of a second
mic-test/python:1   Debian with Python 3.11
mic-test/server:1   the same with mic_supervisor/demo/server.py as `model-server`
mic-test/triton:1   the same with a real tritonserver from the wheel nvidia-pytriton
mic-test/systemd:1  Debian with systemd as PID 1, nginx, and what the project needs in /opt/mic
mic-test/trixie:1   the Debian after it, with systemd as PID 1 and Python 3.13, and no more

Each carries a label with the fingerprint of what went in; one that has it is not built again.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import docker
from docker.errors import APIError, ImageNotFound

from tests.setup import tree
from tests.setup.engine import connect
from tests.setup.steps import CHECKOUT, Missing, cache_dir, fingerprint, run, say

KEY_LABEL = "io.mic.test.key"
BUSYBOX = Path("/bin/busybox")
SERVER = CHECKOUT / "mic_supervisor" / "demo" / "server.py"

TRITON_WHEEL = "nvidia-pytriton==0.7.0"
NUMPY_WHEEL = "numpy==1.26.4"  # with numpy 2 the stub of that wheel answers with empty outputs

TRITON_HOME = "opt/tritonserver"
NUMPY_HOME = "opt/numpy1"
NUMPY_PTH = "usr/local/lib/python3.11/dist-packages/numpy1.pth"

# The server finds its libraries relative to itself, so the wheel's own layout is kept. Debian's
# libpython stands where the loader looks; the wheel's copy is for another version.
TRITONSERVER = f"""#!/bin/sh
exec /{TRITON_HOME}/pytriton/tritonserver/bin/tritonserver \\
    --backend-directory=/{TRITON_HOME}/pytriton/tritonserver/backends "$@"
"""


def _triton_path(name: str) -> str | None:
    """Where a member of the wheel goes in the image; None: it is left out."""
    stub = "pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub"
    if name == stub:
        return f"{TRITON_HOME}/pytriton/tritonserver/backends/python/triton_python_backend_stub"
    if name.startswith(("pytriton/tritonserver/bin/", "pytriton/tritonserver/backends/")):
        return f"{TRITON_HOME}/{name}"
    if name.startswith("nvidia_pytriton.libs/") and "libpython" not in name:
        return f"{TRITON_HOME}/{name}"
    return None


def _numpy_path(name: str) -> str | None:
    if ".dist-info/" in name or "/tests/" in name or name.endswith((".pyi", ".a", ".h")):
        return None
    return f"{NUMPY_HOME}/{name}"


SYSTEMD_BASE = "mic-test/systemd-base:1"
SYSTEMD_DOCKERFILE = """\
FROM mic-test/systemd-base:1
RUN python3 -m venv --without-pip /opt/mic \\
    && systemctl mask systemd-firstboot.service console-getty.service getty.target \\
    && systemctl disable nginx.service \\
    && useradd --create-home alice && useradd --create-home bob
COPY site/ /opt/mic/lib/python3.11/site-packages/
ENV container=docker
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init"]
"""
TRIXIE_BASE = "mic-test/trixie-base:1"
# Its systemd wants to be asked before it lives with version 1 of the control groups. PID 1 of a
# container takes its own command line for the kernel's.
TRIXIE_DOCKERFILE = """\
FROM mic-test/trixie-base:1
RUN systemctl mask systemd-firstboot.service console-getty.service getty.target
ENV container=docker
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init", "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"]
"""


# --- tar streams ------------------------------------------------------------------------------


def _put(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))


def _put_wheel(archive: tarfile.TarFile, wheel: Path, place: Callable[[str], str | None]) -> None:
    """Everything executable: the index's wheels carry no modes for the server and its stub."""
    with zipfile.ZipFile(wheel) as members:
        for name in members.namelist():
            target = None if name.endswith("/") else place(name)
            if target is not None:
                _put(archive, target, members.read(name), 0o755)


def _busybox_tree(archive: tarfile.TarFile) -> None:
    _put(archive, "bin/busybox", BUSYBOX.read_bytes(), 0o755)
    for applet in run([str(BUSYBOX), "--list"], "list busybox's applets").split():
        if applet != "busybox":
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)
    for name in ("dev", "etc", "proc", "root", "run", "sys", "tmp", "var"):
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
        archive.addfile(entry)
    _put(archive, "etc/passwd", b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    _put(archive, "etc/group", b"root:x:0:\nnogroup:x:65534:\n")


def _wheel(requirement: str) -> Path:
    """The wheel of an exact requirement, downloaded once."""
    name, _, version = requirement.partition("==")
    kept = cache_dir() / "wheels"
    kept.mkdir(exist_ok=True)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(kept.glob(pattern)):
        say(f"images: downloading {requirement}")
        platforms = [f"manylinux_2_{minor}_{os.uname().machine}" for minor in (17, 28, 35)]
        run(
            [
                *[sys.executable, "-m", "pip", "download", "-q", "--no-deps"],
                *["--no-input", "--only-binary", ":all:", "--python-version", "3.11"],
                *[f"--platform={p}" for p in platforms],
                *["-d", str(kept), requirement],
            ],
            f"download {requirement}",
        )
    return next(kept.glob(pattern))


# --- building ---------------------------------------------------------------------------------


def _id_if_current(engine: docker.APIClient, tag: str, key: str) -> tuple[bool, str | None]:
    try:
        found = engine.inspect_image(tag)  # type: ignore[no-untyped-call]
    except ImageNotFound:
        return False, None
    labels = found["Config"].get("Labels") or {}
    return labels.get(KEY_LABEL) == key, found["Id"]


def _forget(engine: docker.APIClient, image: str) -> None:
    """Deletes a replaced image, unless something still uses it."""
    try:
        engine.remove_image(image)
    except APIError as error:
        say(f"images: {image[:19]} stays: {error.explanation}")


def _ensure(engine: docker.APIClient, tag: str, key: str, make: Callable[[str], None]) -> None:
    """Builds `tag` unless the engine has it with this key. `make` takes the key."""
    current, old = _id_if_current(engine, tag, key)
    if current:
        say(f"images: {tag} is there")
        return
    say(f"images: building {tag}")
    make(key)
    current, new = _id_if_current(engine, tag, key)
    if not current:
        raise Missing(
            f"cannot build {tag}: the engine took it, and does not have it",
            hint="look at the engine's log",
        )
    if old is not None and old != new:
        _forget(engine, old)


def _check(answers: Iterator[dict[str, object]], tag: str) -> None:
    for answer in answers:
        if "error" in answer:
            raise Missing(f"cannot build {tag}: {answer['error']}", hint="mend what it says")


def _import(engine: docker.APIClient, tag: str, key: str, path: Path, *changes: str) -> None:
    repository, _, version = tag.partition(":")
    label = f"LABEL {KEY_LABEL}={key}"
    text = engine.import_image_from_file(
        str(path), repository=repository, tag=version, changes=[label, *changes]
    )
    _check((json.loads(line) for line in text.splitlines()), tag)


def _build(
    engine: docker.APIClient,
    tag: str,
    key: str,
    dockerfile: str,
    fill: Callable[[tarfile.TarFile], None],
) -> None:
    with tempfile.TemporaryFile() as context:
        with tarfile.open(fileobj=context, mode="w") as archive:
            _put(archive, "Dockerfile", dockerfile.encode())
            fill(archive)
        context.seek(0)
        _send(engine, tag, key, context)


def _send(engine: docker.APIClient, tag: str, key: str, context: IO[bytes]) -> None:
    labels = {KEY_LABEL: key}
    _check(
        engine.build(
            fileobj=context, custom_context=True, tag=tag, labels=labels, forcerm=True, decode=True
        ),
        tag,
    )


def _build_busybox(engine: docker.APIClient) -> None:
    def make(key: str) -> None:
        with tempfile.NamedTemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                _busybox_tree(archive)
            packed.flush()
            _import(engine, tag, key, Path(packed.name), 'CMD ["sh"]', "ENV PATH=/bin")

    tag = "mic-test/busybox:1"
    if not BUSYBOX.exists():
        raise Missing(
            f"cannot build {tag}: there is no {BUSYBOX}", hint="apt-get install busybox-static"
        )
    _ensure(engine, tag, fingerprint(BUSYBOX, "passwd, group, tmp"), make)


def _build_python(engine: docker.APIClient) -> None:
    tag = "mic-test/python:1"
    changes = ('CMD ["python3"]', "ENV PYTHONUNBUFFERED=1")

    def make(key: str) -> None:
        _import(engine, tag, key, tree.packed(), *changes)

    _ensure(engine, tag, fingerprint(tree.KEY, changes), make)


def _build_server(engine: docker.APIClient) -> None:
    tag = "mic-test/server:1"
    dockerfile = """\
FROM mic-test/python:1
COPY model-server /usr/local/bin/model-server
ENV HOST=0.0.0.0
CMD ["model-server"]
"""

    def make(key: str) -> None:
        def fill(archive: tarfile.TarFile) -> None:
            _put(archive, "model-server", SERVER.read_bytes(), 0o755)

        _build(engine, tag, key, dockerfile, fill)

    _ensure(engine, tag, fingerprint(tree.KEY, dockerfile, SERVER), make)


def _build_triton(engine: docker.APIClient) -> None:
    tag = "mic-test/triton:1"
    dockerfile = """\
FROM mic-test/python:1
COPY tree/ /
"""

    def make(key: str) -> None:
        def fill(archive: tarfile.TarFile) -> None:
            _put(archive, "tree/usr/local/bin/tritonserver", TRITONSERVER.encode(), 0o755)
            _put(archive, f"tree/{NUMPY_PTH}", f"/{NUMPY_HOME}\n".encode())
            triton, numpy = _wheel(TRITON_WHEEL), _wheel(NUMPY_WHEEL)
            _put_wheel(archive, triton, lambda name: _below("tree", _triton_path(name)))
            _put_wheel(archive, numpy, lambda name: _below("tree", _numpy_path(name)))

        _build(engine, tag, key, dockerfile, fill)

    key = fingerprint(tree.KEY, dockerfile, TRITONSERVER, TRITON_WHEEL, NUMPY_WHEEL)
    _ensure(engine, tag, key, make)


def _build_systemd(engine: docker.APIClient) -> None:
    """Without the project itself, which every test session puts in afresh."""
    tag = "mic-test/systemd:1"
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], "pytest>=8.2"]

    def make_base(key: str) -> None:
        _import(engine, SYSTEMD_BASE, key, tree.packed("systemd", tree.SYSTEMD))

    def make(key: str) -> None:
        if sys.version_info[:2] != (3, 11):
            raise Missing(
                f"cannot build {tag}: what is installed into it is for Python 3.11",
                hint="make PYTHON=python3.11 test",
            )
        with tempfile.TemporaryDirectory() as scratch:
            site = Path(scratch) / "site"
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-input", "--no-compile"]
            run([*pip, "--target", str(site), *wanted], "install the project's dependencies")
            _build(engine, tag, key, SYSTEMD_DOCKERFILE, lambda archive: archive.add(site, "site"))

    base_key = tree.key(tree.SYSTEMD)
    _ensure(engine, SYSTEMD_BASE, base_key, make_base)
    _ensure(engine, tag, fingerprint(base_key, SYSTEMD_DOCKERFILE, wanted), make)


def _build_trixie(engine: docker.APIClient) -> None:
    tag = "mic-test/trixie:1"
    base_key = tree.key(tree.NEXT_SYSTEMD, tree.NEXT_SUITE)

    def make_base(key: str) -> None:
        packed = tree.packed("trixie", tree.NEXT_SYSTEMD, tree.NEXT_SUITE)
        _import(engine, TRIXIE_BASE, key, packed)

    def make(key: str) -> None:
        _build(engine, tag, key, TRIXIE_DOCKERFILE, lambda _archive: None)

    _ensure(engine, TRIXIE_BASE, base_key, make_base)
    _ensure(engine, tag, fingerprint(base_key, TRIXIE_DOCKERFILE), make)


def _below(directory: str, name: str | None) -> str | None:
    return None if name is None else f"{directory}/{name}"


def ensure() -> None:
    """Builds what is missing or out of date. Raises Missing."""
    engine = connect(timeout=900)
    if engine is None:
        raise Missing("cannot build the images: no engine answers", hint="see the step before")
    try:
        _build_busybox(engine)
        _build_python(engine)
        _build_server(engine)
        _build_triton(engine)
        _build_systemd(engine)
        _build_trixie(engine)
    finally:
        engine.close()
