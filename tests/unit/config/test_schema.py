"""The schema that editors use, and the example that documents the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.diagnostics import InvalidConfig
from mic_supervisor.config.load import load
from mic_supervisor.config.options import Defaults, ModelOptions
from mic_supervisor.config.schema import json_schema
from mic_supervisor.config.types import format_duration, parse_duration
from tests.unit.config.fakes import FakeRegistry, load_text
from tests.unit.config.test_load_corpus import FILES

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "gpus.yaml"
COPY = ROOT / "docs" / "gpus.schema.json"


def as_json(text: str) -> Any:
    """YAML as an editor's language server sees it: every key a text."""

    def texts(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): texts(item) for key, item in value.items()}
        return [texts(item) for item in value] if isinstance(value, list) else value

    return texts(yaml.safe_load(text))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema(FakeRegistry())


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(schema)


def test_it_is_a_schema(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    Draft202012Validator.check_schema(json_schema(Registry()))


def test_references_lead_somewhere(schema: dict[str, Any]) -> None:
    references = set(re.findall(r"#/\$defs/([^'\"]+)", repr(schema)))
    assert references <= set(schema["$defs"])
    assert {"server_options", "server_settings", "command_options"} <= references


def objects(schema: Any) -> list[dict[str, Any]]:
    found = [schema] if isinstance(schema, dict) and "properties" in schema else []
    children = schema.values() if isinstance(schema, dict) else schema
    for child in children if isinstance(schema, dict | list) else ():
        found += objects(child)
    return found


def test_no_unknown_key_passes_anywhere(schema: dict[str, Any]) -> None:
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
    assert schema["additionalProperties"] is False


def test_nothing_of_pydantic_shows(schema: dict[str, Any]) -> None:
    text = repr(schema)
    assert "'title': 'gpus.yaml'" in text
    assert text.count("'title'") == 1
    assert "'default': None" not in text


def test_defaults_are_spelled_as_a_file_would(schema: dict[str, Any]) -> None:
    options = schema["$defs"]["server_options"]["properties"]
    assert options["start_timeout"]["default"] == "15m"
    assert options["stop_timeout"]["default"] == "30s"
    for definition in schema["$defs"].values():
        for name, value in definition["properties"].items():
            if "default" in value:
                problems = list(Draft202012Validator(value).iter_errors(value["default"]))
                assert problems == [], name


def keys(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key that a file may have, by its path in the schema."""
    children = schema.items() if isinstance(schema, dict) else ()
    children = enumerate(schema) if isinstance(schema, list) else children
    for name, value in children:
        if name == "properties":
            yield from ((f"{path}/{key}", one) for key, one in value.items())
        yield from keys(value, f"{path}/{name}")


def test_what_a_key_is_for_is_said_wherever_it_stands() -> None:
    found = dict(keys(json_schema(Registry())))
    assert {name.rpartition("/")[2] for name in found} >= {*ModelOptions.model_fields, "gpus"}
    assert [name for name, one in found.items() if not one.get("description")] == []


def test_the_copy_in_the_repository_is_what_schema_prints() -> None:
    text = json.dumps(json_schema(Registry()), indent=2, ensure_ascii=False) + "\n"
    assert COPY.read_text() == text, f"run: mic-supervisor schema > {COPY}"


def test_it_has_an_address_of_its_own(schema: dict[str, Any]) -> None:
    assert schema["$id"] == "urn:mic-supervisor:gpus.schema.json"
    Draft202012Validator.check_schema(schema)


def test_a_key_that_a_backend_refuses_says_why_and_matches_nothing(
    schema: dict[str, Any], validator: Draft202012Validator
) -> None:
    refused = schema["$defs"]["command_options"]["properties"]["network"]
    assert refused["description"] == "Not available: a command has no network of its own."
    text = "{version: 1, models: {a: {backend: %s, network: host%s}}, gpus: {'0': a}}"
    assert not validator.is_valid(as_json(text % ("command", ", command: [/a]")))
    assert validator.is_valid(as_json(text % ("server", "")))


def test_defaults_are_keys_that_models_have() -> None:
    assert set(Defaults.model_fields) <= set(ModelOptions.model_fields)


def test_a_backend_that_does_not_load_is_left_out(schema: dict[str, Any]) -> None:
    assert "broken" not in schema["properties"]["backends"]["properties"]


@pytest.mark.parametrize("key", ["0", "127", "0-3", "3,4", "3, 4", "3b:00.0", "00000000:3B:00.0"])
def test_keys_of_gpus(validator: Draft202012Validator, tmp_path: Path, key: str) -> None:
    models = "models: {a: {backend: command, command: [/a]}}"
    text = f'version: 1\n{models}\ngpus: {{"{key}": a}}\n'
    assert validator.is_valid(as_json(text))
    load_text(tmp_path, text)


# Faults that an editor underlines before anything is run.
MUST_SEE = {
    *("version-2", "version-missing", "top-unknown", "defaults-no-unit", "backend-unknown"),
    *("backend-setting-unknown", "backend-setting-missing", "model-null", "model-no-backend"),
    *("model-unknown-key", "model-missing-key", "model-unavailable", "model-range", "probe-path"),
    *("model-port-range", "model-literal", "gpus-empty", "gpus-missing", "gpu-null"),
    *("gpu-range-mixed", "gpu-leading-zero", "gpu-mig", "gpu-negative", "gpu-short-uuid"),
    *("model-name-none", "model-name-slash", "probe-split-unknown", "scalar-number-as-text"),
}


def test_the_schema_sees_what_a_schema_can(validator: Draft202012Validator) -> None:
    seen, visible = 0, 0
    for path in FILES:
        text = path.read_text()
        try:
            document = as_json(text)
        except (yaml.YAMLError, ValueError, OverflowError):
            continue
        visible += 1
        seen += not validator.is_valid(document)
        if path.stem in MUST_SEE:
            assert not validator.is_valid(document), path.stem
    assert visible > 120
    assert seen > 100


def test_must_see_names_files() -> None:
    assert {path.stem for path in FILES} >= MUST_SEE


@pytest.mark.parametrize("seconds", [0, 0.5, 1, 30, 60, 90, 300, 900, 3600, 5400, 86400, 0.001])
def test_durations_come_back(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds)


# --- the example --------------------------------------------------------------------------------


def test_the_example_is_valid_for_the_reader_and_the_schema() -> None:
    config = load(EXAMPLE, Registry(), environ={})
    shown = {model.backend for model in config.models.values()}
    assert shown == {"comfyui", "container", "process", "triton"}
    assert (
        list(
            Draft202012Validator(json_schema(Registry())).iter_errors(as_json(EXAMPLE.read_text()))
        )
        == []
    )


def commented_keys() -> list[tuple[int, str]]:
    """The lines of the example that show a key in a comment, as (index, line without the hash)."""
    lines = EXAMPLE.read_text().splitlines()
    shown = re.compile(r"^( +)# ([a-z_]+: \S.*)$")
    return [
        (number, f"{match[1]}{match[2]}")
        for number, line in enumerate(lines)
        if (match := shown.match(line)) is not None
    ]


def test_the_example_shows_keys_in_comments() -> None:
    assert len(commented_keys()) >= 8


@pytest.mark.parametrize(("number", "line"), commented_keys())
def test_what_the_example_shows_in_comments_works_too(
    tmp_path: Path, number: int, line: str
) -> None:
    lines = EXAMPLE.read_text().splitlines()
    lines[number] = line
    path = tmp_path / "gpus.yaml"
    path.write_text("\n".join(lines) + "\n")
    try:
        load(path, Registry(), environ={})
    except InvalidConfig as error:
        pytest.fail(error.rendered, pytrace=False)


def test_a_mount_is_a_map_or_a_text(validator: Draft202012Validator) -> None:
    models = 'models: {a: {backend: command, command: [/a], mounts: ["/a:/b:ro"]}}'
    assert validator.is_valid(as_json(f"version: 1\n{models}\ngpus: {{0: a}}\n"))
    assert not validator.is_valid(
        as_json(f"version: 1\n{models.replace('/a:/b:ro', 'data:/b')}\ngpus: {{0: a}}\n")
    )
