"""Starts one host process through a keeper, in the place of its previous run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import ProcessSpec
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.identity import IDENTITY, identity_variables
from mic_supervisor.runtimes.keeper import program, records, stop
from mic_supervisor.runtimes.keeper.records import BadRecord, Record
from mic_supervisor.runtimes.keeper.stop import Options

START_TIMEOUT = 30.0
"""Seconds after which a start that gives no answer has failed."""


def start_kept(
    path: Path, record: Record, spec: ProcessSpec, logs: Path, handle: int, options: Options
) -> None:
    """Returns once the program was executed; `handle` is the lock on `path`.

    A failure leaves what was there before. Raises RuntimeRefused, PreflightFailed and OSError.
    """
    before = {
        name: (path / name).read_bytes()
        for name in (program.RECORD, program.EXIT)
        if (path / name).is_file()
    }
    try:
        # Before the keeper exists: whoever observes now sees that this is about to run.
        records.write(path, record)
        _spawn(path, _payload(record, spec, logs, options), handle)
    except BaseException:  # an interrupt too must leave nothing half-started behind
        _undo(path, record, before, options)
        if logs != path:
            shutil.rmtree(logs, ignore_errors=True)
        raise


def _undo(path: Path, record: Record, before: dict[str, bytes], options: Options) -> None:
    try:
        made = records.load(path)
    except BadRecord:
        made = None
    if made is not None and made.run_id == record.run_id:
        stop.kill_now(path, made, options)
    if not before:
        records.discard(path)
    for name in reversed(before):  # the exit status first
        draft = path / f".{name}.before"
        draft.write_bytes(before[name])
        draft.chmod(0o600)
        draft.replace(path / name)


def _variables(record: Record) -> dict[str, str]:
    """What names the run to whoever finds one of its processes without a record."""
    return {**identity_variables(record.name, record.identity), records.RUN_ID: record.run_id}


def _payload(record: Record, spec: ProcessSpec, logs: Path, options: Options) -> dict[str, Any]:
    who = checks.account(spec.user)
    return {
        "record": record.document(),
        "command": list(spec.command),
        "env": {**checks.environment(spec, who), **_variables(record)},
        "working_dir": record.working_dir,
        "limits": checks.limits(spec),
        "user": {"uid": who.uid, "gid": who.gid, "groups": who.groups} if who.switch else None,
        "stop_signal": checks.signal_number(spec.stop_signal) or signal.SIGTERM.value,
        "stop_timeout": spec.stop_timeout,
        "remains_grace": options.remains_grace,
        "logs": str(logs),
        "log_max_size": options.log_max_size,
    }


def _spawn(path: Path, payload: dict[str, Any], handle: int) -> None:
    own = {name: payload["env"][name] for name in (IDENTITY, records.RUN_ID)}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", program.__file__, str(path), str(handle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(handle,),
        env={"PATH": checks.DEFAULT_PATH, "LANG": "C.UTF-8", **own},
        cwd="/",
        start_new_session=True,
    )
    try:
        answer, _ = process.communicate(json.dumps(payload).encode(), START_TIMEOUT)
    except BaseException as error:
        # The keeper is in the session of the process that it forked from, and may not have come
        # as far as the record; without it, a child that waits at the barrier goes.
        for one in procfs.processes().values():
            if one.session == process.pid:
                procfs.send_signal(one.pid, one.start_time, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            reason = f"its keeper gave no answer within {START_TIMEOUT:g} s"
            raise RuntimeRefused(f"cannot start {path.name}: {reason}") from error
        raise
    said = answer.decode(errors="replace").strip().rpartition("\n")[2]
    try:
        reason = json.loads(said).get("error")
    except ValueError:
        reason = f"its keeper failed: {said or 'it was killed'}"
    if reason is not None:
        raise RuntimeRefused(f"cannot start {path.name}: {reason}")
