"""The tour: what a first hour with the program would be, in seconds, each step checked.

Steps 1 to 6 use the file and single commands; from step 7 on the daemon runs.
"""

from __future__ import annotations

import difflib
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import click

from mic_supervisor.demo.world import DemoFailed, World

_TIMEOUT = 15.0  # seconds for what takes one

_FILE = """\
version: 1

models:
  MAM:
    backend: process
    command: [/bin/sh, {path}/serve, "${{model}}", "${{port}}"]
    args: [--ready-delay, "0.3"]
    probe: {{http: /health, period: 300ms}}
  change_face:
    backend: process
    command: [/bin/sh, {path}/serve, "${{model}}", "${{port}}"]
    probe: {{http: /health, period: 300ms}}

gpus:
  0: MAM
  1: MAM
  2: change_face
  3: none
"""


class Screen:
    """Writes to standard output at once, since commands that follow write to the same place."""

    def __init__(self) -> None:
        self._number = 0
        self._plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))

    def heading(self, text: str) -> None:
        self._number += 1
        self._put("")
        self._put(f"{self._number}. {text}", bold=True)

    def say(self, text: str) -> None:
        self._put(text.rstrip("\n"))

    def command(self, line: str) -> None:
        self._put("")
        self._put(f"$ {line}", fg="cyan")

    def note(self, text: str) -> None:
        """What a check found out."""
        self._put(f"=> {text}", fg="green")

    def _put(self, text: str, *, bold: bool = False, fg: str | None = None) -> None:
        click.echo(text if self._plain else click.style(text, bold=bold or None, fg=fg))
        sys.stdout.flush()


class Model(NamedTuple):
    """One running instance, as status and the model itself tell."""

    gpu: int
    model: str
    url: str
    pid: int


class Tour:
    """Plays the steps in `world`. A step that does not do what it says raises DemoFailed."""

    def __init__(self, world: World, screen: Screen) -> None:
        self._world = world
        self._screen = screen
        self._models: dict[str, Model] = {}  # as of the last `_status`

    def play(self) -> None:
        self._screen.say(
            "A supervisor on four simulated GPUs. The models are real processes; there is no\n"
            "root, no Docker and no GPU in it. All of it lives in\n"
            f"{self._world.path}, and goes away at the end."
        )
        self._write_the_file()
        self._first_apply()
        self._use_it()
        self._change_it()
        self._break_it()
        self._crash()
        self._daemon()
        self._daemon_dies()

    # --- single commands ------------------------------------------------------------------------

    def _write_the_file(self) -> None:
        self._screen.heading("One file says which model runs on which GPU")
        self._world.write(_FILE.format(path=self._world.path))
        self._screen.command(f"cat {self._world.config}")
        self._screen.say(self._world.config.read_text())
        self._mic("check", rc=0, expect=["valid: 4 GPUs, 1 of them kept empty; 2 models"])

    def _first_apply(self) -> None:
        self._screen.heading("See what would happen, then have it happen")
        self._mic("plan", rc=0, expect=["Plan: 3 to create."])
        self._mic("apply", rc=0)
        self._status(["0 MAM", "1 MAM", "2 change_face"])

    def _use_it(self) -> None:
        self._screen.heading("The models answer, and there is nothing left to do")
        model = self._models["2 change_face"]
        self._screen.command(f"curl -d '{{\"image\": 7}}' {model.url}/infer")
        try:
            self._screen.say(_post(model.url, {"image": 7}))
        except OSError as error:
            raise DemoFailed(
                f"the tour went wrong: {model.url} does not answer: {error}"
            ) from error
        self._mic("plan", rc=0, expect=["No changes."])

    def _change_it(self) -> None:
        self._screen.heading("Edit the file: a setting, a move, a GPU to keep empty")
        text = self._world.config.read_text()
        self._edit(
            text.replace('"0.3"', '"0.6"').replace(
                "2: change_face\n  3: none", "2: none\n  3: change_face"
            )
        )
        self._mic(
            "plan",
            rc=0,
            expect=[
                'command[5]: "0.3" -> "0.6"',
                "the file keeps its GPU empty",
                "Plan: 1 to create, 2 to replace, 1 to remove.",
            ],
        )
        self._screen.say("MAM is replaced on one GPU at a time, so that the other one serves.")
        self._mic("apply", rc=0)
        self._status(["0 MAM", "1 MAM", "3 change_face"])

    def _break_it(self) -> None:
        self._screen.heading("Save a file with mistakes: it is refused, and nothing stops")
        good = self._edit(
            self._world.config.read_text()
            .replace("1: MAM", "1: MAN")
            .replace("period: 300ms", "period: 300", 1)
        )
        location = f"{self._world.config}:"
        self._mic("apply", rc=1, expect=[location, "unknown model 'MAN'", "did you mean MAM?"])
        self._expect(self._pids_answer(), "a model stopped because of a broken file")
        self._screen.note("all three processes still answer, with the PIDs they had")
        self._world.write(good)

    def _crash(self) -> None:
        self._screen.heading("A model crashes")
        victim = self._models["0 MAM"]
        self._kill(victim)
        self._until(lambda: "SIGKILL" in self._world.read("plan")[1], "its end is not seen")
        self._mic("plan", rc=0, expect=["SIGKILL", "Plan: 1 to start."])
        self._mic("apply", rc=0)
        fresh = _pid(victim.url)
        self._expect(fresh not in (None, victim.pid), "the model does not answer again")
        self._models["0 MAM"] = victim._replace(pid=fresh or 0)
        self._screen.note(f"it runs again, as PID {fresh}")

    # --- with the daemon ------------------------------------------------------------------------

    def _daemon(self) -> None:
        self._screen.heading("Leave it to the daemon, as systemd would start it")
        self._screen.command("mic-supervisor run &")
        self._world.start_daemon()
        self._ready(3)
        self._expect(self._pids_answer(), "the daemon restarted what it should adopt")
        self._screen.note("it found what runs and took it over: the PIDs are the same")
        victim = self._models["3 change_face"]
        began = self._kill(victim)
        self._until(lambda: self._replaced(victim), "the daemon does not bring the model back")
        self._screen.note(
            f"the daemon brought it back; it was away for {time.monotonic() - began:.1f} s"
        )
        self._mic("history", "change_face", rc=0, expect=["SIGKILL"], last=5)
        self._edit(self._world.config.read_text().replace("2: none", "2: MAM"))
        self._screen.say("The daemon watches the file, so saving it is enough:")
        self._until(lambda: "2 MAM" in self._ready_now(), "the daemon does not follow the file")
        self._status(["0 MAM", "1 MAM", "2 MAM", "3 change_face"])
        self._screen.say("\nPrograms ask over HTTP, which only reads; a browser gets a page:")
        self._screen.command(f"curl {self._world.url}/readyz")
        answers: list[str] = []
        self._until(
            lambda: _is_answered(f"{self._world.url}/readyz", answers),
            "the daemon does not say over HTTP that all is ready",
        )
        self._screen.say(answers[-1])

    def _daemon_dies(self) -> None:
        self._screen.heading("The supervisor itself crashes: the models do not notice")
        self._screen.command(f"kill -9 {self._world.daemon_pid}    # the daemon")
        self._world.kill_daemon()
        self._screen.command("mic-supervisor run &")
        self._world.start_daemon()
        self._ready(4)
        self._expect(self._pids_answer(), "a model stopped with the daemon")
        self._screen.note("the daemon is back, and every model has the PID that it had")

    # --- what steps are made of -----------------------------------------------------------------

    def _mic(
        self, *arguments: str, rc: int, expect: list[str] | None = None, last: int = 0
    ) -> None:
        """Show a command and its output. `expect`: what the output has to contain.

        Without `expect` the command writes to our terminal itself, and may draw on it. `last` shows
        only so many lines.
        """
        tail = f" | tail -n {last}" if last else ""
        line = " ".join(("mic-supervisor", *arguments))
        self._screen.command(f"{line}{tail}")
        if expect is None:
            found, text = self._world.mic(*arguments), ""
        else:
            found, text = self._world.read(*arguments)
            self._screen.say("\n".join(text.splitlines()[-last:]))
        self._expect(found == rc, f"`{line}` exits with {found} instead of {rc}")
        for part in expect or ():
            self._expect(part in text, f"`{line}` does not say {part!r}")

    def _edit(self, text: str) -> str:
        """Save another file and show the difference; what it said before."""
        before = self._world.write(text)
        lines = difflib.unified_diff(before.splitlines(), text.splitlines(), "", "", "", "", 0, "")
        changed = [line for line in lines if line[:2] not in ("--", "++", "@@")]
        self._expect(bool(changed), "the edit changed nothing")
        self._screen.command(f"$EDITOR {self._world.config}")
        self._screen.say("\n".join(changed))
        return before

    def _kill(self, victim: Model) -> float:
        """Kill a model's process, and wait until it is gone; when that was (monotonic)."""
        self._screen.command(f"kill -9 {victim.pid}    # {victim.model} on GPU {victim.gpu}")
        os.kill(victim.pid, signal.SIGKILL)
        began = time.monotonic()
        self._until(lambda: _pid(victim.url) != victim.pid, f"PID {victim.pid} does not end")
        return began

    def _status(self, wanted: list[str]) -> None:
        """Show the status. Exactly these are ready and answer, named by GPU and model: "0 MAM"."""
        self._mic("status", rc=0)
        found = {}
        for row in self._world.status()["instances"]:
            gpu, model = row["gpus"][0]["index"], row["model"]
            url = row["endpoints"].get("http", "")
            pid = _pid(url) if row["phase"] == "ready" else None
            if pid is not None:
                found[f"{gpu} {model}"] = Model(gpu, model, url, pid)
        self._expect(sorted(found) == wanted, f"{sorted(found)} answers instead of {wanted}")
        self._models = found

    def _ready_now(self) -> list[str]:
        rows = self._world.status()["instances"]
        return [f"{r['gpus'][0]['index']} {r['model']}" for r in rows if r["phase"] == "ready"]

    def _ready(self, count: int) -> None:
        self._until(lambda: len(self._ready_now()) == count, f"{count} models do not get ready")

    def _replaced(self, victim: Model) -> bool:
        return _pid(victim.url) not in (None, victim.pid) and len(self._ready_now()) == 3

    def _pids_answer(self) -> bool:
        return all(_pid(model.url) == model.pid for model in self._models.values())

    def _until(self, condition: Any, otherwise: str) -> None:
        self._expect(self._world.wait_for(condition, _TIMEOUT), otherwise)

    def _expect(self, good: bool, otherwise: str) -> None:
        if not good:
            raise DemoFailed(f"the tour went wrong: {otherwise}")


def _pid(url: str) -> int | None:
    """The PID of the model server that answers at `url`; None when nobody does."""
    try:
        answer = json.loads(_post(url, None))
    except (OSError, ValueError):
        return None
    return int(answer["pid"])


def _is_answered(url: str, answers: list[str]) -> bool:
    """Whether a GET succeeds; its answer is appended to `answers`."""
    try:
        answers.append(_read(url))
    except OSError:  # 503 is one of them
        return False
    return True


def _post(url: str, document: Any) -> str:
    """The answer of POST /infer. Raises OSError."""
    return _read(f"{url}/infer", json.dumps(document).encode())


def _read(url: str, body: bytes | None = None) -> str:
    """The answer of a GET, or of a POST of `body`. Raises OSError."""
    request = urllib.request.Request(url, body)
    # Not through a proxy that the environment may name: this is our own machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=5.0) as answer:
        text: str = answer.read().decode()
    return text


# --- from the beginning to the end --------------------------------------------------------------


def play(*, once: bool) -> None:
    """The tour, and unless `once` a world that stays until Ctrl-C. Leaves nothing behind."""
    screen = Screen()
    with _ended_by_signals():
        world = World()
        began = time.monotonic()
        try:
            Tour(world, screen).play()
            seconds = time.monotonic() - began
            if not once:
                _stay(world, screen)
        finally:
            world.close()
    screen.say(f"\nThe tour took {seconds:.1f} s. Everything of the demo is removed.")


def _stay(world: World, screen: Screen) -> None:
    """Show what the daemon logs, until Ctrl-C or SIGTERM."""
    screen.heading("Your turn")
    screen.say(
        f"The daemon keeps running, and shows itself at {world.url}/\n"
        "In another terminal:\n\n"
        f"  . {world.env}\n"
        "  mic-supervisor status\n"
        f"  $EDITOR {world.config}\n\n"
        "What the daemon does about it is shown here. Ctrl-C ends the demo."
    )
    screen.say("")
    try:
        with world.daemon_log.open(errors="replace") as log:
            log.seek(0, 2)
            while True:
                text = log.read()
                if text:
                    screen.say(text)
                elif not world.daemon_runs:
                    screen.say("The daemon has ended. The models run until Ctrl-C.")
                    signal.pause()
                else:
                    time.sleep(0.2)
    except (KeyboardInterrupt, _Ended):
        screen.say("")


class _Ended(SystemExit):
    """SIGTERM or SIGHUP."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: with everything removed."""

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise _Ended(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers[:2]:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stdout.flush()
