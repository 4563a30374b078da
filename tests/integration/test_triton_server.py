"""The triton backend against a real tritonserver, which decides whether the backend is right.

The answers and logs that the unit tests use are recorded; here each scenario is played again and
must lead to the same sentence.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import docker
import pytest

from mic_supervisor.backends.triton import TritonBackend
from mic_supervisor.model import ContainerSpec, HttpCall, Instance, LoadState, Placement
from tests.support import scopes, triton
from tests.support.ports import PortBlock
from tests.support.triton import TritonRepository
from tests.support.waiting import Answer, http, until
from tests.unit.backends.support import ANSWERS, REAL, SIMULATED, request

pytestmark = [pytest.mark.engine, pytest.mark.triton]

BACKEND = TritonBackend()

ENSEMBLE = """\
platform: "ensemble"
input [ { name: "INPUT" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT" data_type: TYPE_FP32 dims: [ -1 ] } ]
ensemble_scheduling { step [ {
  model_name: "Step" model_version: -1
  input_map { key: "INPUT" value: "INPUT" } output_map { key: "OUTPUT" value: "OUTPUT" }
} ] }
"""


@dataclass(frozen=True)
class Server:
    """A container made of what `compile` gave."""

    engine: docker.APIClient
    repository: TritonRepository
    container: str
    url: str

    def compile(self, model: str = "MAM", **options: Any) -> Instance:
        return compiled(self.repository, model, **options)

    def placement(self, model: str = "MAM", **options: Any) -> Placement:
        return self.compile(model, **options).placements[0]

    def call(self, what: HttpCall, timeout: float | None = None) -> Answer:
        return http(f"{self.url}{what.path}", what.method, what.body, timeout or what.timeout)

    def load(self, placement: Placement) -> None:
        answer = self.call(placement.load)
        assert answer.status == 200, answer.text

    def state(self, placement: Placement) -> Any:
        answer = self.call(placement.verify)
        return BACKEND.placement_state(placement, answer.status, answer.text)

    def log(self) -> list[str]:
        return self.engine.logs(self.container).decode().splitlines()


def compiled(repository: TritonRepository, model: str, **options: Any) -> Instance:
    gpus = options.pop("gpus", (SIMULATED,))
    exit_timeout = options.pop("exit_timeout", "5s")
    return BACKEND.compile(
        request(
            BACKEND,
            options,
            model=model,
            gpus=gpus,
            settings={
                "image": "mic-test/triton:1",
                "model_repository": str(repository.path),
                "shm_size": "256m",
                "exit_timeout": exit_timeout,
            },
            read_text=lambda path: path.read_text(encoding="utf-8"),
        )
    )


def start(
    engine: docker.APIClient,
    scope: str,
    repository: TritonRepository,
    instance: Instance,
    port: int,
) -> Server:
    spec = instance.workload
    assert isinstance(spec, ContainerSpec)
    inside = {item.name: item.container for item in spec.ports}
    bridge = spec.network == "bridge"
    command = [item.replace("${port:http}", str(port)) for item in spec.command]
    for name, offset in (("grpc", 1), ("metrics", 2)):
        command = [item.replace(f"${{port:{name}}}", str(port + offset)) for item in command]
    container = engine.create_container(
        spec.image,
        command,
        ports=[inside["http"]] if bridge else None,
        labels={scopes.LABEL: scope},
        host_config=engine.create_host_config(
            port_bindings={inside["http"]: (spec.listen, port)} if bridge else None,
            network_mode=spec.network,
            shm_size=spec.shm_size,
            binds=[f"{m.source}:{m.target}:{'ro' if m.read_only else 'rw'}" for m in spec.mounts],
        ),
    )["Id"]
    engine.start(container)
    return Server(engine, repository, container, f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def server(
    engine: docker.APIClient, triton_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    repository = TritonRepository(tmp_path_factory.mktemp("repository"))
    repository.model("MAM")
    scope, ports = scopes.new_scope(), PortBlock()
    try:
        made = start(engine, scope, repository, compiled(repository, "MAM"), ports.take())
        until(lambda: http(f"{made.url}/v2").status == 200, "the server")
        yield made
    finally:
        scopes.remove_containers(engine, scope)
        ports.close()


def group(server: Server, model: str = "MAM") -> Any:
    groups = http(f"{server.url}/v2/models/{model}/config").json()["instance_group"]
    assert len(groups) == 1
    return groups[0]


def initialised(server: Server, model: str) -> int:
    return sum(f"initialising {model}" in line for line in server.log())


def test_the_startup_probe_recognises_its_own_server(server: Server) -> None:
    probes = server.compile().probes
    assert probes.startup is not None and probes.liveness is not None
    name = http(server.url + probes.startup.check.path).json()["name"]
    assert probes.startup.check.expect == (("name", name),)
    assert http(server.url + probes.liveness.check.path).status == 200


def test_a_model_is_absent_then_loaded_then_absent(server: Server) -> None:
    server.repository.model("Life")
    instance = server.compile("Life", instances_per_gpu=2)
    (placement,) = instance.placements
    readiness = instance.probes.readiness
    assert readiness is not None
    assert server.state(placement).state is LoadState.ABSENT
    assert http(server.url + readiness.check.path).status == 400

    server.load(placement)
    state = server.state(placement)
    assert (state.state, state.digest) == (LoadState.LOADED, placement.digest)
    assert state.summary == (("instances_per_gpu", "2"),)
    assert (group(server, "Life")["count"], group(server, "Life")["kind"]) == (2, "KIND_CPU")
    assert http(server.url + readiness.check.path).status == 200
    body = triton.infer_request(1.0, 2.5)
    answer = http(f"{server.url}/v2/models/Life/infer", "POST", body)
    assert answer.json()["outputs"][0]["data"] == [1.0, 2.5]

    assert server.call(placement.unload).status == 200
    until(lambda: server.state(placement).state is LoadState.ABSENT, "the unload")


def test_another_number_of_instances_adds_only_the_difference(server: Server) -> None:
    server.repository.model("Grows")
    one, three = server.placement("Grows"), server.placement("Grows", instances_per_gpu=3)
    server.load(one)
    until(lambda: initialised(server, "Grows") == 1, "its word in the log")
    assert server.state(three).digest != three.digest

    server.load(three)
    assert server.state(three).digest == three.digest
    assert server.state(one).digest not in (None, one.digest)
    # The first instance went on. The log reaches the engine a moment after the answer.
    until(lambda: initialised(server, "Grows") == 3, "two more")


def test_a_changed_template_is_another_configuration(server: Server) -> None:
    server.repository.model("Changes")
    before = server.placement("Changes")
    server.load(before)
    config = triton.CONFIG.format(name="Changes") + 'parameters { key: "a" value { } }\n'
    server.repository.model("Changes", config=config)
    after = server.placement("Changes")
    assert server.state(after).digest not in (None, after.digest)
    server.load(after)
    assert server.state(after).digest == after.digest
    # What was taken out is noticed, too: the answer holds more than is sent.
    assert server.state(before).digest != before.digest


def test_a_plain_load_by_somebody_else_is_noticed(server: Server) -> None:
    server.repository.model("Plain")
    placement = server.placement("Plain", instances_per_gpu=2)
    server.load(placement)
    path = f"{server.url}/v2/repository/models/Plain/load"
    assert http(path, "POST", "{}", timeout=60).status == 200
    assert server.state(placement).digest == placement.digest  # no file changed: nothing happened
    server.repository.model("Plain")
    assert http(path, "POST", "{}", timeout=60).status == 200
    state = server.state(placement)
    assert state.state is LoadState.LOADED
    assert state.digest not in (None, placement.digest)
    assert state.summary == (("instances_per_gpu", "1"),)


def test_a_failed_reload_keeps_the_old_one_and_its_digest(server: Server) -> None:
    server.repository.model("Keeps")
    before = server.placement("Keeps")
    server.load(before)
    server.repository.model("Keeps", fails=True)
    config = triton.CONFIG.format(name="Keeps") + 'parameters { key: "a" value { } }\n'
    server.repository.model("Keeps", fails=True, config=config)
    after = server.placement("Keeps")
    assert server.call(after.load).status == 400
    assert server.state(before).digest == before.digest
    assert server.state(after).digest != after.digest


def test_an_ensemble_has_its_mark_elsewhere(server: Server) -> None:
    server.repository.model("Step", config_name="config.pbtxt")
    server.repository.model("Whole", config=ENSEMBLE)
    placement = server.placement("Whole")
    server.load(placement)
    assert server.state(placement).digest == placement.digest
    body = triton.infer_request(4.0)
    answer = http(f"{server.url}/v2/models/Whole/infer", "POST", body)
    assert answer.json()["outputs"][0]["data"] == [4.0]
    assert server.call(placement.unload).status == 200
    until(
        lambda: http(f"{server.url}/v2/models/Step/ready").status == 400,
        "the step to go with the ensemble",
    )


# --- Failures ---------------------------------------------------------------------------------


def _raises(server: Server) -> HttpCall:
    server.repository.model("Raises", fails=True)
    return server.placement("Raises").load


def _syntax(server: Server) -> HttpCall:
    server.repository.model("Syntax", syntax_error=True)
    return server.placement("Syntax").load


def _import(server: Server) -> HttpCall:
    directory = server.repository.model("Import")
    model = directory / "1" / "model.py"
    model.write_text("import nobody_has_this\n" + model.read_text())
    return server.placement("Import").load


def _no_version(server: Server) -> HttpCall:
    directory = server.repository.model("NoVersion")
    (directory / "1" / "model.py").unlink()
    (directory / "1").rmdir()
    return server.placement("NoVersion").load


def _unknown_backend(server: Server) -> HttpCall:
    config = triton.CONFIG.format(name="Unknown").replace('"python"', '"onnxruntime"')
    server.repository.model("Unknown", config=config)
    return server.placement("Unknown").load


def _no_gpu(server: Server) -> HttpCall:
    server.repository.model("NoGpu")
    return server.placement("NoGpu", gpus=(REAL,)).load


def _no_gpu_in_a_reload(server: Server) -> HttpCall:
    server.repository.model("Reload")
    server.load(server.placement("Reload"))
    return server.placement("Reload", gpus=(REAL,)).load


def _not_there(server: Server) -> HttpCall:
    load = server.placement("MAM").load
    return replace(load, path=load.path.replace("MAM", "NotThere"))


def _newer_field(server: Server) -> HttpCall:
    server.repository.model("Newer")
    config = {**triton.model_config("Newer"), "from_the_future": 1}
    return replace(server.placement("Newer").load, body=json.dumps(triton.load_request(config)))


def _file_of_a_step(server: Server) -> HttpCall:
    server.repository.model(
        "BadStep", config_name="config.pbtxt", config='name: "BadStep"\nfoo: 3\n'
    )
    return HttpCall("POST", "/v2/repository/models/BadStep/load", "{}")


SCENARIOS: dict[str, Callable[[Server], HttpCall]] = {
    "raises": _raises,
    "syntax error": _syntax,
    "import error": _import,
    "no version": _no_version,
    "unknown backend": _unknown_backend,
    "no gpu": _no_gpu,
    "no gpu in a reload": _no_gpu_in_a_reload,
    "not there": _not_there,
    "newer field": _newer_field,
    "file of a step": _file_of_a_step,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_failed_load_says_why(server: Server, scenario: str) -> None:
    call = SCENARIOS[scenario](server)
    before = len(server.log())
    answer = server.call(call)
    recorded = ANSWERS[scenario]
    assert answer.status == recorded["status"]

    def says() -> str:
        return BACKEND.load_failure(answer.text, server.log()[before:], recorded["model"])

    # The log reaches the engine a moment after the answer has reached us.
    with contextlib.suppress(AssertionError):
        until(lambda: unmarked(says()) == unmarked(recorded["says"]), "the log")
    assert unmarked(says()) == unmarked(recorded["says"])


def unmarked(text: str) -> str:
    """Without the digest in an instance group's name, which depends on protobuf's version, and
    without the quotes around what Triton says.
    """
    return re.sub(r"-[0-9a-f]{12}\b|[“”]", "", text)


@pytest.mark.slow
def test_a_load_that_hangs_says_why_and_never_ends_by_itself(
    engine: docker.APIClient,
    triton_image: str,
    triton_repository: TritonRepository,
    scope: str,
    free_port: Callable[[], int],
) -> None:
    directory = triton_repository.model("Hangs")
    (directory / "1" / "model.py").unlink()
    instance = compiled(triton_repository, "Hangs")
    server = start(engine, scope, triton_repository, instance, free_port())
    until(lambda: http(f"{server.url}/v2").status == 200, "the server")
    (placement,) = instance.placements
    answer = server.call(placement.load, timeout=3)
    assert answer.status == 0

    def says() -> str:
        return unmarked(BACKEND.load_failure("", server.log(), "Hangs"))

    # What stands in the log is written by a program that has to be started first.
    with contextlib.suppress(AssertionError):
        until(lambda: says() == ANSWERS["hangs"]["says"], "the log")
    assert says() == ANSWERS["hangs"]["says"]
    # Triton's own exit_timeout is over long before that, and yet the kill is needed.
    engine.stop(server.container, timeout=7)
    assert engine.inspect_container(server.container)["State"]["ExitCode"] == 137


def test_it_stops_by_itself_within_its_exit_timeout(
    engine: docker.APIClient,
    triton_image: str,
    triton_repository: TritonRepository,
    scope: str,
    free_port: Callable[[], int],
) -> None:
    triton_repository.model("MAM")
    instance = compiled(triton_repository, "MAM", network="host", exit_timeout="20s")
    server = start(engine, scope, triton_repository, instance, free_port() - 2)
    until(lambda: http(f"{server.url}/v2").status == 200, "the server on the host's network")
    server.load(instance.placements[0])
    assert isinstance(instance.workload, ContainerSpec)
    engine.stop(server.container, timeout=math.ceil(instance.workload.stop_timeout))
    assert engine.inspect_container(server.container)["State"]["ExitCode"] == 0


def test_every_recorded_answer_is_played() -> None:
    assert set(ANSWERS) == {*SCENARIOS, "hangs", "config"}
