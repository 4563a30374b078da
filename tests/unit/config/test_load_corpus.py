"""Every bad file is refused at the right place in the right words: see tests/corpus/bad."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from mic_supervisor.config.diagnostics import InvalidConfig
from mic_supervisor.config.load import load
from tests.support.pace import idle
from tests.unit.config.fakes import FakeRegistry

BAD = Path(__file__).parents[2] / "corpus" / "bad"
FILES = sorted(BAD.glob("*.yaml"))
_EXPECT = re.compile(r"# expect: (\d+):(\d+) ?(.*)")


def expected(path: Path) -> list[tuple[int, int, str]]:
    """The `# expect: LINE:COLUMN WORDS` lines that a file begins with."""
    found = []
    for line in path.read_text().splitlines():
        match = _EXPECT.fullmatch(line)
        if match is None:
            break
        found.append((int(match[1]), int(match[2]), match[3]))
    return found


def test_the_corpus_is_there() -> None:
    assert len(FILES) >= 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_bad_file_is_refused_in_the_right_place(path: Path) -> None:
    wanted = expected(path)
    assert wanted
    begin = time.process_time()
    with pytest.raises(InvalidConfig) as caught:
        load(path, FakeRegistry(), environ={"HOME": "/root"})
    took = time.process_time() - begin
    assert took < 1 or idle(took) < 1
    found = caught.value.diagnostics
    assert [(one.location.line, one.location.column) for one in found] == [w[:2] for w in wanted], (
        caught.value.rendered
    )
    for one, (line, column, words) in zip(found, wanted, strict=True):
        assert f"{path}:{line}:{column}: error: " in one.headline
        assert words in one.headline
    assert caught.value.rendered == "".join(f"{one.render()}\n" for one in found)
    assert "pydantic" not in caught.value.rendered
    assert "Input should" not in caught.value.rendered


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_caret_stands_below_the_fault(path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(path, FakeRegistry(), environ={})
    lines = path.read_text().splitlines()
    for one in caught.value.diagnostics:
        source = lines[one.location.line - 1]
        at = source[one.location.column - 1 : one.location.column] or " "  # or the line's end
        shown, caret = one.render().splitlines()[1:3]
        assert caret.strip() == "^"
        if source.isascii():  # elsewhere a character may be two columns wide
            assert shown.ljust(len(caret))[caret.index("^")] == at.replace("\t", " ")
