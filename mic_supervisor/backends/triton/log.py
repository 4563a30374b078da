"""Why Triton did not load a model, from its answer and its log.

Some answers hold the cause, a Python exception for instance. Others say only "failed to poll from
model repository", and a load that hangs says nothing: then the cause stands in the log alone. Seen
on tritonserver 2.51; the tests hold its own texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mic_supervisor.backends import error_text
from mic_supervisor.text import quoted

_LONGEST = 600  # characters of one quotation

_ISO = re.compile(r'\S+ [IWEF] \d+ [\w.]+:\d+\] "(?P<text>.*)"$', re.DOTALL)
_GLOG = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] +(?P<text>.*)$", re.DOTALL)
_PROTOBUF = re.compile(r"\[libprotobuf ERROR [^\]]*\] (?P<text>.*)$", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)")

_HEAD = re.compile(r"^load failed for model '[^']*': ")
_VERSION = re.compile(r"version \d+ is at (?P<state>[A-Z]+) state: ")
_FRAMES = re.compile(r"\s*\n\s*At:\s*\n\s*(?P<first>[^\n;]+)(?:\n[^\n;]+)*")
_SAYS_NOTHING = ("failed to poll from model repository", "is not healthy")
_TEXT_PROTO = "Error parsing text-format inference.ModelConfig: "


def load_failure(answer: str, log: Sequence[str], model: str) -> str:
    """One sentence without a full stop: Triton's own words, then its log's if those say nothing.

    `model` is the name in the repository. Only what the log says of the last try is quoted.
    """
    said = error_text(answer)
    words = _sentence(said)
    if words and not any(text in words for text in _SAYS_NOTHING):
        return quoted(words)
    cause = _cause(log, model)
    shown = quoted(words) if words else "Triton gave no answer"
    if cause is None or cause in words:
        return shown
    return f"{shown}; its log says: {quoted(cause)}"


def _cause(log: Sequence[str], model: str) -> str | None:
    name = re.escape(model)
    pattern = re.compile(
        rf"Poll failed for model directory '{name}': (?P<poll>.*)"
        rf"|failed to poll model '{name}': (?P<find>.*)"
        rf"|failed to load (?:model '{name}'|'{name}' version \d+): (?P<load>.*)"
        r"|Failed to (?:pre)?initialize Python stub(?: for auto-complete)?: (?P<stub>.*)",
        re.DOTALL,
    )
    begins = re.compile(rf"loading: {name}:\d+$|successfully loaded '{name}'$")
    messages = [_message(line) for line in log]
    for index in range(len(messages) - 1, -1, -1):
        if begins.match(messages[index]):
            return None
        match = pattern.match(messages[index])
        if match is None:
            continue
        cause = next(text for text in match.groups() if text is not None)
        if any(text in cause for text in _SAYS_NOTHING):
            continue
        before = messages[index - 1] if index else ""
        if "failed to read text proto" in cause and before.startswith(_TEXT_PROTO):
            cause = f"{cause}: {before.removeprefix(_TEXT_PROTO)}"
        return _sentence(cause)
    return None


def _message(line: str) -> str:
    """A line of the log without time, level and place, its escapes undone."""
    line = line.rstrip("\r\n")
    if match := _ISO.match(line):
        return _ESCAPE.sub(lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), match["text"])
    match = _GLOG.match(line) or _PROTOBUF.match(line)
    return match["text"] if match else line


def _sentence(text: str) -> str:
    """One line: of a traceback the innermost frame, and no state that says nothing new."""
    text = _HEAD.sub("", text)
    serving = any(match["state"] == "READY" for match in _VERSION.finditer(text))
    text = _FRAMES.sub(r" (at \g<first>)", _VERSION.sub("", text))
    text = " ".join(text.split()).rstrip("; .")
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1].rstrip() + "…"
    return f"{text} (what was loaded before keeps serving)" if serving else text
