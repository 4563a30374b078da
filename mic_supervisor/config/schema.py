"""The JSON Schema of gpus.yaml, for editors: what a value may be, where the reader knows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mic_supervisor.config.document import FLEET, MAX_NAME, NONE
from mic_supervisor.config.load import BackendSource, BackendTypes
from mic_supervisor.config.merge import VERSION
from mic_supervisor.config.options import Defaults, Hooks, ModelOptions
from mic_supervisor.config.types import format_duration, format_size
from mic_supervisor.errors import MicError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ADDRESS = "urn:mic-supervisor:gpus.schema.json"
"""What the schema is called, wherever a copy of it lies; docs/gpus.schema.json is one."""
FILES = (Path("/usr/local/share/mic/gpus.schema.json"), Path("/usr/share/mic/gpus.schema.json"))
"""Where editors find it: as `mic-supervisor install` writes it, and as a package brings it."""

# Letters and digits of any script, as far as every dialect of regular expressions can say it.
_NAME = "^[^\\u0000-,/:-@\\[-\\^`{-\\u00a0]+$"
_NAMES = {"pattern": _NAME, "maxLength": MAX_NAME, "not": {"enum": [NONE, FLEET]}}
_INDEX = r"(0|[1-9][0-9]{0,2})"
_DIGITS = "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
_UUID = f"[Gg][Pp][Uu]-{_DIGITS}"
_SLICE = f"[Mm][Ii][Gg]-{_DIGITS}"
_PCI = "(([0-9A-Fa-f]{4}|[0-9A-Fa-f]{8}):)?[0-9A-Fa-f]{2}:[01][0-9A-Fa-f]\\.[0-7]"
_ONE = f"({_INDEX}|{_UUID}|{_PCI})"
_GPUS = f"^({_INDEX}\\s*-\\s*{_INDEX}|{_SLICE}|{_ONE}(\\s*,\\s*{_ONE})*)$"


def json_schema(registry: BackendSource) -> dict[str, Any]:
    """The schema (draft 2020-12) for every backend that can be loaded.

    It is a help while writing; `check` decides. A key that cannot be used with a backend has
    the reason as its description, and matches nothing.
    """
    backends = dict(_loadable(registry))
    classes: dict[str, type[BaseModel]] = {"defaults": Defaults, "hooks": Hooks}
    for name, types in backends.items():
        classes |= {f"{name}_settings": types.Settings, f"{name}_options": types.Options}
    references, definitions = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(classes.values())],
        ref_template="#/$defs/{model}",
    )
    given = {
        key: references[model, "validation"]["$ref"].rpartition("/")[2]
        for key, model in classes.items()
    }
    names = {old: key for key, old in reversed(given.items())}
    defs: dict[str, Any] = {}
    for old, definition in definitions.get("$defs", {}).items():
        _polish(definition, names)
        defs[names.get(old, old)] = definition
    for key, old in given.items():
        # Two backends may share a class; what is said of each is its own.
        defs.setdefault(key, deepcopy(defs[names[old]]))
    for name, types in backends.items():
        options = defs[f"{name}_options"]
        _describe(options)
        _restrict(options, name, types.Options.unavailable)
    _describe(defs["defaults"])
    return {
        "$schema": DIALECT,
        "$id": ADDRESS,
        "title": "gpus.yaml",
        "description": "Which model runs on which GPU of this machine.",
        "type": "object",
        "required": ["version", "gpus"],
        "additionalProperties": False,
        "properties": {
            "version": {"const": VERSION, "description": "The version of this format."},
            "defaults": {
                "anyOf": [_ref("defaults"), {"type": "null"}],
                "description": "What holds for every model that does not say otherwise.",
            },
            "backends": {
                "type": ["object", "null"],
                "description": "Settings of a backend on this host.",
                "additionalProperties": False,
                "properties": {
                    name: {
                        "anyOf": [_ref(f"{name}_settings"), {"type": "null"}],
                        "description": f"Settings of {name} on this host.",
                    }
                    for name in backends
                },
            },
            "models": _models(backends),
            "hooks": {
                "anyOf": [_ref("hooks"), {"type": "null"}],
                "description": "Programs that are run when something changes.",
            },
            "gpus": _gpus(),
            "profiles": {
                "type": ["object", "null"],
                "description": "Other values for some of the GPUs, by the name of a profile.",
                "propertyNames": _NAMES,
                "additionalProperties": {
                    "type": ["object", "null"],
                    "additionalProperties": False,
                    "properties": {
                        "gpus": {
                            **_gpus(),
                            "type": ["object", "null"],
                            "minProperties": 0,
                            "description": "What takes the place of these GPUs' entries in gpus: "
                            "while the profile is on.",
                        }
                    },
                },
            },
            "profile": {
                "type": "string",
                "minLength": 1,
                "description": f"The profile that is on, or {NONE}; mic-supervisor switch sets it.",
            },
        },
        "$defs": defs,
    }


def _loadable(registry: BackendSource) -> Iterator[tuple[str, BackendTypes]]:
    for name in registry.names():
        try:
            types = registry.get(name)
        except MicError:
            continue  # `check` says why wherever a file names it
        if types is not None:
            yield name, types


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def _models(backends: Iterable[str]) -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "description": "What may run: a name, its backend and the backend's options.",
        "propertyNames": _NAMES,
        "additionalProperties": {
            "type": "object",
            "required": ["backend"],
            "properties": {"backend": _backend(enum=list(backends))},
            "allOf": [
                {
                    "if": {
                        "properties": {"backend": _backend(const=name)},
                        "required": ["backend"],
                    },
                    "then": _ref(f"{name}_options"),
                }
                for name in backends
            ],
        },
    }


def _backend(**which: Any) -> dict[str, Any]:
    return {**which, "description": ModelOptions.model_fields["backend"].description}


def _gpus() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "The desired state. A GPU that is not listed is left alone.",
        "minProperties": 1,
        "propertyNames": {
            "pattern": _GPUS,
            "description": 'An index (0), a UUID, also of a MIG slice, a PCI bus id; "0-3" is an '
            'instance for each of four GPUs, "3,4" one instance over two.',
        },
        "additionalProperties": {
            "type": "string",
            "minLength": 1,
            "description": f"A model's name, {NONE} to keep the GPU empty, or {FLEET} to hand it "
            "over to claims.",
        },
    }


def _polish(definition: dict[str, Any], names: dict[str, str]) -> None:
    """Without pydantic's titles, with defaults as a file would spell them, and without null, which
    stands for "not given" and which no file may say."""
    for schema in _walk(definition):
        schema.pop("title", None)
        if "$ref" in schema:
            old = schema["$ref"].rpartition("/")[2]
            schema["$ref"] = f"#/$defs/{names.get(old, old)}"
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
        members = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
        if members and len(members) < len(schema["anyOf"]):
            del schema["anyOf"]
            if len(members) == 1:
                schema.update({**members[0], **schema})
            else:
                schema["anyOf"] = members
        default = schema.get("default")
        if isinstance(default, float) and schema.get("type") == "string":
            schema["default"] = format_duration(default)
        elif isinstance(default, int) and schema.get("type") == "string":
            schema["default"] = format_size(default)
        elif not isinstance(default, (str, int, float)):
            schema.pop("default", None)


def _describe(definition: dict[str, Any]) -> None:
    """A key that every backend has means the same where a backend or `defaults:` repeats it."""
    for key, schema in definition["properties"].items():
        common = ModelOptions.model_fields.get(key)
        if "description" not in schema and common is not None and common.description:
            schema["description"] = common.description


def _restrict(definition: dict[str, Any], backend: str, refused: dict[str, str]) -> None:
    for key, schema in definition["properties"].items():
        if key in refused:
            schema.clear()
            schema.update({"description": f"Not available: {refused[key]}.", "not": {}})
    definition["properties"]["backend"] = _backend(const=backend)


def _walk(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema in a definition, and never a map of names to schemas."""
    if isinstance(schema, list):
        for one in schema:
            yield from _walk(one)
    elif isinstance(schema, dict):
        for key, value in list(schema.items()):
            if key in ("properties", "$defs", "patternProperties"):
                for one in value.values():
                    yield from _walk(one)
            elif isinstance(value, (dict, list)) and key not in ("default", "enum", "examples"):
                yield from _walk(value)
        yield schema
