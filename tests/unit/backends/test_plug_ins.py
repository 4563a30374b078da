"""What a plug-in does wrong stays its own: the guard around one, and what it finds in an instance.

tests/integration/test_plug_ins.py installs real packages.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.backends import Backend, BackendBase, CompileRequest, Member
from mic_supervisor.backends.plug_ins import Guarded, load, misfit
from mic_supervisor.backends.registry import GROUP, Registry
from mic_supervisor.config.options import ModelOptions, Strict
from mic_supervisor.doctor.checks import plug_in
from mic_supervisor.errors import CompileError, MicError
from mic_supervisor.model import (
    ContainerSpec,
    ExecCheck,
    HttpCall,
    HttpCheck,
    Instance,
    LoadState,
    Placement,
    PlacementState,
    Port,
    Probe,
    Probes,
    ProcessSpec,
    Progress,
    WarmUp,
)
from tests.support.waiting import until
from tests.unit.backends.support import REAL, SECOND, request

HERE = __name__
CALL = HttpCall("GET", "/")
PLACEMENT = Placement("a", (REAL.uuid,), "digest", CALL, CALL, CALL)


class Told(BackendBase):
    """Does what the test says, with the built-in names' own types."""

    name = "told"
    Settings = Strict
    Options = ModelOptions
    does: Callable[..., Any] = staticmethod(lambda *_: None)

    def compile(self, request: CompileRequest) -> Instance:
        made: Instance = type(self).does(request)
        return made

    def placement_state(self, placement: Any, status: Any, body: Any) -> PlacementState:
        made: PlacementState = type(self).does(placement)
        return made

    def load_failure(self, answer: Any, log: Any, model: Any) -> str:
        made: str = type(self).does(answer)
        return made

    def is_drained(self, status: Any, body: Any) -> bool:
        made: bool = type(self).does(body)
        return made

    def extra(self) -> str:
        return "mine"


def told(monkeypatch: pytest.MonkeyPatch, does: Callable[..., Any]) -> Backend:
    monkeypatch.setattr(Told, "does", staticmethod(does))
    return load("told", [EntryPoint("told", f"{HERE}:Told", GROUP)])


def raising(error: BaseException) -> Callable[..., Any]:
    def does(*_: Any) -> Any:
        raise error

    return does


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise KeyError


FAULTS = [
    *(KeyError("x"), SystemExit(3), RecursionError(), MicError("own words"), Unspeakable()),
    *(GeneratorExit(), asyncio.CancelledError(), BaseException("all of it"), StopIteration()),
]

GOOD = Instance(
    id="mam-gpu0",
    model="MAM",
    backend="told",
    gpus=(REAL.uuid,),
    workload=ProcessSpec(
        command=("/bin/serve", "${port}", "${port:http}", "${gpu_indices}", "${env:A}"),
        env=(("A", "${env:A}"),),
        variables=(("A", "secret"),),
        ports=(Port("http"),),
    ),
    probes=Probes(startup=Probe(ExecCheck(("/bin/check", "${port}")))),
)


@pytest.fixture
def asked() -> CompileRequest:
    return request(Told(), {})


def test_what_fits_passes_as_it_is(monkeypatch: pytest.MonkeyPatch, asked: CompileRequest) -> None:
    assert told(monkeypatch, lambda _: GOOD).compile(asked) is GOOD


def test_its_own_refusal_passes(monkeypatch: pytest.MonkeyPatch, asked: CompileRequest) -> None:
    with pytest.raises(CompileError, match="no such model"):
        told(monkeypatch, raising(CompileError("no such model"))).compile(asked)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: type(f).__name__)
def test_whatever_compile_raises_is_an_error_of_its_model(
    monkeypatch: pytest.MonkeyPatch, asked: CompileRequest, fault: BaseException
) -> None:
    with pytest.raises(CompileError) as caught:
        told(monkeypatch, raising(fault)).compile(asked)
    said = caught.value.message
    assert said.startswith(f"backend told cannot compile MAM: “{type(fault).__name__}")
    assert caught.value.hint == f"this is a defect of {HERE}:Told; report it there"


def test_ctrl_c_is_not_the_plug_ins(monkeypatch: pytest.MonkeyPatch, asked: CompileRequest) -> None:
    with pytest.raises(KeyboardInterrupt):
        told(monkeypatch, raising(KeyboardInterrupt())).compile(asked)


WRONG: list[tuple[Any, str]] = [
    (None, "the instance is None, not Instance"),
    ({"id": "mam-gpu0"}, "the instance is of type dict, not Instance"),
    (replace(GOOD, id="other"), "its id is 'other', and asked for was 'mam-gpu0'"),
    (replace(GOOD, model="other"), "its model is 'other', and asked for was 'MAM'"),
    (replace(GOOD, backend="triton"), "its backend is 'triton', and asked for was 'told'"),
    (
        replace(GOOD, gpus=(SECOND.uuid,)),
        f"its gpus is {(SECOND.uuid,)!r}, and asked for was {(REAL.uuid,)!r}",
    ),
    (replace(GOOD, gpus=[REAL.uuid]), "its gpus is of type list, not a tuple"),
    (replace(GOOD, start_timeout="5m"), "its start_timeout is of type str, not float"),
    (replace(GOOD, max_unavailable=True), "its max_unavailable is of type bool, not int"),
    (replace(GOOD, on_foreign="kill"), "its on_foreign is of type str, not typing.Literal"),
    (replace(GOOD, workload="serve"), "its workload is of type str, not ContainerSpec or Proc"),
    (
        replace(GOOD, workload=replace(GOOD.workload, command="/bin/serve")),
        "its workload.command is of type str, not a tuple",
    ),
    (
        replace(GOOD, workload=replace(GOOD.workload, command=("/bin/serve", Path("/x")))),
        f"its workload.command[1] is of type {type(Path()).__name__}, not str",
    ),
    (
        replace(GOOD, workload=replace(GOOD.workload, env={"TOKEN": "hf_secret"})),
        "its workload.env is of type dict, not a tuple",
    ),
    (
        replace(GOOD, workload=replace(GOOD.workload, env=(("TOKEN", "hf", "x"),))),
        "its workload.env[0] has 3 items, not 2",
    ),
    (
        replace(GOOD, workload=ContainerSpec("image", devices=(SECOND.uuid,))),
        f"its devices hold {SECOND.uuid}, which is not one of its GPUs",
    ),
    (
        replace(GOOD, workload=replace(GOOD.workload, ports=(Port("http"), Port("http")))),
        "two of its ports have one name",
    ),
    (
        replace(GOOD, workload=replace(GOOD.workload, command=("/bin/serve", "${port:grpc}"))),
        "it refers to ${port:grpc}, which has no value",
    ),
    (
        replace(GOOD, workload=replace(GOOD.workload, ports=())),
        "it refers to ${port}, which has no value",
    ),
    (
        replace(GOOD, workload=replace(GOOD.workload, variables=())),
        "it refers to ${env:A}, which has no value",
    ),
    (
        replace(GOOD, probes=Probes(liveness=Probe(HttpCheck("/", "metrics")))),
        "a probe asks port 'metrics', which it does not have",
    ),
    (
        replace(GOOD, probes=Probes(liveness=Probe(ExecCheck(("/x", "${port:grpc}"))))),
        "it refers to ${port:grpc}, which has no value",
    ),
    (
        replace(GOOD, workload=ProcessSpec(("/bin/serve",)), probes=Probes(), drain=CALL),
        "its server is called on port 'http', which it does not have",
    ),
    (
        replace(GOOD, probes=Probes(readiness=Probe(progress=Progress("a", CALL, port="metrics")))),
        "a probe asks port 'metrics', which it does not have",
    ),
    (
        replace(GOOD, probes=Probes(), warm_up=WarmUp(CALL)),
        "it has a warm_up, and no startup probe says when its server is up",
    ),
    (replace(GOOD, probes=Probe(HttpCheck("/"))), "its probes is of type Probe, not Probes"),
    (replace(GOOD, placements=(CALL,)), "its placements[0] is of type HttpCall, not Placement"),
]


@pytest.mark.parametrize(("made", "fault"), WRONG, ids=range(len(WRONG)))
def test_what_nobody_could_run_is_refused(made: Any, fault: str, asked: CompileRequest) -> None:
    found = misfit(made, asked)
    assert found is not None and found.startswith(fault)
    assert "hf_secret" not in found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: type(f).__name__)
def test_an_answer_that_it_cannot_read_is_unknown(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    state = told(monkeypatch, raising(fault)).placement_state(PLACEMENT, 200, "{}")
    assert (state.model, state.state) == ("a", LoadState.UNKNOWN)
    assert str(state.reason).startswith(
        f"backend told cannot read its server's answer: “{type(fault).__name__}"
    )


def test_so_is_what_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    state = told(monkeypatch, lambda _: "loaded").placement_state(PLACEMENT, 200, "{}")
    assert state.reason == (
        "backend told cannot read its server's answer: its answer is of type str, "
        "not PlacementState"
    )


@pytest.mark.parametrize("does", [raising(KeyError("x")), lambda _: None])
def test_a_failure_it_has_no_words_for_is_told_in_the_servers(
    monkeypatch: pytest.MonkeyPatch, does: Callable[..., Any]
) -> None:
    found = told(monkeypatch, does).load_failure('{"error": "out of memory"}', [], "a")
    assert found == "“out of memory”"


def test_a_drain_that_it_cannot_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = told(monkeypatch, raising(KeyError("queue")))
    with pytest.raises(
        MicError, match=r"^backend told cannot tell whether it is drained: “KeyError: 'queue'”$"
    ):
        backend.is_drained(200, "{}")
    assert told(monkeypatch, lambda _: 1).is_drained(200, "{}") is True


def test_one_that_hangs_is_left_behind_and_refused_until_it_returns(
    monkeypatch: pytest.MonkeyPatch, asked: CompileRequest
) -> None:
    returns, begun = threading.Event(), []

    def hangs(*_: Any) -> Any:
        begun.append(1)
        assert returns.wait(60)
        return GOOD

    told(monkeypatch, hangs)
    backend = Guarded(Told(), "told", timeout=0.1)
    with pytest.raises(CompileError, match=r"“TimeoutError: .*it does not answer within 0\.1 s"):
        backend.compile(asked)
    with pytest.raises(CompileError, match="it has not answered since it was last asked"):
        backend.compile(asked)
    assert backend.load_failure('{"error": "no"}', [], "a") == "“no”"
    assert len(begun) == 1
    returns.set()
    until(lambda: all(one.name != "mic-in-time" for one in threading.enumerate()), "its return")
    assert backend.compile(asked) == GOOD


def test_what_the_protocol_gains_later_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackendBase, "later", lambda self: "the default", raising=False)
    backend: Any = told(monkeypatch, lambda _: None)
    assert (backend.extra(), backend.later()) == ("mine", "the default")
    with pytest.raises(AttributeError):
        backend.never  # noqa: B018


@pytest.mark.parametrize("does", [raising(KeyError("x")), lambda *_: 7])
def test_what_it_says_of_shared_servers_is_only_believed_where_it_is_sound(
    monkeypatch: pytest.MonkeyPatch, does: Callable[..., Any], asked: CompileRequest
) -> None:
    for method in ("server_of", "reserved", "conflicts", "surplus"):
        monkeypatch.setattr(Told, method, lambda _self, *args: does(*args), raising=False)
    for method in ("compile_placement", "compile_server"):
        monkeypatch.setattr(Told, method, lambda _self, *args: does(*args), raising=False)
    backend = told(monkeypatch, lambda _: None)
    assert backend.server_of(None, "a") is None
    assert backend.reserved(None) == ()
    assert backend.conflicts(None, ["args"]) == {}
    assert backend.surplus(GOOD, lambda _call: (None, "")) == ()
    with pytest.raises(CompileError, match="backend told cannot compile MAM: "):
        backend.compile_placement(asked, Member("a", None, ()))
    with pytest.raises(CompileError, match="backend told cannot compile MAM: "):
        backend.compile_server(asked, [], [])


# --- doctor -----------------------------------------------------------------------------------


def findings(name: str, value: str) -> list[tuple[str, str, str]]:
    registry = Registry(lambda: [EntryPoint(name, value, GROUP)])
    return [(one.level, one.subject, one.text) for one in plug_in(registry, name)]


def test_doctor_lists_what_works_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings("told", f"{HERE}:Told") == [("ok", "plug-in told", f"{HERE}:Told")]
    assert findings("gone", "nowhere_at_all:X") == [
        (
            "fail",
            "plug-in gone",
            "cannot use backend gone: nowhere_at_all:X does not load: "
            "ModuleNotFoundError: No module named 'nowhere_at_all'",
        )
    ]
    assert findings("triton", f"{HERE}:Told") == [
        (
            "fail",
            "plug-in triton",
            f"{HERE}:Told brings a backend with the name of a built-in one, which is used instead",
        )
    ]


@pytest.mark.slow
def test_doctor_says_what_makes_every_command_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sleepy.py").write_text(
        f"import time\ntime.sleep(1.1)\nfrom {HERE} import Told as Sleepy\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ((level, _, text),) = findings("told", "sleepy:Sleepy")
    sys.modules.pop("sleepy", None)
    assert level == "warn"
    assert text.startswith("sleepy:Sleepy takes ")
