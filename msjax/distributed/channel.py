"""The line between a client and the server as both ends see it; and lines in memory, with faults to order.

The two ends themselves are objects without any I/O: `session.ClientSession` and `coordinator.Coordinator` take messages
and return messages. What carries these is a `Channel`: gRPC between machines, `MemoryNetwork` within one program.
"""

import dataclasses
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, Protocol


class ConnectionLost(Exception):
    """A channel carries nothing more.

    Args:
      final: whether the other end has turned this one away for good, so that another try would meet the same.
    """

    def __init__(self, reason: str, *, final: bool = False):
        super().__init__(reason)
        self.final = final


class Channel(Protocol):
    """A client's end of a connection: messages arrive once and in order, up to where the connection is lost."""

    received_at: float
    """When the last message that `receive` returned had arrived, on the session's clock."""

    def send(self, message: Any) -> None:
        """Hands a message over; it is not known whether it arrives. A lost channel swallows it."""

    def receive(self, timeout: float | None) -> Any:
        """Returns the next message.

        Args:
          timeout: seconds; None for any.

        Raises:
          ConnectionLost: the connection has ended, or nothing came in time.
        """

    def close(self) -> None:
        """Ends the connection; the other end hears of it after what was sent."""


@dataclasses.dataclass(frozen=True)
class Received:
    """In: a message of a client over a connection, Hello first. Who carries messages names the connections.

    Attributes:
      at: when it had arrived, on the coordinator's clock; by default, when it is handed in.
      nbytes: of the message as it came, where that is known.
    """

    session: int
    message: Any
    peer: str = ""
    at: float | None = None
    nbytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Lost:
    """In: a connection has ended."""

    session: int


@dataclasses.dataclass(frozen=True)
class Stop:
    """In: training is to end at the next opportunity."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Tick:
    """In: it is the time that the coordinator has named, and all that came before has been handed in."""


@dataclasses.dataclass(frozen=True)
class Send:
    """Out: a message to the client at the other end of a connection."""

    session: int
    message: Any


@dataclasses.dataclass(frozen=True)
class Close:
    """Out: end a connection after what was sent; where it is `final`, another try would meet the same."""

    session: int
    reason: str = ""
    final: bool = False


@dataclasses.dataclass(frozen=True)
class Handled:
    """Out: a message of a connection is dealt with, so that another one may be read."""

    session: int


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
