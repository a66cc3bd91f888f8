"""The connection between a client and the server, as both ends see it.

The two ends themselves are objects without any I/O: `session.ClientSession` and `coordinator.Coordinator` take messages
and return messages. What carries these is a `Channel`: gRPC between machines; the tests have one in memory.
"""

import dataclasses
from typing import Any, Protocol


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
