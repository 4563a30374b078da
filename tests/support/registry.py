"""A real registry on loopback, Debian's docker-registry, and images in it that a test makes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
import httpx

from tests.support.require import program
from tests.support.waiting import http, until

_KIND = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = """\
version: 0.1
log: {{accesslog: {{disabled: false}}, level: error}}
storage: {{filesystem: {{rootdirectory: {data}}}}}
http: {{addr: "{host}"}}
"""


class Registry:
    """`image` is the tag that moves: REGISTRY/m:1. What is pushed is not kept on the engine."""

    def __init__(self, home: Path, engine: docker.APIClient, port: int) -> None:
        self.first = self.second = ""  # digests
        self.host = f"127.0.0.1:{port}"
        self.image = f"{self.host}/m:1"
        self._home = home
        self._engine = engine
        self._log = home / "log"
        self._process: subprocess.Popen[bytes] | None = None
        home.mkdir()
        (home / "config.yml").write_text(_CONFIG.format(data=home / "data", host=self.host))

    def start(self) -> None:
        command = [program("docker-registry", "docker-registry"), "serve", "config.yml"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._home, stdout=log, stderr=log)
        until(lambda: http(f"http://{self.host}/v2/").status == 200, "the registry")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def asked(self) -> int:
        """How often an engine has asked it for anything."""
        return self._log.read_text().count('"docker/')

    def push(self, version: int, *commands: str) -> str:
        """Makes m:vVERSION of the test's busybox and of what these commands change in it; its
        digest. /version tells them apart.
        """
        shell = "; ".join([f"echo {version} > /version", *commands])
        made = self._engine.create_container("mic-test/busybox:1", ["sh", "-c", shell])["Id"]
        self._engine.start(made)
        self._engine.wait(made)
        ref = self._engine.commit(made, f"{self.host}/m", f"v{version}")["Id"]
        self._engine.remove_container(made)
        said = list(self._engine.push(f"{self.host}/m", f"v{version}", stream=True, decode=True))
        assert not any("error" in item for item in said), said
        self._engine.remove_image(ref, force=True)
        return str(next(item["aux"]["Digest"] for item in said if "aux" in item))

    def move(self, version: int) -> None:
        """Has the tag mean m:vVERSION from now on."""
        url = f"http://{self.host}/v2/m/manifests"
        found = httpx.get(f"{url}/v{version}", headers={"Accept": _KIND})
        assert found.status_code == 200, found
        put = httpx.put(f"{url}/1", content=found.content, headers={"Content-Type": _KIND})
        assert put.status_code == 201, put


@contextmanager
def registry(home: Path, engine: docker.APIClient, port: int) -> Iterator[Registry]:
    made = Registry(home, engine, port)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        for image in engine.images(f"{made.host}/m", quiet=True):
            engine.remove_image(image, force=True)
