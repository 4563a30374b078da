"""Who serves each model, over all hosts."""

from __future__ import annotations

from typing import Any

_ENDS = ("restart", "replace", "stop", "remove", "unload")


def _serves(row: dict[str, Any]) -> bool:
    return bool(row["serving"] and row["endpoints"]) and row["phase"] not in ("loading", "backoff")


def serving(
    statuses: list[dict[str, Any]],
    models: list[str] | None = None,
    leaving: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One document for `mic-supervisor export --from`, made of the status of each host.

    Each of `models` stands in it, even if nobody serves it yet: a proxy's configuration names it.
    `leaving` are plans of hosts, or the status of hosts that end everything. What ends is left out,
    unless nobody else serves the model: a request that fails is no worse than a model that nobody
    is said to serve.
    """
    ends = {
        (plan["host"], action["instance"])
        for plan in leaving or []
        for action in plan.get("actions", [])
        if action["action"] in _ENDS
    }
    ends |= {(one["host"], row["id"]) for one in leaving or [] for row in one.get("instances", [])}
    staying: dict[str, list[dict[str, Any]]] = {model: [] for model in models or []}
    going: dict[str, list[dict[str, Any]]] = {}
    for status in statuses:
        for row in filter(lambda row: row["backend"], status["instances"]):  # "": kept empty
            for model in row["models"] or [row]:
                staying.setdefault(model["model"], [])
                if not _serves({**row, "phase": model["phase"]}):
                    continue
                # Two hosts may have an instance of one name.
                name = f"{status['host']}.{row['id']}"
                part = going if (status["host"], row["id"]) in ends else staying
                part.setdefault(model["model"], []).append(
                    {
                        "instance": name,
                        "endpoints": row["endpoints"],
                        "openai_model": row.get("openai_model"),
                    }
                )
    served = {model: found or going.get(model, []) for model, found in staying.items()}
    return {"version": 1, "host": "fleet", "models": served}


class FilterModule:
    """What this file gives to templates."""

    def filters(self) -> dict[str, Any]:
        """By name."""
        return {"serving": serving}
