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

EXAMPLES = Path(__file__).parents[2] / "examples"
DASHBOARD = EXAMPLES / "grafana-dashboard.json"


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


def example(target: str) -> dict[str, Any]:
    """examples/prometheus.yml with its one address replaced, and in a hurry."""
    text = (EXAMPLES / "prometheus.yml").read_text()
    assert text.count("127.0.0.1:6004") == 2
    config: dict[str, Any] = yaml.safe_load(text.replace("127.0.0.1:6004", target))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(EXAMPLES / name) for name in config["rule_files"]]
    config["scrape_configs"][1]["http_sd_configs"][0]["refresh_interval"] = "1s"
    return config


def filled(expr: str) -> str:
    """As Grafana would send it."""
    sent = expr.replace("$instance", ".*").replace("$__rate_interval", "1m")
    assert "$" not in sent
    return sent
