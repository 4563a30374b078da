"""How long /metrics takes beside 1000 clients that send their header byte by byte, or read nothing.

python -m benchmarks.slow_clients [TRIES]
"""

from __future__ import annotations

import sys
from contextlib import closing

from benchmarks._common import Target, judge, median, times
from tests.support.ports import PortBlock
from tests.support.slow_clients import answers, crowd, dripping, scrape, serve
from tests.support.waiting import until

CLIENTS = 1000
TARGET = 0.05  # seconds


def main(tries: int) -> None:
    with closing(PortBlock()) as ports:
        port = ports.take()
        server = serve(port)
        server.start()
        try:
            until(lambda: answers(port), "the server")
            alone = [scrape(port) for _ in range(tries)]
            with crowd(port, CLIENTS) as clients, dripping(clients):
                beside = [scrape(port) for _ in range(tries)]
        finally:
            server.stop()
    taken = {"alone": alone, f"beside {CLIENTS} slow clients": beside}
    times(f"An answer from /metrics, {tries} tries each", taken, median(alone), "ratio")
    judge(Target(f"beside {CLIENTS} slow clients", median(beside), TARGET, " s"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
