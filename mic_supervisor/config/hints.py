"""What to write instead: hints for who brings a Compose file, a `docker run` or another tool along.

Each is made of what stands in the file. What a hint has between backquotes after "write" is
accepted by `check`: `tests/unit/config/test_hints.py` puts it into the file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mic_supervisor.config.document import NONE, is_model_name
from mic_supervisor.config.syntax import COLON_AND_BLANK, meant, unspaced
from mic_supervisor.config.types import format_duration
from mic_supervisor.config.yaml import Node, inline

_LONGEST = 2000  # characters of something to write; nobody copies more from a terminal


def written(*texts: str) -> str | None:
    """ "write `…` and `…`", or None where that is too long to be of use."""
    joined = " and ".join(f"`{text}`" for text in texts)
    return f"write {joined}" if len(joined) <= _LONGEST else None


# --- keys that are none here ----------------------------------------------------------------------

Made = dict[str, Any] | None
"""Keys of a model and their values; None: nothing can be made of what was given."""


def for_key(
    key: str, value: Any, known: Collection[str], unavailable: Mapping[str, str]
) -> str | None:
    """A hint for an unknown key of a model, where people are known to write it. `known` are the
    keys that there are; `unavailable` says why some of them cannot be used with this backend."""
    name = key.lower().replace("-", "_")
    if name in _LEFT_OUT and "probe" in known:
        return f"remove the key: {_LEFT_OUT[name]}"
    if name not in _INSTEAD:
        return None
    made = _INSTEAD[name](value)
    if made is None or not made.keys() <= {*known}:
        return None
    for target in made:
        if target in unavailable:
            return unavailable[target]
    return written(*(f"{one}: {inline(given)}" for one, given in made.items()))


_GPUS = "GPUs are given to models under gpus:, each in a line as `0: NAME`"
_RESTARTS = "the supervisor starts again what ends"
_LEFT_OUT = {
    "restart": _RESTARTS,
    "restart_policy": _RESTARTS,
    "container_name": "a container is named after its instance",
    "name": "a model is named by the key above",
    "depends_on": "each model starts as soon as its GPU is free",
    "expose": "the port of a model is published by itself",
    "build": "name an image that is there, or can be pulled",
    "logging": "logs are capped by themselves",
    "deploy": f"{_GPUS}; memory and CPUs stand under limits:",
    **dict.fromkeys(
        ("gpu", "gpus", "device", "device_ids", "gpu_ids", "num_gpus", "runtimes"), _GPUS
    ),
}


def _environment(value: Any) -> Made:
    if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
        pairs = [str(item).partition("=") for item in value]
        value = {name: text if equals else None for name, equals, text in pairs}
    if not isinstance(value, dict) or not value:
        return None
    # Compose passes on the variable of its own environment where there is no value.
    return {"env": {k: f"${{env:{k}}}" if v is None else _text(v) for k, v in value.items()}}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _volumes(value: Any) -> Made:
    mounts = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            source, target = str(item.get("source", "")), str(item.get("target", ""))
            mode = "ro" if item.get("read_only") else ""
        else:
            source, target, mode, *_ = f"{item}::".split(":")
        if not target.startswith("/"):
            return None
        if not source.startswith("/"):  # a volume's name, or below the Compose file
            source = f"/srv/{source.strip('./') or 'data'}"
        mounts.append(f"{source}:{target}" + (":ro" if "ro" in mode.split(",") else ""))
    return {"mounts": mounts}


_SPAN = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")


def _duration(value: Any) -> str | None:
    """Compose's "1m30s" as we write it; None: it is none, or no time at all."""
    found = _SPAN.fullmatch(str(value))
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = hours * 3600 + minutes * 60 + seconds
    return format_duration(total) if total else None


def _healthcheck(value: Any) -> Made:
    given = value if isinstance(value, dict) else {}
    test = given.get("test", [])
    words = test if isinstance(test, list) else ["CMD-SHELL", str(test)]
    url = re.search(r"https?://[^/\s'\"]+(/[^\s'\"|;)]*)?", " ".join(map(str, words)))
    probe: dict[str, Any] = {"docker": True}
    if url is not None:
        probe = {"http": url[1] or "/"}
    elif len(words) > 1:
        shell = ["/bin/sh", "-c"] if words[0] == "CMD-SHELL" else []
        probe = {"exec": [*shell, *map(str, words[1:])]}
    for key, ours in (("interval", "period"), ("timeout", "timeout")):
        if (span := _duration(given.get(key))) is not None:
            probe[ours] = span
    if type(given.get("retries")) is int and given["retries"] > 0:
        probe["failures"] = given["retries"]
    return {"probe": probe}


def _ports(value: Any) -> Made:
    """Of Compose's "8080:80" and its like."""
    found: list[tuple[str, str, str]] = []  # address, port of the host, port in the container
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            item = f"{item.get('published', '')}:{item.get('target', '')}"
        *front, inside = str(item).partition("/")[0].rsplit(":", 2)
        address, outside = front if len(front) == 2 else ("", *front, "")[:2]
        found.append((address.strip("[]"), outside, inside))
    if not all(_is_port(inside) and _is_port(outside or inside) for _, outside, inside in found):
        return None
    if len(found) != 1:
        numbers = [int(outside or inside) for _, outside, inside in found]
        names = ("http", "grpc", "metrics")
        return {"ports": dict(zip(names, numbers, strict=False))} if 0 < len(found) <= 3 else None
    ((address, outside, inside),) = found
    made: dict[str, Any] = {"port": int(outside)} if outside else {}
    if inside != outside:
        made["container_port"] = int(inside)
    return made | ({"listen": address} if address else {})


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 65536


def _network(value: Any) -> Made:
    return {"network": value} if value in ("bridge", "host") else None


def _split(value: Any) -> list[str] | None:
    """A command as a shell splits it."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    try:
        return shlex.split(str(value))
    except ValueError:  # a quote that is not closed, as in "it's"
        return str(value).split()


def _size(value: Any) -> Any:
    """Compose takes a number without a unit for bytes."""
    return f"{value}b" if type(value) is int else value


_PULLS = {"if_not_present": "missing", **{one: one for one in ("missing", "always", "never")}}


def _pull(value: Any) -> Made:
    return {"pull": _PULLS[value]} if isinstance(value, str) and value in _PULLS else None


def _networks(value: Any) -> Made:
    """Of Compose's map of networks, with the names for it in each."""
    if not isinstance(value, dict) or not value:
        return None
    given = [one.get("aliases") for one in value.values() if isinstance(one, dict)]
    aliases = [str(name) for names in given if isinstance(names, list) for name in names]
    made: dict[str, Any] = {"networks": [str(name) for name in value]}
    return made | ({"network_aliases": [*dict.fromkeys(aliases)]} if aliases else {})


_INSTEAD: dict[str, Callable[[Any], Made]] = {
    "environment": _environment,
    "volumes": _volumes,
    "binds": _volumes,
    "healthcheck": _healthcheck,
    "network_mode": _network,
    "cmd": lambda value: {"command": _split(value)},
    "mem_limit": lambda value: {"limits": {"memory": _size(value)}},
    "cpus": lambda value: {"limits": {"cpus": value}},
    "pull_policy": _pull,
    "stop_grace_period": lambda value: {"stop_timeout": _duration(value) or value},
}
KEYS = frozenset((*_LEFT_OUT, *_INSTEAD))
"""What people are known to write and is no key here."""


# --- values of another type -----------------------------------------------------------------------


def for_value(
    key: str, value: Any, wanted: str, unavailable: Mapping[str, str]
) -> tuple[str | None, bool]:
    """A hint for the value of a known key that must be `wanted`, as in "a list"; and whether it
    stands for the whole entry, and not for the value alone."""
    brackets = {"a list": "[]", "a map": "{}"}.get(wanted, "")
    if isinstance(value, str) and (plain := meant(value, brackets)) is not None:
        return written(plain), False
    if key == "ports" and (made := _ports(value)) is not None:
        usable = {one: given for one, given in made.items() if one not in unavailable}
        usable = usable or {"port": made["container_port"]}
        return written(*(f"{one}: {inline(given)}" for one, given in usable.items())), True
    if key == "networks" and (made := _networks(value)) is not None:
        return written(*(f"{one}: {inline(given)}" for one, given in made.items())), True
    if key == "env" and (made := _environment(value)) is not None:
        return written(inline(made["env"])), False
    if key == "probe" and wanted == "a map":
        return _for_probe(value), False
    if wanted == "a list" and not isinstance(value, (dict, list)):
        words = _split(value)
        hint = written(inline(words)) if words else None
        return hint or 'write a list, an item for each argument, as in `[--port, "${port}"]`', False
    if wanted == "a map":
        return for_map(value), False
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], (dict, list)):
        return written(inline(value[0])), False
    return None, False


def _for_probe(value: Any) -> str | None:
    text = _text(value)
    path = re.fullmatch(r"(?:https?://[^/\s]+)?(/\S*)", text)
    probe: dict[str, Any] = {"http": path[1]} if path else {"http": "/health"}
    if text in ("tcp", "docker"):
        probe = {text: True}
    return written(inline(probe))


def for_map(value: Any) -> str | None:
    """A hint for what must be a map: items with a dash each, or a colon without its blank."""
    if isinstance(value, str) and (pair := unspaced(value)) is not None:
        return f"{COLON_AND_BLANK}: write `{pair}`"
    if not isinstance(value, list) or not all(isinstance(item, dict) and item for item in value):
        return None
    whole: dict[str, Any] = {}
    for item in value:
        first = "name" if "name" in item else next(iter(item))
        named = len(item) > 1 and (first == "name" or item[first] is None)  # or "- MAM:" above
        rest = {key: given for key, given in item.items() if key != first}
        whole |= {str(item[first] or first): rest} if named else item
    return f"leave the dashes out: {written(inline(whole)) or 'write NAME: VALUE lines'}"


# --- files of other programs ----------------------------------------------------------------------


def other_file(root: Node) -> tuple[str, str] | None:
    """What to say of a file that was written for another program; None: it may be meant for us."""
    keys, models = root.entries, root.entries.get("models")
    if "gpus" in keys:
        return None
    if "services" in keys and models is None:
        services = keys["services"].node.entries
        found = {str(name): entry.node.entries.get("image") for name, entry in services.items()}
        images = {name: str(one.node.value) for name, one in found.items() if one is not None}
        name = next((name for name, image in images.items() if "$" not in image), "embed")
        return "this is a Compose file, and no gpus.yaml", (
            f"a service is a model here: {_whole_file(name, _container(images.get(name)))}; or "
            "start the file with Compose, and run `mic-supervisor init --from-running`"
        )
    entries = models.node.entries if models is not None else {}
    if any("cmd" in e.node.entries and "backend" not in e.node.entries for e in entries.values()):
        command = ["/usr/local/bin/llama-server", "--port", "${port}", "--model", "/srv/model.gguf"]
        model = {"backend": "process", "command": command, "probe": {"http": "/health"}}
        return "this is a llama-swap file, and no gpus.yaml", (
            "cmd is a command here, and ${PORT} is ${port}: "
            f"{_whole_file(str(next(iter(entries))), model)}"
        )
    if "apiVersion" in keys and "kind" in keys:
        return "this is a Kubernetes manifest, and no gpus.yaml", (
            f"a container is a model here: {_whole_file('embed', _container(None))}"
        )
    return None


def _container(image: str | None) -> dict[str, Any]:
    return {"backend": "container", "image": image or "REGISTRY/NAME:TAG"}


def _whole_file(name: str, model: Mapping[str, Any]) -> str:
    name = name if is_model_name(name) and name != NONE else "embed"
    file = {"version": 1, "models": {name: model}, "gpus": {0: name}}
    return written(inline(file)) or "write one under `models:`"
