"""The loops of the two programs, where messages are carried by threads: gRPC's, or any that keep to `Channel`."""

import contextlib
import queue
import time
from collections.abc import Callable

from msjax.distributed.channel import Channel, Close, ConnectionLost, Handled, Lost, Received, Send, Stop, Tick
from msjax.distributed.coordinator import Coordinator, Stopped
from msjax.distributed.session import ClientSession


def serve(
    coordinator: Coordinator,
    inbox: "queue.Queue[Received | Lost | Stop]",
    carry: Callable[[Send | Close | Handled], None],
) -> None:
    """Leads a run to its end, in the calling thread.

    Args:
      inbox: what happens; other threads put it there, for each connection in order.
      carry: hands a message to whoever sends it, without waiting, and says which of `inbox` are handled; called in this
        thread alone.

    Raises:
      Stopped, Exception: see `Coordinator.handle`.
    """
    while not coordinator.over:
        wake_at, events = coordinator.wake_at, []
        if wake_at is not None and wake_at <= time.monotonic():
            # What has come while the server was at work came in time.
            events = [inbox.get_nowait() for _ in range(inbox.qsize())] + [Tick()]
        else:
            # A signal that asks to stop is heard within a second on every system.
            with contextlib.suppress(queue.Empty):
                left = 1.0 if wake_at is None else wake_at - time.monotonic()
                events = [inbox.get(timeout=min(1.0, max(0.0, left)))]
        for event in events:
            _hand(coordinator, event, carry)


def linger(
    coordinator: Coordinator,
    inbox: "queue.Queue[Received | Lost | Stop]",
    carry: Callable[[Send | Close | Handled], None],
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Tells whoever comes after the end of a run that it is over, for so many seconds; see `serve`.

    Raises:
      Stopped: the server is asked to stop.
    """
    until = clock() + seconds
    while (left := until - clock()) > 0:
        with contextlib.suppress(queue.Empty):
            event = inbox.get(timeout=min(1.0, left))
            if isinstance(event, Stop):
                raise Stopped(event.reason)
            _hand(coordinator, event, carry)


def _hand(coordinator, event, carry):
    for out in coordinator.handle(event):
        carry(out)
    if isinstance(event, Received):
        carry(Handled(event.session))


def take_part(session: ClientSession, connect: Callable[[], Channel]) -> None:
    """Takes a client through a run, in the calling thread.

    Args:
      connect: opens a channel to the server; what goes wrong may be raised here as `ConnectionLost`, or by `receive`.

    Raises:
      Refused, ConnectionError: see `ClientSession`.
    """
    while not session.done:
        time.sleep(max(0.0, (session.next_deadline or 0.0) - time.monotonic()))
        try:
            _attend(session, connect())
        except ConnectionLost as lost:
            session.on_lost(lost)


def _attend(session, channel):
    """One connection's life; returns when the session is done."""
    try:
        for message in session.on_connected():
            channel.send(message)
        while not session.done:
            until = session.next_deadline
            received = channel.receive(None if until is None else max(0.0, until - time.monotonic()))
            for message in session.on_message(received, channel.received_at):
                channel.send(message)
    finally:
        channel.close()
