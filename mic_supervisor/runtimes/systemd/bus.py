"""One connection to the system bus, on a thread of its own, and the calls to PID 1 over it.

The interface is org.freedesktop.systemd1(5). Nothing waits without a bound. A connection that was
lost is made again by the next call: D-Bus may be restarted, and PID 1 then comes back to it a
moment later.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from dbus_fast import AuthError, BusType, InvalidAddressError, Message, MessageType, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.unpack import unpack_variants

from mic_supervisor.errors import MicError, RuntimeRefused, RuntimeUnavailable
from mic_supervisor.runtimes.systemd.unit import Process, Property, Unit
from mic_supervisor.text import quoted

T = TypeVar("T")

SYSTEMD = "org.freedesktop.systemd1"
MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"
PROPERTIES = "org.freedesktop.DBus.Properties"
DBUS = "org.freedesktop.DBus"
DBUS_PATH = "/org/freedesktop/DBus"

CALL_TIMEOUT = 10.0  # seconds for one answer
RETURN_TIMEOUT = 3.0  # seconds that D-Bus, or PID 1 on it, may be away
_PAUSE = 0.1  # seconds between two tries to reach it
_MOST_RESULTS = 256  # results of jobs that nobody has asked for yet

_JOBS = f"type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='JobRemoved'"
_CHANGES = (
    f"type='signal',sender='{SYSTEMD}',interface='{PROPERTIES}',member='PropertiesChanged',"
    f"path_namespace='{MANAGER_PATH}/unit',arg0='{UNIT}'",
    f"type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='UnitRemoved'",
)

# PID 1 is not on the bus (yet): the call did not reach it.
_AWAY = frozenset(
    f"{DBUS}.Error.{name}"
    for name in ("ServiceUnknown", "NameHasNoOwner", "Spawn.ServiceNotFound", "Disconnected")
)
# PID 1 left the bus before it answered, as it does when D-Bus is restarted. The call may have
# reached it.
_LEFT = "org.freedesktop.DBus.Error.NoReply"
_NO_UNIT = frozenset((f"{SYSTEMD}.NoSuchUnit", f"{DBUS}.Error.UnknownObject"))


class Refused(Exception):
    """PID 1, or D-Bus, answered with an error. `name` is the D-Bus error's."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text or name)
        self.name = name
        self.text = text or name


class Lost(Exception):
    """There is no connection, or it broke before the answer came."""


class Bus:
    """`address` is a D-Bus address; None: the system bus."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: MessageBus | None = None
        self._connecting: asyncio.Lock | None = None
        self._waiting: dict[str, asyncio.Future[str]] = {}
        self._results: OrderedDict[str, str] = OrderedDict()
        self._listeners: list[Callable[[Message | None], None]] = []

    # --- from any thread ------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T], *, timeout: float) -> T:
        """Do `work` on the bus's thread. Raises what it raises, Lost after `timeout` seconds."""
        future = asyncio.run_coroutine_threadsafe(work, self._thread())
        try:
            return future.result(timeout)
        except TimeoutError:
            raise Lost(f"no answer within {timeout:g} s") from None
        finally:
            future.cancel()  # an interrupt ends the work too

    def _thread(self) -> asyncio.AbstractEventLoop:
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_serve, args=(self._loop,), name="systemd-bus", daemon=True
                ).start()
            return self._loop

    def close(self) -> None:
        """Hang up. A later call connects again."""
        with self._guard:
            loop, self._loop = self._loop, None
            connection, self._connection = self._connection, None
            self._connecting = None

        def end() -> None:
            if connection is not None:
                connection.disconnect()
            assert loop is not None
            loop.call_later(0.05, loop.stop)  # after the connection's own farewell

        if loop is not None:
            loop.call_soon_threadsafe(end)

    # --- on the bus's thread --------------------------------------------------------------

    async def call(
        self,
        member: str,
        signature: str = "",
        *body: Any,
        path: str = MANAGER_PATH,
        interface: str = MANAGER,
        repeat: bool = False,
        descriptors: Sequence[int] = (),
    ) -> list[Any]:
        """The answer's body, variants unpacked. Raises Refused and Lost.

        `repeat`: asking twice does no harm, so that a lost connection may be made up for.
        """
        deadline = asyncio.get_running_loop().time() + RETURN_TIMEOUT
        while True:
            asked = False
            try:
                connection = await self._connected()
                asked = True
                message = Message(
                    destination=SYSTEMD,
                    path=path,
                    interface=interface,
                    member=member,
                    signature=signature,
                    body=list(body),
                    unix_fds=list(descriptors),
                )
                return await self._ask(connection, message)
            except (Lost, Refused) as error:
                reached = error.name not in _AWAY if isinstance(error, Refused) else asked
                unanswered = isinstance(error, Lost) or error.name == _LEFT
                again = not reached or (repeat and unanswered)
                if not again or asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(_PAUSE)

    async def job(
        self,
        member: str,
        signature: str,
        *body: Any,
        timeout: float,
        descriptors: Sequence[int] = (),
    ) -> str:
        """Queue a job and wait for its end: "done", "failed", "canceled", "timeout", …

        Raises Refused and Lost; Lost means that the outcome is unknown.
        """
        [path] = await self.call(member, signature, *body, descriptors=descriptors)
        if path in self._results:
            return self._results.pop(path)
        future = asyncio.get_running_loop().create_future()
        self._waiting[path] = future
        try:
            async with asyncio.timeout(timeout):
                return str(await future)
        except TimeoutError:
            raise Lost(f"systemd did not finish within {timeout:g} s") from None
        finally:
            self._waiting.pop(path, None)

    async def units(self, pattern: str) -> list[tuple[str, str]]:
        """(name, path) of every loaded unit whose name matches."""
        [listed] = await self.call("ListUnitsByPatterns", "asas", [], [pattern], repeat=True)
        return [(str(one[0]), str(one[6])) for one in listed]

    async def unit(self, name: str, path: str | None = None) -> Unit | None:
        """All of a loaded unit's properties; None when it is not loaded."""
        try:
            if path is None:
                [path] = await self.call("GetUnit", "s", name, repeat=True)
            assert path is not None
            # An empty interface stands for all of them.
            [found] = await self.call(
                "GetAll", "s", "", path=path, interface=PROPERTIES, repeat=True
            )
        except Refused as error:
            if error.name in _NO_UNIT:
                return None
            raise
        unit = Unit(name, path, found)
        # Asking for a unit that has just been forgotten makes PID 1 look for its file.
        return None if unit.text("LoadState") == "not-found" else unit

    async def processes(self, name: str) -> tuple[Process, ...]:
        """What is in a unit's control group, children of children included."""
        try:
            [found] = await self.call("GetUnitProcesses", "s", name, repeat=True)
        except Refused as error:
            if error.name in _NO_UNIT:
                return ()
            raise
        return tuple(sorted((Process(int(pid), str(line)) for _, pid, line in found), key=_pid))

    async def listen(self, callback: Callable[[Message | None], None]) -> None:
        """Pass on every change of a unit, None when the connection is lost."""
        connection = await self._connected()
        for rule in _CHANGES:
            await self._ask(connection, _match(rule))
        try:
            await self._ask(connection, Message(SYSTEMD, MANAGER_PATH, MANAGER, "Subscribe"))
        except Refused as error:
            if not error.name.endswith(".AlreadySubscribed"):
                raise
        self._listeners.append(callback)

    def unlisten(self, callback: Callable[[Message | None], None]) -> None:
        if callback in self._listeners:
            self._listeners.remove(callback)

    # --- the connection -------------------------------------------------------------------

    async def _connected(self) -> MessageBus:
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:
            if self._connection is None or not self._connection.connected:
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> MessageBus:
        try:
            connection = MessageBus(
                bus_address=self._address, bus_type=BusType.SYSTEM, negotiate_unix_fd=True
            )
            async with asyncio.timeout(CALL_TIMEOUT):
                await connection.connect()
        except InvalidAddressError as error:
            raise RuntimeUnavailable(f"cannot use the D-Bus address: {error}") from error
        except TimeoutError:
            raise Lost(f"D-Bus gave no answer within {CALL_TIMEOUT:g} s") from None
        except (OSError, EOFError, AuthError) as error:
            raise Lost(str(error) or type(error).__name__) from error
        connection.add_message_handler(self._on_message)
        self._results.clear()
        asyncio.get_running_loop().create_task(self._await_end(connection))
        await self._ask(connection, _match(_JOBS))
        return connection

    async def _await_end(self, connection: MessageBus) -> None:
        """Tell whoever waits for a signal that it will not come."""
        # How it ended is of no interest: EOFError, ConnectionResetError, or nothing at all.
        with contextlib.suppress(Exception):
            await connection.wait_for_disconnect()  # type: ignore[no-untyped-call]
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Lost("the connection to D-Bus was lost"))
        for callback in [*self._listeners]:
            callback(None)
        self._listeners.clear()

    async def _ask(self, connection: MessageBus, message: Message) -> list[Any]:
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                reply = await connection.call(message)
        except TimeoutError:
            raise Lost(f"systemd gave no answer within {CALL_TIMEOUT:g} s") from None
        except (OSError, EOFError) as error:
            raise Lost("the connection to D-Bus was lost") from error
        if reply is None:
            raise Lost("the connection to D-Bus was lost")
        if reply.message_type is MessageType.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise Refused(reply.error_name or "", text)
        body = unpack_variants(reply.body)
        assert isinstance(body, list)
        return body

    def _on_message(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        if message.member == "JobRemoved":
            _, path, _, result = message.body
            future = self._waiting.get(path)
            if future is None:
                self._results[path] = result
                while len(self._results) > _MOST_RESULTS:
                    self._results.popitem(last=False)
            elif not future.done():
                future.set_result(result)
        elif message.path and message.path.startswith(MANAGER_PATH):
            for callback in [*self._listeners]:
                callback(message)


def _match(rule: str) -> Message:
    """Asks D-Bus for the signals of a rule."""
    return Message(DBUS, DBUS_PATH, DBUS, "AddMatch", signature="s", body=[rule])


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def variants(properties: Sequence[Property]) -> list[Any]:
    """As StartTransientUnit takes them, a(sv)."""
    return [[one.name, Variant(one.signature, one.value)] for one in properties]


def _pid(process: Process) -> int:
    return process.pid


# --- what is said of a call that failed ---------------------------------------------------------

_BUSY = ("NoReply", "Timeout", "TimedOut", "LimitsExceeded", "NoMemory")
_DENIED = ("AccessDenied", "AuthFailed", "InteractiveAuthorizationRequired")

_REFUSALS: dict[str, tuple[str, str | None]] = {
    f"{SYSTEMD}.TransactionIsDestructive": (
        "the machine is going down, or the unit is being stopped",
        "see systemctl list-jobs",
    ),
    f"{SYSTEMD}.UnitExists": (
        "there is a unit of that name already",
        "see which: systemctl list-unit-files 'mic-*'",
    ),
}


def explain(action: str, error: Refused | Lost) -> MicError:
    """ "cannot ACTION: cause", with a way out where one is known."""
    if isinstance(error, Lost):
        return _lost(action, error)
    if error.name in _AWAY:
        return RuntimeUnavailable(
            f"cannot {action}: systemd is not on the system bus",
            hint="where systemd is not PID 1, set MIC_PROCESS_RUNTIME=subprocess",
        )
    short = error.name.removeprefix(f"{DBUS}.Error.")
    if short in _BUSY:
        return RuntimeUnavailable(f"cannot {action}: systemd gave no answer: {quoted(error.text)}")
    if short in _DENIED:
        return RuntimeRefused(f"cannot {action}: systemd lets only root do it", hint="run as root")
    if error.name == f"{SYSTEMD}.UnitMasked":
        return RuntimeRefused(f"cannot {action}: {quoted(error.text)}", hint="see systemctl unmask")
    cause, hint = _REFUSALS.get(error.name, (f"systemd refused: {quoted(error.text)}", None))
    return RuntimeRefused(f"cannot {action}: {cause}", hint=hint)


def _lost(action: str, error: Lost) -> RuntimeUnavailable:
    reported: tuple[str, str | None] = f"systemd cannot be reached: {error}", None
    match error.__cause__:
        case FileNotFoundError():
            reported = "there is no D-Bus to reach systemd by", "install it: apt-get install dbus"
        case ConnectionRefusedError():
            reported = "D-Bus does not run", "start it with: systemctl start dbus"
        case PermissionError():
            reported = "the system bus may not be used by this user", "run as root"
    return RuntimeUnavailable(f"cannot {action}: {reported[0]}", hint=reported[1])
