"""What the measurements print and write down, and the files of those that are measured."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.__main__ import MEASUREMENTS, PAGE
from benchmarks._common import Options, alternating
from benchmarks.contenders import (
    Job,
    compose_yaml,
    entered,
    gpus_yaml,
    one_by_one_sh,
    playbook,
    supervisord_conf,
)
from benchmarks.sheets import Cell, Outcome, Row, Sheet, Target, Unit, amount
from mic_supervisor.backends.registry import Registry
from mic_supervisor.config import load
from tests.setup.steps import Missing
from tests.support import reliability

OURS = Row("mic-supervisor", (Cell((0.2, 0.1, 0.3), "s"), Cell((2.0,), "s")))
SHEET = Sheet(
    "no-change",
    "Nothing to do",
    ("8 containers", "64 containers"),
    (
        OURS,
        Row("Compose", (Cell((0.05, 0.1), "s"), Cell((4.0,), "s")), "It is compiled."),
        Row("Ansible", (Cell((4.0,), "s"), None)),
    ),
)
JOB = Job(
    "a", ("/bin/serve", "--say", "it is"), "img:1", 8123, env={"A": "b"}, mounts=("/x:/y:ro",)
)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "s", "0.123 s"),
        (1.234, "s", "1.23 s"),
        (12.34, "s", "12.3 s"),
        (123.4, "s", "123 s"),
        (3.21, "ms", "3.2 ms"),
        (0.456, "ms", "0.46 ms"),
        (45.6, "ms", "46 ms"),
        (0.4567, "%", "0.46 %"),
        (64.6, "MiB", "65 MiB"),
        (6.0, "threads", "6 threads"),
    ],
)
def test_an_amount_has_as_many_digits_as_are_of_use(value: float, unit: Unit, text: str) -> None:
    assert amount(value, unit) == text


def test_a_table_has_ratios_of_ours_and_says_who_is_ahead() -> None:
    assert SHEET.lines() == [
        "**Nothing to do**",
        "",
        "| | 8 containers | ratio | 64 containers | ratio |",
        "| --- | --- | --- | --- | --- |",
        "| mic-supervisor | 0.200 s (3: 0.100 s to 0.300 s) | 1.00 | 2.00 s | 1.00 |",
        "| Compose | 0.075 s (2: 0.050 s to 0.100 s) | 0.38 | 4.00 s | 2.00 |",
        "| Ansible | 4.00 s | 20.00 | | |",
        "",
        "- Compose is ahead in: 8 containers. It is compiled.",
        "",
    ]


def test_a_table_of_ours_alone_has_no_ratios() -> None:
    sheet = Sheet("x", "X", ("a", "b"), (OURS, OURS), compares=False)
    assert sheet.lines()[2:5] == [
        "| | a | b |",
        "| --- | --- | --- |",
        "| mic-supervisor | 0.200 s (3: 0.100 s to 0.300 s) | 2.00 s |",
    ]
    assert sheet.ahead() == []


def test_a_reason_that_nobody_knows_is_not_made_up() -> None:
    ahead = Row("Other", (Cell((0.1,), "s"), None))
    lines = Sheet("x", "X", SHEET.columns, (OURS, ahead)).lines()
    assert "- Other is ahead in: 8 containers. The reason is not known yet." in lines


def test_who_takes_as_much_as_ours_is_not_ahead() -> None:
    same = Row("Other", (Cell((0.1995,), "s"), Cell((2.0,), "s")))
    assert Sheet("x", "X", SHEET.columns, (OURS, same)).ahead() == []


def test_another_way_of_ours_is_not_ahead_of_us() -> None:
    other = Row("ours, otherwise", (Cell((0.1,), "s"), None), ours=True)
    assert Sheet("x", "X", SHEET.columns, (OURS, other)).ahead() == []


def test_nothing_is_compared_with_what_ours_has_not() -> None:
    ours = Row("ours", (None, Cell((0.0,), "%")))
    other = Row("other", (Cell((1.0,), "s"), Cell((1.0,), "%")))
    sheet = Sheet("x", "X", ("a", "b"), (ours, other))
    assert (sheet.ratio(other, 0), sheet.ratio(other, 1), sheet.ahead()) == (None, None, [])


def test_a_target_says_whether_it_was_met() -> None:
    met, missed = (Target("x", "memory", value, 60.0, " MiB") for value in (59.96, 60.04))
    assert (met.missed, missed.missed) == (False, True)
    assert str(met) == "memory: 60 MiB, at most 60 MiB: met"
    assert str(missed) == "memory: 60 MiB, at most 60 MiB: missed"


def test_a_section_has_its_tables_its_targets_and_who_is_left_out() -> None:
    target = Target("no-change", "time", 1.0, 2.0, " s")
    outcome = Outcome([SHEET], [target, Target("else", "time", 1.0, 2.0, " s")])
    outcome.left_out["ansible: cannot download it"] = None
    assert outcome.sections() == ["no-change", "else"]
    assert outcome.lines("no-change") == [
        *SHEET.lines(),
        "- Target: time: 1 s, at most 2 s: met.",
        "",
        "- Left out: ansible: cannot download it.",
    ]


def test_a_long_sentence_fits_an_editor() -> None:
    slow = Row("Other", (Cell((0.1,), "s"), None), "It does nothing at all, and so. " * 5)
    lines = Sheet("x", "X", SHEET.columns, (OURS, slow)).lines()[7:]
    assert max(map(len, lines)) <= 100
    assert [line[:2] for line in lines] == ["- ", "  ", ""]


def test_who_cannot_be_had_is_left_out_and_named() -> None:
    def make(_count: int):  # type: ignore[no-untyped-def]
        raise Missing("cannot download it", hint="look at the network")

    outcome = Outcome()
    with entered({"ansible": make}, 1, outcome) as found:
        assert found == {}
    assert [*outcome.left_out] == ["ansible: cannot download it"]


def test_the_first_call_of_each_does_not_count_and_the_patient_get_all_tries() -> None:
    calls: list[str] = []
    options = Options(frozenset(), tries=2, patience=60.0)
    found = alternating(options, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(cell.values) for name, cell in found.items()} == {"a": 2, "b": 2}


def test_a_call_that_ends_the_patience_counts_and_is_the_only_one() -> None:
    calls: list[str] = []
    options = Options(frozenset(), tries=2, patience=0.0)
    found = alternating(options, {"a": lambda: calls.append("a")})
    assert calls == ["a"] and len(found["a"].values) == 1


# --- the files of the contenders -----------------------------------------------------------------


def test_our_file_is_one_that_we_read(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    mine = Job("t", (), "img:2", ours="{backend: container, image: 'other:1', command: [x]}")
    host = Job("h", ("/bin/sleep", "1"))
    path.write_text(gpus_yaml([JOB, mine, host]))
    config = load.load(path, Registry(), environ={})
    assert [(entry.keys[0].value, entry.model) for entry in config.entries] == [
        ("0", "a"), ("1", "t"), ("2", "h")
    ]  # fmt: skip
    assert {name: model.backend for name, model in config.models.items()} == {
        "a": "container", "t": "container", "h": "process"
    }  # fmt: skip
    path.write_text(gpus_yaml([]))
    assert [entry.model for entry in load.load(path, Registry(), environ={}).entries] == [None]


def test_the_file_for_compose_has_the_same_job() -> None:
    (service,) = yaml.safe_load(compose_yaml([JOB.changed(3)]))["services"].values()
    assert service == {
        "image": "img:1",
        "command": ["/bin/serve", "--say", "it is"],
        "init": True,
        "environment": {"A": "b", "VERSION": "3"},
        "ports": ["127.0.0.1:8123:8123"],
        "volumes": ["/x:/y:ro"],
        "shm_size": "64m",
    }


def test_the_playbook_has_the_same_job() -> None:
    (task,) = json.loads(playbook([JOB], "scope"))[0]["tasks"]
    (item,) = task["loop"]
    assert item == {
        "name": "scope-a",
        "image": "img:1",
        "command": ["/bin/serve", "--say", "it is"],
        "env": {"A": "b"},
        "ports": ["127.0.0.1:8123:8123"],
        "volumes": ["/x:/y:ro"],
        "shm": "64m",
    }
    used = set(re.findall(r"item\.(\w+)", json.dumps(task["community.docker.docker_container"])))
    assert used == set(item)


def test_the_file_for_supervisord_has_the_same_job(tmp_path: Path) -> None:
    text = configparser.RawConfigParser()
    text.read_string(supervisord_conf([JOB], tmp_path, 9001))
    assert dict(text["program:a"]) == {
        "command": "/bin/serve --say 'it is'", "environment": 'A="b"'
    }  # fmt: skip


def test_one_by_one_waits_before_it_goes_on() -> None:
    first, second, *_ = one_by_one_sh([JOB, JOB], "scope").splitlines()
    assert first.startswith("docker run -d --init --name scope-a ")
    assert first.endswith(
        "-p 127.0.0.1:8123:8123 -v /x:/y:ro -e A=b img:1 /bin/serve --say 'it is'"
    )
    assert second.startswith("until ") and JOB.url in second


# --- the page ------------------------------------------------------------------------------------


def test_every_measurement_has_a_section_on_the_page() -> None:
    assert re.findall(r"<!-- (\S+): a run writes this -->", PAGE.read_text()) == [*MEASUREMENTS]


def test_a_run_writes_its_section_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    reliability.write("idle", ["a line"], page)
    start, end = "<!-- idle: a run writes this -->\n", "<!-- idle: end -->"
    head, _, rest = PAGE.read_text().partition(start)
    assert page.read_text() == f"{head}{start}\na line\n\n{end}{rest.partition(end)[2]}"
