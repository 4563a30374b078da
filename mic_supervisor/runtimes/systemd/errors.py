"""What D-Bus and PID 1 answer, in words for the operator."""

from __future__ import annotations

from mic_supervisor.errors import MicError, RuntimeRefused, RuntimeUnavailable
from mic_supervisor.runtimes.systemd.bus import Lost, Refused

_DBUS = "org.freedesktop.DBus.Error."
_SYSTEMD = "org.freedesktop.systemd1."
_AWAY = ("ServiceUnknown", "NameHasNoOwner", "Spawn.ServiceNotFound", "Disconnected")
_BUSY = ("NoReply", "Timeout", "TimedOut", "LimitsExceeded", "NoMemory")
_DENIED = ("AccessDenied", "AuthFailed", "InteractiveAuthorizationRequired")

# Results of a job, see JobRemoved in org.freedesktop.systemd1(5).
_JOBS = {
    "canceled": "somebody else cancelled it",
    "timeout": "it did not come up in time",
    "dependency": "something that it depends on failed",
    "collected": "systemd dropped the job",
}


def explain(action: str, error: Refused | Lost) -> MicError:
    """ "cannot ACTION: cause", with a way out where one is known."""
    if isinstance(error, Lost):
        return _lost(action, error)
    short = error.name.removeprefix(_DBUS)
    if short in _AWAY:
        return RuntimeUnavailable(
            f"cannot {action}: systemd is not on the system bus",
            hint="where systemd is not PID 1, set MIC_PROCESS_RUNTIME=subprocess",
        )
    if short in _BUSY:
        return RuntimeUnavailable(f"cannot {action}: systemd gave no answer: {error.text}")
    if short in _DENIED:
        return RuntimeRefused(f"cannot {action}: systemd lets only root do it", hint="run as root")
    if error.name == f"{_SYSTEMD}TransactionIsDestructive":
        return RuntimeRefused(
            f"cannot {action}: the machine is going down, or the unit is being stopped",
            hint="see systemctl list-jobs",
        )
    if error.name == f"{_SYSTEMD}UnitExists":
        return RuntimeRefused(
            f"cannot {action}: there is a unit of that name already",
            hint="see which: systemctl list-unit-files 'mic-*'",
        )
    if error.name == f"{_SYSTEMD}UnitMasked":
        return RuntimeRefused(f"cannot {action}: {error.text}", hint="see systemctl unmask")
    return RuntimeRefused(f"cannot {action}: systemd refused: {error.text}")


def _lost(action: str, error: Lost) -> RuntimeUnavailable:
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return RuntimeUnavailable(
            f"cannot {action}: there is no D-Bus to reach systemd by",
            hint="install it: apt-get install dbus",
        )
    if isinstance(cause, ConnectionRefusedError):
        return RuntimeUnavailable(
            f"cannot {action}: D-Bus does not run", hint="start it with: systemctl start dbus"
        )
    if isinstance(cause, PermissionError):
        return RuntimeUnavailable(
            f"cannot {action}: the system bus may not be used by this user", hint="run as root"
        )
    return RuntimeUnavailable(f"cannot {action}: systemd cannot be reached: {error}")


def job_reason(result: str) -> str:
    """Why a job did not come to "done"; for a result other than "failed"."""
    return _JOBS.get(result, f"systemd ended the job with “{result}”")
