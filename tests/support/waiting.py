"""Waiting for something to become true, and plain HTTP without a client library."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


def until(look: Callable[[], T], what: str, *, timeout: float = 60.0, period: float = 0.05) -> T:
    """The first true answer of `look`. An AssertionError quotes the last one."""
    end = time.monotonic() + timeout
    while True:
        answer = look()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout:g} s in vain for {what}; last: {answer!r}")
        time.sleep(period)


class Answer(NamedTuple):
    """`status` 0: nothing answered, and `text` says why."""

    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


def http(url: str, method: str = "GET", body: Any = None, timeout: float = 10.0) -> Answer:
    """One request; a body that is not a string is sent as JSON. What comes back never raises."""
    data = None
    if body is not None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
    request = urllib.request.Request(url, data=data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return Answer(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode())
    except OSError as error:
        return Answer(0, str(error))
