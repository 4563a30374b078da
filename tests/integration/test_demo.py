"""mic-supervisor demo as a newcomer meets it: piped, on a terminal, interrupted, and failing."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

import pytest

from mic_supervisor.host.processes import with_environ
from tests.support import waiting
from tests.support.mic import PROGRAM
from tests.support.scopes import end_processes

ROOT = Path(__file__).parents[2]
SERVE = re.compile(r"\. (?P<env>/\S+/env)$", re.MULTILINE)


@dataclass
class Home:
    """Where a demo puts its directory, and what is in its environment."""

    tmp: Path
    env: dict[str, str]

    def worlds(self) -> list[Path]:
        return sorted(self.tmp.glob("mic-demo-*"))


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    # Short: the daemon's socket lies in it, and the path of a socket has 107 bytes.
    tmp = tmp_path_factory.mktemp("demo")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MIC_")}
    # A production's settings, which must not shine through, and no way to an engine.
    production = {
        "MIC_CONFIG": "/nonexistent/gpus.yaml",
        "MIC_SCOPE": "default",
        "MIC_STATE_DIR": "/nonexistent/state",
        "MIC_RUN_DIR": "/nonexistent/run",
        "MIC_GPU_SOURCE": "nvml",
        "MIC_DOCKER_HOST": "unix:///nonexistent/docker.sock",
    }
    yield Home(tmp, {**inherited, **production, "TMPDIR": str(tmp), "NO_COLOR": "1"})
    for pid in demos():
        os.kill(pid, signal.SIGKILL)
    for scope in set(leftovers().values()):
        end_processes(scope)


_mine: list[subprocess.Popen[bytes]] = []


def demos() -> list[int]:
    return [one.pid for one in _mine if one.poll() is None]


def leftovers() -> dict[int, str]:
    """PID -> scope of everything that a demo of this test process has started and not ended."""
    return with_environ("MIC_SCOPE", [f"demo-{one.pid}" for one in _mine])


def start(home: Home, *arguments: str, output: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [PROGRAM, "demo", *arguments],
        env=home.env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # As a terminal's foreground job: a group of its own.
        start_new_session=True,
    )
    _mine.append(process)
    return process


class Terminal:
    """A terminal of 80 columns, and what was written on it."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
        self.text = ""

    def read(self, pause: float = 0.2) -> str:
        while select.select([self._ours], [], [], pause)[0]:
            try:
                data = os.read(self._ours, 65536)
            except OSError:  # EIO: nobody has the other end any more
                break
            if not data:
                break
            self.text += data.decode(errors="replace")
        return self.text

    def close(self) -> None:
        os.close(self._ours)
        os.close(self.theirs)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    it = Terminal()
    yield it
    it.close()


def gone(home: Home) -> bool:
    return not home.worlds() and not leftovers()


def left_over() -> set[int]:
    """PIDs of what demos have started that are over, whoever started them."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environ = (entry / "environ").read_bytes().split(b"\0")
            demo = next((one for one in environ if one.startswith(b"MIC_SCOPE=demo-")), None)
            if demo and not Path(f"/proc/{demo.decode().rpartition('-')[2]}").exists():
                found.add(int(entry.name))
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What would be committed now, and nothing else."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    made = tmp_path / "clone"
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, made / name)
    return made


@pytest.mark.slow
def test_make_demo_in_a_fresh_clone_plays_the_tour_and_leaves_nothing(
    home: Home, clone: Path
) -> None:
    """Without the test extras. How long the tour takes is told by `make bench`."""
    before = left_over()
    done = subprocess.run(
        ["make", "demo", "DEMO_ARGS=--once", f"PYTHON={sys.executable}"],
        cwd=clone,
        env=home.env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "The tour took" in done.stdout
    assert not home.worlds()
    waiting.until(lambda: left_over() <= before, "what it started to be gone")
    installed = [path.name.lower() for path in (clone / ".venv").glob("lib/*/site-packages/*")]
    assert any(name.startswith("pydantic") for name in installed)
    assert not any(name.startswith(("pytest", "hypothesis", "mypy")) for name in installed)
    told = re.sub(r"/\S*mic-demo-\w+", "DIR", text)
    told = re.sub(r"\d+\.\d s", "N s", re.sub(r"127\.0\.0\.1:\d+", "HOST", told))
    told = re.sub(r"(PID|kill -9) \d+", r"\1 N", told)
    steps = [
        line for line in told.splitlines() if line.startswith(("$ ", "=> ")) or line[1:3] == ". "
    ]
    assert steps == [
        "1. One file says which model runs on which GPU",
        "$ cat DIR/gpus.yaml",
        "$ mic-supervisor check",
        "2. See what would happen, then have it happen",
        "$ mic-supervisor plan",
        "$ mic-supervisor apply",
        "$ mic-supervisor status",
        "3. The models answer, and there is nothing left to do",
        "$ curl -d '{\"image\": 7}' http://HOST/infer",
        "$ mic-supervisor plan",
        "4. Edit the file: a setting, a move, a GPU to keep empty",
        "$ $EDITOR DIR/gpus.yaml",
        "$ mic-supervisor plan",
        "$ mic-supervisor apply",
        "$ mic-supervisor status",
        "5. Save a file with mistakes: it is refused, and nothing stops",
        "$ $EDITOR DIR/gpus.yaml",
        "$ mic-supervisor apply",
        "=> all three processes still answer, with the PIDs they had",
        "6. A model crashes",
        "$ kill -9 N    # MAM on GPU 0",
        "$ mic-supervisor plan",
        "$ mic-supervisor apply",
        "=> it runs again, as PID N",
        "7. Leave it to the daemon, as systemd would start it",
        "$ mic-supervisor run &",
        "=> it found what runs and took it over: the PIDs are the same",
        "$ kill -9 N    # change_face on GPU 3",
        "=> the daemon brought it back; it was away for N s",
        "$ mic-supervisor history change_face | tail -n 5",
        "$ $EDITOR DIR/gpus.yaml",
        "$ mic-supervisor status",
        "$ curl http://HOST/readyz",
        "8. The supervisor itself crashes: the models do not notice",
        "$ kill -9 N    # the daemon",
        "$ mic-supervisor run &",
        "=> the daemon is back, and every model has the PID that it had",
    ]
    assert "warning" not in text
    assert "\x1b" not in text


@pytest.mark.slow
def test_it_stays_until_ctrl_c_and_can_be_used_meanwhile(home: Home, terminal: Terminal) -> None:
    process = start(home, output=terminal.theirs)
    waiting.until(
        lambda: "Ctrl-C ends the demo" in terminal.read() or process.poll() is not None,
        "the end of the tour",
        timeout=120,
    )
    assert process.poll() is None, terminal.text
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", terminal.text)
    assert len(re.findall(r"^GPU  MODEL +PHASE  SYNC  SINCE  RST  ENDPOINT *$", shown, re.M)) == 3
    match = SERVE.search(shown)
    assert match is not None, shown

    def shell(line: str) -> str:
        done = subprocess.run(
            ["sh", "-ec", f". {match['env']}; {line}"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert [line.split("\t")[:3] for line in shell("mic-supervisor status").splitlines()] == [
        ["0", "MAM", "ready"],
        ["1", "MAM", "ready"],
        ["2", "MAM", "ready"],
        ["3", "change_face", "ready"],
    ]
    shell('sed -i "s/2: MAM/2: none/" "$MIC_CONFIG"')
    waiting.until(
        lambda: "the file keeps its GPU empty" in terminal.read().partition("Ctrl-C ends")[2],
        "the daemon's log on the terminal",
        timeout=20,
    )
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 0
    assert "Everything of the demo is removed." in terminal.read()
    assert gone(home)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rc", "after"),
    [
        (signal.SIGTERM, 143, "$ mic-supervisor check"),
        (signal.SIGTERM, 143, "Apply: 3 as desired."),
        (signal.SIGINT, 130, "3. The models answer"),
        (signal.SIGHUP, 129, "2. See what would happen"),
    ],
)
def test_a_signal_ends_it_at_any_step_and_leaves_nothing(
    home: Home, tmp_path: Path, number: signal.Signals, rc: int, after: str
) -> None:
    log = tmp_path / "output"
    with log.open("wb") as output:
        process = start(home, "--once", output=output.fileno())
        waiting.until(lambda: after in log.read_text(), after, timeout=60)
        process.send_signal(number)
        assert process.wait(60) == rc, log.read_text()
    assert "Traceback" not in log.read_text()
    assert gone(home)


def test_a_command_that_nobody_waits_for_any_more_is_ended(home: Home) -> None:
    """As one is left whose start was cut short by a signal, between fork and the next line."""
    code = (
        "import subprocess\n"
        "from mic_supervisor.demo.world import World\n"
        "world = World()\n"
        "subprocess.Popen(['sleep', '600'], env=world.environment())\n"
        "world.close()\n"
        "print(world.processes(), world.path.exists())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=home.env, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "[] False\n"), done.stderr


def _sitecustomize(home: Home, code: str) -> None:
    """Have every Python of the demo run `code` first."""
    path = home.tmp / "site"
    path.mkdir()
    (path / "sitecustomize.py").write_text(code)
    home.env["PYTHONPATH"] = str(path)


@pytest.mark.slow
def test_a_step_that_goes_wrong_fails_it_and_leaves_nothing(home: Home, tmp_path: Path) -> None:
    """A tour that says what did not happen would be worse than none."""
    _sitecustomize(
        home,
        "import os, sys\n"
        "if 'plan' in sys.orig_argv:\n"
        "    print('No changes.', flush=True)\n"
        "    os._exit(0)\n",
    )
    log = tmp_path / "output"
    with log.open("wb") as output:
        assert start(home, "--once", output=output.fileno()).wait(60) == 1
    assert log.read_text().endswith(
        "$ mic-supervisor plan\n"
        "No changes.\n"
        "error: the tour went wrong: `mic-supervisor plan` does not say 'Plan: 3 to create.'\n"
    )
    assert gone(home)


def test_a_reader_that_leaves_ends_it(home: Home) -> None:
    process = subprocess.Popen(
        [PROGRAM, "demo", "--once"], env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _mine.append(process)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    complaint = process.stderr.read().decode()
    process.wait(60)
    assert "Traceback" not in complaint
    assert gone(home)


def test_there_is_no_place_for_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from mic_supervisor.demo import world
    from mic_supervisor.errors import MicError

    monkeypatch.setattr(world, "_is_free", lambda port: False)
    with pytest.raises(MicError) as caught:
        world.World()
    assert caught.value.message == "cannot find 20 free ports in a row from 21000 to 31999"
    monkeypatch.undo()
    monkeypatch.setattr(world.tempfile, "mkdtemp", _no_space)
    with pytest.raises(MicError) as caught:
        world.World()
    assert caught.value.message == "cannot make a directory for the demo: No space left on device"


def _no_space(**_: str) -> str:
    raise OSError(28, "No space left on device")
