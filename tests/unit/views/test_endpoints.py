"""Who serves which model, what a proxy is told of it, and when a stop waits for that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from mic_supervisor.model import Hook, ObservedState, RunState
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.reconcile import reconcile
from mic_supervisor.plan.status import InstanceStatus, instance_statuses
from mic_supervisor.views.endpoints import (
    Endpoints,
    document,
    haproxy,
    litellm,
    name_of,
    nginx,
    serving,
)
from tests.unit.plan.builders import (
    CONTEXT,
    NOW,
    changed,
    desired,
    failing,
    known,
    observed,
    on,
    plan_for,
    reread,
    shortly,
    text,
    workload,
)

A, B = on("MAM", 0), on("MAM", 1)
HOOK = Hook(("/bin/hook",))


def rows(state: ObservedState, *wanted: Any) -> tuple[InstanceStatus, ...]:
    file = desired(*wanted)
    plan = plan_for(file, state)
    assessments = assess(file, state, CONTEXT)
    return instance_statuses(file, state, assessments, plan, known(), {})


def at(number: int) -> dict[str, str]:
    return {"http": f"http://127.0.0.1:{number}"}


def running(item: Any, port: int, **values: Any) -> Any:
    return workload(item, ports={"http": port}, pid=7, **values)


def test_whose_probes_pass_serves() -> None:
    a, b = running(A, 20001), running(B, 20002)
    found = serving(rows(observed(a, b), A, B), (), {})
    assert found == {"MAM": {A.id: at(20001), B.id: at(20002)}}
    sick = observed(a, b, health={b.ref: failing("readiness")})
    assert serving(rows(sick, A, B), (), found) == {"MAM": {A.id: at(20001)}}
    assert serving(rows(observed(a, b), A, B), {A.id}, found) == {"MAM": {B.id: at(20002)}}
    ended = observed(running(A, 20001, state=RunState.EXITED), b)
    assert serving(rows(ended, A, B), (), found) == {"MAM": {B.id: at(20002)}}
    assert serving(rows(observed(), A), (), found) == {"MAM": {}}


def test_of_whom_nothing_is_known_yet_stays_what_he_was() -> None:
    a = running(A, 20001)
    unasked = rows(observed(a, health={a.ref: failing("startup", ok=None)}), A)
    assert serving(unasked, (), {}) == {"MAM": {}}
    assert serving(unasked, (), {"MAM": {A.id: at(20001)}}) == {"MAM": {A.id: at(20001)}}
    assert serving(unasked, (), {"MAM": {A.id: at(20009)}}) == {"MAM": {}}


def test_an_unprobed_one_is_never_said_to_serve() -> None:
    from mic_supervisor.model import Probes

    bare = replace(A, probes=Probes())
    it = running(bare, 20001)
    found = rows(observed(it), bare)
    assert serving(found, (), {"MAM": {A.id: at(20001)}}) == {"MAM": {}}


def test_the_document() -> None:
    found: Endpoints = {"MAM": {A.id: at(20001)}, "web": {}}
    assert document(found, "h") == {
        "version": 1,
        "host": "h",
        "models": {
            "MAM": [{"instance": A.id, "endpoints": at(20001), "openai_model": None}],
            "web": [],
        },
    }
    for published in (found, {}):
        assert reread(Memory(published=published)).published == published


# --- texts ------------------------------------------------------------------------------------

FOUND: Endpoints = {
    "MAM": {"MAM-1": at(20001), "MAM-2": {"http": "http://[::1]:20002", "grpc": "grpc://[::1]:9"}},
    "web.1": {},
}


def test_a_model_list_for_litellm() -> None:
    found = {**FOUND, "换脸": {"x-1": {"http": "http://10.0.0.2:20003"}}}
    names = {"MAM-1": "Qwen/Qwen3-8B", "MAM-2": "Qwen/Qwen3-8B"}
    about = {"port": "http", "scope": "s"}
    listed = litellm(found, names, **about, api_key="os.environ/KEY")
    key = {"api_key": "os.environ/KEY"}
    assert yaml.safe_load(listed) == {
        "model_list": [
            {
                "model_name": "MAM",
                "litellm_params": {
                    "model": "openai/Qwen/Qwen3-8B",
                    "api_base": "http://127.0.0.1:20001/v1",
                    **key,
                },
                "model_info": {"id": "MAM-1"},
            },
            {
                "model_name": "MAM",
                "litellm_params": {
                    "model": "openai/Qwen/Qwen3-8B",
                    "api_base": "http://[::1]:20002/v1",
                    **key,
                },
                "model_info": {"id": "MAM-2"},
            },
        ]
    }
    assert "# web.1: nobody serves it\n" in listed
    assert "# 换脸: left out, unless --openai says that it speaks OpenAI's API\n" in listed
    assert litellm(found, names, **about, api_key="os.environ/KEY") == listed
    assert yaml.safe_load(litellm({}, {}, **about, api_key="none")) == {"model_list": []}
    (one,) = yaml.safe_load(litellm(found, {"x-1": "a: b # c"}, **about, api_key="none"))[
        "model_list"
    ]
    assert (one["model_name"], one["litellm_params"]["model"]) == ("换脸", "openai/a: b # c")


def test_upstreams_for_nginx() -> None:
    assert nginx(FOUND, port="http", scope="s") == (
        "# Written by mic-supervisor, scope s: the instances of each model that serve on port\n"
        "# http now. What is changed here by hand is lost when they change.\n"
        "# MAM\n"
        "upstream mic_MAM {\n"
        "    server 127.0.0.1:20001 max_fails=0;  # MAM-1\n"
        "    server [::1]:20002 max_fails=0;  # MAM-2\n"
        "}\n"
        "\n"
        "# web.1\n"
        f"upstream {name_of('web.1')} {{\n"
        "    server 127.0.0.1:1 down;\n"
        "}\n"
    )


def test_backends_for_haproxy() -> None:
    assert haproxy(FOUND, port="grpc", scope="s").partition("# MAM\n")[2] == (
        "backend mic_MAM\n"
        "    mode http\n"
        "    balance leastconn\n"
        "    server MAM-2 [::1]:9 proto h2\n"
        "\n"
        "# web.1\n"
        f"backend {name_of('web.1')}\n"
        "    mode http\n"
        "    balance leastconn\n"
    )


def test_names_are_plain_and_stay_apart() -> None:
    names = [name_of(model) for model in ("MAM", "a.b", "a_b", "换脸", "é", "x" * 128)]
    assert len({*names}) == len(names)
    assert all(name.replace("_", "").replace("-", "").isascii() for name in names)
    assert names[0] == "mic_MAM"


# --- plans ------------------------------------------------------------------------------------


def test_before_a_stop_whoever_forwards_requests_is_told() -> None:
    old = workload(A)
    new = changed(A, image="mam:2")
    plan = plan_for(desired(new, hook=HOOK), observed(old))
    assert shortly(plan, old=old)[:4] == [
        "prepare MAM-aaaaaaaa",
        "create MAM-aaaaaaaa <- prepare MAM-aaaaaaaa",
        "withdraw old <- create MAM-aaaaaaaa",
        "stop old <- withdraw old",
    ]
    assert not any("withdraw" in line for line in shortly(plan_for([new], observed(old))))


def roll(published: dict[str, frozenset[str]] | None, error: str | None = None) -> str:
    """A rolled already, B is next."""
    new = [changed(item, image="mam:2") for item in (A, B)]
    state = observed(workload(new[0]), workload(B))
    context = replace(CONTEXT, published=published, hook_error=error)
    plan = reconcile(desired(*new, hook=HOOK), state, known(workload(new[0])), NOW, context)
    return text(plan)


def test_the_next_one_waits_until_the_one_before_is_known() -> None:
    waits = "waits for on_endpoints_change, which does not know yet what serves instead\n"
    assert waits in roll({"MAM": frozenset({B.id})})
    assert waits not in roll({"MAM": frozenset({A.id, B.id})})
    assert waits not in roll(None)
    assert "warning: it broke\n" in roll(None, "it broke")
