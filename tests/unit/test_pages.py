"""The pages for operators against the program: each word that it says, each alert, both languages.

tests/unit/test_docs.py holds every document to the commands, links and settings that there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from mic_supervisor.backends.registry import Registry
from mic_supervisor.gpu.source import SimulatedSource
from mic_supervisor.http.app import command_for
from mic_supervisor.plan.actions import ChangeKind
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.status import Sync
from mic_supervisor.views.status import GpuState
from tests.unit.test_docs import FENCE, README, ROOT, Row, anchor, headings, prose, schema, tables

CHINESE = ROOT / "README.zh.md"
FIRST_STEPS = ROOT / "docs" / "first-steps.md"
FIRST_STEPS_CHINESE = ROOT / "docs" / "zh" / "first-steps.md"
CONCEPTS = ROOT / "docs" / "concepts.md"
ALERTS = ROOT / "docs" / "alerts.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
HTTP = ROOT / "docs" / "http.md"
RULES = ROOT / "examples" / "mic.rules.yml"
PAGES = [
    *(README, CHINESE, FIRST_STEPS, FIRST_STEPS_CHINESE, CONCEPTS, ALERTS, TROUBLESHOOTING),
    ROOT / "SECURITY.md",
]

# Followed by a colon, and no key: the beginning of a reason, and what Compose has.
NO_KEYS = {"backoff", "restart"}

# What `health` in the document of `status` may be.
HEALTH = {"healthy", "progressing", "degraded", "unhealthy", "suspended", "missing", "unknown"}


def rows_of(path: Path, heading: str, head: str) -> list[Row]:
    text = path.read_text()
    (found,) = (rows for at, first, rows in tables(text) if (at, first) == (heading, head))
    return found


def sections(path: Path) -> list[str]:
    """The headings of the second level, in their order."""
    return re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)


# --- concepts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("Phase", list(Phase)),
        ("Sync", get_args(Sync)),
        ("Health", HEALTH),
        ("Serving", ["true", "false", "null"]),
        ("State of a GPU", get_args(GpuState)),
    ],
)
def test_every_word_of_status_is_explained(heading: str, words: Any) -> None:
    head = heading if heading != "State of a GPU" else "State"
    assert {row.key for row in rows_of(CONCEPTS, heading, head)} == set(words)


def test_a_phase_has_a_health_that_there_is() -> None:
    for row in rows_of(CONCEPTS, "Phase", "Phase"):
        assert set(re.split(", or ", row.cells[1])) <= HEALTH, row.key


def test_every_action_of_a_plan_is_explained() -> None:
    found = {row.key for row in rows_of(CONCEPTS, "What a plan does", "Action")}
    assert found == set(get_args(ChangeKind))


# --- alerts -------------------------------------------------------------------------------------


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def test_every_alert_has_a_heading_in_the_order_of_the_rules() -> None:
    assert sections(ALERTS) == [rule["alert"] for rule in rules()]


def test_the_runbook_of_a_rule_is_its_heading() -> None:
    for rule in rules():
        path, _, fragment = rule["annotations"]["runbook_url"].partition("#")
        assert ROOT / path == ALERTS
        assert fragment == anchor(rule["alert"]) and fragment in headings(ALERTS)


def test_an_alert_says_what_it_means_what_to_look_at_and_what_to_do() -> None:
    for part in ALERTS.read_text().split("\n## ")[1:]:
        found = re.findall(r"^\*\*(What .+?)\.\*\*", part, re.MULTILINE)
        assert found == ["What it means", "What to look at", "What to do"], part[:20]


def test_the_list_of_alerts_agrees_with_the_rules() -> None:
    listed = {
        re.sub(r"\[(.+)\].*", r"\1", row.key): row.cells[1]
        for row in rows_of(ALERTS, "Alerts", "Alert")
    }
    assert listed == {rule["alert"]: rule["labels"]["severity"] for rule in rules()}


def test_phases_of_the_rules_are_phases() -> None:
    for rule in rules():
        for text in re.findall(r'mic_model_state\{state=~?"([^"]+)"', rule["expr"]):
            assert set(text.split("|")) <= set(Phase), rule["alert"]


# --- troubleshooting ----------------------------------------------------------------------------


def test_every_symptom_is_listed_and_has_a_command_and_a_way_out() -> None:
    text = TROUBLESHOOTING.read_text()
    assert re.findall(r"^- \[(.+)\]\(#.+\)$", text, re.MULTILINE) == sections(TROUBLESHOOTING)
    for part in text.split("\n## ")[1:]:
        name = part.partition("\n")[0]
        referred = name == "It is not restarted" or name == "Everything is to go"
        assert "```console\n" in part, name
        assert "**Way out.**" in part or referred, name


# --- both languages -----------------------------------------------------------------------------


def test_the_chinese_first_steps_show_what_the_english_ones_show() -> None:
    there = FENCE.findall(FIRST_STEPS_CHINESE.read_text())
    assert there == FENCE.findall(FIRST_STEPS.read_text())
    assert len(sections(FIRST_STEPS_CHINESE)) == len(sections(FIRST_STEPS))


def test_the_chinese_readme_shows_the_commands_of_the_english_one() -> None:
    def commands(path: Path) -> list[str]:
        shown = "".join(body for kind, body in FENCE.findall(path.read_text()) if kind == "console")
        return [line for line in shown.splitlines() if line[:2] in ("# ", "$ ")]

    there = commands(README)
    assert commands(CHINESE) == [c for c in there if c in set(commands(CHINESE))]
    assert {*there} - {*commands(CHINESE)} <= {
        "# mic-supervisor check",
        *(line for line in there if line.startswith("$ make ") and "demo" not in line),
    }


def test_the_chinese_readme_links_every_page_that_the_english_one_does() -> None:
    english, chinese = (
        {*re.findall(r"\]\((docs/[^)]+)\)", path.read_text())} for path in (README, CHINESE)
    )
    assert english - chinese == set()


def test_the_chinese_readme_has_every_key_of_the_file() -> None:
    assert {row.key for row in rows_of(CHINESE, "文件", "键")} == set(schema()["properties"])


def test_what_was_called_is_answered_with_the_command_that_the_table_has() -> None:
    rows = rows_of(CHINESE, "从以前的 REST 服务迁移", "以前的调用")
    found = [(row.key.split(), row.cells[1].strip("`")) for row in rows]
    refused = {path: now for (method, path), now in found if method != "GET"}
    assert len(refused) == 3
    for path, now in refused.items():
        assert command_for(path.replace("{pid}", "PID")) == now


def test_keys_that_replace_former_settings_exist() -> None:
    rows = rows_of(CHINESE, "从以前的 REST 服务迁移", "以前的设置")
    for row in rows:
        section, name, *key = row.cells[1].split("`")[1].split(".")
        if section == "models":
            found = schema()["$defs"]["triton_options"]["properties"]
        else:
            found = schema()["$defs"][f"{name}_settings"]["properties"]
        assert key[0] in found, row.key


@pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)
def test_the_other_language_and_the_first_steps_are_linked_at_the_top(path: Path) -> None:
    top = path.read_text().partition("\n\n")[2].partition("\n\n")[0]
    other = CHINESE if path is README else README
    for page in (other, FIRST_STEPS, FIRST_STEPS_CHINESE):
        assert f"]({page.relative_to(ROOT)})" in top, page


# --- what is shown ------------------------------------------------------------------------------


def keys_of(found: Any) -> Iterator[str]:
    """Every key that a file may have, at any depth."""
    if isinstance(found, dict):
        yield from found.get("properties", {})
        for value in found.values():
            yield from keys_of(value)
    elif isinstance(found, list):
        for value in found:
            yield from keys_of(value)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_keys_that_are_named_are_keys(path: Path) -> None:
    """`start_timeout`, `on_foreign: wait`, `limits.memory`: what looks like a key is one."""
    keys = {*keys_of(schema())}
    others = {*Phase, *get_args(Sync), *get_args(GpuState), "mic_instance", "runbook_url"}
    others |= set(re.findall(r"`(mic_[a-z_]+)`", HTTP.read_text()))
    if path is CHINESE:
        rows = rows_of(CHINESE, "从以前的 REST 服务迁移", "以前的设置")
        others |= {word for row in rows for word in re.findall(r"`([a-z_]+)`", row.cells[0])}
    text = prose(path.read_text())
    named = {one for one in re.findall(r"`([a-z]+_[a-z_]+)`", text) if not one.startswith("test_")}
    named -= others
    named |= set(re.findall(r"`([a-z_]+):[^`]*`", text)) - NO_KEYS
    for dotted in re.findall(r"`((?:rollout|limits|hooks|backends)\.[a-z_.]+)`", text):
        named |= {*dotted.split(".")} - {*Registry().names()}
    assert named <= keys


@pytest.mark.parametrize(
    "path", [README, CHINESE, FIRST_STEPS, FIRST_STEPS_CHINESE], ids=lambda path: path.name
)
def test_instances_that_are_shown_are_of_simulated_gpus(path: Path) -> None:
    known = {gpu.uuid[4:12] for gpu in SimulatedSource(4).observe().gpus}
    shown = set(re.findall(r"\b(?:hello|echo)-([0-9a-f]{8})\b", path.read_text()))
    assert shown and shown <= known


def test_every_row_of_who_may_do_what_names_a_test_that_there_is() -> None:
    integration = ROOT / "tests" / "integration"
    written = (integration / "test_who_may.py").read_text()
    rows = rows_of(ROOT / "SECURITY.md", "Who may do what", "Who")
    assert len(rows) > 15
    for row in rows:
        name = row.cells[3].strip("`")
        assert f"def {name}(" in written or (integration / name).is_file(), name


def test_the_readme_keeps_its_order() -> None:
    assert sections(README) == [
        "A minute to try it",
        "Install, and a first model",
        "The file",
        "The daemon",
        "What it does not do",
        "Upgrade and uninstall",
        "Where the rest is",
    ]
    assert len(sections(CHINESE)) == len(sections(README)) + 1  # from the former service


def test_the_reading_path_is_as_long_as_it_says() -> None:
    text = README.read_text()
    said = re.search(r"Five files, about ([\d,]+) lines", text)
    assert said is not None
    table = text.partition(said[0])[2].partition("\n\nThen ")[0]
    files = re.findall(r"\]\((mic_supervisor/[^)]+)\)", table)
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in files)
    assert len(files) == 5
    assert abs(lines - int(said[1].replace(",", ""))) <= 200
