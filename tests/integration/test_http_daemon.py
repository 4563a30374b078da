"""The HTTP interface of a real daemon: what it answers, to whom, and what it keeps to itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.http.connections import MAX_CONNECTIONS
from tests.mock_nvml import MockGpu, MockNvml, mock_uuid
from tests.support.commands import SERVE
from tests.support.mic import Mic
from tests.support.require import program
from tests.support.waiting import Answer, http, until

NGINX = Path(__file__).parents[2] / "examples" / "nginx-mic.conf"
PATHS = (
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/api/v1/status",
    "/api/v1/plan",
    "/api/v1/gpus",
    "/api/v1/models/status",
    "/api/v1/models/supported",
    "/api/v1/sd",
)
TOKEN = "0123456789abcdef0123"


@pytest.fixture
def world(mic: Mic) -> Mic:
    mic.env["MIC_DOCKER_HOST"] = "none"
    return mic


def model(name: str, *more: str, **env: str) -> str:
    keys = [
        "backend: process",
        f"command: {SERVE}",
        f"env: {json.dumps(env)}",
        "probe: {http: /health, period: 200ms}",
        *more,
    ]
    return f"  {name}: {{{', '.join(keys)}}}\n"


def config(models: str, gpus: str) -> str:
    return f"version: 1\nmodels:\n{models}gpus: {gpus}\n"


def ask(url: str, **headers: str) -> Answer:
    """GET with headers, past any proxy; the certificate may be anyone's."""
    lax = ssl.create_default_context()
    lax.check_hostname, lax.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=lax)
    )
    request = urllib.request.Request(
        url, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with opener.open(request, timeout=10) as answer:
            return Answer(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode())


def page(url: str) -> str:
    return ask(url, Accept="text/html").text


# --- what it answers ------------------------------------------------------------------------------


def test_the_clients_of_the_former_service_read_on(world: Mic) -> None:
    world.write(config(model("MAM"), "{0: MAM, 2: MAM}"))
    world.run()
    until(lambda: http(f"{world.url}/readyz").status == 200, "the models")
    api = f"{world.url}/api/v1"
    assert http(world.url).json()["status"] == "ok"
    gpus = http(f"{api}/gpus").json()
    assert [gpu["id"] for gpu in gpus] == [0, 1, 2, 3]
    assert gpus[0]["memory_usage"] is None and gpus[0]["power_draw"] is None  # simulated
    assert gpus[0]["processes"] == []
    rows = http(f"{api}/models/status").json()
    assert [(row["model_name"], row["model_type"], row["gpu_id"]) for row in rows] == [
        ("MAM", "process", 0),
        ("MAM", "process", 2),
    ]
    assert http(f"{api}/models/status/MAM").json() == rows
    assert http(f"{api}/models/status/other").status == 404
    assert http(f"{api}/models/supported").json() == {"MAM": "process"}
    start = {"model_name": "MAM", "gpu_id": 1, "config": {}}
    refused = http(f"{api}/models/start", "POST", start)
    assert refused.status == 405
    assert refused.json()["command"] == "mic-supervisor start MODEL --gpu N"
    assert http(f"{api}/processes/4121", "DELETE").json()["command"] == "mic-supervisor kill 4121"
    assert len(http(f"{api}/models/status").json()) == 2


def test_the_documents_are_those_of_the_command_line(world: Mic) -> None:
    world.write(config(model("a") + model("b", EXIT_UNLESS="/nowhere"), "{0: a, 1: b}"))
    world.run()
    until(lambda: "backoff" in http(f"{world.url}/api/v1/status").text, "the crash loop")

    def same(what: str) -> Any:
        """The document, once both give the same: between two questions a try may have begun."""
        served = http(f"{world.url}/api/v1/{what}").json()
        return served if served == world(what, "--json").json() else None

    until(lambda: same("status"), "equal documents")
    plan = until(lambda: (one := same("plan")) and one["blocked"] and one, "equal plans")
    assert [item["instance"] for item in plan["blocked"]] == ["b-51000001"]


def test_without_gpus_there_is_501_and_the_rest(world: Mic) -> None:
    world.env["MIC_GPU_SOURCE"] = "none"
    world.write(config(model("a"), "{0: a}"))
    world.run()
    answer = http(f"{world.url}/api/v1/gpus")
    assert (answer.status, answer.json()) == (
        501,
        {"detail": "cannot read GPUs: MIC_GPU_SOURCE is none"},
    )
    assert http(f"{world.url}/readyz").status == 503
    assert "mic_gpu_info" not in http(f"{world.url}/metrics").text
    assert "cannot read GPUs: MIC_GPU_SOURCE is none" in page(world.url)


def test_a_broken_file_shows_with_its_place_and_goes_when_it_is_mended(world: Mic) -> None:
    world.write(config(model("a"), "{0: a}"))
    world.run()
    until(lambda: http(f"{world.url}/readyz").status == 200, "the model")
    world.write(config(model("a"), "{0: b}"))
    error = f"{world.config}:4:11: error: gpus.0: "

    def told() -> str | None:
        found: str | None = http(f"{world.url}/api/v1/status").json()["config"]["error"]
        return found

    assert until(told, "the error").startswith(error)
    assert error in page(world.url)
    assert "mic_config_last_reload_successful 0.0" in http(f"{world.url}/metrics").text
    assert http(f"{world.url}/readyz").status == 200  # what ran before, runs
    world.write(config(model("a"), "{0: a}"))
    until(lambda: told() is None, "the error to go")
    assert error not in page(world.url)


# --- on NVML --------------------------------------------------------------------------------------


@pytest.fixture
def nvml(world: Mic, tmp_path: Path) -> MockNvml:
    made = MockNvml(tmp_path)
    made.set([MockGpu(memory_used=7 << 30, utilization=37), MockGpu(), MockGpu()])
    world.env |= {"MIC_GPU_SOURCE": "nvml", "MIC_RESYNC": "300ms", **made.env()}
    return made


def metrics(mic: Mic) -> str:
    return http(f"{mic.url}/metrics").text


def test_gpus_as_nvml_tells_of_them(world: Mic, nvml: MockNvml) -> None:
    world.write(config(model("a"), "{0: a}"))
    world.run()
    gpu = http(f"{world.url}/api/v1/gpus").json()[0]
    assert (gpu["memory_usage"], gpu["power_draw"], gpu["memory_used"]) == (17.5, 71.3, 7168)
    text = metrics(world)
    zero = f'{{uuid="{mock_uuid(0)}"}}'
    assert f"mic_gpu_utilization_ratio{zero} 0.37" in text
    assert f"mic_gpu_energy_joules_total{zero} 123456.789" in text
    assert 'mic_driver_info{cuda="12.9",driver="575.57.08",nvml="12.575.57.08"} 1.0' in text
    assert "7.0 of 40.0 GiB" in page(world.url)


def test_a_gpu_that_falls_off_the_bus_has_no_stale_series(world: Mic, nvml: MockNvml) -> None:
    world.write(config(model("a"), "{0: a, 2: a}"))
    world.run()
    until(lambda: http(f"{world.url}/readyz").status == 200, "the models")
    two = f'{{uuid="{mock_uuid(2)}"}}'
    assert f"mic_gpu_power_draw_watts{two} 71.3" in metrics(world)
    nvml.add_event(2, 79)
    until(lambda: f'xid_errors_total{{uuid="{mock_uuid(2)}",xid="79"}} 1.0' in metrics(world), "it")
    nvml.change(2, lost=True)
    until(lambda: f"mic_gpu_healthy{two} 0.0" in metrics(world), "the loss")
    assert f"mic_gpu_power_draw_watts{two}" not in metrics(world)
    shown = page(world.url)
    assert "reported Xid 79, critical" in shown
    assert "GPU 2" in shown and "does not answer" in shown
    assert len(http(f"{world.url}/api/v1/gpus").json()) == 2


def test_a_library_that_fails_leaves_no_gpu_series_and_501(world: Mic, nvml: MockNvml) -> None:
    world.write(config(model("a"), "{0: a}"))
    world.run()
    until(lambda: "mic_nvml_up 1.0" in metrics(world), "NVML")
    nvml.break_library(999)
    until(lambda: "mic_nvml_up 0.0" in metrics(world), "the failure")
    assert "mic_gpu_info" not in metrics(world)
    answer = http(f"{world.url}/api/v1/gpus")
    assert answer.status == 501
    assert answer.json()["detail"].startswith("cannot read GPUs: NVML answers Unknown Error (999)")
    nvml.break_library(0)
    until(lambda: http(f"{world.url}/api/v1/gpus").status == 200, "NVML again")


def test_a_release_is_counted(world: Mic, nvml: MockNvml) -> None:
    both = model("a") + model("b")
    world.write(config(both, "{0: a}"))
    world.run()
    until(lambda: http(f"{world.url}/readyz").status == 200, "the model")
    count = "mic_gpu_memory_release_seconds_count"
    assert f"{count} 0.0" in metrics(world)
    world.write(config(both, "{0: b}"))
    until(lambda: f"{count} 1.0" in metrics(world), "the release")


# --- to whom ------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["0.0.0.0", "[::]"])
def test_it_does_not_open_itself_to_others_unasked(world: Mic, listen: str) -> None:
    port = world.listen.rpartition(":")[2]
    world.env["MIC_LISTEN"] = f"{listen}:{port}"
    world.write(config(model("a"), "{0: a}"))
    done = world("run", rc=78)
    assert done.stderr == (
        f"error: cannot serve HTTP on {listen}:{port}: other machines reach that address, "
        "and no token is asked of them\n"
        "hint: set MIC_HTTP_TOKEN_FILE to a file that holds one, or MIC_HTTP_OPEN=true if "
        "everybody may read; 127.0.0.1 behind a reverse proxy needs neither\n"
    )
    assert world("status", "--json").json()["instances"][0]["pid"] is None  # nothing was started
    world.env["MIC_HTTP_OPEN"] = "true"
    world.run()


def test_with_a_token_nothing_is_told_without_it(world: Mic, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    port = world.listen.rpartition(":")[2]
    world.env |= {"MIC_LISTEN": f"0.0.0.0:{port}", "MIC_HTTP_TOKEN_FILE": str(token)}
    world.write(config(model("a"), "{0: a}"))
    world.run()
    for path in PATHS:
        expected = 200 if path == "/healthz" else 401
        assert http(f"{world.url}{path}").status == expected, path
    assert ask(f"{world.url}/metrics", Authorization=f"Bearer {TOKEN}").status == 200
    assert ask(f"{world.url}/metrics", Authorization=f"Bearer {TOKEN}x").status == 401


def test_a_port_that_is_taken_costs_no_model(world: Mic) -> None:
    world.write(config(model("a"), "{0: a}"))
    host, _, port = world.listen.rpartition(":")
    with closing(socket.socket()) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((host, int(port)))
        other.listen()
        daemon = world.start("run")
        until(lambda: world("status").rc == 0, "the model")
        until(
            lambda: f"cannot serve HTTP on {world.listen}: address already in use" in daemon.text(),
            "the sentence",
        )
    until(lambda: http(f"{world.url}/healthz").status == 200, "the address")


def test_the_end_of_the_daemon_does_not_wait_for_a_client(world: Mic) -> None:
    world.write(config(model("a"), "{0: a}"))
    daemon = world.run()
    host, _, port = world.listen.rpartition(":")
    with closing(socket.create_connection((host, int(port)))) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\n")
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 9  # it gives a client 10 s
    assert "Traceback" not in daemon.text()


def test_clients_cost_the_loop_neither_files_nor_time(world: Mic) -> None:
    world.env["MIC_RESYNC"] = "200ms"
    world.write(config(model("a"), "{0: a}"))
    daemon = world.run()
    until(lambda: http(f"{world.url}/readyz").status == 200, "the model")
    files = Path(f"/proc/{daemon.pid}/fd")
    before = len([*files.iterdir()])
    host, _, port = world.listen.rpartition(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(600)]
    try:
        for client in clients[::2]:
            client.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert http(f"{world.url}/healthz").status == 200
        assert len([*files.iterdir()]) - before <= MAX_CONNECTIONS + 10
        (pid,) = [row["pid"] for row in world.status()["instances"]]
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: world.status()["instances"][0]["pid"] not in (pid, None),
            "the restart",
        )
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("command", ["plan", "apply", "status", "models"])
def test_no_other_command_loads_a_web_server(world: Mic, command: str) -> None:
    world.write(config(model("a"), "{0: a}"))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mic_supervisor.cli", command],
        env=world.environment(),
        cwd=world.home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in loaded, done.stderr
    assert not loaded & {"starlette", "uvicorn", "prometheus_client"}


# --- what it keeps to itself ----------------------------------------------------------------------


def test_no_secret_is_in_any_answer(world: Mic, tmp_path: Path) -> None:
    """A canary in env, env_file, args and ${env:NAME}, in a model that says it as it dies."""
    canary = {name: f"canary-{name}-4f1d9" for name in ("env", "file", "args", "outer", "later")}
    env_file = tmp_path / "secrets.env"
    env_file.write_text(f"FILE_TOKEN={canary['file']}\n")
    env_file.chmod(0o600)
    world.env["OUTER"] = canary["outer"]
    spill = (
        "import os, sys; print(sys.argv, dict(os.environ), file=sys.stderr); "
        "sys.exit(' '.join([*sys.argv, *os.environ.values()]))"
    )

    def written(extra: str) -> str:
        dying = (
            f"  dying:\n    backend: process\n"
            f"    command: [{sys.executable}, -c, {json.dumps(spill)}]\n"
            f'    args: [--api-key, {canary["args"]}, "--key={canary["args"]}"]\n'
            f"    env: {{TOKEN: {canary['env']}, OUTER_TOKEN: '${{env:OUTER}}'{extra}}}\n"
            f"    env_file: {env_file}\n"
            "    probe: {http: /health}\n"
        )
        sick = model("sick", f"env_file: {env_file}", TOKEN=canary["env"])
        return config(dying + sick, "{0: dying, 1: sick}")

    def answers() -> Iterator[tuple[str, str]]:
        for path in PATHS:
            yield path, http(f"{world.url}{path}").text
        yield "the page", page(world.url)
        yield "405", http(f"{world.url}/api/v1/models/start", "POST", "{}").text
        yield "404", http(f"{world.url}/api/v1/models/status/x").text

    def clean() -> None:
        for name, text in answers():
            assert "canary-" not in text, (name, text)
            assert "sys.argv" not in text, (name, text)

    world.write(written(""))
    world.run()
    until(lambda: "backoff" in http(f"{world.url}/api/v1/status").text, "the crash loop")
    sick = f"{world.url}/api/v1/models/status/sick"
    until(lambda: '"phase":"ready"' in http(sick).text.replace(" ", ""), "the other one")
    # Its probe fails, and quotes what the server answers.
    port = http(f"{world.url}/api/v1/models/status/sick").json()[0]["endpoint"]
    http(f"{port}/health?status=500", "PUT", f"cannot log in with {canary['env']}")
    until(lambda: "500" in http(f"{world.url}/readyz").text, "the failing probe")
    clean()
    # Another specification: the diff of the plan names what changed, not how.
    world.write(written(f", LATER: {canary['later']}").replace("--api-key", "--api-token"))
    until(lambda: http(f"{world.url}/api/v1/status").json()["config"]["generation"] == 2, "it")
    clean()
    # A broken file: its lines, with secrets in them, are for `check`.
    world.write(written(f", LATER: {canary['later']}, NUMBER: 12345, BAD: [{canary['later']}]"))
    until(lambda: http(f"{world.url}/api/v1/status").json()["config"]["error"], "the error")
    assert "NUMBER" in http(f"{world.url}/api/v1/status").text
    clean()
    # And one that is no YAML at all.
    world.write(written(f', LATER: {canary["later"]}, "{canary["later"]}: }}'))
    until(lambda: "NUMBER" not in http(f"{world.url}/api/v1/status").text, "the other error")
    clean()


# --- behind a proxy -------------------------------------------------------------------------------


def test_nginx_adds_tls_and_a_password(
    world: Mic, free_port: Callable[[], int], tmp_path: Path
) -> None:
    """examples/nginx-mic.conf with its addresses and paths replaced, and nothing else."""
    nginx, openssl = program("nginx", "nginx-light"), program("openssl", "openssl")
    port = free_port()
    subprocess.run(
        f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=gpu-01.example "
        f"-keyout {tmp_path}/mic.key -out {tmp_path}/mic.crt",
        shell=True,
        check=True,
        capture_output=True,
    )
    hashed = subprocess.run(
        [openssl, "passwd", "-apr1", "secret"], check=True, capture_output=True, text=True
    ).stdout
    (tmp_path / "mic.htpasswd").write_text(f"ops:{hashed}")
    site = NGINX.read_text()
    for old, new in (
        ("127.0.0.1:6004", world.listen),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("    listen [::]:443 ssl;\n", ""),
        ("/etc/nginx/", f"{tmp_path}/"),
    ):
        assert old in site
        site = site.replace(old, new)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; daemon off; user root;\n"
        "events { worker_connections 64; }\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}/body;\n"
        f"proxy_temp_path {tmp_path}/proxy; fastcgi_temp_path {tmp_path}/f;\n"
        f"uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;\n{site}\n}}\n"
    )
    world.write(config(model("a"), "{0: a}"))
    world.run()
    proxy = subprocess.Popen(
        [nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"https://127.0.0.1:{port}"

        def up() -> bool:
            try:
                return ask(f"{url}/healthz").status == 200
            except OSError:
                return False

        until(up, "nginx")
        assert ask(f"{url}/api/v1/status").status == 401
        login = "Basic b3BzOnNlY3JldA=="  # ops:secret
        assert ask(f"{url}/api/v1/status", Authorization=login).json()["version"] == 1
        assert "mic_build_info" in ask(f"{url}/metrics", Authorization=login).text
        shown = ask(url, Authorization=login, Accept="text/html").text
        assert shown.startswith("<!doctype html>")
    finally:
        proxy.terminate()
        proxy.wait(60)
