"""One coordinator and its clients in one thread, over lines in memory: each does what is due, in a fixed order."""

import math
from collections.abc import Callable

from msjax.distributed.channel import Clock, Close, ConnectionLost, MemoryChannel, MemoryNetwork, Send, Stop, Tick
from msjax.distributed.coordinator import Coordinator
from msjax.distributed.session import ClientSession


class Loop:
    """Steps a run on a clock that moves only when nothing is left to do.

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
