"""Why something happens, waits or does not happen: as data, and in the words for it.

A `Reason` is a code and its facts. Programs go by the code; the sentence is made here and nowhere
else, and nobody reads it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import TYPE_CHECKING, Any

from mic_supervisor.clocks import local
from mic_supervisor.text import one_line

if TYPE_CHECKING:
    from mic_supervisor.model import Claim

_RETRY = "change the file, or: mic-supervisor retry {instance}"
_FAILED = "the new specification failed ({failure})"
_HELD = "{what} is still held by {holder}, "
_NEEDS = "it needs {vram}, and GPU {gpu} ({name}) has "
IGNORED_HINT = (
    "install Docker Engine, and have MIC_DOCKER_HOST name its socket; the package podman-docker "
    "puts Podman at Docker's usual one"
)
_FOREIGN = "GPU {gpu} is held by {who}, not ours{whose}"


@unique
class Code(Enum):
    """A sentence, and the way out where there is one, with the names of their facts."""

    # What the look itself says.
    ENTRY_IN_TROUBLE = "{trouble}"
    GPUS_UNREADABLE = "{error}"
    RUNTIME_UNREADABLE = "what {runtime} runs is unknown: {error}"
    RUNTIME_OFF = "{off}"
    GPU_LOST = "{gpus} is not there"
    GPU_UNHEALTHY = (
        "GPU {gpu} is unhealthy: {trouble}",
        "stop what uses it, then: nvidia-smi --gpu-reset -i {index}; or reboot",
    )

    GPUS_IGNORED = "{engine} takes a request for a GPU and ignores it", IGNORED_HINT

    # Somebody asked for it, or has yet to.
    PAUSED = "paused since {since}{note}"
    MODEL_PAUSED = "{model} is {pause}"
    DRAINED = "the host is drained since {since}{note}", "mic-supervisor undrain"
    IN_DOUBT = "{doubt}"
    NOT_CHOSEN = "not one of the targets", "name it as well, with apply --target"
    UNEXPLAINED = "it stays as it is, since what was remembered of it is lost"
    UNCONFIRMED = "the file no longer names {what}; its removal waits to be confirmed"
    SHRINKS = "the file no longer names {gpus} of it; its replacement waits to be confirmed"
    CLAIMED = (
        "it is claimed, and only the daemon knows by whom",
        "start it: systemctl start mic, or mic-supervisor run",
    )
    WOULD = "would {kind}: {cause}"
    WOULD_BE_BLOCKED = "would be blocked: {blocked}"

    # Something failed.
    BACKOFF = "backoff: {failure}"
    MODEL_BACKOFF = "{model}: backoff: {failure}"
    FAILED_ELSEWHERE = ("the new specification failed on {instance}; the earlier one runs", _RETRY)
    ROLLED_BACK = f"{_FAILED}; the last good one runs", _RETRY
    ROLLBACK_BACKOFF = f"{_FAILED}; the last good one {{how}}; backoff: {{last}}", _RETRY
    ROLLBACK_BLOCKED = f"{_FAILED}; the last good one cannot take over yet: {{obstacle}}", _RETRY

    # Something is in the way.
    HELD_ON_HOLD = f"{_HELD}{{hold}}"
    HELD_IN_DOUBT = "{what} is still held by {holder}: {hold}"
    HELD_BY_OWNER = f"{_HELD}which keeps it"
    HELD_UNCONFIRMED = f"{_HELD}whose removal waits to be confirmed"
    HELD_BY_ENTRY = f"{_HELD}and an entry of the file that cannot be followed now may mean it"
    HELD_FOR_OTHERS = f"{_HELD}which stays because an instance that follows it cannot start"
    NO_PORT = "no port is free from {first} to {last}", "widen MIC_PORT_RANGE"
    PORT_TAKEN = "port {port} is taken by {who}", "free the port, or give {model} another one"
    NAME_TAKEN = "the name {name} is taken by a workload that is not ours: {foreign}"
    NO_VARIABLE = "its texts refer to {name}, which it does not have"
    GPU_TOO_SMALL = (f"{_NEEDS}{{total}}", "give it a larger GPU, or correct `vram` of {model}")
    GPU_TOO_FULL = (
        f"{_NEEDS}{{free}} beside {{who}}, not ours",
        "end what uses the GPU, or move the model to another one",
    )
    HOLDERS_UNREADABLE = "the processes on GPU {gpu} cannot be read"
    HOLDERS_UNTOLD = (
        "this platform does not report who is on GPU {gpu}",
        "set `on_foreign: ignore` for {model} if nobody else uses that GPU",
    )
    HOLDERS_IMPLAUSIBLE = (
        "what the driver lists on GPU {gpu} cannot be true",
        "upgrade the driver, or set `on_foreign: ignore` for {model} if nobody else uses that GPU",
    )
    STRANGER = _FOREIGN, "end that process, or move the model to another GPU"
    WAITS_FOR_STRANGER = (
        f"waiting for the GPU: {_FOREIGN}",
        "end that process, or move the model to another GPU",
    )
    STAYS = "it stays while {instance} is blocked"

    # Why a change is made.
    MISSING = "nothing runs for it yet"
    WORKLOAD_REMOVED = "it is missing: its workload was removed"
    ENDED = "{end}"
    NEVER_STARTED = "it was created and never started"
    INTERRUPTED = "its replacement was interrupted"
    SPEC_CHANGED = "its specification changed: {paths}{down}"
    TAG_MOVED = "{image} is another image now: {before} -> {after}"
    GPUS_CHANGED = "its set of GPUs changed{down}"
    CHANGED_AND_DOWN = "{drift}, and the earlier one does not run"
    ASKED_FOR = "asked for"
    DOWN = "somebody said `mic-supervisor down`"
    UNHEALTHY = "{failure}"
    GPU_NOT_SEEN = "{blind}"
    ROLLBACK = "rollback: {failure}"
    ROLLED_BACK_UNHEALTHY = "rolled back, and {failure}"
    RUNS_TWICE = "it runs twice"
    FAILED = "it failed, and the last good one runs"
    ADOPTED = "it runs already, as the file asks"
    LEFT_OVER = "left over from an earlier specification"
    OTHER_MODEL = "the file has {model} on its GPU"
    KEPT_EMPTY = "the file keeps its GPU empty"
    OF_PROFILE = "the profile that has its GPU is not on"
    NOT_NAMED = "the file no longer names it"
    CLAIM_ENDED = "{ending}"
    HANDED_OVER = "the file hands its GPU over, and no claim has it"
    CLAIMED_BY = "claimed by {holder}"
    LEAVING = "the file does not ask for it: it will be removed"
    NOT_LOADED = "{of}the server does not have {model} loaded"
    MODEL_CHANGED = "{of}{changed} changed"
    SURPLUS = "the file no longer has {model} in this server"

    # What a change waits for.
    HOOK = "on_endpoints_change, which does not know yet what serves instead"
    TURN = "its turn: {limit} instance{s} of {model} at a time"
    LATER = "{instance}, whose turn comes later"
    NEXT_TRY = "its next try, since the last one failed: {failure}"

    def __init__(self, sentence: str, hint: str | None = None) -> None:
        self.sentence = sentence
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Reason:
    """`facts` fill in the sentence; those called "hint" and "queued" stand for themselves.

    `also` is what there is to say besides.
    """

    kind: Code
    facts: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[Reason, ...] = ()

    def __str__(self) -> str:
        own = self.kind.sentence.format_map(self.facts)
        return one_line("; ".join([own, *map(str, self.also)]))

    @property
    def code(self) -> str:
        """What programs know it by."""
        return self.kind.name.lower()

    @property
    def hint(self) -> str | None:
        """The way out; the reason's own goes before the code's."""
        own: str | None = self.facts.get("hint")
        return own or (self.kind.hint.format_map(self.facts) if self.kind.hint else None)

    def is_about(self, text: str) -> bool:
        """Whether it is among the facts, as what something failed with is."""
        nested = [fact for fact in self.facts.values() if isinstance(fact, Reason)]
        return text in self.facts.values() or any(
            one.is_about(text) for one in (*nested, *self.also)
        )

    @property
    def queued(self) -> bool:
        """Whether the file says to wait for it."""
        return self.kind is Code.WAITS_FOR_STRANGER or self.facts.get("queued") is True


def because(kind: Code, /, **facts: Any) -> Reason:
    return Reason(kind, facts)


# --- pieces of sentences --------------------------------------------------------------------


def gpus_down(error: str) -> str:
    return f"{error}; nothing is started or stopped meanwhile"


def shortened(paths: Sequence[str]) -> str:
    """ "image, env.A, env.B and 2 more" """
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def short_digest(digest: str | None) -> str:
    """ "sha256:488f61a60d35", as Docker shows ids."""
    return "unknown" if digest is None else digest[: len("sha256:") + 12]


def beside(phase: str, reason: str) -> str:
    """`reason` as it stands behind its phase: that of a backoff begins with the word."""
    return reason.removeprefix(f"{phase}: ")


def gpu_names(gpus: Iterable[str], indices: Mapping[str, int]) -> str:
    """ "GPU 3,4"; a GPU that is not there is named by its UUID, which begins with "GPU-"."""
    gpus = tuple(gpus)
    if not any(uuid in indices for uuid in gpus):
        return ",".join(gpus) or "no GPU"
    return "GPU " + ",".join(str(indices.get(uuid, uuid)) for uuid in gpus)


def left_out_line(instance: str, action: str, cause: str) -> str:
    """What is due and was not chosen."""
    return f"left out: {instance} ({action}: {cause})"


def called(claim: Claim) -> str:
    """ "alice (task 3)": the user who holds a claim, and what the holder calls itself."""
    return f"{claim.by} ({claim.holder})" if claim.holder else claim.by


def size(count: int) -> str:
    """ "3.1 GiB", "512 MiB"."""
    if count < 1 << 30:
        return f"{-(-count // (1 << 20))} MiB"
    return f"{count / (1 << 30):.1f} GiB"


def clock(at: float) -> str:
    """Local time of day."""
    return local(at).strftime("%H:%M:%S")


def moment(at: float, now: float) -> str:
    """Local time of day; with the date where that was not today."""
    when = local(at)
    today = when.date() == local(now).date()
    return when.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")
