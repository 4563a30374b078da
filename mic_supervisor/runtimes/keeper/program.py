"""The keeper: one small process beside each host process, where systemd is not there to do it.

Run as `python -I -S program.py DIRECTORY LOCK`, with the payload as JSON on stdin and a pipe as
stdout. It uses the standard library only, and imports all it needs before it starts anything, so
that an upgrade of the package below it cannot break it. It

1. detaches, and becomes the subreaper of everything that its child will ever start;
2. forks the child, which waits at a barrier;
3. writes the record, which names both by PID and start time, and only then lets the child exec:
   whoever is killed, and whenever, no process runs that no record names;
4. answers one line of JSON on stdout, `{"pid": …}` or `{"error": …}`;
5. keeps the log within its bounds, and ends what the main process left behind when it ended;
6. writes the exit status once nothing of the tree is left.

It holds the lock on the record's directory (flock on the descriptor LOCK) for as long as it lives.
SIGTERM makes it stop its child. The payload, which holds secrets, is on no command line and in no
file.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
import warnings  # noqa: F401 - os.execvpe imports it, when the user may read no library any more
from typing import Any

RECORD = "record.json"
EXIT = "exit.json"
LOG = "log"
NAME = "mic-keeper"
MAIN = "MIC_MAIN"
"""Variable "PID:TICKS:PID:TICKS" of a main process: itself and its keeper, each by PID and start
time. Whoever copied the environment, or inherited it, is not who it names.
"""

_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_WAITED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
_PAUSE = 1.0  # seconds between two looks at the log


def _stat(pid: int | str) -> list[bytes]:
    """The fields of /proc/PID/stat from `state` on: 1 is the parent, 19 the start time in ticks."""
    with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib costs start-up time
        return file.read().rpartition(b")")[2].split()


def _anchor(pid: int) -> dict[str, int]:
    return {"pid": pid, "start_time": int(_stat(pid)[19])}


def write_json(directory: int, name: str, document: dict[str, Any]) -> None:
    """Write a file of the directory that `directory` is open on, whole or not at all."""
    text = json.dumps(document).encode()
    draft = f".{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with os.fdopen(os.open(draft, flags, 0o600, dir_fd=directory), "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)


def rotate(directory: str, log: int, most: int) -> None:
    """Move what the log holds to `log.1`. Raises OSError where that cannot be kept: a full disk.

    The child writes to the very file, so that it depends on nobody; hence copy and truncate. What
    arrives between the last read and the truncation, microseconds, is lost. After a burst of more
    than twice `most` bytes only the last `most` are kept.
    """
    draft = f"{directory}/.{LOG}.1"
    size = os.fstat(log).st_size
    offset = size - most if size > 2 * most else 0
    end = offset + 2 * most  # also where the writer is faster than the copy
    try:
        with open(f"{directory}/{LOG}", "rb") as source, open(draft, "wb") as target:  # noqa: PTH123
            while sent := os.sendfile(target.fileno(), source.fileno(), offset, end - offset):
                offset += sent
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)  # noqa: PTH108
        raise
    finally:
        os.ftruncate(log, 0)  # the bound holds, whatever happens
    os.rename(draft, f"{directory}/{LOG}.1")  # noqa: PTH104 - readers go by the new file


class Keeper:
    """One run of one process. Single-threaded: `waitpid` and `kill` cannot race each other."""

    def __init__(self, payload: dict[str, Any], directory: int) -> None:
        self.payload = payload
        self.directory = directory
        self.child = 0
        self.status: int | None = None
        self.finished_at: float | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.log = os.open(f"{payload['logs']}/{LOG}", flags, 0o600)

    def start(self) -> str | None:
        """Start the child; an error message when it could not be."""
        barrier, release = os.pipe()
        failure, report = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            os.close(release)
            os.close(failure)
            self._become(barrier, report)
        os.close(barrier)
        os.close(report)
        record = self.payload["record"]
        record |= {
            "keeper": _anchor(os.getpid()),
            "child": _anchor(self.child),
            "started_at": time.time(),
        }
        try:
            write_json(self.directory, RECORD, record)
        except OSError as error:
            os.close(release)  # the child reads the end of the file, and goes
            os.waitpid(self.child, 0)
            return f"its record cannot be written: {error}"
        with contextlib.suppress(BrokenPipeError):  # it has failed before the barrier
            os.write(release, b"!")
        os.close(release)
        with os.fdopen(failure, "rb") as pipe:
            problem = pipe.read().decode(errors="replace")
        self.payload["env"] = None
        if problem:
            os.waitpid(self.child, 0)
        return problem or None

    def _become(self, barrier: int, report: int) -> None:
        """The child's side of the fork: never returns."""
        try:
            self._set_up()
            if os.read(barrier, 1):
                command = self.payload["command"]
                names = [_anchor(pid).values() for pid in (os.getpid(), os.getppid())]
                main = ":".join(str(part) for name in names for part in name)
                environment = {**self.payload["env"], MAIN: main}
                os.execvpe(command[0], command, environment)
        except Exception as error:  # noqa: BLE001 - whatever it is, only the pipe can tell of it
            os.write(report, str(error).encode(errors="backslashreplace")[:4000])
        finally:
            os._exit(127)

    def _set_up(self) -> None:
        payload = self.payload
        os.setsid()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError):  # some are the C library's own
                signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (self.log, 1), (self.log, 2)):
            os.dup2(source, target)
        for name, value in payload["limits"].items():
            bound = resource.RLIM_INFINITY if value == -1 else value
            try:
                resource.setrlimit(getattr(resource, name), (bound, bound))
            except (OSError, ValueError) as error:
                raise OSError(f"{name} cannot be set to {value}: {error}") from error
        if payload["user"]:
            # So that the program may open /dev/stdout, which is this file, anew.
            os.fchown(self.log, payload["user"]["uid"], payload["user"]["gid"])
            os.setgroups(payload["user"]["groups"])
            os.setgid(payload["user"]["gid"])
            os.setuid(payload["user"]["uid"])
        os.umask(0o022)
        os.chdir(payload["working_dir"])
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def watch(self) -> None:
        """Until the main process has ended."""
        kill_at: float | None = None
        while self.status is None:
            left = _PAUSE if kill_at is None else kill_at - time.monotonic()
            got = signal.sigtimedwait(_WAITED, min(max(left, 0.01), _PAUSE))
            if got and got.si_signo != signal.SIGCHLD and kill_at is None:
                os.kill(self.child, self.payload["stop_signal"])
                kill_at = time.monotonic() + self.payload["stop_timeout"]
            self._reap()
            if self.status is None and kill_at is not None and time.monotonic() >= kill_at:
                os.kill(self.child, signal.SIGKILL)
            self._bound_log()

    def _bound_log(self) -> None:
        try:
            if os.fstat(self.log).st_size >= self.payload["log_max_size"]:
                rotate(self.payload["logs"], self.log, self.payload["log_max_size"])
        except OSError as error:
            # A log out of bounds is no reason to lose the process.
            sys.stderr.write(f"mic keeper: cannot rotate the log: {error}\n")

    def _reap(self) -> bool:
        """Collect whoever ended; True when no child is left.

        A subreaper without children has no descendants: orphans would be its children.
        """
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return False
                if pid == self.child:
                    self.status = os.waitstatus_to_exitcode(status)
                    self.finished_at = time.time()
        except ChildProcessError:
            return True

    def end_remains(self) -> None:
        """TERM, then KILL, for what the main process left, until nothing is left.

        Only direct children are signalled: their PIDs cannot be used again before they are reaped
        here, and their own children become direct ones when they end.
        """
        kill_at = time.monotonic() + self.payload["remains_grace"]
        asked: set[int] = set()
        while not self._reap():
            force = time.monotonic() >= kill_at
            for pid in self._children():
                if force:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    asked.add(pid)
                    os.kill(pid, signal.SIGTERM)
                    os.kill(pid, signal.SIGCONT)
            signal.sigtimedwait(_WAITED, 0.05)

    def _children(self) -> list[int]:
        me = b"%d" % os.getpid()
        found = []
        for entry in os.listdir("/proc"):  # noqa: PTH208
            with contextlib.suppress(OSError, IndexError):  # gone, or no process
                if _stat(entry)[1] == me:
                    found.append(int(entry))
        return found

    def write_exit(self, error: str | None = None) -> None:
        """The last thing that is written of a run; a directory that is gone is nobody's loss."""
        code = self.status if self.status is not None and self.status >= 0 else None
        number = -self.status if self.status is not None and self.status < 0 else None
        document = {
            "run_id": self.payload["record"]["run_id"],
            "exit_code": code,
            "signal": number,
            "finished_at": self.finished_at or time.time(),
            "error": error,
        }
        try:
            try:
                write_json(self.directory, EXIT, document)
            except FileNotFoundError:  # it was deleted; there may be another one in its place
                self.directory = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                write_json(self.directory, EXIT, document)
        except OSError as problem:
            sys.stderr.write(f"mic keeper: cannot write {EXIT}: {problem}\n")


def _answer(document: dict[str, Any]) -> None:
    """To the runtime, which may have been killed meanwhile."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(document).encode() + b"\n")


def _become_subreaper() -> None:
    # Not above: who starts keepers imports this module, too, and has no use for it.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, NAME.encode(), 0, 0, 0)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def main() -> None:
    directory = int(sys.argv[2])
    os.set_inheritable(directory, False)
    os.umask(0o077)
    text = sys.stdin.buffer.read()
    try:
        payload = json.loads(text)
    except ValueError:
        os._exit(1)  # the runtime was killed while it wrote: nothing was started
    del text
    if os.fork():
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir("/")
    _become_subreaper()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    keeper = Keeper(payload, directory)
    problem = keeper.start()
    if problem is not None:
        keeper.write_exit(error=f"it could not be started: {problem}")
        _answer({"error": problem})
        os._exit(1)
    _answer({"pid": keeper.child})
    os.dup2(keeper.log, 1)
    os.dup2(keeper.log, 2)
    keeper.watch()
    keeper.end_remains()
    keeper.write_exit()
    os._exit(0)


if __name__ == "__main__":
    main()
