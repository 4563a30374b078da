"""Whatever the bytes: a Config or a ConfigError, soon. Never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mic_supervisor.config.load import load
from mic_supervisor.errors import ConfigError
from tests.support.examples import examples
from tests.support.pace import idle
from tests.unit.config.fakes import FakeRegistry
from tests.unit.config.test_load_corpus import FILES

VALID = """\
# A comment, with ünïcode
version: 1
defaults: {start_timeout: 5m, rollout: {rollback: false}}
backends: {server: {image: "img:1", memory: 2g}}
models:
  MAM: {backend: server, copies: 8}
  换脸:
    backend: command
    command: [/bin/serve, --port, "${port}", '${env:HOME}']
    env: {A: "x\\ty", B: |
      two
      lines
      }
    probe: {startup: {http: /}, liveness: {tcp: true, period: 1s}}
    limits: {cpus: 1.5, memlock: unlimited}
gpus:
  "0-2": MAM
  "3,4": 换脸
  GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10: MAM
  5: none
""".replace("B: |\n      two\n      lines\n      }", 'B: "two\n      lines"}')
ENVIRON = {"HOME": "/root"}
TEXT = VALID.encode()

SNIPPETS = [
    *(
        b"&a ",
        b"*a",
        b"!!x ",
        b"<<: ",
        b"- ",
        b"? ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"|\n",
        b">-\n",
    ),
    *(b"'", b'"', b"\\", b"\t", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"---\n"),
    *(b"%YAML 1.1\n", b"...", b"~", b"null", b"on", b"010", b"1_0", b".inf", b"${", b"$${port}"),
    *(b'"\\UFFFFFFFF"', b'"\\ud800"', b"#", b"@", b"`", b"\n", b"  ", b"9" * 5000, b"0-3,5", b"-1"),
]


def try_load(directory: Path, data: bytes) -> None:
    path = directory / "gpus.yaml"
    path.write_bytes(data)
    begin = time.process_time()
    try:
        load(path, FakeRegistry(), environ=ENVIRON)
    except ConfigError as error:
        assert error.rendered.strip()
        assert all(char.isprintable() or char == "\n" for char in error.rendered)
        error.rendered.encode()
    took = time.process_time() - begin
    assert took < 1 or idle(took) < 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_the_valid_file_is_valid(directory: Path) -> None:
    path = directory / "gpus.yaml"
    path.write_bytes(TEXT)
    assert len(load(path, FakeRegistry(), environ=ENVIRON).entries) == 6


@pytest.mark.parametrize("part", range(8))
def test_cut_short_at_every_byte(directory: Path, part: int) -> None:
    for end in range(part, len(TEXT), 8):
        try_load(directory, TEXT[:end])


@pytest.mark.slow
def test_every_byte_removed_or_replaced(directory: Path) -> None:
    for at in range(0, len(TEXT), 2):
        try_load(directory, TEXT[:at] + TEXT[at + 1 :])
        try_load(directory, TEXT[:at] + bytes([at % 256]) + TEXT[at + 1 :])


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(TEXT)), st.integers(0, 20), st.sampled_from(SNIPPETS)),
        min_size=1,
        max_size=4,
    )
)
def test_mutated(directory: Path, edits: list[tuple[int, int, bytes]]) -> None:
    data = TEXT
    for at, length, snippet in edits:
        data = data[:at] + snippet + data[at + length :]
    try_load(directory, data)


@settings(max_examples=examples(200), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
@example(data=b"%YAML 1." + b"9" * 5000 + b"\n---\n")
@example(data=b'version: "\\UFFFFFFFF"')
@example(data=b"!<%ff> a")
@example(data=b"%TAG ! tag:x\n---\n!y z")
def test_junk(directory: Path, data: bytes) -> None:
    try_load(directory, data)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = """
version defaults backends models gpus a server command backend probe startup http tcp env args ports
limits rollout mounts 0 0-3 3,4 none start_timeout cpus
"""
keys = st.sampled_from(KEYS.split())
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=6),
    max_leaves=30,
)


@pytest.mark.slow
@settings(max_examples=examples(120), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=st.fixed_dictionaries(
        {
            "version": st.just(1),
            "defaults": documents,
            "backends": documents | st.fixed_dictionaries({"server": documents}),
            "models": documents
            | st.fixed_dictionaries(
                {"a": st.dictionaries(keys, documents).map(lambda d: {**d, "backend": "command"})}
            ),
            "gpus": documents | st.dictionaries(keys, scalars | st.just("a"), max_size=4),
        }
    )
)
def test_any_structure(directory: Path, document: object) -> None:
    # JSON is YAML; what of it is not (NaN, a lone surrogate) is junk like any other.
    try_load(directory, json.dumps(document).encode())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(FILES), end=st.floats(0, 1))
def test_the_corpus_cut_short(directory: Path, file: Path, end: float) -> None:
    data = file.read_bytes()
    try_load(directory, data[: int(end * len(data))])


HEAD = "version: 1\nmodels:\n  a: {backend: process, command: [/bin/a]}\n"
K = 1024
NASTY = {
    "deep flow lists": "a: " + "[" * 250 * K,
    "deep flow maps": "{a: " * 60 * K,
    "deep block lists": "- " * 120 * K,
    "deep keys": "? " * 120 * K,
    "billion laughs": "a0: &a0 [x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 300)),
    "many items": "a: [" + "1," * 120 * K + "]",
    "many keys": "".join(f"k{n}: v\n" for n in range(20 * K)),
    "one text": "a: " + "x" * 250 * K,
    "one quoted text": 'a: "' + "\\x41" * 60 * K + '"',
    "many words": "a: " + "x " * 120 * K,
    "many lines of text": "a: |\n" + "  x\n" * 60 * K,
    "blank lines": "a: 1\n" + "\n" * 250 * K,
    "comments": "#\n" * 120 * K,
    "a long key": HEAD + "gpus: {" + "x" * 1000 + ": a}",
    "unknown models": HEAD
    + "gpus:\n"
    + "".join(f"  GPU-{n:08x}-0000-0000-0000-000000000000: b{n}\n" for n in range(3 * K)),
    "similar models": "version: 1\nmodels:\n"
    + "".join(f"  model-{n}: {{backend: process, command: [/a]}}\n" for n in range(1200))
    + "gpus:\n"
    + "".join(f'  "{n}": moodel-{n + 5000}\n' for n in range(128)),
    "ranges again and again": HEAD
    + "gpus:\n"
    + "".join(f'  "0{" " * (n % 70)}-{" " * (n // 70)}127": a\n' for n in range(3 * K)),
    "placeholders": HEAD[:-2] + ", args: [" + ", ".join(['"' + "${x}" * 4000 + '"'] * 15) + "]}\n",
    "dollars in brackets": "a: [" + "," * 1000 + "${" * 100 * K,
    "unknown keys": HEAD[:-2] + "".join(f", k{n}: 1" for n in range(4 * K)) + "}\n",
    "a group": HEAD + 'gpus: {"' + "1," * 30 * K + '1": a}',
    "escapes": 'a: "\\UFFFFFFFF"',
    "a directive": "%YAML " + "9" * 200 * K + ".1\n---\n",
    "a tag": "!" + "a" * 250 * K,
    "too large": "#" * K * K,
}


@pytest.mark.slow
def test_the_nastiest_files_are_refused_in_time_and_memory(tmp_path: Path) -> None:
    for number, (name, text) in enumerate(NASTY.items()):
        (tmp_path / f"{number:02} {name}.yaml").write_text(text)
    huge = tmp_path / "99 huge.yaml"
    with huge.open("wb") as stream:
        stream.truncate(1 << 34)
    drop_ins = tmp_path / "98 drop-ins.yaml.d"
    drop_ins.mkdir()
    (tmp_path / "98 drop-ins.yaml").write_text(HEAD)
    for number in range(60):
        (drop_ins / f"{number}.yaml").write_text("models: [" + "1," * 3 * K + "]")
    program = """
        import json, sys, time
        from pathlib import Path
        from mic_supervisor.config.load import load
        from mic_supervisor.errors import ConfigError
        from mic_supervisor.backends.registry import Registry
        from tests.support.pace import idle

        def load_it(path):
            begin = time.process_time()
            try:
                load(path, Registry(), environ={})
                outcome = "loaded"
            except ConfigError as error:
                outcome = error.rendered.splitlines()[0][:300]
            return outcome, time.process_time() - begin

        seen = {}
        for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
            outcome, took = load_it(path)
            if took > 1:  # what else the machine does is not this file's doing
                took = min(idle(load_it(path)[1]) for _ in range(3))
            seen[path.stem] = [outcome, took, len(outcome)]
        # Not getrusage: its peak outlives exec, and so is that of the test's own process.
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0])
        print(json.dumps({"seen": seen, "peak": peak}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    assert len(answer["seen"]) == len(NASTY) + 2
    assert {name: row[0] for name, row in answer["seen"].items() if "error" not in row[0]} == {}
    assert {name: row[1] for name, row in answer["seen"].items() if row[1] > 1} == {}
    assert answer["peak"] < 200 * 1024  # KiB
