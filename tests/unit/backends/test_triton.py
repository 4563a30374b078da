"""What the triton backend makes of a model, and how it reads the server's answers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from mic_supervisor.backends.triton import TritonBackend
from mic_supervisor.errors import CompileError
from mic_supervisor.model import (
    ContainerSpec,
    ExecCheck,
    HttpCall,
    HttpCheck,
    Instance,
    LoadState,
    Mount,
    Placement,
    Port,
    Probe,
    Probes,
    Progress,
)
from tests.unit.backends.support import ANSWERS, REAL, SECOND, SIMULATED, request

BACKEND = TritonBackend()
REPOSITORY = "/srv/triton/model_repository"
SETTINGS = {"image": "nvcr.io/nvidia/tritonserver:25.04-py3", "model_repository": REPOSITORY}
TEMPLATE = f"{REPOSITORY}/MAM/config.pbtxt.template"
CONFIG = """\
name: "MAM"  # a comment
backend: "python"
max_batch_size: 8
input [ { name: "X" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ 4 ] } ]
instance_group [ { count: 2 kind: KIND_CPU } ]
"""


def compiled(
    options: dict[str, Any] | None = None,
    *,
    config: str | OSError | UnicodeDecodeError = CONFIG,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> Instance:
    more.setdefault("files", {TEMPLATE: config})
    asked = request(BACKEND, options or {}, settings={**SETTINGS, **(settings or {})}, **more)
    return BACKEND.compile(asked)


def spec(*args: Any, **more: Any) -> ContainerSpec:
    workload = compiled(*args, **more).workload
    assert isinstance(workload, ContainerSpec)
    return workload


def placement(*args: Any, **more: Any) -> Placement:
    (made,) = compiled(*args, **more).placements
    return made


def sent(*args: Any, **more: Any) -> Any:
    """The configuration that the load call carries."""
    body = placement(*args, **more).load.body
    assert body is not None
    return json.loads(json.loads(body)["parameters"]["config"])


def refusal(*args: Any, **more: Any) -> tuple[str, str | None]:
    with pytest.raises(CompileError) as caught:
        compiled(*args, **more)
    return str(caught.value), caught.value.hint


# --- The workload -----------------------------------------------------------------------------


def test_one_server_for_one_gpu() -> None:
    made = compiled({"instances_per_gpu": 8, "args": ["--log-verbose=1"], "start_timeout": "4m"})
    digest = made.placements[0].digest
    config = (
        '{"backend":"python","input":[{"data_type":"TYPE_FP32","dims":["4"],"name":"X"}],'
        '"instance_group":[{"count":8,"gpus":[0],"kind":"KIND_GPU","name":"MAM-'
        f"{digest[:12]}"
        '"}],"max_batch_size":8,"name":"MAM",'
        '"output":[{"data_type":"TYPE_FP32","dims":["4"],"name":"Y"}]}'
    )
    assert made == Instance(
        id="mam-gpu0",
        model="MAM",
        backend="triton",
        gpus=(REAL.uuid,),
        workload=ContainerSpec(
            image="nvcr.io/nvidia/tritonserver:25.04-py3",
            command=(
                "tritonserver",
                "--model-repository=/models",
                "--model-control-mode=explicit",
                "--id=mam-gpu0",
                "--http-port=8000",
                "--grpc-port=8001",
                "--metrics-port=8002",
                "--strict-readiness=false",
                "--exit-on-error=false",
                "--exit-timeout-secs=25",
                "--log-format=ISO8601",
                "--log-verbose=1",
            ),
            devices=(REAL.uuid,),
            mounts=(Mount(REPOSITORY, "/models", read_only=True),),
            ports=(
                Port("http", None, 8000),
                Port("grpc", None, 8001),
                Port("metrics", None, 8002),
            ),
            shm_size=1 << 30,
        ),
        probes=Probes(
            startup=Probe(HttpCheck("/v2", expect=(("name", "mam-gpu0"),)), period=1.0),
            liveness=Probe(HttpCheck("/v2/health/live")),
            readiness=Probe(HttpCheck("/v2/models/MAM/ready")),
        ),
        placements=(
            Placement(
                model="MAM",
                gpus=(REAL.uuid,),
                digest=digest,
                load=HttpCall(
                    "POST",
                    "/v2/repository/models/MAM/load",
                    json.dumps({"parameters": {"config": config}}),
                    timeout=240.0,
                ),
                unload=HttpCall(
                    "POST",
                    "/v2/repository/models/MAM/unload",
                    '{"parameters": {"unload_dependents": true}}',
                ),
                verify=HttpCall("GET", "/v2/models/MAM/config"),
                directory=f"{REPOSITORY}/MAM",
                summary=(("instances_per_gpu", "8"),),
            ),
        ),
        start_timeout=240.0,
    )


def test_on_the_host_network_every_port_and_address_is_its_own() -> None:
    made = spec({"network": "host", "listen": "10.0.0.5", "ports": {"grpc": 9001}})
    assert made.command[4:10] == (
        "--http-address=10.0.0.5",
        "--http-port=${port:http}",
        "--grpc-address=10.0.0.5",
        "--grpc-port=${port:grpc}",
        "--metrics-address=10.0.0.5",
        "--metrics-port=${port:metrics}",
    )
    assert made.ports == (Port("http"), Port("grpc", 9001), Port("metrics"))


def test_sizes_and_times_of_the_settings() -> None:
    settings = {"shm_size": "4g", "exit_timeout": "1500ms"}
    made = spec({"stop_timeout": "3s"}, settings=settings)
    assert made.shm_size == 4 << 30
    assert "--exit-timeout-secs=2" in made.command
    assert spec({"shm_size": "512m"}, settings=settings).shm_size == 512 << 20


def test_triton_ends_before_it_is_killed() -> None:
    assert refusal({"stop_timeout": "25s"}) == (
        "cannot configure MAM: its stop_timeout, 25s, would kill Triton before its own "
        "exit_timeout, 25s, has passed",
        "raise the model's stop_timeout or lower backends.triton.exit_timeout",
    )
    assert spec({"stop_timeout": "26s"}).stop_timeout == 26.0


def test_probes_can_be_given_but_not_that_of_the_start() -> None:
    infer = {"exec": ["infer", "${model}"]}
    made = compiled({"probe": {"liveness": infer}}).probes
    assert made.liveness == Probe(ExecCheck(("infer", "MAM")))
    assert made.readiness == Probe(HttpCheck("/v2/models/MAM/ready"))
    assert made.startup is not None and isinstance(made.startup.check, HttpCheck)
    for probe in (infer, {"startup": infer}):
        with pytest.raises(ValidationError, match="whether a Triton server is up is checked"):
            compiled({"probe": probe})


def test_a_counter_stands_beside_its_own_checks_and_is_read_from_its_metrics() -> None:
    counter = {
        "metric": "nv_inference_request_success",
        "request": {"path": "/v2/models/MAM/infer"},
    }
    moves = Progress(
        "nv_inference_request_success",
        HttpCall("GET", "/v2/models/MAM/infer", timeout=120.0),
        port="metrics",
    )
    usual = compiled({}).probes
    assert usual.liveness is not None and usual.readiness is not None
    made = compiled({"probe": {"progress": counter}}).probes
    assert made == replace(usual, readiness=replace(usual.readiness, progress=moves))
    made = compiled({"probe": {"liveness": {"progress": counter}}}).probes
    assert made == replace(usual, liveness=replace(usual.liveness, progress=moves))


@pytest.mark.parametrize("flag", ["--id=x", "--http-port", "--load-model=MAM"])
def test_flags_of_the_supervisor_are_refused(flag: str) -> None:
    with pytest.raises(ValidationError, match=f"args: {flag.partition('=')[0]} is set by"):
        compiled({"args": [flag]})


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"server": "per-node"}, "Input should be 'per-gpu'"),
        (
            {"gpus": [0, 1]},
            "gpus: it belongs to a server for all models, but this says server: per-gpu",
        ),
        (
            {"ports": {"http": 8000}, "server": "per-model"},
            "ports: it belongs to a server for all mod",
        ),
        ({"args": ["--id=x"], "server": "shared"}, "args: --id is set by the supervisor"),
        ({"gpus": ["0-1"], "server": "shared"}, "0-1: name one GPU at a time"),
        ({"gpus": ["x"], "server": "shared"}, "x: this names no GPU"),
        ({"model_repository": "relative"}, "should match pattern"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        compiled(settings=settings)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"instances_per_gpu": 0}, "greater than or equal to 1"),
        ({"instances_per_gpu": "8"}, "valid integer"),
        ({"container_port": 80}, "Triton's ports in its container are fixed"),
        ({"drain_timeout": "1s"}, "drain_timeout: Triton finishes its requests after"),
        ({"model": "a/b"}, "should match pattern"),
        ({"model": "模型"}, "should match pattern"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        compiled(options)


def test_one_server_over_two_gpus_is_refused() -> None:
    assert refusal(gpus=(REAL, SECOND)) == (
        "cannot configure MAM: server: per-gpu runs one server for one GPU, and this entry has 2",
        'write a range ("3-4") for one server on each, or server: per-model',
    )


def test_a_name_that_triton_cannot_take_goes_by_another() -> None:
    files = {TEMPLATE: CONFIG}
    assert refusal(model="人脸", files=files) == (
        "cannot configure 人脸: in a model's name Triton's HTTP interface takes only ASCII "
        "letters, digits, '-', '_' and '.'",
        "rename its directory in the repository, and give the directory's name as `model:`",
    )
    made = compiled({"model": "MAM"}, model="人脸", instance="x-gpu0", files=files)
    assert (made.model, made.placements[0].model) == ("人脸", "MAM")
    assert made.placements[0].load.path == "/v2/repository/models/MAM/load"


# --- The configuration ------------------------------------------------------------------------


def test_a_simulated_gpu_runs_on_the_cpu() -> None:
    made = compiled(gpus=(SIMULATED,))
    assert isinstance(made.workload, ContainerSpec) and made.workload.devices == ()
    (group,) = sent(gpus=(SIMULATED,))["instance_group"]
    assert group == {"count": 1, "kind": "KIND_CPU", "name": group["name"]}


def test_the_template_comes_first_and_the_plain_file_second() -> None:
    plain = f"{REPOSITORY}/MAM/config.pbtxt"
    other = CONFIG.replace("8", "4")
    assert sent(files={TEMPLATE: CONFIG, plain: other})["max_batch_size"] == 8
    assert sent(files={plain: other})["max_batch_size"] == 4


def test_what_a_group_says_beyond_the_generated_is_kept() -> None:
    config = CONFIG.replace("count: 2", 'count: 2 profile: ["0"] host_policy: "numa0" gpus: [3]')
    (group,) = sent(config=config)["instance_group"]
    assert group.pop("name").startswith("MAM-")
    assert group == {
        "count": 1,
        "gpus": [0],
        "host_policy": "numa0",
        "kind": "KIND_GPU",
        "profile": ["0"],
    }


def test_equal_groups_become_one_and_others_are_refused() -> None:
    two = CONFIG + "instance_group [ { count: 1 kind: KIND_GPU gpus: [1] } ]"
    assert len(sent(config=two)["instance_group"]) == 1
    differ = CONFIG + "instance_group [ { passive: true } ]"
    assert refusal(config=differ) == (
        f"cannot configure MAM: {TEMPLATE} has instance groups that differ in more than name, "
        "count, kind, gpus",
        "leave one group, or none; instances_per_gpu says how many instances run",
    )


def test_a_missing_name_is_filled_in() -> None:
    assert sent(config=CONFIG.replace('name: "MAM"', ""))["name"] == "MAM"


def test_the_digest_is_of_the_configuration_and_of_nothing_else() -> None:
    digest = placement().digest
    assert digest == placement(config=CONFIG.replace("  # a comment", "\n\n")).digest
    assert digest == placement({"start_timeout": "1m"}).digest
    assert digest == placement(gpus=(SECOND,)).digest
    changed = [
        placement({"instances_per_gpu": 2}).digest,
        placement(gpus=(SIMULATED,)).digest,
        placement(config=CONFIG.replace("8", "4")).digest,
    ]
    assert len({digest, *changed}) == 4


def test_text_of_any_script_is_sent_as_it_is() -> None:
    config = CONFIG + 'parameters { key: "标签" value { string_value: "å \\" \\\\" } }'
    assert sent(config=config)["parameters"] == {"标签": {"string_value": 'å " \\'}}


ENSEMBLE = """\
platform: "ensemble"
input [ { name: "X" data_type: TYPE_FP32 dims: [ 4 ] } ]
ensemble_scheduling { step [ { model_name: "A" model_version: -1 } ] }
"""


def test_an_ensemble_has_no_group() -> None:
    config = sent(config=ENSEMBLE)
    assert "instance_group" not in config
    digest = placement(config=ENSEMBLE).digest
    assert config["parameters"] == {"mic_digest": {"string_value": digest}}


@pytest.mark.parametrize(
    ("options", "config"),
    [({"instances_per_gpu": 2}, ENSEMBLE), ({}, ENSEMBLE + "instance_group [ { count: 1 } ]")],
)
def test_an_ensemble_with_instances_is_refused(options: dict[str, Any], config: str) -> None:
    assert refusal(options, config=config)[0] == (
        f"cannot configure MAM: {TEMPLATE} is an ensemble, which has no instances of its own"
    )


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (
            'name: "MAM"\nfoo: 3\n',
            f'{TEMPLATE}:2:1: Message type "inference.ModelConfig" has no field named "foo"',
        ),
        (
            "input [ { data_type: TYPE_FLOAT } ]",
            f"{TEMPLATE}:1:22: 'input [ {{ data_type: TYPE_FLOAT }} ]': Enum type "
            '"inference.DataType" has no value named TYPE_FLOAT',
        ),
        ("input {\n", f'{TEMPLATE}:1:7: Expected "}}"'),
    ],
)
def test_a_template_that_does_not_parse_says_where(config: str, cause: str) -> None:
    said, hint = refusal(config=config)
    location, _, words = cause.partition(": ")
    assert said == f"cannot configure MAM: {location}: “{words}”"  # with the line, it may be
    assert hint == (
        "correct the file; if the field is right and new, upgrade the package tritonclient"
    )


def test_a_template_of_another_model_is_refused() -> None:
    assert refusal(config='name: "Other"') == (
        f"cannot configure MAM: {TEMPLATE} names the model 'Other', and Triton wants the name of "
        "its directory, 'MAM'",
        'write name: "MAM" or remove the line',
    )


def test_a_missing_template_says_what_was_looked_for() -> None:
    assert refusal(files={}) == (
        "cannot configure MAM: neither config.pbtxt.template nor config.pbtxt is in "
        f"{REPOSITORY}/MAM",
        f"put one there, or set `model:` if the directory in {REPOSITORY} has another name",
    )


def test_a_template_that_cannot_be_read_is_not_taken_for_a_missing_one() -> None:
    error = PermissionError(13, "Permission denied")
    assert refusal(files={TEMPLATE: error, f"{REPOSITORY}/MAM/config.pbtxt": CONFIG}) == (
        f"cannot configure MAM: its configuration {TEMPLATE} cannot be read: Permission denied",
        f"let the supervisor's user read {TEMPLATE}",
    )


def test_a_template_in_another_encoding_is_refused() -> None:
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    assert refusal(files={TEMPLATE: error})[0] == (
        f"cannot configure MAM: its configuration {TEMPLATE} is not UTF-8 at byte 0"
    )


# --- The server's answers ---------------------------------------------------------------------


def answered(name: str = "", **more: Any) -> str:
    """What a real server answers for its configuration, its instance group called `name`."""
    config = json.loads(ANSWERS["config"]["body"])
    config["instance_group"][0] |= {"name": name, **more}
    return json.dumps(config)


def test_a_real_answer_is_recognised_by_the_mark_alone() -> None:
    real = ANSWERS["config"]
    made = Placement("MAM", ("g",), real["digest"], *(HttpCall("GET", "/"),) * 3)
    state = BACKEND.placement_state(made, 200, real["body"])
    assert (state.state, state.digest, state.reason) == (LoadState.LOADED, real["digest"], None)
    assert state.summary == (("instances_per_gpu", "8"),)


def test_any_other_configuration_has_another_digest() -> None:
    made = placement()
    for body in (answered("MAM_0"), answered(f"MAM-{'0' * 12}"), answered("MAM_0", count=3)):
        state = BACKEND.placement_state(made, 200, body)
        assert state.state is LoadState.LOADED
        assert state.digest not in (None, made.digest)
        assert state.reason == "it runs with another configuration"
    assert state.summary == (("instances_per_gpu", "3"),)


@pytest.mark.parametrize(
    ("status", "body", "state", "reason"),
    [
        (None, "", LoadState.UNKNOWN, "Triton does not answer"),
        (
            404,
            '{"error":"Request for unknown model: \'MAM\' is not found"}',
            LoadState.ABSENT,
            "it is not loaded",
        ),
        (
            400,
            '{"error":"Request for unknown model: \'MAM\' has no available versions"}',
            LoadState.ABSENT,
            "Triton has no version of it loaded",
        ),
        (404, "Not Found", LoadState.UNKNOWN, "Triton answers 404: “Not Found”"),
        (503, "", LoadState.UNKNOWN, "Triton answers 503"),
        (200, "<html>", LoadState.UNKNOWN, "the answer is not Triton's configuration of it"),
        (200, "[]", LoadState.UNKNOWN, "the answer is not Triton's configuration of it"),
        (
            200,
            '{"name": "Other"}',
            LoadState.UNKNOWN,
            "the answer is not Triton's configuration of it",
        ),
    ],
)
def test_what_other_answers_mean(
    status: int | None, body: str, state: LoadState, reason: str
) -> None:
    made = BACKEND.placement_state(placement(), status, body)
    assert (made.model, made.state, made.digest, made.reason) == ("MAM", state, None, reason)
