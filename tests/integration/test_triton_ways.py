"""The three ways to divide models among real Triton servers, under clients that never stop asking.

Two models on three simulated GPUs: MAM on 0 and 1, web on 2. What a change does not touch answers
every request meanwhile; how many those were is printed with `-s`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.integration.job_world import World, lines_of, simulated, world
from tests.support.ports import PortBlock
from tests.support.prometheus import DASHBOARD, Prometheus, example, filled
from tests.support.triton import infer_request
from tests.support.waiting import http, until

pytestmark = [pytest.mark.engine, pytest.mark.triton]

MODELS = {"MAM": "{backend: triton}", "web": "{backend: triton}"}
GPUS: dict[int | str, str] = {0: "MAM", 1: "MAM", 2: "web"}
SHARED = "triton-shared"
DOCS = Path(__file__).parents[2] / "docs" / "http.md"


class Client:
    """Asks one model on one server for an inference, again and again."""

    def __init__(self, url: str, model: str) -> None:
        self.model, self.answered = model, 0
        self.failed: list[str] = []
        self._url = f"{url}/v2/models/{model}/infer"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Client:
        self._thread.start()
        until(lambda: self.answered > 2, f"answers of {self.model}: {self.failed[-1:]}")
        self.failed.clear()
        return self

    def __exit__(self, *_: object) -> None:
        seen = self.answered
        until(lambda: self.answered > max(seen + 2, 20), f"more answers: {self.failed[-1:]}")
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            answer = http(self._url, "POST", infer_request(1.0, 2.5), timeout=20)
            if answer.status == 200 and answer.json()["outputs"][0]["data"] == [1.0, 2.5]:
                self.answered += 1
            else:
                self.failed.append(f"{answer.status}: {answer.text[:200]}")
            time.sleep(0.005)


@contextmanager
def asked(made: World, *targets: tuple[str, str]) -> Iterator[None]:
    """Clients for (instance, model); every answer has to be a good one."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(Client(made.url(instance), model)) for instance, model in targets
        ]
        yield
    for client in clients:
        print(f"{client.model}: {client.answered} answers, {len(client.failed)} failures")
        assert client.failed == []
        assert client.answered > 20


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient, triton_image: str
) -> Iterator[World]:
    assert triton_image
    fixed = PortBlock()
    with world(tmp_path_factory.mktemp("ways"), engine, gpus=3) as one:
        one.models |= MODELS
        one.repository.model("MAM")
        one.repository.model("web")
        one.repository.model("bad", fails=True)
        common = one.settings.removesuffix("}}")
        ports = ", ".join(f"{name}: {fixed.take()}" for name in ("http", "grpc", "metrics"))
        one.ways = {  # type: ignore[attr-defined]
            "per-gpu": common + "}}",
            "per-model": common + ", server: per-model}}",
            "shared": common + f", server: shared, gpus: [0, 1, 2], ports: {{{ports}}}}}}}",
            "loose": common + f", server: shared, ports: {{{ports}}}}}}}",
        }
        yield one
    fixed.close()


def use(made: World, way: str, gpus: Mapping[int | str, str] = GPUS, **models: str) -> None:
    made.settings = made.ways[way]  # type: ignore[attr-defined]
    made.write(dict(gpus), **{**MODELS, **models})


def groups(made: World, instance: str, model: str) -> list[tuple[str, int]]:
    """(where, how many) of each group of instances that the server has of a model."""
    config = http(f"{made.url(instance)}/v2/models/{model}/config").json()
    found = config["instance_group"]
    return [(group["name"].partition("@")[2], group["count"]) for group in found]


def models_of(made: World, instance: str) -> dict[str, dict[str, Any]]:
    return {one["model"]: one for one in made.instances()[instance]["models"]}


def test_a_server_for_all_models(made: World) -> None:
    use(made, "shared")
    assert made.plan() == (
        "+ create   triton-shared  GPU 0,1,2  nothing runs for it yet\n\nPlan: 1 to create.\n"
    )
    made.apply()
    made.unchanged()
    run = made.run_of(SHARED)
    assert groups(made, SHARED, "MAM") == [("0", 1), ("1", 1)]
    assert groups(made, SHARED, "web") == [("2", 1)]
    rows = [line.split("\t")[:3] for line in made.mic("status", rc=0).stdout.splitlines()]
    assert rows == [["0,1", "MAM", "ready"], ["2", "web", "ready"]]
    assert made.url(SHARED).rpartition(":")[2] in made.settings

    # Another count, for one model alone; the other one is not touched, and neither misses a beat.
    use(made, "shared", web="{backend: triton, instances_per_gpu: 2}")
    assert made.plan() == (
        "~ load     triton-shared  GPU 2  web: instances_per_gpu changed\n"
        '    instances_per_gpu: "1" -> "2"\n'
        "\n"
        "Plan: 1 to load.\n"
    )
    with asked(made, (SHARED, "MAM"), (SHARED, "web")):
        made.apply()
    assert groups(made, SHARED, "web") == [("2", 2)]
    assert groups(made, SHARED, "MAM") == [("0", 1), ("1", 1)]

    # A model that moves within the server's GPUs.
    use(made, "shared", {0: "none", 1: "MAM", 2: "web"}, web="{backend: triton}")
    assert lines_of(made.plan(), "~") == [
        "~ load     triton-shared  GPU 1  MAM: places changed",
        "~ load     triton-shared  GPU 2  web: instances_per_gpu changed",
    ]
    with asked(made, (SHARED, "MAM"), (SHARED, "web")):
        made.apply()
    assert groups(made, SHARED, "MAM") == [("1", 1)]
    assert made.run_of(SHARED) == run
    made.unchanged()


def test_a_model_that_does_not_load_leaves_the_others_serving(made: World) -> None:
    use(made, "shared", {0: "bad", 1: "MAM", 2: "web"}, bad="{backend: triton}")
    made.mic.shortened = {"mic_supervisor.plan.backoff.FIRST": 60.0}
    with asked(made, (SHARED, "MAM"), (SHARED, "web")):
        done = made.mic("apply", rc=3)
        plan, row = made.plan(), made.instances()[SHARED]
        assert "told to fail" in done.stdout
    made.mic.shortened = {}
    (line,) = lines_of(plan, "! blocked")
    assert line.startswith("! blocked  triton-shared on GPU 0,1,2: bad: backoff: cannot load bad: ")
    models = {one["model"]: one for one in row["models"]}
    assert (row["phase"], row["health"]) == ("degraded", "degraded")
    assert {name: one["phase"] for name, one in models.items()} == {
        "MAM": "ready",
        "bad": "backoff",
        "web": "ready",
    }
    assert "told to fail" in models["bad"]["reason"]
    assert made.mic("status", "bad", rc=3).stdout

    made.repository.model("bad")
    with asked(made, (SHARED, "MAM"), (SHARED, "web")):
        made.apply()
    assert models_of(made, SHARED)["bad"]["phase"] == "ready"
    made.unchanged()

    # An entry that cannot be followed now is left as it is.
    (made.repository.path / "bad" / "config.pbtxt.template").rename(made.mic.home / "away")
    (line,) = lines_of(made.plan(), "-", "~", "! blocked")
    assert line.startswith("! blocked  triton-shared/bad on GPU 0: cannot configure bad: neither ")
    made.mic("apply", rc=3)
    assert http(f"{made.url(SHARED)}/v2/models/bad/ready").status == 200
    (made.mic.home / "away").rename(made.repository.path / "bad" / "config.pbtxt.template")

    # One that goes is unloaded, and what a person loaded is not.
    made.repository.model("mine")
    assert http(f"{made.url(SHARED)}/v2/repository/models/mine/load", "POST", {}).status == 200
    use(made, "shared", {0: "none", 1: "MAM", 2: "web"}, bad="{backend: triton}")
    assert lines_of(made.plan(), "-") == [
        "- unload   triton-shared  GPU 0  the file no longer has bad in this server"
    ]
    with asked(made, (SHARED, "MAM"), (SHARED, "web")):
        made.apply()
    until(lambda: http(f"{made.url(SHARED)}/v2/models/bad/ready").status != 200, "the unload")
    assert http(f"{made.url(SHARED)}/v2/models/mine/ready").status == 200
    made.unchanged()


def test_the_daemon_knows_what_was_loaded_before_it_started(made: World) -> None:
    use(made, "shared")
    made.apply()
    run = made.run_of(SHARED)
    daemon = made.mic.run()
    until(lambda: made.instances()[SHARED]["phase"] == "ready", "it to be adopted")
    assert daemon.stop() == 0
    with asked(made, (SHARED, "MAM"), (SHARED, "web")):
        daemon = made.mic.run()
        until(lambda: made.instances()[SHARED]["phase"] == "ready", "it to be adopted again")
        served = http(f"{made.mic.url}/api/v1/models/status").json()
        found = [(one["model_name"], one["gpu_id"], one["phase"]) for one in served]
        assert sorted(found) == [("MAM", 0, "ready"), ("MAM", 1, "ready"), ("web", 2, "ready")]
        assert daemon.stop() == 0
    assert made.run_of(SHARED) == run
    assert "load" not in daemon.text().replace("load-", "").replace("reload", "")


def test_one_of_its_models_is_called_by_its_name(made: World) -> None:
    """With a daemon and without; `other` is what the file calls a directory of another name."""
    made.repository.model("bad", fails=True)
    gpus: dict[int | str, str] = {0: "MAM", 1: "bad", 2: "other"}
    use(made, "shared", gpus, bad="{backend: triton}", other="{backend: triton, model: web}")
    made.mic("apply", rc=3)
    run = made.run_of(SHARED)
    for way in ("alone", "through the daemon"):
        daemon = made.mic.run() if way != "alone" else None
        done = made.mic("logs", "MAM", "-n", "3", rc=0)
        assert done.stderr == f"MAM is in {SHARED}: this is the log of that server.\n"
        assert done.stdout
        asked_at = load_count(made, "web")
        with asked(made, (SHARED, "MAM")):
            done = made.mic("restart", "other", rc=0)
        assert lines_of(done.stdout, "ready") == [
            f"ready      {SHARED}/other  GPU 2  {made.url(SHARED)}"
        ]
        # The log reaches the engine a moment after the answer.
        until(lambda: load_count(made, "web") > asked_at, "the load in the log")  # noqa: B023
        assert load_count(made, "web") == asked_at + 1

        done = made.mic("retry", "bad", rc=1)
        assert "had failed" not in done.stdout
        assert "told to fail" in done.stdout
        done = made.mic("retry", SHARED, rc=1)
        assert "had failed" not in done.stdout
        done = made.mic("retry", "MAM", rc=0)
        assert done.stdout.startswith("Nothing of MAM had failed: there was nothing to try again.")
        done = made.mic("retry", "nobody", rc=1)
        assert f"there is {SHARED}, MAM, bad, other" in done.stderr
        if daemon is not None:
            assert daemon.stop() == 0
    assert made.run_of(SHARED) == run
    assert lines_of(made.mic("status", "other", rc=3).stdout, "2\tother\tready")
    made.repository.model("bad")
    assert "had failed" not in made.mic("retry", "bad", rc=0).stdout


def load_count(made: World, model: str) -> int:
    """How often the server has loaded a model since it was started."""
    log = made.engine.logs(made.one(SHARED)["Id"]).decode()
    return log.count(f"successfully loaded '{model}'")


def test_prometheus_joins_what_the_server_says_of_each_model_with_what_we_say(
    made: World, tmp_path: Path
) -> None:
    use(made, "shared")
    made.apply()
    daemon = made.mic.run()
    http_port = made.mic.ports.take()
    prometheus = Prometheus(tmp_path / "prometheus", http_port, example(made.mic.listen))
    try:
        with asked(made, (SHARED, "MAM"), (SHARED, "web")):
            until(lambda: prometheus.query("nv_inference_request_success"), "Triton's own metrics")
        documented = re.findall(r"```promql\n(.*?)\n```", DOCS.read_text(), re.DOTALL)
        assert len(documented) == 2
        (first, second) = documented

        def gpus_of() -> dict[str, str]:
            found = [row["metric"] for row in prometheus.query(first)]
            return {one["model"]: one["gpu_uuids"] for one in found}

        mam, web = ",".join(map(simulated, (0, 1))), simulated(2)
        until(lambda: gpus_of() == {"MAM": mam, "web": web}, "the join")  # and no error
        ready = second.replace("vllm:num_requests_running", "nv_inference_request_success")
        until(
            lambda: {row["metric"]["model"] for row in prometheus.query(ready)} >= {"MAM", "web"},
            "the join with one value for each instance",
        )

        panels = json.loads(DASHBOARD.read_text())["panels"]
        for panel in panels:
            for target in panel["targets"]:
                prometheus.query(filled(target["expr"]))  # one that is wrong is answered with 422
        (table,) = (one for one in panels if one["type"] == "table" and "state" in str(one))
        rows = prometheus.query(filled(table["targets"][0]["expr"]))
        assert {row["metric"]["model"] for row in rows} == {"MAM", "web"}

        began = datetime.fromisoformat(made.run_of(SHARED).started_at[:26] + "+00:00").timestamp()
        until(lambda: prometheus.query("mic_model_start_time_seconds"), "the start")
        for row in prometheus.query("mic_model_start_time_seconds"):
            assert abs(float(row["value"][1]) - began) < 0.01
    finally:
        prometheus.close()
        assert daemon.stop() == 0


def test_what_the_file_says_for_every_model_holds_for_their_server(made: World) -> None:
    use(made, "shared")
    made.settings += "\ndefaults: {network: host, stop_timeout: 20s}"
    made.write(dict(GPUS), **MODELS)
    made.apply()
    assert made.one(SHARED)["HostConfig"]["NetworkMode"] == "host"
    made.unchanged()


def test_another_set_of_gpus_replaces_the_server_and_says_who_goes_down(made: World) -> None:
    use(made, "loose")
    made.apply()
    use(made, "loose", {0: "MAM", 2: "web"})
    assert lines_of(made.plan(), "~") == [
        "~ replace  triton-shared  GPU 0,2  its set of GPUs changed; MAM and web go down with it"
    ]
    made.apply()
    made.unchanged()
    assert groups(made, SHARED, "MAM") == [("0", 1)]
    assert groups(made, SHARED, "web") == [("1", 1)]  # its second GPU


def test_a_server_for_each_model(made: World) -> None:
    use(made, "per-model")
    plan = made.plan()
    assert lines_of(plan, "+", "-") == [
        "+ create   MAM-server     GPU 0,1  nothing runs for it yet",
        "- remove   triton-shared  GPU 0,2  the file has MAM on its GPU",
        "+ create   web-server     GPU 2    nothing runs for it yet",
    ]
    made.apply()
    made.unchanged()
    runs = made.runs()
    assert sorted(runs) == ["MAM-server", "web-server"]
    assert groups(made, "MAM-server", "MAM") == [("0", 1), ("1", 1)]

    use(made, "per-model", MAM="{backend: triton, instances_per_gpu: 2}")
    assert lines_of(made.plan(), "~") == [
        "~ load     MAM-server  GPU 0,1  instances_per_gpu changed"
    ]
    with asked(made, ("MAM-server", "MAM"), ("web-server", "web")):
        made.apply()
    assert groups(made, "MAM-server", "MAM") == [("0", 2), ("1", 2)]
    assert made.runs() == runs

    use(made, "per-model", {0: "MAM", 1: "none", 2: "web"})
    assert lines_of(made.plan(), "~") == ["~ replace  MAM-server  GPU 0  its set of GPUs changed"]
    with asked(made, ("web-server", "web")):
        made.apply()
    assert made.run_of("web-server") == runs["web-server"]
    made.unchanged()


def test_and_a_server_on_each_gpu_again(made: World) -> None:
    use(made, "per-gpu")
    made.apply()
    made.unchanged()
    assert sorted(made.runs()) == ["MAM-51000000", "MAM-51000001", "web-51000002"]
    use(made, "per-gpu", MAM="{backend: triton, instances_per_gpu: 2}")
    with asked(made, ("MAM-51000000", "MAM"), ("MAM-51000001", "MAM"), ("web-51000002", "web")):
        made.apply()
    use(made, "shared")
    made.apply()
    made.unchanged()
    assert sorted(made.runs()) == [SHARED]
    use(made, "per-gpu")
    made.apply()
    made.unchanged()


def test_what_is_wrong_with_a_shared_server_is_found_by_check(made: World) -> None:
    use(made, "shared", web="{backend: triton, env: {A: b}, ports: {http: 8000}}")
    done = made.mic("check", rc=1)
    assert (
        "models.web.env: all models are in one server, which no model configures; see "
        "backends.triton.env" in done.stderr + done.stdout
    )
    assert "models.web.ports: all models are in one server" in done.stderr + done.stdout
    made.settings = made.settings.replace("server: shared", "server: per-gpu")
    made.write(dict(GPUS), **MODELS)
    done = made.mic("check", rc=1)
    assert (
        "backends.triton.gpus: it belongs to a server for all models" in done.stderr + done.stdout
    )
