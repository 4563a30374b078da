"""Backends of other packages: the example installed and serving, broken ones beside it.

The example is copied away from the checkout and installed into a directory of its own, as from
anybody's package. What it starts is a real MLServer.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.setup.steps import CHECKOUT
from tests.support import waiting
from tests.support.mic import Mic
from tests.support.waiting import until

ECHO = """\
from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput


class Echo(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        (one,) = payload.inputs
        same = {"name": one.name, "shape": one.shape, "datatype": one.datatype, "data": one.data}
        return InferenceResponse(model_name=self.name, outputs=[ResponseOutput(**same)])
"""
INPUT = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1.5, 2.5]}


@dataclass(frozen=True)
class Package:
    """`source` is the copy it was built from, `site` the directory it was installed into."""

    source: Path
    site: Path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    home = tmp_path_factory.mktemp("plug-in")
    source = home / "plugin"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(CHECKOUT / "examples" / "plugin", source, ignore=ignored)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-input", "--no-deps"]
    subprocess.run([*install, "--target", home / "site", source], check=True, timeout=300)
    return Package(source, home / "site")


@pytest.fixture
def site(package: Package, mic: Mic) -> Path:
    mic.env["PYTHONPATH"] = str(package.site)
    return package.site


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A directory that MLServer serves: a model that gives back what it gets."""
    path = tmp_path / "echo"
    path.mkdir()
    (path / "echo_model.py").write_text(ECHO)
    settings = {"name": "echo", "implementation": "echo_model.Echo"}
    (path / "model-settings.json").write_text(json.dumps(settings))
    return path


def write(mic: Mic, program: Path, path: Path, gpus: str, more: str = "") -> None:
    mic.write(f"""
        version: 1
        backends: {{mlserver: {{executable: {program}}}}}
        models:
          echo: {{backend: mlserver, path: {path}, parallel_workers: 1, stop_timeout: 10s}}
          {more}
        gpus: {{{gpus}}}
        """)


def rows(mic: Mic) -> dict[int, dict[str, Any]]:
    found = mic.status()["instances"]
    return {row["gpus"][0]["index"]: row for row in found}


def asked(url: str) -> Any:
    body = json.dumps({"inputs": [INPUT]}).encode()
    request = urllib.request.Request(
        f"{url}/v2/models/echo/infer", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)["outputs"][0]["data"]


# --- the example ------------------------------------------------------------------------------


def test_its_own_tests_pass_where_it_is_installed(package: Package) -> None:
    env = {**os.environ, "PYTHONPATH": str(package.site)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=package.source, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_the_command_knows_it_like_a_built_in_one(mic: Mic, site: Path, echo: Path) -> None:
    write(mic, Path("/opt/mlserver/bin/mlserver"), echo, "0: echo, 1: none")
    assert "valid: 2 GPUs" in mic("check", rc=0).stdout
    assert mic("models", rc=0).stdout == "echo\tmlserver\t0\n"
    schema = mic("schema", rc=0).json()
    assert schema["$defs"]["mlserver_options"]["required"] == ["backend", "path"]
    assert "mlserver" in schema["properties"]["models"]["additionalProperties"]["properties"][
        "backend"
    ]["enum"]  # fmt: skip
    found = mic("doctor").stdout
    version = "mic-supervisor-mlserver 0.1.0 (mic_mlserver:MLServerBackend)"
    assert f"ok    plug-in mlserver: {version}\n" in found

    mic.write(mic.config.read_text().replace("parallel_workers", "parallel_worker"))
    refused = mic("check", rc=1).stderr
    assert "error: models.echo.parallel_worker: unknown key" in refused
    assert "did you mean parallel_workers?" in refused

    del mic.env["PYTHONPATH"]
    assert "error: models.echo.backend: unknown backend 'mlserver'" in mic("check", rc=1).stderr


def test_it_serves_on_two_gpus(mic: Mic, site: Path, echo: Path, mlserver_program: Path) -> None:
    write(mic, mlserver_program, echo, "0: echo, 1: echo")
    mic("apply", rc=0, timeout=240)
    found = rows(mic)
    assert [(row["phase"], row["backend"]) for row in found.values()] == [("ready", "mlserver")] * 2
    for row in found.values():
        assert asked(row["endpoints"]["http"]) == INPUT["data"]
    for row in found.values():  # each counts its own request, and not the other one's
        counted = 'model_infer_request_success_total{model="echo",version="None"} 1.0'
        assert counted in waiting.http(row["endpoints"]["metrics"]).text
    assert mic("plan", rc=0).stdout.strip() == "No changes."

    os.kill(found[1]["pid"], signal.SIGKILL)
    until(lambda: rows(mic)[1]["phase"] != "ready", "its end to be seen")
    mic("apply", rc=0, timeout=240)
    again = rows(mic)
    assert again[0]["pid"] == found[0]["pid"]
    assert again[1]["pid"] != found[1]["pid"]
    assert again[1]["endpoints"] == found[1]["endpoints"]
    assert asked(again[1]["endpoints"]["http"]) == INPUT["data"]

    write(mic, mlserver_program, echo, "0: none, 1: none")
    mic("apply", rc=0, timeout=240)
    assert rows(mic) == {}


def test_what_it_refuses_blocks_its_own_model(
    mic: Mic, site: Path, echo: Path, mlserver_program: Path
) -> None:
    (echo / "settings.json").write_text('{"http_port": 8080}')
    more = "other: {backend: process, command: [/bin/sleep, '600']}"
    write(mic, mlserver_program, echo, "0: echo, 1: other", more)
    said = mic("apply", rc=3).stdout
    assert f"cannot configure echo: {echo}/settings.json sets http_port" in said
    assert rows(mic)[1]["phase"] == "unprobed"


def test_a_real_server_is_a_process_like_any_other(
    mic: Mic, echo: Path, mlserver_program: Path
) -> None:
    """What the plug-in does by itself, written out for the backend `process`."""
    mic.write(f"""
        version: 1
        models:
          echo:
            backend: process
            command: [{mlserver_program}, start, {echo}]
            working_dir: {echo}
            env:
              MLSERVER_HOST: 127.0.0.1
              MLSERVER_HTTP_PORT: "${{port}}"
              MLSERVER_GRPC_PORT: "${{port:grpc}}"
              MLSERVER_METRICS_PORT: "${{port:metrics}}"
              MLSERVER_PARALLEL_WORKERS: "0"
            probe: {{http: /v2/models/echo/ready, period: 1s}}
        gpus: {{0: echo}}
        """)
    mic("apply", rc=0, timeout=240)
    endpoints = rows(mic)[0]["endpoints"]
    assert asked(endpoints["http"]) == INPUT["data"]
    assert "python_info" in waiting.http(endpoints["metrics"]).text


def test_one_that_is_gone_takes_nothing_of_others_with_it(
    mic: Mic, site: Path, echo: Path, mlserver_program: Path
) -> None:
    """A daemon that starts without the plug-in: what runs with it is left alone."""
    more = "other: {backend: process, command: [/bin/sleep, '600']}"
    write(mic, mlserver_program, echo, "0: echo, 1: other", more)
    daemon = mic.run()
    until(lambda: rows(mic).get(0, {}).get("phase") == "ready", "the server", timeout=240)
    before = rows(mic)
    daemon.stop()
    del mic.env["PYTHONPATH"]
    mic.run()
    status = mic.status()
    assert "error: models.echo.backend: is not valid" in status["config"]["error"]
    os.kill(before[1]["pid"], signal.SIGKILL)
    until(lambda: rows(mic)[1]["restarts"] == 1, "the other one to be restarted")
    after = rows(mic)
    assert (after[0]["phase"], after[0]["reason"]) == ("blocked", "unknown backend 'mlserver'")
    assert asked(before[0]["endpoints"]["http"]) == INPUT["data"]


# --- broken ones ------------------------------------------------------------------------------

STUB = """\
from dataclasses import replace

from mic_supervisor.backends import BackendBase, common
from mic_supervisor.config.options import ModelOptions, Strict
from mic_supervisor.model import HttpCall


class Stub(BackendBase):
    Settings = Strict
    Options = ModelOptions

    def compile(self, request):
        ports = common.ports(request.options)
        texts = common.texts(request, ports, command=["/bin/sleep", "600"], env={})
        return common.instance(request, common.process(request, texts, ports), texts.probes)


class Works(Stub):
    name = "works"
"""

BROKEN = {
    "unimportable": "raise RuntimeError('no licence')",
    "exits": "raise SystemExit('wrong machine')",
    "missing": "Other = Stub",
    "loose": "class Broken(Stub):\n    name = 'loose'\n    Options = Strict",
    "raises": "class Broken(Stub):\n    name = 'raises'\n    def compile(self, request):\n"
    "        raise KeyError('template')",
    "quits": "class Broken(Stub):\n    name = 'quits'\n    def compile(self, request):\n"
    "        raise SystemExit(3)",
    "untyped": "class Broken(Stub):\n    name = 'untyped'\n    def compile(self, request):\n"
    "        made = super().compile(request)\n"
    "        return replace(made, workload=replace(made.workload, env={'A': 'b'}))",
    "thief": "class Broken(Stub):\n    name = 'thief'\n    def compile(self, request):\n"
    "        return replace(super().compile(request), gpus=('GPU-others',))",
    "picky": "from pydantic import model_validator\n\n\nclass Picky(ModelOptions):\n"
    "    @model_validator(mode='after')\n    def _check(self):\n"
    "        raise {'a': KeyError('size'), 'b': SystemExit(3)}[self.args[0]]\n\n\n"
    "class Broken(Stub):\n    name = 'picky'\n    Options = Picky",
    "container": "class Broken(Stub):\n    name = 'container'",
}


@pytest.fixture
def broken(tmp_path: Path, mic: Mic) -> Path:
    """One package with a plug-in that works, and one with each way of not doing so."""
    site = tmp_path / "site"
    texts = {name: f"{STUB}\n\n{text}\n" for name, text in BROKEN.items()}
    for name, text in {"works": STUB, **texts}.items():
        info = site / f"mic_{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"mic_{name}.py").write_text(text)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mic-{name}\nVersion: 1.0\n")
        attribute = "Works" if name == "works" else "Broken"
        (info / "entry_points.txt").write_text(
            f"[mic_supervisor.backends]\n{name} = mic_{name}:{attribute}\n"
        )
    mic.env["PYTHONPATH"] = str(site)
    return site


def test_broken_ones_are_errors_where_they_are_named_and_nowhere_else(
    mic: Mic, broken: Path
) -> None:
    plain = "{backend: container, image: x:1, container_port: 80}"
    head = f"version: 1\nmodels:\n  a: {{backend: works}}\n  b: {plain}\n"
    mic.write(head + "gpus: {0: a, 1: b}\n")
    said = mic("check", rc=0)
    assert said.stderr == ""
    names = ("unimportable", "exits", "missing", "loose")
    models = "".join(f"  m-{name}: {{backend: {name}}}\n" for name in names)
    mic.write(f"{head}{models}gpus: {{0: a, 1: b}}\n")
    errors = [line for line in mic("check", rc=1).stderr.splitlines() if ": error: " in line]
    causes = [
        "does not load: RuntimeError: no licence",
        "does not load: SystemExit: wrong machine",
        "does not load: AttributeError: module 'mic_missing' has no attribute 'Broken'",
        "has no Options that derives from ModelOptions",
    ]
    assert errors == [
        f"{mic.config}:{5 + line}:{len(name) + 17}: error: models.m-{name}.backend: cannot use "
        f"backend {name}: mic-{name} 1.0 (mic_{name}:Broken) {cause}"
        for line, (name, cause) in enumerate(zip(names, causes, strict=True))
    ]
    known = mic("schema", rc=0).json()["properties"]["backends"]["properties"]
    assert set(known) - set(BROKEN) >= {"works", "process"}
    assert not set(known) & set(names)
    found = mic("doctor", "--json").json()["findings"]
    said_of = {one["subject"].removeprefix("plug-in "): one for one in found}
    # Of the others, only compiling shows it.
    assert [name for name in ("works", *BROKEN) if said_of[name]["level"] == "fail"] == [
        *names,
        "container",
    ]
    assert "brings a backend with the name of a built-in one" in said_of["container"]["text"]


def test_a_validator_that_fails_is_an_error_of_that_model(mic: Mic, broken: Path) -> None:
    mic.write("""
        version: 1
        models:
          good: {backend: works}
          a: {backend: picky, args: [a]}
          b: {backend: picky, args: [b]}
        gpus: {0: good, 1: a, 2: b}
        """)
    said = [line for line in mic("check", rc=1).stderr.splitlines() if ": error: " in line]
    assert [line.partition(": error: ")[2] for line in said] == [
        "models.a: cannot be checked: KeyError: 'size'",
        "models.b: cannot be checked: SystemExit: 3",
    ]


def test_what_goes_wrong_while_compiling_blocks_that_model(mic: Mic, broken: Path) -> None:
    mic.write("""
        version: 1
        models:
          good: {backend: works}
          a: {backend: raises}
          b: {backend: quits}
          c: {backend: untyped}
          d: {backend: thief}
        gpus: {0: good, 1: a, 2: b, 3: c}
        """)
    plan = mic("plan", "--json", rc=0).json()
    assert [(one["action"], one["model"]) for one in plan["actions"]] == [("create", "good")]
    assert sorted(one["reason"].partition(";")[0] for one in plan["blocked"]) == [
        "backend quits cannot compile b: “SystemExit: 3”",
        "backend raises cannot compile a: “KeyError: 'template'”",
        "backend untyped cannot compile c: its workload.env is of type dict, not a tuple",
    ]
    mic("apply", rc=3)
    pid = rows(mic)[0]["pid"]

    mic.write(mic.config.read_text().replace("3: c", "3: d"))
    reasons = [one["reason"] for one in mic("plan", "--json", rc=0).json()["blocked"]]
    assert any("cannot compile d: its gpus is ('GPU-others',)" in reason for reason in reasons)
    mic("apply", rc=3)
    assert rows(mic)[0]["pid"] == pid
