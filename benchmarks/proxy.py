"""A slow link on this machine: a TCP proxy on loopback that lets each direction through at a given rate.

    with Proxy("localhost:50051", megabits=100) as link:
        ...  # connect to link.address
        link.counts()

    python benchmarks/proxy.py localhost:50051 --megabits 100       # by hand; prints its port

It is a program of its own, so that the programs at its ends do not slow it down. A direction is one token bucket for
all connections, as one wireless cell is for all that are in it, or one a connection; bytes leave when the last of them
would have arrived. No more than `WAITING_BYTES` of a connection wait for that, then nothing more of it is read: a
sender feels the rate as it would on a real link. Rates count what the sockets carry, without the headers of TCP and IP.
Needs the standard library alone.
"""

import argparse
import asyncio
import contextlib
import json
import math
import pathlib
import socket
import struct
import subprocess
import sys
import threading
from typing import Any, NamedTuple

BURST_BYTES = 16 << 10
"""What an idle link saves up."""
_CHUNK_BYTES = 32 << 10
WAITING_BYTES = 4 * _CHUNK_BYTES
"""Of one connection and direction; so much may pass while the program sleeps for longer than it wanted to."""
_FREE_CHUNK_BYTES = 256 << 10  # where there is no rate


class Counts(NamedTuple):
    """Bytes that have left the proxy, over all connections."""

    up: int
    """From the side that connects to the target."""
    down: int
    connections: int
    """That were ever opened."""


class Proxy:
    """A running proxy in front of `target`, host:port.

    Args:
      megabits: 10⁶ bits a second of each direction, or None for as fast as it goes.
      delay_ms: one way.
      per_connection: whether every connection has that rate for itself.
    """

    def __init__(
        self, target: str, *, megabits: float | None = 100.0, delay_ms: float = 0.0, per_connection: bool = False
    ):
        arguments = [target, "--delay-ms", str(delay_ms), *_megabits_flag(megabits)]
        if per_connection:
            arguments.append("--per-connection")
        self._program = subprocess.Popen(
            [sys.executable, "-I", str(pathlib.Path(__file__).resolve()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        self.port = self._answer()["port"]
        self.address = f"localhost:{self.port}"

    def counts(self) -> Counts:
        """Returns what has passed so far."""
        return Counts(**self._ask({}))

    def shape(self, megabits: float | None) -> None:
        """Changes the rate, from the next bytes on."""
        self._ask({"megabits": megabits})

    def stop(self) -> None:
        """Ends the program and with it every connection."""
        self._program.stdin.close()
        self._program.wait(60)
        self._program.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def _ask(self, question):
        with self._lock:
            self._program.stdin.write(json.dumps(question) + "\n")
            self._program.stdin.flush()
            return self._answer()

    def _answer(self):
        line = self._program.stdout.readline()
        if not line:
            raise ConnectionError("the proxy's program has ended")
        return json.loads(line)


class _Bucket:
    """One direction of a link: when bytes would have arrived."""

    def __init__(self, rate):
        self.rate = rate  # bytes a second, or None
        self._free_at = 0.0

    def reserve(self, length):
        """The time at which `length` more bytes are through."""
        now = asyncio.get_running_loop().time()
        if self.rate is None:
            return now
        # A link that was idle may catch up by a burst.
        self._free_at = max(self._free_at, now - BURST_BYTES / self.rate) + length / self.rate
        return self._free_at


class _Link:
    """The proxy inside its program."""

    def __init__(self, target, megabits, delay_ms, per_connection):
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self._rate, self._delay, self._per_connection = _rate(megabits), delay_ms / 1e3, per_connection
        self._shared = self._pair()
        self._pairs = [self._shared]
        self._counts = [0, 0]
        self._connections = 0

    def _pair(self):
        return _Bucket(self._rate), _Bucket(self._rate)

    async def run(self):
        listener = socket.create_server(("localhost", 0), backlog=128)
        # The kernel's buffer is a part of what waits; accepted sockets inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WAITING_BYTES)
        listener.setblocking(False)
        _say({"port": listener.getsockname()[1]})
        async with asyncio.TaskGroup() as tasks:
            accepting = tasks.create_task(self._accept(listener, tasks))
            await self._obey()
            accepting.cancel()
            raise _Ended

    async def _obey(self):
        """Answers the program that started this one, until it closes its end or dies."""
        loop = asyncio.get_running_loop()
        lines = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        while line := await lines.readline():
            question = json.loads(line)
            if "megabits" in question:
                self._rate = _rate(question["megabits"])
                for bucket in (bucket for pair in self._pairs for bucket in pair):
                    bucket.rate = self._rate
            up, down = self._counts
            _say({"up": up, "down": down, "connections": self._connections})

    async def _accept(self, listener, tasks):
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(listener)
            self._connections += 1
            tasks.create_task(self._connection(near))

    async def _connection(self, near):
        pair = self._shared
        if self._per_connection:
            self._pairs.append(pair := self._pair())
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WAITING_BYTES)  # before it connects, for the window
        try:
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(far, self._target)
            async with asyncio.TaskGroup() as tasks:
                for way, (source, sink) in enumerate(((near, far), (far, near))):
                    # With what is read and what is sent, four chunks. A delayed link also holds what is on its way,
                    # rate × delay; its chunks may be smaller than they could be.
                    in_flight = asyncio.Queue(2 + math.ceil(self._delay * (self._rate or 1e9) / 4096))
                    tasks.create_task(self._fill(source, in_flight, pair[way]))
                    tasks.create_task(self._drain(sink, in_flight, way))
        except* OSError:
            # Whatever broke here is to break there: closed like this, a socket sends a reset.
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            near.close()
            far.close()
            if self._per_connection:
                self._pairs.remove(pair)

    async def _fill(self, source, in_flight, bucket):
        """Reads no faster than the bucket lets through: what waits for its time fills the queue."""
        loop = asyncio.get_running_loop()
        while True:
            data = await loop.sock_recv(source, _FREE_CHUNK_BYTES if bucket.rate is None else _CHUNK_BYTES)
            await in_flight.put((bucket.reserve(len(data)) + self._delay, data))
            if not data:
                return

    async def _drain(self, sink, in_flight, way):
        loop = asyncio.get_running_loop()
        while True:
            due, data = await in_flight.get()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            # Before it is sent: whoever has received it finds it counted.
            self._counts[way] += len(data)
            await loop.sock_sendall(sink, data)


class _Ended(Exception):
    """The program that started this one wants no more of it."""


def _rate(megabits):
    """Bytes a second."""
    return None if megabits is None else megabits * 1e6 / 8


def _megabits_flag(megabits):
    return [] if megabits is None else ["--megabits", str(megabits)]


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="host:port")
    parser.add_argument("--megabits", type=float, help="10⁶ bits a second each way; by default as fast as it goes")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--per-connection", action="store_true", help="the rate is every connection's own")
    options = parser.parse_args()
    link = _Link(options.target, options.megabits, options.delay_ms, options.per_connection)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(link.run())
        except* _Ended:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
