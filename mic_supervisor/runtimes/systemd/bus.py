"""One connection to the system bus, on a thread of its own, and the calls to PID 1 over it.

The interface is org.freedesktop.systemd1(5). Nothing waits without a bound. A connection that was
lost is made again by the next call: D-Bus may be restarted, and PID 1 then comes back to it a
moment later.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.runtimes.systemd.unit import Property
from mic_supervisor.runtimes.systemd.view import Process, Unit

if TYPE_CHECKING:
    import asyncio

    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

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
    f"org.freedesktop.DBus.Error.{name}"
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
        import asyncio

        future = asyncio.run_coroutine_threadsafe(work, self._thread())
        try:
            return future.result(timeout)
        except TimeoutError:
            raise Lost(f"no answer within {timeout:g} s") from None
        finally:
            future.cancel()  # an interrupt ends the work too

    def _thread(self) -> asyncio.AbstractEventLoop:
        import asyncio

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
        import asyncio

        deadline = asyncio.get_running_loop().time() + RETURN_TIMEOUT
        while True:
            away: Exception
            try:
                connection = await self._connected()
            except Lost as error:
                away = error
            else:
                try:
                    return await self._ask(
                        connection, SYSTEMD, path, interface, member, signature, body, descriptors
                    )
                except Lost as error:
                    if not repeat:
                        raise
                    away = error
                except Refused as error:
                    if error.name not in _AWAY and not (repeat and error.name == _LEFT):
                        raise
                    away = error
            if asyncio.get_running_loop().time() >= deadline:
                raise away
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
        import asyncio

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

    async def listen(self, hear: Callable[[Message | None], None]) -> None:
        """Pass on every change of a unit, None when the connection is lost."""
        connection = await self._connected()
        for rule in _CHANGES:
            await self._ask(connection, DBUS, DBUS_PATH, DBUS, "AddMatch", "s", (rule,), ())
        try:
            await self._ask(connection, SYSTEMD, MANAGER_PATH, MANAGER, "Subscribe", "", (), ())
        except Refused as error:
            if not error.name.endswith(".AlreadySubscribed"):
                raise
        self._listeners.append(hear)

    def unlisten(self, hear: Callable[[Message | None], None]) -> None:
        if hear in self._listeners:
            self._listeners.remove(hear)

    # --- the connection -------------------------------------------------------------------

    async def _connected(self) -> MessageBus:
        import asyncio

        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:
            if self._connection is None or not self._connection.connected:
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> MessageBus:
        import asyncio

        from dbus_fast import AuthError, BusType, InvalidAddressError
        from dbus_fast.aio import MessageBus

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
        connection.add_message_handler(self._heard)
        self._results.clear()
        asyncio.get_running_loop().create_task(self._await_end(connection))
        await self._ask(connection, DBUS, DBUS_PATH, DBUS, "AddMatch", "s", (_JOBS,), ())
        return connection

    async def _await_end(self, connection: MessageBus) -> None:
        """Tell whoever waits for a signal that it will not come."""
        import contextlib

        # How it ended is of no interest: EOFError, ConnectionResetError, or nothing at all.
        with contextlib.suppress(Exception):
            await connection.wait_for_disconnect()  # type: ignore[no-untyped-call]
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Lost("the connection to D-Bus was lost"))
        for hear in [*self._listeners]:
            hear(None)
        self._listeners.clear()

    async def _ask(
        self,
        connection: MessageBus,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        descriptors: Sequence[int],
    ) -> list[Any]:
        import asyncio

        from dbus_fast import Message, MessageType
        from dbus_fast.unpack import unpack_variants

        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            unix_fds=list(descriptors),
        )
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

    def _heard(self, message: Message) -> None:
        from dbus_fast import MessageType

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
            for hear in [*self._listeners]:
                hear(message)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def variants(properties: Sequence[Property]) -> list[Any]:
    """As StartTransientUnit takes them, a(sv)."""
    from dbus_fast import Variant

    return [[one.name, Variant(one.signature, one.value)] for one in properties]


def _pid(process: Process) -> int:
    return process.pid
