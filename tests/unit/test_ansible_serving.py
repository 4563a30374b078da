"""The filter of the Ansible collection that says who serves, over all hosts."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

FILTER = Path(__file__).parents[2] / "ansible" / "plugins" / "filter" / "serving.py"
serving = runpy.run_path(str(FILTER))["serving"]


def row(instance: str, model: str, **more: Any) -> dict[str, Any]:
    found = {"id": instance, "model": model, "phase": "ready", "serving": True, "models": []}
    return {**found, "backend": "vllm", "endpoints": {"http": f"http://{instance}:1"}, **more}


def status(host: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"host": host, "instances": [*rows]}


def plan(host: str, *actions: str) -> dict[str, Any]:
    words = (action.split() for action in actions)
    return {"host": host, "actions": [{"action": kind, "instance": one} for kind, one in words]}


def names(document: dict[str, Any]) -> dict[str, list[str]]:
    return {
        model: [one["instance"] for one in found] for model, found in document["models"].items()
    }


def test_instances_of_one_name_on_two_hosts_stay_apart() -> None:
    found = serving([status("a", row("m-1", "m")), status("b", row("m-1", "m"))])
    assert names(found) == {"m": ["a.m-1", "b.m-1"]}
    assert found["models"]["m"][0]["endpoints"] == {"http": "http://m-1:1"}


def test_what_does_not_serve_is_left_out_and_its_model_is_not() -> None:
    bad = [
        row("m-1", "m", serving=False),
        row("m-2", "m", serving=None),
        row("m-3", "m", phase="backoff"),
        row("m-4", "m", endpoints={}),
        row("gpu-5", "none", backend=""),
    ]
    assert names(serving([status("a", *bad)], ["later"])) == {"later": [], "m": []}


def test_a_server_of_several_models_serves_those_that_are_loaded() -> None:
    models = [{"model": "m", "phase": "ready"}, {"model": "n", "phase": "loading"}]
    found = serving([status("a", row("server-1", "", models=models))])
    assert names(found) == {"m": ["a.server-1"], "n": []}


def test_what_a_plan_ends_is_left_out_where_another_serves() -> None:
    hosts = [status("a", row("m-1", "m"), row("n-1", "n")), status("b", row("m-1", "m"))]
    assert names(serving(hosts, [], [plan("a", "replace m-1", "stop n-1", "create o-1")])) == {
        "m": ["b.m-1"],
        "n": ["a.n-1"],
    }
    assert names(serving(hosts, [], [plan("a", "create m-1")]))["m"] == ["a.m-1", "b.m-1"]


def test_a_host_that_ends_everything_is_left_out() -> None:
    hosts = [status("a", row("m-1", "m")), status("b", row("m-1", "m"))]
    assert names(serving(hosts, [], [hosts[0]])) == {"m": ["b.m-1"]}
