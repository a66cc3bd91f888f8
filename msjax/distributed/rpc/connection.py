"""A client's connection to the server by gRPC."""

import queue
import re
import threading
import time
from typing import Any

import grpc

from msjax.distributed.channel import ConnectionLost
from msjax.distributed.rpc import split_pb2 as pb
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


class Connection:
    """One stream to the server; a `Channel`."""

    def __init__(self, address: str, tls: TlsFiles, token: str | None, max_bytes: int = -1):
        self._address, self._tls = address, tls
        self._channel = open_channel(address, tls, max_bytes)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[tuple[pb.FromServer | ConnectionLost, float]] = queue.SimpleQueue()
        self.received_at = time.monotonic()
        """When the last message that `receive` returned had arrived, while this program may have been at work."""
        # As bytes: what is longer than a frame is no message by itself.
        service = pb.DESCRIPTOR.services_by_name["Split"].full_name
        train = self._channel.stream_stream(f"/{service}/Train")
        self._stream = train(iter(self._outbox.get, None), metadata=metadata_of(token))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        heard, joiner = False, Joiner(pb.FromServer)
        try:
            for frame in self._stream:
                heard = True
                if (message := joiner.add(frame)) is not None:
                    self._put(message)
            self._put(ConnectionLost("the server closed the stream"))
        except FrameError as error:
            self._put(ConnectionLost(f"{self._address}: {error}", final=True))
        except grpc.RpcError as error:
            # A message that is too large will be so again; the code alone may also mean too many calls.
            final = error.code() in _FINAL or _TOO_LARGE in (error.details() or "")
            reason = reason_of(error)
            if (
                not heard
                and error.code() is grpc.StatusCode.UNAVAILABLE
                and (fault := self._tls.fault_with(self._address))
            ):
                reason, final = f"{self._address}: {fault}", True
            self._put(ConnectionLost(reason if final else f"{self._address}: {reason}", final=final))

    def _put(self, message):
        self._inbox.put((message, time.monotonic()))

    def send(self, message: pb.FromClient) -> None:
        """Hands a message over."""
        for frame in to_frames(message):
            self._outbox.put(frame)

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
        self._stream.cancel()
        self._outbox.put(None)
        self._channel.close()


def metadata_of(token: str | None) -> list[tuple[str, str]] | None:
    """Returns what a call brings to show its token; raises ValueError for a token that gRPC does not carry."""
    if not token:
        return None
    check_token("token", token)
    return [("authorization", f"Bearer {token}")]


def reason_of(error: grpc.RpcError) -> str:
    """Returns why a call failed, without what gRPC says of its own workings."""
    details = error.details() or str(error.code())
    return re.sub(r"^failed to connect to all addresses; last error: \w+: (\w+:[^ ]+: )?", "", details)


def open_channel(address: str, tls: TlsFiles, max_bytes: int) -> grpc.Channel:
    """Returns a channel to `address`, with TLS where there are files for it; options as `channel_options`."""
    # By default the time to the next try grows to two minutes, whoever waits.
    backoff = [(f"grpc.{name}_reconnect_backoff_ms", ms) for name, ms in (("initial", 500), ("max", 5_000))]
    options = channel_options(max_bytes) + backoff
    if tls:
        return grpc.secure_channel(address, tls.client(), options)
    # What is sent in the open must not leave the machine for a proxy that the environment names.
    return grpc.insecure_channel(address, [*options, ("grpc.enable_http_proxy", 0)])


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
