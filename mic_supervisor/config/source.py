"""The text of a configuration file, within bounds and fit for an editor."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from mic_supervisor.config.diagnostics import Report
from mic_supervisor.config.document import Place

MAX_BYTES = 256 * 1024

# What YAML calls printable, less what it counts as the end of a line and no editor does (NEL, LS,
# PS, a lone CR): places would be wrong after it.
_UNFIT = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd"
    "\U00010000-\U0010ffff]|\r(?!\n)"
)


def read_text(path: Path, report: Report) -> str | None:
    """The text of a regular file, or None after reporting why not. Never blocks on a FIFO."""
    file = str(path)
    report.lines.setdefault(file, [])
    whole = Place(file, 0, 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                what = "it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file"
                report.add(whole, "", f"cannot read the file: {what}")
                return None
            data = b""
            while len(data) <= MAX_BYTES and (part := os.read(descriptor, MAX_BYTES + 1)):
                data += part
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        report.add(whole, "", f"cannot read the file: {cause_of(error)}")
        return None
    return text_of(data, path, report)


def text_of(data: bytes, path: Path, report: Report) -> str | None:
    """The text of a file that holds `data`, or None after reporting why it has none."""
    file = str(path)
    report.lines.setdefault(file, [])
    if len(data) > MAX_BYTES:
        message = f"cannot read the file: it is larger than {MAX_BYTES // 1024} KiB"
        report.add(Place(file, 0, 0), "", message)
        return None
    return _decode(data, file, report)


def cause_of(error: OSError | ValueError) -> str:
    """What the system says, as the end of a sentence."""
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return cause[:1].lower() + cause[1:]


def _decode(data: bytes, file: str, report: Report) -> str | None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        report.add(
            Place(file, 1, 1), "", "cannot read the file: it is UTF-16", hint="save it as UTF-8"
        )
        return None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        line = data.count(b"\n", 0, error.start) + 1
        before = data[line_start : error.start].decode("utf-8")
        report.lines[file] = data.decode("utf-8", "replace").split("\n")
        report.add(
            Place(file, line, len(before) + 1),
            "",
            f"the byte 0x{data[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        )
        return None
    report.lines[file] = [line.removesuffix("\r") for line in text.split("\n")]
    bad = _UNFIT.search(text)
    if bad is not None:
        line = text.count("\n", 0, bad.start()) + 1
        column = bad.start() - text.rfind("\n", 0, bad.start())
        report.add(
            Place(file, line, column),
            "",
            f"the character U+{ord(bad[0]):04X} cannot stand here",
            hint=f'inside double quotes it can be written as "\\u{ord(bad[0]):04x}"'
            if 0 < ord(bad[0]) < 0x10000
            else None,
        )
        return None
    return text
