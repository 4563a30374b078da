"""A real Prometheus, and its promtool, on a configuration of the test's own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from tests.support.require import program
from tests.support.waiting import http, until


def promtool(*args: str | Path, stdin: str = "") -> str:
    """What promtool says; a complaint of its fails the test."""
    done = subprocess.run(
        [program("promtool", "prometheus"), *args], input=stdin, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


class Prometheus:
    """A server on `port` that scrapes every second. `close` ends it."""

    def __init__(self, directory: Path, port: int, config: dict[str, Any]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self._log = (directory / "log").open("wb")
        self._process = subprocess.Popen(
            [
                program("prometheus", "prometheus"),
                f"--config.file={path}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        until(lambda: http(f"{self.url}/-/ready").status == 200, "Prometheus", timeout=30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that an expression gives now; one that is wrong fails the test."""
        answer = http(f"{self.url}/api/v1/query?query={quote(expression)}")
        assert answer.status == 200, (expression, answer.text)
        data = answer.json()["data"]
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(http(f"{self.url}/api/v1/targets").text)["data"][
            "activeTargets"
        ]
        return found

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
