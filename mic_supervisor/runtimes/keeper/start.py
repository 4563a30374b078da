"""Starts one host process through a keeper, in the place of its previous run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import Launch, ProcessSpec
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.keeper import program, records
from mic_supervisor.runtimes.keeper import stop as stopping
from mic_supervisor.runtimes.keeper.records import BadRecord, Record
from mic_supervisor.runtimes.keeper.stop import Options
from mic_supervisor.runtimes.systemd_unit import IDENTITY, identity_variables

START_TIMEOUT = 30.0
"""Seconds after which a start that gives no answer has failed."""


def start(path: Path, record: Record, spec: ProcessSpec, handle: int, options: Options) -> None:
    """Returns once the program was executed; `handle` is the lock on `path`.

    A failure leaves what was there before. Raises RuntimeRefused, PreflightFailed and OSError.
    """
    aside = _put_aside(path)
    try:
        # Before the keeper exists: whoever observes now sees that this is about to run.
        program.write_json(handle, program.RECORD, record.document())
        _spawn(path, record, spec, handle, options)
    except BaseException:  # an interrupt too must leave nothing half-started behind
        _undo(path, record, aside, options)
        raise
    if aside is not None:
        _keep(aside)


def _keep(aside: Path) -> None:
    """What was put aside is the previous run from now on, if it came as far as having a log."""
    if not (aside / program.LOG).exists():
        shutil.rmtree(aside)
        return
    target = aside.with_name(records.PREVIOUS)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def _put_aside(path: Path) -> Path | None:
    """Move an ended run's files out of the way of the next; where they are, None if none were.

    Record and exit status stay in place as well, so that whoever is killed here leaves a record
    of a run that has ended.
    """
    aside = path / f"{records.PREVIOUS}.new"
    if aside.exists():  # a start was cut short before it could do this
        _keep(aside)
    if not (path / program.RECORD).exists():
        return None
    aside.mkdir(mode=0o700)
    for entry in sorted(path.iterdir()):
        if entry.name in (program.RECORD, program.EXIT):
            os.link(entry, aside / entry.name)
        elif entry.name == program.LOG or entry.name.startswith(f"{program.LOG}."):
            entry.rename(aside / entry.name)
    return aside


def _undo(path: Path, record: Record, aside: Path | None, options: Options) -> None:
    try:
        made = records.load(path)
    except BadRecord:
        made = None
    if made is not None and made.run_id == record.run_id:
        stopping.kill_now(path, made, options)
    if aside is None:
        records.discard(path)
        return
    for entry in sorted(path.iterdir()):
        if entry.is_file():
            entry.unlink()
    for entry in sorted(aside.iterdir()):
        entry.rename(path / entry.name)
    aside.rmdir()


def _payload(record: Record, spec: ProcessSpec, options: Options) -> dict[str, Any]:
    who = checks.account(spec.user)
    return {
        "record": record.document(),
        "command": list(spec.command),
        "env": {
            **checks.environment(spec, who),
            **_variables(record, spec),
            records.RUN_ID: record.run_id,
        },
        "working_dir": record.working_dir,
        "limits": checks.limits(spec),
        "user": {"uid": who.uid, "gid": who.gid, "groups": who.groups} if who.switch else None,
        "stop_signal": checks.signal_number(spec.stop_signal) or signal.SIGTERM.value,
        "stop_timeout": spec.stop_timeout,
        "remains_grace": options.remains_grace,
        "log_max_size": options.log_max_size,
        "log_files": options.log_files,
    }


def _variables(record: Record, spec: ProcessSpec) -> dict[str, str]:
    return identity_variables(Launch(record.name, "subprocess", record.identity, spec))


def _spawn(path: Path, record: Record, spec: ProcessSpec, handle: int, options: Options) -> None:
    payload = json.dumps(_payload(record, spec, options)).encode()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", program.__file__, str(path), str(handle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(handle,),
        env={
            "PATH": checks.DEFAULT_PATH,
            "LANG": "C.UTF-8",
            # Whose it is, should the record be lost.
            IDENTITY: _variables(record, spec)[IDENTITY],
            records.RUN_ID: record.run_id,
        },
        cwd="/",
        start_new_session=True,
    )
    try:
        answer, _ = process.communicate(payload, START_TIMEOUT)
    except BaseException as error:
        # The keeper is in the session of the process that it forked from, and may not have come
        # as far as the record; without it, a child that waits at the barrier goes.
        for one in procfs.processes().values():
            if one.session == process.pid:
                procfs.send_signal(one.pid, one.start_time, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            reason = f"its keeper gave no answer within {START_TIMEOUT:g} s"
            raise RuntimeRefused(f"cannot start {record.name}: {reason}") from error
        raise
    said = answer.decode(errors="replace").strip().rpartition("\n")[2]
    try:
        result = json.loads(said)
    except ValueError:
        reason = f"its keeper failed: {said or 'it was killed'}"
    else:
        if "error" not in result:
            return
        reason = result["error"]
    raise RuntimeRefused(f"cannot start {record.name}: {reason}")
