"""mic-supervisor status"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli.common import json_option, name_argument, print_json
from mic_supervisor.cli.session import Alone, daemon, named_gpus
from mic_supervisor.config.names import is_called, shown_id, with_shown_ids
from mic_supervisor.errors import MicError
from mic_supervisor.host import start_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import Group
    from rich.table import Table

EXIT_UNREADABLE = 1
EXIT_NOT_READY = 3

_PERIOD = 1.0  # seconds between two looks of --watch

_STYLES = {
    "ready": "green",
    "unprobed": "default",
    "starting": "yellow",
    "loading": "yellow",
    "paused": "cyan",
    "drained": "cyan",
}


@click.command(name="status")
@name_argument("MODEL|INSTANCE|GPU", required=False)
@json_option
@click.option(
    "--watch",
    is_flag=True,
    help="Redraw every second until Ctrl-C; in a pipe, or with --json, print a document a line.",
)
def command(name: str | None, as_json: bool, watch: bool) -> int:
    """Desired against actual, one row per instance.

    With a name, those of one model, instance or GPU only. Exits with 0 when all shown are ready, 3
    otherwise, and 1 when the machine cannot be read. --watch ends with 0.
    """
    read = _reader(name)
    if watch:
        return _stream(read) if as_json or not sys.stdout.isatty() else _redraw(read)
    document = read()
    if as_json:
        print_json(document)
    else:
        show(document)
    if document["unreadable"]:
        return EXIT_UNREADABLE
    return 0 if all(row["as_desired"] for row in document["instances"]) else EXIT_NOT_READY


def _reader(name: str | None) -> Callable[[], dict[str, Any]]:
    """What reads the document once more each time it is called, for this name or for all."""
    alone = Alone()

    def read() -> dict[str, Any]:
        document = _ask() or alone.call("status")
        if name is not None:
            rows = document["instances"] = _only(name, document)
            models = {row["model"] for row in rows}
            document["paused"] = [p for p in document.get("paused", ()) if p["model"] in models]
            ids = {row["id"] for row in rows}
            document["claims"] = [c for c in document.get("claims", ()) if c["instance"] in ids]
        return document

    return read


def _ask() -> dict[str, Any] | None:
    """The daemon's document; None where none runs. HTTP is for who may not use the socket."""
    try:
        client = daemon()
        if client is None:
            return None
        document: dict[str, Any] = client.call("status", timeout=10.0)
    except MicError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        over_http = _ask_http()
        if over_http is None:
            raise
        return over_http
    return document


def _ask_http() -> dict[str, Any] | None:
    """The document that the daemon serves on MIC_LISTEN; None where nobody gives one."""
    import asyncio

    from mic_supervisor.cli import wiring
    from mic_supervisor.converge.http_calls import HttpCalls, NoAnswer, reachable
    from mic_supervisor.host.files import read_text

    found = wiring.settings()
    headers = {}
    try:
        if found.http_token_file is not None:
            token = read_text(found.http_token_file).strip()
            headers["Authorization"] = f"Bearer {token}"
        host, port = found.listen
        asked = HttpCalls().ask(
            reachable(host), port, "GET", "/api/v1/status", headers=headers, timeout=5.0
        )
        answer = asyncio.run(asked)
        document = answer.json() if answer.status == 200 else None
    except (NoAnswer, OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("version") == 1 else None


def _only(name: str, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an instance, a model or a GPU. Raises MicError where there is none."""
    rows = document["instances"]
    chosen = [row for row in rows if is_called(name, row["id"], (row["model"], *_inside(row)))]
    if not chosen:
        uuids = named_gpus(name, document)
        chosen = [row for row in rows if uuids & {gpu["uuid"] for gpu in row["gpus"]}]
    if not chosen:
        known = ", ".join(sorted({name for row in rows for name in _inside(row) or [row["model"]]}))
        raise MicError(
            f"cannot show {name}: neither the file nor this machine has an instance of it",
            hint=f"there is {known}" if known else None,
        )
    return chosen


def _by_model(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each model: of a server of several, one for each that it is to have."""
    for row in rows:
        yield from ({**row, **one} for one in row.get("models", ()))
        if not row.get("models"):
            yield row


def _inside(row: dict[str, Any]) -> list[str]:
    """The models of a server of several. An older daemon does not list them."""
    return [one["model"] for one in row.get("models", ())]


def show(document: dict[str, Any]) -> None:
    """A table on a terminal, lines of tab-separated fields in a pipe."""
    for text in _notices(document):
        click.echo(text, err=True)
    if not sys.stdout.isatty():
        for row in _by_model(document["instances"]):
            click.echo("\t".join((*_cells(row, document["at"]), row["reason"] or "")))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(document))
    for text in _remarks(document):
        console.print(text, soft_wrap=True, markup=False)


def _notices(document: dict[str, Any]) -> list[str]:
    """What is to be known besides the rows: unreadable sources, warnings, pauses, a broken file."""
    warnings = document["warnings"]
    reported = [text for text in document["unreadable"] if text not in warnings]
    notices = [f"warning: {text}" for text in (*reported, *warnings)]
    shown = {gpu["uuid"] for row in document["instances"] for gpu in row["gpus"]}
    models = {row["model"] for row in document["instances"]}
    for pause in document.get("paused", ()):  # an earlier daemon has none
        gpu, model = pause["gpu"], pause["model"]
        if gpu is not None and gpu["uuid"] not in shown:
            name = _gpu_name(gpu)
            notices.append(f"{name} is {_paused(pause)}")
        elif model is not None and model not in models:
            notices.append(f"{model} is {_paused(pause)}")
    if document["config"]["error"]:
        notices.append(f"{document['config']['error']}".rstrip())
        notices.append("warning: the file has errors; what it said before runs")
    profile = document["config"].get("profile")  # an earlier daemon knows none
    notices += [f"Profile {profile} is on."] if profile is not None else []
    return [*notices, *_waiting(document.get("waiting"))]


def _waiting(plan: dict[str, Any] | None) -> Iterator[str]:
    """What a file would change that waits for a person; why it waits is one of the warnings."""
    if plan is None:  # none does, or an earlier daemon does not say
        return
    due = [one for one in plan["actions"] if one["action"] != "adopt"]
    for one in due:
        yield f"would {one['action']} {one['instance']}: {one['cause']}"
    for one in plan["blocked"]:
        yield f"would leave {one['instance']} blocked: {one['reason']}"
    if not due and not plan["blocked"]:
        yield "would change nothing that runs"


def _table(document: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPU", "MODEL", "PHASE", "SYNC", "SINCE", "RST", "ENDPOINT"):
        table.add_column(name, overflow="fold", no_wrap=name in ("PHASE", "ENDPOINT"))
    for row in _by_model(document["instances"]):
        cell = _cells(row, document["at"])
        table.add_row(*cell[:2], f"[{_STYLES.get(cell[2], 'red')}]{cell[2]}", *cell[3:])
    return table


def _remarks(document: dict[str, Any]) -> list[str]:
    """A sentence for each row that is not as it should be, and what is to be said of other GPUs."""
    models = {row["id"]: row["model"] for row in document["instances"]}
    remarks = [
        with_shown_ids(f"{row['id']}: {row['reason']}", models)
        for row in document["instances"]
        if row["reason"] and not row["as_desired"]
    ]
    parents = {gpu.get("parent") for gpu in document["gpus"]}  # an earlier daemon tells none
    for gpu in document["gpus"]:
        if gpu["state"] in ("foreign", "unmanaged", "unhealthy", "lost", "unknown"):
            name = _gpu_name(gpu)
            # An older daemon does not say what the trouble is.
            why = f": {gpu['trouble']}" if gpu.get("trouble") else ""
            remarks.append(f"{name} is {gpu['state']}{why}")
    remarks += [_claim(claim) for claim in document.get("claims", ())]  # an earlier daemon has none
    for state, text in (
        ("kept_empty", "Kept empty"),
        ("fleet", "Handed over, and not claimed"),
        ("idle", "Not in the file"),
    ):
        gpus = [gpu for gpu in document["gpus"] if gpu["state"] == state]
        # A GPU with slices is not idle because it is not in the file: its slices may be.
        names = [_gpu_number(gpu) for gpu in gpus if gpu["uuid"] not in parents]
        remarks += [f"{text}: GPU {','.join(names)}"] if names else []
    if not document.get("daemon", True):  # one that answers may be too old to say so
        remarks.append(f"No daemon runs: nothing restarts what dies. Start it: {start_daemon()}")
    return remarks


def _claim(claim: dict[str, Any]) -> str:
    """ "MAM-51000000: claimed by alice (task 3), ready"; its instance has a row of its own."""
    from mic_supervisor.plan.words import clock

    what = shown_id(claim["instance"], claim["model"]) if claim["instance"] else claim["model"]
    note = f" ({claim['holder']})" if claim["holder"] else ""
    who = f"claimed by {claim['by']}{note}" if claim["by"] else "claimed"
    if claim["state"] == "waiting":
        return f"{what}: {who}, waits for {claim['reason']}"
    until = f" until {clock(claim['until'])}" if claim["until"] is not None else ""
    return f"{what}: {who}, {claim['state']}{until}"


def _paused(pause: dict[str, Any]) -> str:
    from mic_supervisor.plan.memory import Pause
    from mic_supervisor.plan.selection import since

    return str(since(Pause(pause["since"], pause["reason"]), time.time()))


# --- --watch ------------------------------------------------------------------------------------


def _stream(read: Callable[[], dict[str, Any]]) -> int:
    """A document a line, until the reader goes or Ctrl-C."""
    try:
        while True:
            began = time.monotonic()
            click.echo(json.dumps(read(), ensure_ascii=False))
            _pause(began)
    except KeyboardInterrupt:
        return 0


def _redraw(read: Callable[[], dict[str, Any]]) -> int:
    """The table on a screen of its own, until Ctrl-C.

    A first read that fails ends the command; a later one is shown in place, above what was seen
    last: a daemon that restarts is back in a moment.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    document = read()
    failure: MicError | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                began = time.monotonic()
                live.update(_screen(document, failure, console.width), refresh=True)
                _pause(began)
                try:
                    document, failure = read(), None
                except MicError as error:
                    failure = error
    except KeyboardInterrupt:
        return 0


def _screen(document: dict[str, Any], failure: MicError | None, width: int) -> Group:
    """Everything that `show` prints, and when it was so."""
    from rich.console import Group
    from rich.text import Text

    now = time.time()
    title = f"{document['host']}  {time.strftime('%H:%M:%S', time.localtime(now))}"
    lines = [Text(title[:width], style="bold")]
    if failure is not None:
        lines.append(Text(f"not read for {_ago(document['at'], now)}: {failure.message}"))
    # Between two rounds of the daemon time goes on.
    current = {**document, "at": max(now, document["at"])}
    return Group(
        *lines,
        Text(),
        _table(current),
        Text(),
        *(Text(text) for text in (*_remarks(document), *_notices(document))),
    )


def _pause(began: float) -> None:
    time.sleep(max(0.0, began + _PERIOD - time.monotonic()))


def _cells(row: dict[str, Any], now: float) -> tuple[str, ...]:
    gpus = [_gpu_number(gpu) for gpu in row["gpus"]]
    return (
        ",".join(gpus) or "-",
        row["model"],
        row["phase"],
        {"in_sync": "yes", "out_of_sync": "no"}.get(row["sync"], "?"),
        _ago(row["since"], now),
        str(row["restarts"]),
        row["endpoints"].get("http", "-"),
    )


def _gpu_number(gpu: dict[str, Any]) -> str:
    """The UUID of one that is not there, or is a slice."""
    return str(gpu["uuid"] if gpu["index"] is None else gpu["index"])


def _gpu_name(gpu: dict[str, Any]) -> str:
    return str(gpu["uuid"]) if gpu["index"] is None else f"GPU {gpu['index']}"


def _ago(since: float | None, now: float) -> str:
    """ "42s", "12m", "3h", "5d", the largest unit only; "-" when unknown."""
    if since is None:
        return "-"
    seconds = max(0, int(now - since))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
