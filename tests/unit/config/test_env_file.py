"""The syntax of env files, held to systemd's own reader."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mic_supervisor.config.env_file import format_env_file, parse_env_file
from mic_supervisor.text import unseen
from tests.support.examples import examples
from tests.support.pace import idle
from tests.support.require import missing

SAME_AS_SYSTEMD = [
    ("A=1", {"A": "1"}),
    ("  A = 1  ", {"A": "1"}),
    ("A=", {"A": ""}),
    ("A=a b  c", {"A": "a b  c"}),
    ("A=1 # no comment", {"A": "1 # no comment"}),
    ("# A=1\n; B=2\n\nC=3", {"C": "3"}),
    ('A="a  b"', {"A": "a  b"}),
    ('A=" a "', {"A": " a "}),
    ("A=' a '", {"A": " a "}),
    (r'A="a\"b\\c\$d\`e\n"', {"A": r'a"b\c$d`e\n'}),
    (r"A='a\b'", {"A": r"a\b"}),
    (r"A=a\b\ ", {"A": "ab "}),
    ("A=a\\\nb", {"A": "ab"}),
    ('A="a\\\nb"', {"A": "ab"}),
    ('A="a\nb"\nB=2', {"A": "a\nb", "B": "2"}),
    ("A='a\nb'\nB=2", {"A": "a\nb", "B": "2"}),
    ("A=it's", {"A": "it's"}),
    ('A=say "hi"', {"A": 'say "hi"'}),
    ("A=\"a\"'b'", {"A": "ab"}),
    ('A="a" "b"', {"A": "ab"}),
    ("A=1\nA=2", {"A": "2"}),
    ("A=x=y", {"A": "x=y"}),
    ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
    ("A=é", {"A": "é"}),
    ("# a comment \\\nA=1\nB=2", {"B": "2"}),
]


@pytest.mark.parametrize(("text", "values"), SAME_AS_SYSTEMD)
def test_the_format_is_systemds(text: str, values: dict[str, str]) -> None:
    found, bad = parse_env_file(text)
    assert bad == []
    assert {one.name: one.value for one in found} == values


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("A=1\nexport B=2", 2, "begins with export, which systemd does not know"),
        ("A", 1, "is not NAME=VALUE"),
        ("\n\n1A=2", 3, "does not begin with the name of a variable"),
        ("A B=2", 1, "does not begin with the name of a variable"),
        ("=2", 1, "does not begin with the name of a variable"),
        ('A="x\nB=2\nC=3', 1, "has a quote that is not closed"),
        ("A=x\n'B'\nC='x", 2, "is not NAME=VALUE"),
        ('A=x\nB="\0"', 2, "holds U+0000 (a control character), which nobody sees"),
        ("\ufeffHF_TOKEN=x", 1, "holds U+FEFF (ZERO WIDTH NO-BREAK SPACE), which nobody sees"),
        ("A=1\nTOK\u200bEN=x", 2, "holds U+200B (ZERO WIDTH SPACE), which nobody sees"),
        ("A=1\nTOKEN=hf_x\u00a0", 2, "holds U+00A0 (NO-BREAK SPACE), which nobody sees"),
        ("A='x\u202ey'", 1, "holds U+202E (RIGHT-TO-LEFT OVERRIDE), which nobody sees"),
        ('A="x\x1b[2Jy"', 1, "holds U+001B (a control character), which nobody sees"),
        ("A=x\u3000y", 1, "holds U+3000 (IDEOGRAPHIC SPACE), which nobody sees"),
        ("A=x\x85", 1, "holds U+0085 (a control character), which nobody sees"),
    ],
)
def test_what_systemd_would_skip_is_an_error(text: str, line: int, message: str) -> None:
    _, bad = parse_env_file(text)
    assert bad[0].line == line
    assert str(bad[0]).startswith(message)


def test_lines_keep_their_numbers_over_continuations() -> None:
    found, _ = parse_env_file('A="1\n2"\nB=3\\\n4\n# c\nC=5')
    assert [(one.name, one.line) for one in found] == [("A", 1), ("B", 3), ("C", 6)]


@settings(max_examples=examples(200), suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="A=\"'\\ \n#;x$\r\t1", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    found, bad = parse_env_file(text)
    lines = text.count("\n") + 1
    assert all(1 <= one.line <= lines for one in [*found, *bad])


@settings(max_examples=examples(200))
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=30))
def test_a_value_in_double_quotes_comes_back(value: str) -> None:
    escaped = "".join(f"\\{char}" if char in '"\\`$' else char for char in value)
    found, bad = parse_env_file(f'A="{escaped}"')
    if unseen(value) is None:
        assert ([one.value for one in found], bad) == ([value], [])
    else:
        assert (found, [one.unseen for one in bad]) == ([], [unseen(value)])


@pytest.mark.parametrize(
    "text", ["A=" + " " * 200_000 + "x", 'A="' + "\\" * 200_001, "#\\" * 100_000, "x " * 100_000]
)
def test_a_long_line_takes_no_time(text: str) -> None:
    began = time.process_time()
    parse_env_file(text)
    took = time.process_time() - began
    assert took < 2 or idle(took) < 2


def test_the_example_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "config.md").read_text()
    example = page.partition("### Env files")[2].partition("```sh\n")[2].partition("```")[0]
    found, bad = parse_env_file(example)
    assert bad == []
    assert {one.name: one.value for one in found} == {
        "HASH": "a b # c is part of it",
        "QUOTED": 'say "hi" for $5 ',
        "RAW": 'a\\b "c"',
        "LONG": "one two",
    }


# --- writing ------------------------------------------------------------------------------------


def test_quotes_stand_where_they_are_needed() -> None:
    text = format_env_file(
        {"A": "x \"y\" $z `w` \\ 'v'\nnext # no", "B": "", "C": "a=b/c", "D": " a", "E": "'"}
    )
    assert text == (
        'A="x \\"y\\" \\$z \\`w\\` \\\\ \'v\'\nnext # no"\nB=\nC=a=b/c\nD=" a"\nE="\'"\n'
    )


VARIABLES = st.dictionaries(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True),
    # Not Cn: to systemd, what Unicode calls no character (U+FDD0) is no UTF-8.
    st.text(st.characters(exclude_categories=["Cs", "Cn"])).filter(lambda text: not unseen(text)),
)


@given(VARIABLES)
def test_what_is_written_comes_back(variables: dict[str, str]) -> None:
    found, bad = parse_env_file(format_env_file(variables))
    assert ({one.name: one.value for one in found}, bad) == (variables, [])


# --- against systemd itself ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_systemd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """systemd's own reader, load_env_file() of its private library; it needs no running systemd."""
    found = sorted(Path("/usr/lib").glob("*/systemd/libsystemd-shared-*.so"))
    if not found:
        missing("libsystemd-shared is not installed", "apt-get install libsystemd-shared")
    strings = ctypes.POINTER(ctypes.c_char_p)
    call = ctypes.CDLL(str(found[0])).load_env_file
    call.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(strings)]
    path = tmp_path_factory.mktemp("env") / "env"

    def load(text: str) -> dict[str, str]:
        path.write_bytes(text.encode())
        out = strings()
        assert call(None, bytes(path), ctypes.byref(out)) >= 0
        lines = list(takewhile(lambda item: item is not None, out)) if out else []
        return dict(line.decode().split("=", 1) for line in lines)

    return load


@pytest.mark.parametrize(("text", "values"), SAME_AS_SYSTEMD)
def test_systemd_agrees(
    by_systemd: Callable[[str], dict[str, str]], text: str, values: dict[str, str]
) -> None:
    assert by_systemd(text) == values


@settings(max_examples=examples(500))
@given(parts=st.lists(st.sampled_from([*"=\"'\\ \n#;x$\r\t`", "A=", "B="]), max_size=14))
def test_systemd_agrees_on_whatever_is_not_refused(
    by_systemd: Callable[[str], dict[str, str]], parts: list[str]
) -> None:
    text = "".join(parts)
    found, bad = parse_env_file(text)
    if not bad:
        assert by_systemd(text) == {one.name: one.value for one in found}


@given(VARIABLES)
def test_systemd_reads_what_is_written(
    by_systemd: Callable[[str], dict[str, str]], variables: dict[str, str]
) -> None:
    assert by_systemd(format_env_file(variables)) == variables
