"""mic-supervisor doctor"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import json_option, print_json
from mic_supervisor.errors import ConfigError
from mic_supervisor.text import printable

if TYPE_CHECKING:
    from mic_supervisor.doctor import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(name="doctor")
@json_option
def command(as_json: bool) -> int:
    """Check this machine, and say how to fix what is wrong.

    What is installed, the configuration with its files and images, backends of other packages, the
    driver and the GPUs, Docker and its NVIDIA side, systemd and the unit, the daemon, ports,
    directories, the clock.
    Nothing is changed. Each check is on its own, and has 15 seconds.

    Exits with 0 when nothing fails (warnings are no failure), 1 otherwise.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.doctor import examine, fail
    from mic_supervisor.doctor.checks import checks, installation_checks

    try:
        found = wiring.settings()
    except ConfigError as error:
        wrong = fail("settings", error.message, "correct it: what else is checked depends on it")
        findings = [wrong, *examine(installation_checks(Registry()))]
    else:
        findings = examine(checks(found))
    if as_json:
        print_json(document(findings))
    elif sys.stdout.isatty():
        colours = not os.environ.get("NO_COLOR")
        click.echo("\n".join(table(findings, get_terminal_size().columns, colours=colours)))
    else:
        click.echo("\n".join(lines(findings)))
    return 1 if any(item.level == "fail" for item in findings) else 0


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    from mic_supervisor.host import host_name

    return {
        "version": 1,
        "host": host_name(),
        "ok": not any(item.level == "fail" for item in findings),
        "findings": [
            {"level": item.level, "subject": item.subject, "text": item.text, "mend": item.fix}
            for item in findings
        ],
    }


def lines(findings: Sequence[Finding]) -> list[str]:
    """ "warn  docker live-restore: is off: …; fix: set …"."""
    return [
        f"{item.level:4}  {printable(item.subject)}: {printable(item.text)}"
        + (f"; {fix}" if (fix := _fix(item)) else "")
        for item in findings
    ]


def table(findings: Sequence[Finding], width: int, *, colours: bool = True) -> list[str]:
    """The same for people: in columns, broken at `width`, the fix on lines of its own."""
    indent = 6 + max((len(item.subject) for item in findings), default=0) + 2
    room = max(30, width - indent)
    out = []
    for item in findings:
        texts = wrap(printable(item.text), room, break_on_hyphens=False) or [""]
        texts += wrap(_fix(item), room, subsequent_indent="     ", break_on_hyphens=False)
        level = f"{item.level:4}"
        if colours:
            level = click.style(level, fg=_COLOURS[item.level])
        out.append(f"{level}  {printable(item.subject):{indent - 6}}{texts[0]}")
        out += [" " * indent + text for text in texts[1:]]
    return out


def _fix(item: Finding) -> str:
    return f"fix: {printable(item.fix)}" if item.fix and item.level != "ok" else ""
