"""Who may ask (loopback, holders of a token, or everybody when that is said to be meant), and what
nobody is told.

The interface may be open to more people than the machine is. Locations, codes and our own words go
there: not what another program said, nor values of environments and arguments of commands, wherever
a sentence picked them up.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mic_supervisor.config.settings import Settings
from mic_supervisor.errors import ConfigError
from mic_supervisor.host.files import read_text
from mic_supervisor.model import ContainerSpec, DesiredState, ExecCheck, Instance, Preparation
from mic_supervisor.text import one_line, without_quotes

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1: what a header can carry
_SHORTEST = 16
_PORT = re.compile(r":[0-9]*$")
_MAKE = "make one with: openssl rand -hex 32"


@dataclass(frozen=True, slots=True)
class Access:
    """`token` None: whoever reaches the address may read.

    `hosts` are the names under which requests may come, in lower case; None: any. Addresses and
    localhost always may.
    """

    token: bytes | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None

    def answers_to(self, host: str | None) -> bool:
        """Whether the value of a Host header means this machine.

        A page of another site can have the site's name point to loopback (DNS rebinding): the
        browser then takes us for that site. It sends the site's name, which no address is.
        """
        if self.hosts is None or not host:
            return True
        name = _PORT.sub("", host).lower().rstrip(".")
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self.hosts or name.rpartition(".")[2] == "localhost"
        return True

    def admits(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header is good enough."""
        if self.token is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        # A comparison that stops at the first difference would tell how much of a guess is right.
        return scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(errors="replace"), self.token
        )


def access_of(settings: Settings) -> Access:
    """What the settings allow. Raises ConfigError where they would open the machine unasked."""
    if settings.http_token_file is not None:
        return Access(_read(settings.http_token_file))
    if not settings.listen.is_loopback and not settings.http_open:
        raise ConfigError(
            f"cannot serve HTTP on {settings.listen}: "
            "other machines reach that address, and no token is asked of them",
            hint="set MIC_HTTP_TOKEN_FILE to a file that holds one, or MIC_HTTP_OPEN=true "
            "if everybody may read; 127.0.0.1 behind a reverse proxy needs neither",
        )
    if settings.http_open:
        return Access()
    return Access(hosts=frozenset({socket.gethostname().lower(), *(settings.http_hosts or ())}))


def _read(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        text = read_text(path).strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read the token in {path}: {(error.strerror or str(error)).lower()}",
            hint=f"{_MAKE} > {path}; chmod 600 {path}",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot use the token in {path}: it is not text", hint=_MAKE) from error
    if mode & stat.S_IROTH:
        raise ConfigError(
            f"cannot use the token in {path}: everybody on this machine may read it",
            hint=f"chmod 600 {path}, and make a new one",
        )
    if not _TOKEN.fullmatch(text) or len(text) < _SHORTEST:
        raise ConfigError(
            f"cannot use the token in {path}: it must be one word of {_SHORTEST} characters or "
            "more, of letters, digits and -._~+/",
            hint=_MAKE,
        )
    return text.encode()


# --- what nobody is told ------------------------------------------------------------------------

HIDDEN = "(hidden)"
SHORTEST = 6  # characters; what is shorter is "true" or "8192" far more often than a secret
_MOST = 10_000  # texts that are hidden; a daemon may live through many files
_SHORTEST_NAMED = 3  # of a variable whose name says that it is one
_NAMED = re.compile(r"TOKEN|KEY|SECRET|PASS|PWD|CREDENTIAL|AUTH", re.IGNORECASE)

_FREE_TEXT = frozenset(
    {
        *("reason", "hint", "error", "cause", "waits", "warnings", "unreadable", "trouble"),
        *("text", "detail"),
    }
)
_PRIVATE = re.compile(r"(command|entrypoint|env|args|file_env|variables)(?=[.\[]|$)")


class Scrubber:
    """Hides what another program said, and what desired workloads hold in confidence.

    A server may say a secret in a form that nobody knows. So of what others said, which stands in
    quotes, nothing is shown, and of our own words what is known to be confidential is not.
    """

    def __init__(self, confidential: frozenset[str] = frozenset()) -> None:
        # The longest first: a secret may begin with another one.
        self._ordered = sorted(confidential, key=lambda item: (-len(item), item))
        self._confidential = confidential
        self._pattern = re.compile("|".join(map(_as_pattern, self._ordered)))

    def including(self, desired: DesiredState) -> Scrubber:
        """One that hides what this state holds, too: itself, where it does so already.

        What the file no longer has stays hidden: the history, or a remembered failure, may name it.
        """
        # In sentences a text stands as what can be shown of it.
        found = frozenset(form for word in _held(desired) for form in (word, one_line(word)))
        if found <= self._confidential:
            return self
        both = found | self._confidential
        return Scrubber(both if len(both) <= _MOST else found)

    def text(self, text: str) -> str:
        if self._ordered:
            text = self._pattern.sub(HIDDEN, text)
            *cut, rest = text.split("…")
            text = "…".join([*map(self._without_a_beginning, cut), rest])
        return without_quotes(text, HIDDEN)

    def _without_a_beginning(self, text: str) -> str:
        """What was cut in the middle of a secret, without the beginning of that one."""
        for secret in self._ordered:
            for count in range(min(len(secret), len(text)), SHORTEST - 1, -1):
                if text.endswith(secret[:count]):
                    return f"{text[:-count]}{HIDDEN}"
        return text

    def document(self, value: Any, key: str = "") -> Any:
        """A JSON document with its sentences scrubbed; names, ids and addresses stay."""
        if isinstance(value, dict):
            return {name: self.document(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self.document(item, key) for item in value]
        if isinstance(value, str) and key in _FREE_TEXT:
            return self.text(value)
        return value


def _held(desired: DesiredState | None) -> Iterator[str]:
    while desired is not None:
        for hook in (desired.hook, desired.on_transition):
            yield from _arguments(hook.command[1:] if hook is not None else ())
        for instance in desired.instances:
            yield from _secrets(instance)
        desired = desired.waiting


def _secrets(instance: Instance) -> Iterator[str]:
    workload, prepare = instance.workload, instance.prepare or Preparation(())
    for pairs in (workload.env, workload.file_env, workload.variables, prepare.variables):
        for name, value in pairs:
            short = len(value) < SHORTEST
            if not short or (len(value) >= _SHORTEST_NAMED and _NAMED.search(name)):
                yield value
    # A container's whole command is arguments; a process's begins with its program.
    command = workload.command
    yield from _arguments(command if isinstance(workload, ContainerSpec) else command[1:])
    yield from _arguments(prepare.command[1:])
    probes = instance.probes
    for probe in (probes.startup, probes.liveness, probes.readiness):
        if probe is not None and isinstance(probe.check, ExecCheck):
            yield from _arguments(probe.check.command[1:])


def _arguments(words: Iterable[str]) -> Iterator[str]:
    for argument in words:
        name, equals, value = argument.partition("=")
        word = value if equals and name.startswith("-") else argument
        # Long options and paths are what a reason has to name to be of use; `-pSECRET` is neither.
        if len(word) >= SHORTEST and not word.startswith(("--", "/", "${")):
            yield word


def _as_pattern(secret: str) -> str:
    """A short one is hidden as a word of its own alone."""
    text = re.escape(secret)
    return text if len(secret) >= SHORTEST else rf"(?<!\w){text}(?!\w)"


def plan_document(document: dict[str, Any]) -> dict[str, Any]:
    """A plan without the commands and values that its diffs show."""
    actions = [
        {**action, "diff": [_diff(one) for one in action["diff"]]} for action in document["actions"]
    ]
    return {**document, "actions": actions}


def _diff(diff: dict[str, Any]) -> dict[str, Any]:
    if not _PRIVATE.match(str(diff["path"])):
        return diff
    values = {key: None if diff[key] is None else HIDDEN for key in ("before", "after")}
    return {"path": diff["path"], **values}
