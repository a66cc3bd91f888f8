"""A client's connection to the server by gRPC."""

import asyncio
import contextlib
import queue
import re
import threading
import time
from typing import Any

import grpc

from msjax.distributed.channel import ConnectionLost
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.event_loop import event_loop, run
from msjax.distributed.rpc.frames import FrameError, Joiner, to_frames
from msjax.distributed.rpc.security import TlsFiles, check_token

# Refusals that another try would meet again.
_FINAL = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
)


_TOO_LARGE = "larger than max"
"""What gRPC says of a frame above a limit."""

_CLOSED = "the server closed the stream"

RUN_KEY = "msjax-run"
"""Of the metadata with which a trained part begins its answers: the `run_id` of the part."""

OTHER_SERVER = (
    "the server there does not answer such calls: msjax client needs a training one (msjax serve), msjax eval, "
    "predict and generate one with a trained part (msjax serve --part)"
)
"""Of a call that a server does not know."""


class Connection:
    """One stream to the server; a `Channel`.

    The event loop carries its messages, as it does those of all connections of a program: it holds no thread.
    """

    def __init__(self, address: str, tls: TlsFiles, token: str | None):
        self._address, self._tls, self._metadata = address, tls, metadata_of(token)
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._inbox: queue.SimpleQueue[tuple[pb.FromServer | ConnectionLost, float]] = queue.SimpleQueue()
        self.received_at = time.monotonic()
        """When the last message that `receive` returned had arrived, while this program may have been at work."""
        run(self._open())

    # -- In the event loop. ----------------------------------------------------------------------------------------

    async def _open(self):
        self._channel = open_channel(self._address, self._tls, grpc.aio)
        # As bytes: what is longer than a frame is no message by itself.
        service = pb.DESCRIPTOR.services_by_name["Split"].full_name
        self._stream = self._channel.stream_stream(f"/{service}/Train")(metadata=self._metadata)
        self._ending = Ending(self._stream)
        self._tasks = [asyncio.create_task(it) for it in (self._read(), self._write())]

    async def _read(self):
        joiner, heard = Joiner(pb.FromServer, -1), False
        try:
            while (frame := await self._stream.read()) is not grpc.aio.EOF:
                heard = True
                if (message := joiner.add(frame)) is not None:
                    self._put(message)
            self._put(ConnectionLost(_CLOSED))
        except FrameError as error:
            self._put(ConnectionLost(f"{self._address}: {error}", final=True))
        except grpc.RpcError as error:
            error = await self._ending.of_server(error)
            # A message that is too large will be so again; the code alone may also mean too many calls.
            final = error.code() in _FINAL or _TOO_LARGE in (error.details() or "")
            reason, unavailable = reason_of(error), error.code() is grpc.StatusCode.UNAVAILABLE
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                reason = f"{self._address}: {OTHER_SERVER}"
            if not heard and unavailable and (fault := await asyncio.to_thread(self._tls.fault_with, self._address)):
                reason, final = f"{self._address}: {fault}", True
            self._put(ConnectionLost(reason if final else f"{self._address}: {reason}", final=final))

    async def _write(self):
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # why the stream has ended, `_read` says
            while True:
                await self._stream.write(await self._outbox.get())

    def _queue(self, frames):
        for frame in frames:
            self._outbox.put_nowait(frame)

    def _put(self, message):
        self._inbox.put((message, time.monotonic()))

    async def _close(self):
        for task in self._tasks:
            task.cancel()
        self._stream.cancel()
        await self._channel.close()

    # -- From the thread that it is for. ---------------------------------------------------------------------------

    def send(self, message: pb.FromClient) -> None:
        """Hands a message over."""
        event_loop().call_soon_threadsafe(self._queue, list(to_frames(message)))

    def receive(self, timeout: float | None) -> pb.FromServer:
        """Returns the server's next message; see `Channel.receive`."""
        try:
            timeout = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
            message, self.received_at = self._inbox.get(timeout=timeout)
        except queue.Empty:
            raise ConnectionLost(f"{self._address}: no answer within {timeout:.0f} s") from None
        if isinstance(message, ConnectionLost):
            raise message
        return message

    def close(self) -> None:
        """Breaks the stream off, unless it has ended."""
        run(self._close())


class Ending:
    """Why a stream ended, in the words of its server.

    Where a client writes while the server ends the stream, grpc.aio puts an error of its own in place of the server's,
    before or after that has come (https://github.com/grpc/grpc/issues/36066). A refusal would look like a lost link.
    """

    _LOCAL = "Internal error from Core"

    def __init__(self, stream: Any):
        self._of_server: asyncio.Future[grpc.aio.AioRpcError] = asyncio.get_running_loop().create_future()
        stream.add_done_callback(self._note)  # called for each status, also for one that another replaces

    def _note(self, stream):
        # A task would come too late. A stream that has ended knows these without waiting.
        status = [_result_now(it) for it in (stream.code(), stream.details())]
        if None not in status and status[1] != self._LOCAL and not self._of_server.done():
            code, details = status
            self._of_server.set_result(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details))

    async def of_server(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Returns the server's error in place of `error`; `error` itself where none comes within a second."""
        if error.details() != self._LOCAL:
            return error
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._of_server), 1.0)
        return error


def _result_now(coroutine):
    """Returns what a coroutine returns if it need not wait, else None."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    return None


def metadata_of(token: str | None) -> list[tuple[str, str]] | None:
    """Returns what a call brings to show its token; raises ValueError for a token that gRPC does not carry."""
    if not token:
        return None
    check_token("token", token)
    return [("authorization", f"Bearer {token}")]


def reason_of(error: grpc.RpcError) -> str:
    """Returns why a call failed, without what gRPC says of its own workings."""
    if error.code() is grpc.StatusCode.OK:
        return _CLOSED
    details = error.details() or str(error.code())
    if details == "Cancelling all calls":
        return "the server is stopping"
    return re.sub(r"^failed to connect to all addresses; last error: \w+: (\w+:[^ ]+: )?", "", details)


def open_channel(address: str, tls: TlsFiles, api: Any = grpc) -> Any:
    """Returns a channel to `address`, with TLS where there are files for it; messages may have any size.

    Args:
      api: `grpc`, or `grpc.aio` for a channel of the event loop.
    """
    # By default the time to the next try grows to two minutes, whoever waits.
    backoff = [(f"grpc.{name}_reconnect_backoff_ms", ms) for name, ms in (("initial", 500), ("max", 5_000))]
    options = channel_options(-1) + backoff
    if tls:
        return api.secure_channel(address, tls.client(), options)
    # What is sent in the open must not leave the machine for a proxy that the environment names.
    return api.insecure_channel(address, [*options, ("grpc.enable_http_proxy", 0)])


def channel_options(max_bytes: int) -> list[tuple[str, Any]]:
    """Returns gRPC's options: messages up to `max_bytes` (-1: any), pings that find a dead link in half a minute."""
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        # A connection of its own for every client, also for several in one program.
        ("grpc.use_local_subchannel_pool", 1),
    ]
