"""Lines between clients and a server in memory, with faults to order, and the parties of a run that use them."""

import dataclasses
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from msjax.distributed.channel import Close, ConnectionLost, Lost, Received, Send, Stop, Tick
from msjax.distributed.coordinator import Coordinator
from msjax.distributed.session import ClientSession

Direction = Literal["up", "down"]
"""To the server, or to the client."""

Faults = Callable[[Direction, int | str, Any], tuple[float, ...]]
"""From direction, client and message to after how many seconds a copy of it arrives: `(0.0,)` for a good line."""


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        """Returns the time."""
        return self.now


@dataclasses.dataclass
class _Way:
    """One direction of a connection; what is sent later arrives no earlier."""

    busy_until: float = 0.0
    open: bool = True


class MemoryChannel:
    """A client's end of a connection in memory. `receive` never waits: time passes only where the clock is moved."""

    def __init__(self, network: "MemoryNetwork", session: int, client: int | str):
        self.session, self.client = session, client
        self._network = network
        self.ways = {"up": _Way(), "down": _Way()}
        self._inbox: deque[Any] = deque()
        self.received_at = network.now

    def send(self, message: Any) -> None:
        """Hands a message over."""
        self._network.put(self, "up", message)

    def receive(self, timeout: float | None = 0.0) -> Any:
        """Returns the next message that has arrived; see `Channel.receive`."""
        if not self._inbox:
            raise ConnectionLost("no message is there")
        if isinstance(self._inbox[0], ConnectionLost):
            raise self._inbox[0]
        self.received_at = self._network.now
        return self._inbox.popleft()

    def close(self) -> None:
        """Ends the connection; the server hears of it after what was sent."""
        self._network.end(self, "up")

    @property
    def has_news(self) -> bool:
        """Whether `receive` returns a message, or raises because the connection is lost."""
        return bool(self._inbox)

    def arrive(self, message: Any) -> None:
        """Puts a message, or `ConnectionLost`, where `receive` finds it."""
        self._inbox.append(message)


class MemoryNetwork:
    """Connections of clients to one server, within one thread: deterministic, without a socket and without sleep.

    Args:
      clock: says the time; whoever moves it asks `next_arrival` how far.
      copy: what becomes of a message on the way, for example through bytes and back.
    """

    def __init__(self, clock: Callable[[], float], copy: Callable[[Any], Any] = lambda message: message):
        self._clock, self._copy = clock, copy
        self._sessions, self._order = itertools.count(1), itertools.count()
        self._under_way: list[tuple[float, int, MemoryChannel, Direction, Any]] = []
        self._open: dict[int, MemoryChannel] = {}
        self.faults: Faults = lambda direction, client, message: (0.0,)
        self.down = False
        """Whether the server is gone: connections fail at once."""

    def connect(self, client: int | str) -> MemoryChannel:
        """Returns a new connection to the server; it is lost at once where there is none."""
        channel = MemoryChannel(self, next(self._sessions), client)
        if self.down:
            channel.ways["up"].open = channel.ways["down"].open = False
            channel.arrive(ConnectionLost("no server is there"))
        else:
            self._open[channel.session] = channel
        return channel

    # -- The server's end. -----------------------------------------------------------------------------------------

    def send(self, session: int, message: Any) -> None:
        """To a client; nothing where its connection is lost."""
        if session in self._open:
            self.put(self._open[session], "down", message)

    def close(self, session: int, lost: ConnectionLost | None = None) -> None:
        """Ends a connection; its client hears of it after what was sent."""
        if session in self._open:
            self.end(self._open[session], "down", lost)

    # -- Faults. ---------------------------------------------------------------------------------------------------

    def cut(self, client: int | str, *, server_notices_after: float = 0.0, client_notices_after: float = 0.0) -> None:
        """Cuts all connections of a client: what is under way is lost, and each end hears of it when it notices."""
        for channel in [channel for channel in self._open.values() if channel.client == client]:
            self._lose(channel, server_notices_after, client_notices_after)

    def take_down(self) -> None:
        """The server dies: all connections with it, and new ones fail until `down` is set to False again."""
        self.down = True
        for channel in list(self._open.values()):
            self._lose(channel, None, 0.0)

    def _lose(self, channel, server_seconds, client_seconds):
        self._under_way = [item for item in self._under_way if item[2] is not channel]
        heapq.heapify(self._under_way)
        now = self._clock()
        for direction, seconds in (("up", server_seconds), ("down", client_seconds)):
            if channel.ways[direction].open and seconds is not None:
                self._push(now + seconds, channel, direction, ConnectionLost("the connection is cut"))
            channel.ways[direction].open = False
        self._open.pop(channel.session, None)

    def inject(self, client: int | str, message: Any) -> None:
        """Lets an old copy of a message come to the server over the client's newest connection."""
        mine = [channel for channel in self._open.values() if channel.client == client]
        if mine:
            self._push(self._clock(), mine[-1], "up", message)

    # -- What is under way. ----------------------------------------------------------------------------------------

    def put(self, channel: MemoryChannel, direction: Direction, message: Any) -> None:
        """Sends a message on its way, with the faults of the line."""
        way = channel.ways[direction]
        if not way.open:
            return
        for delay in self.faults(direction, channel.client, message):
            way.busy_until = max(way.busy_until, self._clock() + delay)
            self._push(way.busy_until, channel, direction, self._copy(message))

    def end(self, channel: MemoryChannel, direction: Direction, lost: ConnectionLost | None = None) -> None:
        """One end closes: the other hears of it, and this one hears nothing more."""
        way = channel.ways[direction]
        if way.open:
            lost = lost or ConnectionLost("the other end has closed the connection")
            self._push(max(way.busy_until, self._clock()), channel, direction, lost)
        for each in channel.ways.values():
            each.open = False
        other = "down" if direction == "up" else "up"
        self._under_way = [item for item in self._under_way if item[2] is not channel or item[3] != other]
        heapq.heapify(self._under_way)
        self._open.pop(channel.session, None)

    def _push(self, when, channel, direction, message):
        heapq.heappush(self._under_way, (when, next(self._order), channel, direction, message))

    @property
    def now(self) -> float:
        """The time by the clock."""
        return self._clock()

    @property
    def next_arrival(self) -> float | None:
        """When the next message, or end of a connection, arrives somewhere; None where nothing is under way."""
        return self._under_way[0][0] if self._under_way else None

    def deliver(self) -> MemoryChannel | Received | Lost | None:
        """Lets the next thing arrive that is due.

        Returns:
          The channel of the client that has news, or what has arrived at the server; None where nothing is due.
        """
        if not self._under_way or self._under_way[0][0] > self._clock():
            return None
        _, _, channel, direction, message = heapq.heappop(self._under_way)
        if direction == "down":
            channel.arrive(message)
            return channel
        if isinstance(message, ConnectionLost):
            return Lost(channel.session)
        return Received(channel.session, message, f"client {channel.client}'s address")


class Loop:
    """One coordinator and its clients in one thread: each does what is due, in a fixed order.

    Steps a run on a clock that moves only when nothing is left to do.

    Attributes:
      clients: the sessions that are under way, by the name of their process: the client_id, where no other is given.
      failures: what ended others before their time, by name; "server" for the server.
    """

    def __init__(self, network: MemoryNetwork, clock: Clock):
        self.network, self.clock = network, clock
        self.server: Coordinator | None = None
        self.clients: dict[int | str, ClientSession] = {}
        self.failures: dict[int | str, Exception] = {}
        self._channels: dict[int | str, MemoryChannel] = {}

    def add(self, session: ClientSession, name: int | str | None = None) -> None:
        """A client begins."""
        self.clients[session.client_id if name is None else name] = session

    def kill(self, client: int | str) -> ClientSession:
        """A client's process is gone, with its connection; returns what is left of it."""
        self.network.cut(client)
        self._channels.pop(client, None)
        return self.clients.pop(client)

    def kill_server(self) -> Coordinator:
        """The server's process is gone, with all connections; returns what is left of it."""
        server, self.server = self.server, None
        self.network.take_down()
        return server

    def start_server(self, server: Coordinator) -> None:
        """A server begins; connections find it from now on."""
        self.server, self.network.down = server, False

    def stop(self, reason: str) -> None:
        """Asks the server to stop."""
        self._handle(Stop(reason))

    # -- One thing after the other. --------------------------------------------------------------------------------

    def step(self) -> bool:
        """Does one thing that is due; returns whether there was one."""
        match self.network.deliver():
            case MemoryChannel() as channel:
                if self._channels.get(channel.client) is channel:
                    self._read(channel)
                return True
            case None:
                pass
            case event:
                self._handle(event)
                return True
        if self.server is not None and _due(self.server.wake_at, self.clock()):
            self._handle(Tick())
            return True
        for client, session in self.clients.items():
            if _due(session.next_deadline, self.clock()):
                if client in self._channels:
                    self._lost(client, ConnectionLost("no answer came in time"))
                else:
                    self._connect(client, session)
                return True
        return False

    def run_until_idle(self) -> None:
        """Does all that is due now."""
        while self.step():
            pass

    def run(self, until: Callable[[], bool] | None = None, *, seconds: float = math.inf) -> None:
        """Does what is due, and moves the clock to what is due next, until `until()` holds or all are done.

        Raises:
          RuntimeError: nothing will happen any more, or not within `seconds`, and it is not so yet.
        """
        until = until or (lambda: not self.clients and self.server is None)
        limit = self.clock() + seconds
        while not until():
            if self.step():
                continue
            times = [self.network.next_arrival, *(session.next_deadline for session in self.clients.values())]
            times += [] if self.server is None else [self.server.wake_at]
            following = min((t for t in times if t is not None), default=None)
            if following is None or following > limit:
                late = f"not within {seconds} s" if following is not None else "never"
                raise RuntimeError(f"what is waited for happens {late}: {self.failures or 'nobody has failed'}")
            self.clock.now = following

    # -- The two sides. --------------------------------------------------------------------------------------------

    def _handle(self, event):
        if self.server is None:
            return
        try:
            for out in self.server.handle(event):
                match out:
                    case Send(session, message):
                        self.network.send(session, message)
                    case Close(session, reason, final):
                        self.network.close(session, ConnectionLost(reason, final=final) if reason else None)
        except Exception as error:
            self.failures["server"] = error
        if self.server.over:
            # What it has sent still arrives; who comes now finds nobody.
            self.server, self.network.down = None, True

    def _connect(self, client, session):
        channel = self._channels[client] = self.network.connect(client)
        self._say(client, session.on_connected)
        if channel.has_news:  # there is no server
            self._read(channel)

    def _read(self, channel):
        client = channel.client
        try:
            message = channel.receive()
        except ConnectionLost as lost:
            self._lost(client, lost)
        else:
            self._say(client, self.clients[client].on_message, message, channel.received_at)

    def _say(self, client, method, *args):
        session, channel = self.clients[client], self._channels[client]
        try:
            for message in method(*args):
                channel.send(message)
        except Exception as error:
            self._gone(client, error)
        else:
            if session.done:
                self._gone(client)

    def _lost(self, client, lost):
        self._channels.pop(client).close()
        session = self.clients[client]
        try:
            session.on_lost(lost)
        except Exception as error:
            self._gone(client, error)
        else:
            if session.done:
                self._gone(client)

    def _gone(self, client, error=None):
        del self.clients[client]
        if client in self._channels:
            self._channels.pop(client).close()
        if error is not None:
            self.failures[client] = error


def _due(time, now):
    return time is not None and time <= now
