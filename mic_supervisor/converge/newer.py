"""Asks for what `plan.newer` decides on: tags in their registries, the files of models.

No registry is asked unless a person says `--pull`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from mic_supervisor.converge.tasks import Threads, blocking
from mic_supervisor.errors import MicError, PreflightFailed
from mic_supervisor.host.files import fingerprint, in_time
from mic_supervisor.model import Placement
from mic_supervisor.plan import newer as decide
from mic_supervisor.plan.assess import Assessment
from mic_supervisor.plan.look import Look
from mic_supervisor.plan.memory import Memory, Pulled
from mic_supervisor.runtimes import Images, Runtime
from mic_supervisor.text import one_line

_FILES_TIMEOUT = 5.0  # seconds for a file system to say what is in a model's directory
_THREADS = 16  # registries and directories that are asked at a time

Report = Callable[[Assessment, str], None]
"""Takes an instance and a line about the pull of its image; called on the event loop."""


@dataclass(frozen=True, slots=True)
class Newer:
    """What was found. `pulled` is by instance, for ledger.pulled; `failures` are why it lacks some.

    `restarts` names what a restart takes: instances, and models of servers by `memory_key`.
    """

    pulled: Mapping[str, Pulled | None] = field(default_factory=dict)
    failures: tuple[tuple[Assessment, MicError], ...] = ()
    restarts: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


async def look_for_newer(
    seen: Look,
    only: Collection[str] | None,
    runtimes: Mapping[str, Runtime],
    *,
    ask: bool,
    report: Report | None = None,
) -> Newer:
    """Of these instances, None is all. `ask`: registries, too.

    With `report` what is newer is pulled as well, which stops nothing, and `pulled` is what is here
    then.
    """
    items = [one for one in seen.assessments if only is None or one.instance.id in only]
    pool = Threads(_THREADS, "mic-newer")
    found = await _new_files(items, seen.memory, pool)
    warnings = [warning for _, warning in found]
    pulled: dict[str, Pulled | None] = {}
    failures: list[tuple[Assessment, MicError]] = []
    for images in runtimes.values():
        if ask and isinstance(images, Images):
            pulled, failures, said = await _renewed(items, seen.memory, images, report, pool)
            warnings += said
    warnings += sorted({_in_one(error) for _, error in failures})
    restarts = frozenset(name for name, _ in found)
    return Newer(pulled, tuple(failures), restarts, tuple(warnings))


def _in_one(error: MicError) -> str:
    return one_line(f"{error}; {error.hint}" if error.hint else str(error))


# --- images -------------------------------------------------------------------------------------


async def _renewed(
    items: Collection[Assessment],
    memory: Memory,
    images: Images,
    report: Report | None,
    pool: Executor,
) -> tuple[dict[str, Pulled | None], list[tuple[Assessment, MicError]], list[str]]:
    """What was found, why not, and warnings. Each image is asked for once, all at a time."""
    users = decide.tags(items)
    answers = await asyncio.gather(
        *(_digest(image, users[image], images, report, pool) for image in users)
    )
    found: list[decide.Answer] = []
    failures: list[tuple[Assessment, MicError]] = []
    warnings = [
        f"{image} came from no registry, and none is asked for it"
        for image, answer in zip(users, answers, strict=True)
        if answer is None
    ]
    for (image, own), answer in zip(users.items(), answers, strict=True):
        for item in own:
            try:
                if isinstance(answer, MicError):
                    raise answer
                last = decide.last_image(item, image)
                known = (*await blocking(pool, images.digests, last), last) if last else ()
            except MicError as error:
                failures.append((item, error))
            else:
                found.append(decide.Answer(item, image, answer, known))
    return decide.moved(found, memory), failures, warnings


async def _digest(
    image: str, own: list[Assessment], images: Images, report: Report | None, pool: Executor
) -> str | MicError | None:
    """The digest of a tag in its registry; with `report`, once the engine has that image. None: it
    was built here, or loaded, so that no registry is known to have it.
    """
    loop = asyncio.get_running_loop()

    def told(report: Report, text: str) -> None:  # from a thread
        for item in own:
            loop.call_soon_threadsafe(report, item, text)

    def find() -> str | None:
        last = (decide.last_image(item, image) for item in own)
        if not any(map(images.digests, filter(None, (image, *last)))):
            return None
        digest = images.registry_digest(image)
        if report is not None and digest not in images.digests(image):
            images.pull(image, lambda text: told(report, text))
            if digest not in images.digests(image):
                raise PreflightFailed(
                    f"cannot use {image}: its tag moved once more while it was pulled",
                    hint="mic-supervisor apply --pull",
                )
        return digest

    try:
        return await blocking(pool, find)
    except MicError as error:
        return error


# --- files of models ----------------------------------------------------------------------------


def files_of(placement: Placement) -> str | None:
    """The fingerprint of the files that a load of the model reads now; None: it is not known."""
    if placement.directory is None:
        return None
    directory = Path(placement.directory)
    try:
        return in_time(("files", directory), lambda: fingerprint(directory), _FILES_TIMEOUT)
    except OSError:
        return None


async def _new_files(
    items: Collection[Assessment], memory: Memory, pool: Executor
) -> list[tuple[str, str]]:
    """See `decide.outdated`."""
    known = decide.loaded(items, memory)
    now = await asyncio.gather(*(blocking(pool, files_of, one.placement) for one in known))
    return decide.outdated([*zip(known, now, strict=True)])
