"""Keys that every model may have: texts, env_file, probes, ports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mic_supervisor.backends import BackendBase, error_text
from mic_supervisor.backends.container import ContainerBackend
from mic_supervisor.config.env_file import format_env_file
from mic_supervisor.errors import CompileError
from mic_supervisor.model import (
    ContainerSpec,
    EngineCheck,
    ExecCheck,
    HttpCall,
    HttpCheck,
    Instance,
    Limits,
    LoadState,
    Mount,
    Placement,
    Port,
    Probe,
    Probes,
    Progress,
    TcpCheck,
)
from mic_supervisor.text import unseen
from tests.unit.backends.support import REAL, SECOND, SIMULATED, request

BACKEND = ContainerBackend()
FILE = "/etc/mic/embed.env"


def compiled(options: dict[str, Any], **more: Any) -> Instance:
    return BACKEND.compile(request(BACKEND, {"image": "i", **options}, **more))


def spec(options: dict[str, Any], **more: Any) -> ContainerSpec:
    workload = compiled(options, **more).workload
    assert isinstance(workload, ContainerSpec)
    return workload


def refusal(options: dict[str, Any], **more: Any) -> tuple[str, str | None]:
    with pytest.raises(CompileError) as caught:
        compiled(options, **more)
    return str(caught.value), caught.value.hint


# --- Placeholders -----------------------------------------------------------------------------


def test_what_is_known_is_filled_in_and_the_rest_left_for_the_launch() -> None:
    made = spec(
        {
            "command": ["${model}/${instance}", "${gpu_uuids}", "${port}:${port:http}"],
            "args": ["${gpu_indices}"],
            "entrypoint": ["/bin/${model}"],
            "env": {"B": "${env:TOKEN}-${model}", "A": "plain $HOME $5 {x}"},
        },
        gpus=(REAL, SECOND),
        variables={"TOKEN": "s3cret", "UNUSED": "x"},
    )
    assert made.command == (
        "MAM/mam-gpu0",
        f"{REAL.uuid},{SECOND.uuid}",
        "${port}:${port:http}",
        "${gpu_indices}",
    )
    assert made.entrypoint == ("/bin/MAM",)
    assert made.env == (("A", "plain $HOME $5 {x}"), ("B", "${env:TOKEN}-MAM"))
    assert made.variables == (("TOKEN", "s3cret"),)
    assert "s3cret" not in repr(made)


@pytest.mark.parametrize(
    "options",
    [
        {"command": ["--grpc=${port:grpc}"], "args": ["${port:metrics}"]},
        {"entrypoint": ["${port:grpc}"], "env": {"A": "x${port:metrics}"}},
        {"probe": {"exec": ["check", "${port:grpc}", "${port:metrics}"]}},
    ],
)
def test_a_port_that_is_referred_to_is_there(options: dict[str, Any]) -> None:
    assert spec(options).ports == (Port("http"), Port("grpc"), Port("metrics"))


def test_such_a_port_may_be_fixed() -> None:
    made = spec({"command": ["${port:metrics}"], "ports": {"metrics": 9000}})
    assert made.ports == (Port("http"), Port("metrics", 9000))


def test_metrics_on_the_port_itself() -> None:
    assert compiled({}).metrics_path is None
    assert compiled({"metrics": "/metrics"}).metrics_path == "/metrics"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"command": ["a", "${prot}"]}, "command[1] refers to ${prot}, which is unknown"),
        ({"command": ["${}"]}, "command[0] refers to ${}, which is unknown"),
        ({"entrypoint": ["${HOME}"]}, "entrypoint[0] refers to ${HOME}, which is unknown"),
        ({"env": {"A": "${env:NO}"}}, "env.A refers to ${env:NO}, which has no value"),
        (
            {"command": ["${port:rpc}"]},
            "command[0] refers to ${port:rpc}, and its ports are: http",
        ),
        ({"command": ["${port"]}, "command[0] has a ${ without its }"),
        (
            {"probe": {"exec": ["check", "${nope}"]}},
            "probe.startup.exec[1] refers to ${nope}, which is unknown",
        ),
    ],
)
def test_a_text_that_cannot_be_filled_in_is_refused(options: dict[str, Any], cause: str) -> None:
    assert refusal(options)[0] == f"cannot configure MAM: {cause}"


def test_an_exec_probe_is_a_command_too() -> None:
    made = compiled({"probe": {"exec": ["check", "${model}", "${port}"]}})
    assert made.probes.startup == Probe(ExecCheck(("check", "MAM", "${port}")))


# --- Progress and warm_up ---------------------------------------------------------------------

HEALTH = HttpCheck("/health")
CALL = HttpCall("POST", "/infer", '{"inputs": ["ä", 1.5]}', 60.0)
MOVES = Progress("requests_total", CALL, within=60.0)
COUNTER = {
    "metric": "requests_total",
    "within": "1m",
    "request": {"path": "/infer", "body": {"inputs": ["ä", 1.5]}},
}


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (
            {"progress": COUNTER},
            Probes(Probe(HttpCheck("/metrics")), None, Probe(None, progress=MOVES)),
        ),
        (
            {"http": "/health", "progress": COUNTER},
            Probes(Probe(HEALTH), Probe(HEALTH), Probe(HEALTH, progress=MOVES)),
        ),
        (
            {"startup": {"http": "/health"}, "liveness": {"progress": COUNTER, "period": "1s"}},
            Probes(Probe(HEALTH), Probe(None, 1.0, progress=MOVES), None),
        ),
        (
            {"liveness": {"http": "/health", "progress": COUNTER}},
            Probes(Probe(HEALTH), Probe(HEALTH, progress=MOVES), None),
        ),
    ],
)
def test_a_counter_reports_and_restarts_only_where_it_is_asked_to(
    probe: dict[str, Any], expected: Probes
) -> None:
    assert compiled({"probe": probe}).probes == expected


def test_a_counter_is_read_where_the_metrics_are() -> None:
    probe = {"progress": {**COUNTER, "path": "/m"}}
    made = compiled({"probe": probe, "args": ["--metrics=${port:metrics}"]}).probes
    assert made.startup == Probe(HttpCheck("/m", "metrics"))
    assert made.readiness == Probe(None, progress=replace(MOVES, path="/m", port="metrics"))


def test_a_request_without_a_body_is_a_get_and_a_text_is_sent_as_it_is() -> None:
    def sent(request: dict[str, Any]) -> HttpCall:
        made = compiled({"probe": {"http": "/health"}, "warm_up": {**request, "count": 3}})
        assert made.warm_up is not None and made.warm_up.count == 3
        return made.warm_up.request

    assert sent({"path": "/a"}) == HttpCall("GET", "/a", None, 300.0)
    assert sent({"path": "/a", "body": "b c"}) == HttpCall("POST", "/a", "b c", 300.0)
    assert sent({"path": "/a", "body": [1]}) == HttpCall("POST", "/a", "[1]", 300.0)
    assert compiled({}).warm_up is None


def test_nothing_is_warmed_up_that_nobody_says_the_start_of() -> None:
    with pytest.raises(ValidationError, match="warm_up: nothing says when its server is up"):
        compiled({"warm_up": {"path": "/a"}})


def test_neither_is_part_of_the_specification() -> None:
    plain = spec({"probe": {"http": "/health"}})
    asked = {"probe": {"http": "/health", "progress": COUNTER}, "warm_up": {"path": "/a"}}
    assert spec(asked) == plain


@given(st.text(alphabet="ab$ {}:port=", max_size=30))
def test_text_without_placeholders_is_left_alone(text: str) -> None:
    if "${" not in text:
        assert spec({"command": [text]}).command == (text,)


# --- env_file ---------------------------------------------------------------------------------


def test_env_file_is_read_as_mic_env_is() -> None:
    text = (
        "# a comment\n\nTOKEN=a=b c # not a comment\r\nEMPTY=\nA=${model} é\n"
        "a.b = '\\c' \nMORE=\"one\ntwo\"\n"
    )
    made = spec({"env_file": FILE}, files={FILE: text})
    assert made.env_file == FILE
    assert made.file_env == (
        ("A", "${model} é"),
        ("EMPTY", ""),
        ("MORE", "one\ntwo"),
        ("TOKEN", "a=b c # not a comment"),
        ("a.b", "\\c"),
    )
    assert "a=b c" not in repr(made)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("export A=s3cret", f"{FILE}:2 is not KEY=VALUE"),
        ("A B=s3cret", f"{FILE}:2 is not KEY=VALUE"),
        ("s3cret B=x", f"{FILE}:2 is not KEY=VALUE"),
        ("s3cret", f"{FILE}:2 is not KEY=VALUE"),
        ("=s3cret", f"{FILE}:2 is not KEY=VALUE"),
        ("A=s3\0cret", f"{FILE}:2 holds U+0000 (a control character), which nobody sees"),
        ("A=s3\u200bcret", f"{FILE}:2 holds U+200B (ZERO WIDTH SPACE), which nobody sees"),
        ("A='s3cret", f"{FILE}:2 is not KEY=VALUE"),
        ("FIRST=s3cret", f"{FILE}:2 sets FIRST a second time"),
    ],
)
def test_a_bad_line_is_named_without_its_value(line: str, cause: str) -> None:
    said, hint = refusal({"env_file": FILE}, files={FILE: f"FIRST=1\n{line}\n"})
    assert said == f"cannot configure MAM: {cause}"
    assert "s3cret" not in f"{said}{hint}"


@pytest.mark.parametrize(
    ("error", "cause", "hint"),
    [
        (
            FileNotFoundError(2, "No such file or directory"),
            "cannot be read: No such file or directory",
            f"create {FILE}, or name another file",
        ),
        (
            PermissionError(13, "Permission denied"),
            "cannot be read: Permission denied",
            f"let the supervisor's user read {FILE}",
        ),
        (
            UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte"),
            "is not UTF-8 at byte 1",
            "save it as UTF-8",
        ),
    ],
)
def test_an_env_file_that_cannot_be_read_says_why(
    error: OSError | UnicodeDecodeError, cause: str, hint: str
) -> None:
    said = refusal({"env_file": FILE}, files={FILE: error})
    assert said == (f"cannot configure MAM: its env_file {FILE} {cause}", hint)


_NAMES = st.text(alphabet="ABCdef_012.-", min_size=1, max_size=8)
_VALUES = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(
    lambda text: not unseen(text)
)


@given(st.dictionaries(_NAMES, _VALUES))
def test_every_value_comes_back(values: dict[str, str]) -> None:
    text = format_env_file(values)
    assert spec({"env_file": FILE}, files={FILE: text}).file_env == tuple(sorted(values.items()))


# --- Probes and ports -------------------------------------------------------------------------


def test_a_single_probe_is_all_three() -> None:
    probe = Probe(HttpCheck("/health"), period=2.0, timeout=1.0, failures=5)
    options = {"http": "/health", "period": "2s", "timeout": "1s", "failures": 5}
    assert compiled({"probe": options}).probes == Probes(probe, probe, probe)
    assert compiled({}).probes == Probes()


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"http": "/x"}, HttpCheck("/x")),
        ({"tcp": True}, TcpCheck()),
        ({"exec": ["a", "b"]}, ExecCheck(("a", "b"))),
        ({"docker": True}, EngineCheck()),
    ],
)
def test_each_kind_of_probe(options: dict[str, Any], check: Any) -> None:
    assert compiled({"probe": options}).probes.liveness == Probe(check)


def test_a_split_probe_without_startup_starts_with_its_liveness() -> None:
    live, ready = Probe(TcpCheck()), Probe(HttpCheck("/ready"))
    both = {"liveness": {"tcp": True}, "readiness": {"http": "/ready"}}
    assert compiled({"probe": both}).probes == Probes(live, live, ready)
    assert compiled({"probe": {"readiness": {"http": "/ready"}}}).probes == Probes(
        ready, None, ready
    )
    own = {"startup": {"http": "/up"}, "liveness": {"tcp": True}}
    assert compiled({"probe": own}).probes == Probes(Probe(HttpCheck("/up")), live, None)


@pytest.mark.parametrize(
    ("options", "ports"),
    [
        ({}, (Port("http"),)),
        ({"port": 9000}, (Port("http", 9000),)),
        ({"container_port": 80}, (Port("http", None, 80),)),
        ({"port": 9000, "container_port": 80}, (Port("http", 9000, 80),)),
        ({"ports": {"metrics": 9100}}, (Port("http"), Port("metrics", 9100))),
        ({"ports": {"grpc": 1, "http": 2}}, (Port("http", 2), Port("grpc", 1))),
    ],
)
def test_ports(options: dict[str, Any], ports: tuple[Port, ...]) -> None:
    assert spec(options).ports == ports


# --- The rest ---------------------------------------------------------------------------------


def test_every_common_key_reaches_the_workload_or_the_instance() -> None:
    made = compiled(
        {
            "listen": "0.0.0.0",
            "network": "host",
            "shm_size": "2g",
            "user": "1000:1000",
            "working_dir": "/srv",
            "limits": {"memory": "4g", "cpus": 2, "nofile": 1024, "memlock": "unlimited"},
            "mounts": [{"source": "/a", "target": "/b", "read_only": True}],
            "stop_signal": "int",
            "stop_timeout": "90s",
            "start_timeout": "10m",
            "rollout": {"rollback": False, "max_unavailable": 2},
        },
        gpus=(REAL, SIMULATED, SECOND),
    )
    assert made.workload == ContainerSpec(
        image="i",
        devices=(REAL.uuid, SECOND.uuid),
        mounts=(Mount("/a", "/b", True),),
        ports=(Port("http"),),
        listen="0.0.0.0",
        network="host",
        shm_size=2 << 30,
        user="1000:1000",
        working_dir="/srv",
        limits=Limits(4 << 30, 2.0, 1024, -1),
        stop_signal="SIGINT",
        stop_timeout=90.0,
    )
    assert (made.id, made.model, made.backend) == ("mam-gpu0", "MAM", "container")
    assert made.gpus == (REAL.uuid, SIMULATED.uuid, SECOND.uuid)
    assert (made.start_timeout, made.rollback, made.max_unavailable) == (600.0, False, 2)


def test_two_mounts_on_one_target_are_refused() -> None:
    mounts = [{"source": "/a", "target": "/x"}, {"source": "/b", "target": "/x/"}]
    assert refusal({"mounts": mounts})[0] == (
        "cannot configure MAM: two mounts have the target /x/"
    )


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("drain_timeout", "nothing is known of its requests"),
        ("runtime", "there is one way to run it; remove the key"),
    ],
)
def test_a_key_that_nothing_honours_is_refused(key: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=f"{key}: {reason}"):
        compiled({key: "x"})


def test_the_same_request_gives_an_equal_instance() -> None:
    options = {"env": {"B": "1", "A": "2"}, "probe": {"tcp": True}}
    turned = {"probe": {"tcp": True}, "env": {"A": "2", "B": "1"}}
    assert compiled(options) == compiled(turned)


def test_the_base_class_knows_of_no_placements_and_quotes_what_there_is() -> None:
    call = HttpCall("GET", "/")
    placement = Placement("m", ("g",), "d", call, call, call)
    base = BackendBase()
    assert base.placement_state(placement, 200, "").state is LoadState.UNKNOWN
    assert base.load_failure('{"error": "no"}', ["x"], "m") == "“no”"
    assert base.load_failure("", ["a", "last ", ""], "m") == (
        "no answer; the last line of its log is: “last”"
    )
    assert base.load_failure("", [], "m") == "no answer"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"error": " bad "}', "bad"),
        ("Not\n found", "Not found"),
        ("", ""),
        ("[1]", "[1]"),
        ('{"error": 3}', '{"error": 3}'),
    ],
)
def test_error_text(body: str, text: str) -> None:
    assert error_text(body) == text
