"""Who serves, as the real nginx and HAProxy are told: files that they take, a change under load.

The count of the requests that were answered meanwhile is printed with `-s`.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.integration.job_world import world
from tests.support.mic import PROGRAM, Mic
from tests.support.ports import PortBlock
from tests.support.require import missing
from tests.support.triton import infer_request
from tests.support.waiting import http, until

NASTY = {
    "version": 1,
    "host": "h",
    "models": {
        "MAM": [{"instance": "MAM-1", "endpoints": {"http": "http://127.0.0.1:9"}}],
        "换脸": [{"instance": "m-2", "endpoints": {"http": "http://[::1]:9"}}],
        "a.b-c_d": [],
        "nobody": [],
    },
}


def tool(name: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        missing(f"{name} is not installed", "run make test as root, which installs it")
    return str(found)


@pytest.fixture
def exported(mic: Mic, tmp_path: Path) -> dict[str, Path]:
    import json

    given = tmp_path / "endpoints.json"
    given.write_text(json.dumps(NASTY))
    paths = {form: tmp_path / f"{form}.conf" for form in ("nginx", "haproxy")}
    for form, path in paths.items():
        first = mic("export", form, "--from", given, "--output", path, rc=0)
        assert first.stderr == f"{path}: written\n"
        again = mic("export", form, "--from", given, "--output", path, rc=0)
        assert again.stderr == f"{path}: as it was\n"
    return paths


class Nginx:
    """An nginx of the test's own, that forwards everything to one upstream."""

    def __init__(self, home: Path, included: Path, upstream: str, port: int) -> None:
        home.mkdir(exist_ok=True)
        self.config, self.url = home / "nginx.conf", f"http://127.0.0.1:{port}"
        self.log = home / "error.log"
        self.config.write_text(
            f"""
            daemon off; master_process on; worker_processes 2; user root;
            pid {home}/pid; error_log {self.log} warn;
            events {{ worker_connections 256; }}
            http {{
              access_log off;
              client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
              fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u; scgi_temp_path {home}/s;
              include {included};
              server {{
                listen 127.0.0.1:{port};
                location / {{
                  proxy_pass http://{upstream};
                  proxy_next_upstream off;  # nothing is tried a second time
                }}
              }}
            }}
            """
        )
        self.command = [tool("nginx"), "-p", str(home), "-c", str(self.config)]

    def checked(self) -> str:
        done = subprocess.run([*self.command, "-t"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    @contextmanager
    def running(self) -> Iterator[None]:
        self.log.touch()
        process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        try:
            until(lambda: http(self.url).status != 0, f"nginx: {self.log.read_text()}")
            yield
        finally:
            process.terminate()
            process.wait(60)


def test_nginx_takes_it_and_answers_for_a_model_that_nobody_serves(
    exported: dict[str, Path], tmp_path: Path, free_port: Any
) -> None:
    nginx = Nginx(tmp_path / "n", exported["nginx"], "mic_nobody", free_port())
    nginx.checked()
    with nginx.running():
        assert http(f"{nginx.url}/v1").status == 502


def test_haproxy_takes_it_and_answers_for_a_model_that_nobody_serves(
    exported: dict[str, Path], tmp_path: Path, free_port: Any
) -> None:
    port, main = free_port(), tmp_path / "main.cfg"
    main.write_text(
        "defaults\n  mode http\n  timeout connect 1s\n  timeout client 5s\n  timeout server 5s\n"
        f"frontend in\n  bind 127.0.0.1:{port}\n  default_backend mic_nobody\n"
    )
    command = [tool("haproxy"), "-f", str(main), "-f", str(exported["haproxy"])]
    done = subprocess.run([*command, "-c"], capture_output=True, text=True)
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr
    process = subprocess.Popen([*command, "-db"], stdin=subprocess.DEVNULL)
    try:
        until(lambda: http(f"http://127.0.0.1:{port}").status == 503, "HAProxy")
    finally:
        process.terminate()
        process.wait(60)


def test_what_is_no_document_is_refused(mic: Mic, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text('{"models": []}')
    done = mic("export", "nginx", "--from", bad, rc=1)
    assert "nor what on_endpoints_change is given" in done.stderr
    good = tmp_path / "good"
    good.write_text('{"models": {}}')
    done = mic("export", "nginx", "--from", good, "--output", tmp_path / "no" / "x", rc=1)
    assert f"cannot write {tmp_path}/no/x: No such file or directory" in done.stderr


# --- the hook -----------------------------------------------------------------------------------

PROCESS = (
    '{backend: process, command: [/usr/bin/python3, -m, http.server, "${port}", --bind, 127.0.0.1],'
    " probe: {http: /, period: 500ms}, stop_timeout: 2s, working_dir: /usr/share/doc%s}"
)


def file(hook: Path, gpus: str, more: str = "", settle: str = "0s") -> str:
    return (
        f"version: 1\nhooks: {{on_endpoints_change: [{hook}], settle: {settle}, timeout: 60s}}\n"
        f"models:\n  a: {PROCESS % more}\ngpus: {gpus}\n"
    )


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """Writes down what it is told, a line a run; fails while `broken` is there."""
    path = tmp_path / "hook"
    path.write_text(
        f"#!/bin/sh\n{PROGRAM} export nginx --from /dev/stdin | grep -o 'server .*' | sort | "
        f"tr '\\n' ',' >> {tmp_path}/told\necho >> {tmp_path}/told\n"
        f"if test -e {tmp_path}/broken; then echo no proxy here; exit 4; fi\n"
    )
    path.chmod(0o755)
    return path


def told(hook: Path) -> list[list[str]]:
    """By run, the instances that it was told of."""
    path = hook.parent / "told"
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        sorted(one.rpartition("# ")[2] for one in line.split(",") if "#" in one) for line in lines
    ]


def test_apply_alone_tells_of_what_is_ready_and_before_it_stops_something(
    mic: Mic, hook: Path
) -> None:
    mic.write(file(hook, "{0: a, 1: a}"))
    mic("apply", rc=0)
    assert told(hook)[-1] == ["a-51000000", "a-51000001"]
    count = len(told(hook))
    mic("apply", rc=0)
    assert len(told(hook)) == count  # nothing has changed
    mic.write(file(hook, "{0: a, 1: none}"))
    done = mic("apply", rc=0)
    assert told(hook)[count:] == [["a-51000000"]]
    lines = done.stdout.splitlines()
    withdrawn = next(i for i, line in enumerate(lines) if "withdrawing it" in line)
    removed = next(i for i, line in enumerate(lines) if "a-51000001: removed" in line)
    assert withdrawn < removed


def test_a_daemon_that_starts_again_tells_nobody_what_is_known(mic: Mic, hook: Path) -> None:
    mic.write(file(hook, "{0: a}"))
    daemon = mic.run()
    until(lambda: told(hook)[-1:] == [["a-51000000"]], "the hook")
    served = http(f"{mic.url}/api/v1/endpoints").json()
    assert [one["instance"] for one in served["models"]["a"]] == ["a-51000000"]
    assert mic("export", "nginx", rc=0).stdout.count("server 127.0.0.1:") == 1
    count = len(told(hook))
    assert daemon.stop() == 0
    daemon = mic.run()
    until(lambda: mic("status", rc=None).rc == 0, "it to be ready again")
    time.sleep(1)
    assert len(told(hook)) == count
    pid = mic.status()["instances"][0]["pid"]
    subprocess.run(["kill", "-9", str(pid)], check=True)
    until(lambda: len(told(hook)) >= count + 2, "that it was gone and is back")
    assert told(hook)[-1] == ["a-51000000"]
    assert daemon.stop() == 0


def test_a_hook_that_fails_is_shown_and_freezes_nothing(mic: Mic, hook: Path) -> None:
    (hook.parent / "broken").touch()
    mic.write(file(hook, "{0: a, 1: a}"))
    daemon = mic.run()
    cause = f"on_endpoints_change, {hook}, exits with 4: “no proxy here”"
    until(lambda: cause in daemon.text(), "the log")
    until(lambda: f"warning: {cause}" in mic("status").stderr, "the status")
    failures = "mic_endpoints_hook_failures_total"
    line = next(x for x in http(f"{mic.url}/metrics").text.splitlines() if x.startswith(failures))
    assert float(line.split()[1]) >= 1
    mic.write(file(hook, "{0: a, 1: a}", ", env: {A: b}"))
    mic("apply", rc=0)
    (hook.parent / "broken").unlink()
    mic.write(file(hook, "{0: a, 1: none}", ", env: {A: b}"))
    mic("apply", rc=0)
    until(lambda: told(hook)[-1] == ["a-51000000"], "the hook")
    until(lambda: cause not in mic("status").stderr, "the end of the warning")
    assert daemon.stop() == 0


# --- under load ---------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.triton
def test_a_model_rolls_over_two_gpus_behind_nginx_and_no_post_fails(
    tmp_path: Path, engine: docker.APIClient, triton_image: str
) -> None:
    assert triton_image
    with world(tmp_path, engine, gpus=2) as made, closing(PortBlock()) as ports:
        made.repository.model("MAM", infer_seconds=0.05)
        included, script = tmp_path / "upstreams.conf", tmp_path / "changed"
        included.write_text("upstream mic_MAM { server 127.0.0.1:1 down; }\n")
        nginx = Nginx(tmp_path / "nginx", included, "mic_MAM", ports.take())
        script.write_text(
            f"#!/bin/sh\nset -e\n"
            f"{PROGRAM} export nginx --from /dev/stdin --output {included}\n"
            f"{' '.join(nginx.command)} -s reload\n"
        )
        script.chmod(0o755)
        made.settings += f"\nhooks: {{on_endpoints_change: [{script}]}}"
        with nginx.running():
            made.write({0: "MAM", 1: "MAM"}, MAM="{backend: triton, env: {STEP: '1'}}")
            made.apply()
            before = made.runs()
            clients = [Poster(f"{nginx.url}/v2/models/MAM/infer") for _ in range(4)]
            until(
                lambda: all(one.answered > 3 for one in clients),
                f"answers: {clients[0].failed[-1:]} {included.read_text()}",
            )
            for one in clients:
                one.failed.clear()
            made.write({0: "MAM", 1: "MAM"}, MAM="{backend: triton, env: {STEP: '2'}}")
            done = made.mic("apply", rc=0, timeout=120)
            time.sleep(1)
            for one in clients:
                one.end()
        answered = sum(one.answered for one in clients)
        failed = [text for one in clients for text in one.failed]
        print(f"{answered} POSTs answered, {len(failed)} failed")
        assert failed == [], f"{failed[:5]}\n{done.stdout}\n{nginx.log.read_text()}"
        assert answered > 100
        now = made.runs()
        assert sorted(now) == sorted(before)
        assert not {run.id for run in now.values()} & {run.id for run in before.values()}
        assert done.stdout.count("withdrawing it") == 2
        ports_of = {one: made.url(one) for one in now}
        made.unchanged()
        assert included.read_text().count("max_fails=0") == 2
        assert all(url.removeprefix("http://") in included.read_text() for url in ports_of.values())


class Poster:
    """Posts one request after the other, each over a connection of its own."""

    def __init__(self, url: str) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            answer = http(self._url, "POST", infer_request(1.0, 2.5), timeout=30)
            if answer.status == 200 and answer.json()["outputs"][0]["data"] == [1.0, 2.5]:
                self.answered += 1
            else:
                self.failed.append(f"{answer.status}: {answer.text[:200]}")

    def end(self) -> None:
        self._over.set()
        self._thread.join()
