"""Asks a URL again and again until TERM; prints how often it was asked, and what failed.

`python load.py URL`, in the network namespace of who asks. Standard library only.
"""

from __future__ import annotations

import collections
import json
import signal
import sys
import threading
import time
import urllib.request

STOP = threading.Event()


def ask(url: str, outcomes: collections.Counter[str]) -> None:
    while not STOP.is_set():
        request = urllib.request.Request(url, data=b'"hello"', method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                outcomes[str(answer.status)] += 1
        except OSError as error:
            outcomes[f"{time.time():.1f} {error}"] += 1
        STOP.wait(0.02)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    outcomes: collections.Counter[str] = collections.Counter()
    askers = [threading.Thread(target=ask, args=(sys.argv[1], outcomes)) for _ in range(4)]
    for asker in askers:
        asker.start()
    while not STOP.wait(1):
        pass
    for asker in askers:
        asker.join()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
