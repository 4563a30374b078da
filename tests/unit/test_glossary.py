"""Names in the package hold no word that the glossary of docs/architecture.md rules out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mic_supervisor"

# Documents, metrics and options have these names for good.
FIXED = {
    "ORPHAN": "the kind of an owner in JSON, and a label of metrics",
    "STRANGER": "the code of a reason",
    "WAITS_FOR_STRANGER": "the code of a reason",
    "_ORPHANS": "the value of --all-orphans",
    "all_orphans": "the option --all-orphans",
    "orphan_processes": "what --all-orphans ends: orphans in the glossary's sense",
    "settle": "a key of `hooks` in the file",
    "strangers": "a member of floors in memory.json",
    "told": "a member of failures in `apply --json`",
}


@cache
def glossary() -> dict[str, list[str]]:
    """Each word, with the words that are not to be used for it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("| Word | Meaning | Do not use |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {cells[0].strip(): re.findall(r"`(\w+)`", cells[-1]) for cells in rows}


def words_of(name: str) -> list[str]:
    """ "_GpuStranger" and "gpu_stranger" have the same two."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


@cache
def names_of(source: str) -> list[tuple[int, str]]:
    """(line, name) of all that a source names itself: what it imports is named elsewhere."""
    return [*_names(ast.parse(source))]


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def ruled_out(source: str, path: str) -> list[str]:
    """What is wrong with the names of one module, one sentence each."""
    instead = {bad: word for word, others in glossary().items() for bad in others}
    return [
        f"{path}:{line}: {name}: say {instead[word]}, not {word}"
        for line, name in [(1, Path(path).stem), *names_of(source)]
        if name not in FIXED
        for word in words_of(name)
        if word in instead
    ]


def test_no_name_in_the_package_holds_a_word_that_is_ruled_out() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        wrong += ruled_out(path.read_text(), str(path.relative_to(ROOT)))
    assert wrong == []


def test_the_names_that_are_fixed_are_all_there() -> None:
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    assert {name for source in sources for _, name in names_of(source)} >= FIXED.keys()


def test_the_glossary_is_sorted_and_no_word_is_both_used_and_ruled_out() -> None:
    table = glossary()
    others = [word for words in table.values() for word in words]
    assert [*table] == sorted(table)
    assert len(others) == len(set(others)) > 20
    assert table.keys() & {*others} == {"orphan"}  # a process is one; a workload never is


@pytest.mark.parametrize("name", ["_stranger", "GpuStranger", "on_stranger", "STRANGER_HINT"])
def test_a_word_is_found_in_any_spelling(name: str) -> None:
    assert ruled_out(f"\n{name} = 1", "x.py") == [f"x.py:2: {name}: say foreign, not stranger"]
    assert ruled_out("estranger = restrangers = 1", "x.py") == []
