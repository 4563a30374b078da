"""What the documents say against what the code does."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from pydantic_core import PydanticUndefined

from mic_supervisor import __version__
from mic_supervisor.backends import Backend, CompileRequest, common
from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import COMMANDS, group
from mic_supervisor.config import load
from mic_supervisor.config.options import ModelOptions
from mic_supervisor.config.schema import json_schema
from mic_supervisor.config.settings import PREFIX, VARIABLES, Settings
from mic_supervisor.config.types import format_duration, parse_size
from tests.support.mic import Mic
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "config.md"
PLUG_INS = ROOT / "docs" / "plugins.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md"), key=lambda path: (path != README, path)),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# --- reading Markdown -------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a table; `key` is the first cell without its backticks."""

    key: str
    cells: tuple[str, ...]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def tables(text: str) -> Iterator[tuple[str, str, list[Row]]]:
    """(heading above it, first cell of its head, its rows) of every table."""
    heading, head, rows = "", "", []
    for line in [*prose(text).splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            cells = tuple(c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1])
            if not head:
                head = cells[0]
            elif set(cells[0]) != {"-"}:
                rows.append(Row(cells[0].strip("`"), cells))
        elif head:
            yield heading, head, rows
            head, rows = "", []


@cache
def reference() -> dict[tuple[str, str], dict[str, Row]]:
    """(heading, first cell of the head) -> rows by key; tables under one heading are merged."""
    out: dict[tuple[str, str], dict[str, Row]] = {}
    for heading, head, rows in tables(REFERENCE.read_text()):
        known = out.setdefault((heading, head), {})
        for row in rows:
            known[row.key] = row
    return out


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(path: Path) -> set[str]:
    text = prose(path.read_text())
    return {anchor(line.lstrip("#")) for line in text.splitlines() if line.startswith("#")}


# --- the file ---------------------------------------------------------------------------------


@cache
def schema() -> dict[str, Any]:
    return json_schema(Registry())


def definition(name: str) -> dict[str, Any]:
    found: dict[str, Any] = schema()["$defs"][name]
    return found


def check_table(place: tuple[str, str], found: dict[str, Any], required: list[str]) -> None:
    """Every property has a row, every row is a property, and the defaults agree."""
    rows = reference()[place]
    assert list(rows) == list(found) or sorted(rows) == sorted(found), place
    for key, row in rows.items():
        assert default_of(found[key], key in required, row.cells[1]), (place, row)


def default_of(found: dict[str, Any], required: bool, said: str) -> bool:
    if required:
        return said == "required"
    default = found.get("default")
    if default is None:
        return not said.startswith("`")
    if not said.startswith("`"):
        return False
    said = said.strip("`")
    if isinstance(default, bool):
        return said == str(default).lower()
    if isinstance(default, int) and not said.isdigit():
        return parse_size(said) == default
    return said == str(default)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("limits", "Key"), "LimitOptions"),
        (("mounts", "Key"), "MountOptions"),
        (("ports", "Key"), "PortOptions"),
        (("rollout", "Key"), "RolloutOptions"),
        (("progress", "Key"), "ProgressOptions"),
        (("request", "Key"), "RequestOptions"),
        (("warm_up", "Key"), "WarmUpOptions"),
        (("defaults", "Key"), "defaults"),
    ],
)
def test_the_keys_below_a_model(place: tuple[str, str], name: str) -> None:
    found = definition(name)
    check_table(place, found["properties"], found.get("required", []))


def test_the_keys_of_a_probe() -> None:
    both = definition("SplitProbe")["properties"] | definition("CheckOptions")["properties"]
    check_table(("probe", "Key"), both, [])


def test_the_keys_of_the_file() -> None:
    check_table(("The file", "Key"), schema()["properties"], schema()["required"])


def test_the_keys_of_every_model() -> None:
    rows = reference()["Keys of a model", "Key"]
    assert list(rows) == list(ModelOptions.model_fields)
    backends = [name for name in Registry().names() if f"{name}_options" in schema()["$defs"]]
    for key, row in rows.items():
        options = {name: definition(f"{name}_options")["properties"][key] for name in backends}
        refused = [name for name, found in options.items() if found.get("not") == {}]
        said = {"-": [], "all, so far": backends}.get(row.cells[2], row.cells[2].split(", "))
        assert refused == said, row
        if key in ("port", "ports"):
            assert row.cells[1] == "from `MIC_PORT_RANGE`"
        elif refused != backends:
            usual, *others = row.cells[1].split(", ")
            special = dict(other.split(" ") for other in others)
            required = ModelOptions.model_fields[key].is_required()
            for name in backends:
                if name not in refused:
                    assert default_of(options[name], required, special.get(name, usual)), (
                        name,
                        row,
                    )


@pytest.mark.parametrize("name", Registry().names())
def test_the_settings_and_options_of_a_backend(name: str) -> None:
    settings = definition(f"{name}_settings")
    if settings.get("properties"):
        check_table((name, "Setting"), settings["properties"], settings.get("required", []))
    else:
        assert (name, "Setting") not in reference()
    found = definition(f"{name}_options")
    own = {k: v for k, v in found["properties"].items() if k not in ModelOptions.model_fields}
    if own:
        check_table((name, "Option"), own, found.get("required", []))
    else:
        assert (name, "Option") not in reference()


def test_the_protocol_of_backends() -> None:
    found = {(heading, head): rows for heading, head, rows in tables(PLUG_INS.read_text())}
    members = {row.key for row in found["The class", "Member"]}
    inherited = {name for name in vars(Backend) if not name.startswith("_")}
    assert members == {*inherited, *Backend.__annotations__}
    asked = [
        key.strip("` ") for row in found["compile", "Of the request"] for key in row.key.split(",")
    ]
    assert sorted(asked) == sorted(one.name for one in fields(CompileRequest))
    for row in found["compile", "Function"]:
        name, arguments = row.key.rstrip(")").split("(")
        known = signature(getattr(common, name)).parameters
        assert {word.strip().partition("=")[0] for word in arguments.split(",")} <= {
            *known, "texts"
        }, row  # fmt: skip


# --- settings, commands, exit codes ------------------------------------------------------------


def test_every_variable_with_its_default() -> None:
    rows = reference()["Settings", "Variable"]
    assert list(rows) == sorted(VARIABLES, key=VARIABLES.index)
    for name, row in rows.items():
        default = Settings.model_fields[name.removeprefix(PREFIX).lower()].default
        assert row.cells[1] == _setting(name, default), row


def _setting(name: str, value: Any) -> str:
    assert value is not PydanticUndefined
    if value is None:
        return "unset"
    if name == "MIC_GPU_SOURCE":
        return f"`{value.kind}`"
    if name == "MIC_PORT_RANGE":
        return f"`{value.first}-{value.last}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{format_duration(value) if isinstance(value, float) else value}`"


def command_of(name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


def test_every_command_with_its_arguments_and_options() -> None:
    rows = reference()["Commands", "Command"]
    lines = {key.split()[0]: key.replace("\\|", "|") for key in rows}
    assert list(lines) == list(COMMANDS)
    for name, line in lines.items():
        said = set(re.findall(r"--?[a-z][a-z-]*", line.partition(" ")[2]))
        there: set[str] = set()
        arguments: list[str] = []
        for parameter in command_of(name).params:
            if isinstance(parameter, click.Argument):
                word = str(parameter.name).upper()
                arguments.append(word if parameter.required else f"[{word}]")
            else:
                there.update(parameter.opts)
        assert said == there, line
        assert re.sub(r"\[-[^\]]*\]|--\S+ \S+", "", line).split()[1:] == arguments, line


def test_a_newcomer_meets_every_command_of_a_day() -> None:
    text = README.read_text()
    assert [c for c in ("plan", "apply", "status", "check", "run", "reload", "history", "gpus")
            if f"mic-supervisor {c}" not in text] == []  # fmt: skip


COMMAND_LINE = re.compile(r"(?:^[$#] (?:[A-Z_]+=\S+ )*|`)(mic-supervisor [^`\n|>#]*)", re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_commands_that_are_shown_can_be_typed(path: Path) -> None:
    for line in COMMAND_LINE.findall(path.read_text()):
        words = shlex.split(line)[1:]
        if not words or words[0].isupper() or words[0].startswith("-"):
            continue
        assert words[0] in COMMANDS, line
        options = {opt for p in command_of(words[0]).params for opt in p.opts} | {"--help", "-h"}
        assert [w for w in words[1:] if w.startswith("-") and w not in options] == [], line


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_variables_that_are_named_are_settings(path: Path) -> None:
    named = set(re.findall(r"\bMIC_[A-Z_]*[A-Z]", prose(path.read_text())))
    assert named <= {*VARIABLES, "MIC_TEST_CACHE"}


def test_exit_codes_agree_between_the_two_pages() -> None:
    there = {row.key for row in reference()["Exit codes", "Code"].values()}
    short = README.read_text().partition("## Exit codes")[2].partition("##")[0]
    assert set(re.findall(r"(?:^|· )(\d+) (?=\D)", short, re.MULTILINE)) == there


def test_every_path_of_the_http_interface() -> None:
    from mic_supervisor.http.app import paths

    views: Any = None  # asked by the handlers alone
    assert set(reference()["HTTP", "Path"]) == {served.path for served in paths(views)}


# --- examples, links, paths --------------------------------------------------------------------


def _blocks(language: str) -> list[tuple[str, str]]:
    return [
        (name, body)
        for path, name in zip(DOCUMENTS, NAMES, strict=True)
        for kind, body in FENCE.findall(path.read_text())
        if kind == language
    ]


def test_there_are_examples() -> None:
    assert {name for name, _ in _blocks("yaml")} >= {"README.md", "docs/config.md"}


@pytest.mark.parametrize(("name", "body"), _blocks("yaml"))
def test_examples_load(name: str, body: str, tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(body)
    assert load.load(path, Registry(), environ={}).entries


def test_the_reference_shows_every_backend() -> None:
    (body,) = (body for name, body in _blocks("yaml") if name == "docs/config.md")
    for name in Registry().names():
        assert f"backend: {name}" in body, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if target.startswith("https://"):
            continue
        file, _, fragment = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_relative_to(ROOT), target
        assert there.exists(), target
        if fragment:
            assert fragment in headings(there), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_pages_fit_an_editor(path: Path) -> None:
    for line in prose(path.read_text()).splitlines():
        assert len(line) <= 100 or line.startswith("|"), line


def test_every_page_can_be_found_from_the_readme() -> None:
    seen, todo = set(), [README]
    while todo:
        page = todo.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+\.md)", prose(page.read_text())):
            there = (page.parent / target).resolve()
            if there not in seen:
                todo.append(there)
    assert sorted(set(DOCUMENTS) - seen) == []


def test_the_changelog_is_in_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]( - \d{4}-\d\d-\d\d)?$", text, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert all(date for _, date in versions[1:])
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert __version__


# --- what the program leaves on disk ------------------------------------------------------------


@pytest.mark.slow
def test_every_file_that_is_kept_is_named_with_its_mode(mic: Mic) -> None:
    """An apply, the daemon and a crash leave what the page says, with the modes that it says."""
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.write(
        """
        version: 1
        models: {nap: {backend: process, command: [/bin/sleep, "100000"]}}
        gpus: {0: nap}
        """
    )
    drop_ins = mic.home / "gpus.yaml.d"
    drop_ins.mkdir()
    (drop_ins / "one.yaml").write_text("gpus: {1: nap}\n")
    before = os.umask(0o022)
    try:
        mic("apply", rc=0)
        daemon = mic.start("run")
        until(lambda: _status(mic)["config"].get("generation"), "the daemon", timeout=20)
        mic("reload", "--wait", rc=0)
        os.kill(_status(mic)["instances"][0]["pid"], signal.SIGKILL)
        until(
            lambda: [row["restarts"] for row in _status(mic)["instances"]] == [1, 0],
            "a second run",
            timeout=20,
        )
    finally:
        os.umask(before)
    found = {
        **_modes("MIC_STATE_DIR", mic.state_dir, mic),
        **_modes("MIC_RUN_DIR", mic.run_dir, mic),
    }
    assert daemon.stop() == 0
    (rows,) = (rows for head, _, rows in tables(ARCHITECTURE.read_text()) if head == "Files")
    assert found == {row.key: row.cells[1] for row in rows}


def _status(mic: Mic) -> Any:
    return mic("status", "--json").json()


def _modes(name: str, base: Path, mic: Mic) -> dict[str, str]:
    """Every file and directory below `base`, as the page calls it, and its mode."""
    found: dict[str, str] = {}
    for path in sorted(base.rglob("*")):
        shown = f"{name}/{path.relative_to(base)}{'/' * path.is_dir()}"
        for real, general in (
            (re.escape(mic.scope), "SCOPE"),
            (r"processes/SCOPE/[^/]+", "processes/SCOPE/NAME"),
            (r"gpus\.yaml\.d/.+", "gpus.yaml.d/*.yaml"),
            (r"logs/mic-[^/]+", "logs/NAME"),
            (r"logs/NAME/[0-9a-f-]{36}", "logs/NAME/RUN"),
            (rf"{name}/mic\.sock", "MIC_SOCKET"),
        ):
            shown = re.sub(real, general, shown)
        mode = f"{path.stat().st_mode & 0o777:04o}"
        assert found.setdefault(shown, mode) == mode, path
    return found
