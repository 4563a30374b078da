"""/metrics beside 1000 clients that send their header byte by byte, or read nothing."""

from __future__ import annotations

from contextlib import closing

from benchmarks._common import Options
from benchmarks.sheets import Cell, Outcome, Row, Sheet, Target
from tests.support.ports import PortBlock
from tests.support.slow_clients import answers, crowd, dripping, scrape, serve
from tests.support.waiting import until

CLIENTS = 1000
MOST = 0.05  # seconds


def measure(options: Options) -> Outcome:
    tries = 4 * options.tries
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
    columns = ("alone", f"beside {CLIENTS} slow clients")
    cells = tuple(Cell(tuple(1000 * value for value in taken), "ms") for taken in (alone, beside))
    rows = (Row("/metrics", cells),)
    return Outcome(
        [Sheet("slow-clients", "An answer from /metrics", columns, rows, compares=False)],
        [Target("slow-clients", columns[1], cells[1].median, 1000 * MOST, " ms")],
    )
