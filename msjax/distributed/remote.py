"""The client's end of what a trained server's part does elsewhere.

It answers features with outputs, and says what comes next in a text:

    with connected_pair(msjax.load_part("client.safetensors"), LinkOptions(server="localhost:50052")) as pair:
        outputs = msjax.predict(pair, images)
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import grpc

from msjax.distributed import messages
from msjax.distributed.generation import RemoteSession
from msjax.distributed.options import LinkOptions
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc import split_pb2_grpc
from msjax.distributed.rpc.connection import OTHER_SERVER, RUN_KEY, metadata_of, open_channel, reason_of
from msjax.distributed.rpc.security import TlsFiles
from msjax.pair import Pair
from msjax.parts import TrainedPart, check_complete, check_run_ids
from msjax.session import Terms
from msjax.split.payloads import Payload, PayloadSpec

T = TypeVar("T")

_TRY_SECONDS = 10.0  # of a call that need not wait


class RemoteServer:
    """A trained server part behind a network. Threads may share it.

    Args:
      address: host:port.
      tls, token, compression: see `LinkOptions`.
      retry_seconds: for how long a server that is away is tried again, at the start and in between.
      tell: takes what there is to say meanwhile.

    Raises, from every method:
      ValueError: the server will not answer this client, or not this request.
      ConnectionError: it cannot be reached, or was lost.

    Attributes:
      sent_bytes, received_bytes: of all messages of features and of outputs so far.
    """

    def __init__(
        self,
        address: str,
        tls: TlsFiles | None = None,
        token: str | None = None,
        compression: Literal["huffman", "all"] | None = None,
        *,
        retry_seconds: float = 60.0,
        tell: Callable[[str], None] = lambda text: None,
    ):
        self._address, self._tls, self._compression = address, tls or TlsFiles(), compression
        self._retry_seconds, self._say = retry_seconds, tell
        self._channel = open_channel(address, self._tls)
        self._stub = split_pb2_grpc.SplitStub(self._channel)
        self._metadata = metadata_of(token)
        self._run: str | None = None
        self.sent_bytes = self.received_bytes = 0

    def describe(self) -> pb.Description:
        """Returns what the server has; another part that answers later is refused."""

        def call(seconds):
            options = {"metadata": self._metadata, "timeout": max(0.1, min(seconds, _TRY_SECONDS))}
            return self._call(lambda: self._stub.Describe(pb.DescribeRequest(), **options))

        found = self._retrying(call)
        self._check_run(found.run)
        self._run = found.run
        return found

    def answers(self, payloads: Sequence[Payload], up: PayloadSpec, down: PayloadSpec) -> list[Payload]:
        """Returns what the server answers to features, in order: outputs or, U-shaped, the tail's features.

        What has no answer yet where a connection is lost is sent again over another.

        Args:
          payloads: of a batch each, as `up` describes them.
          down: what each answer must be.
        """
        requests = [pb.Features(payload=messages.encode(payload, up, self._compression)) for payload in payloads]
        found: list[Payload] = []

        def call(seconds):
            stream = self._stub.Infer(iter(requests[len(found) :]), metadata=self._metadata)
            try:
                while len(found) < len(requests):
                    answer = self._call(lambda: next(stream))
                    self._check_stream(stream)
                    found.append(self._decode(answer, down))
                    self.sent_bytes += _bytes_of(requests[len(found) - 1])
                    self.received_bytes += _bytes_of(answer)
            finally:
                stream.cancel()  # also where an answer cannot be used, or nobody waits any more

        self._retrying(call, lambda: len(found))
        return found

    def begin(self, terms: Terms) -> RemoteSession:
        """Returns a session that continues a text with the part, which is a decoder's."""

        def open_stream(requests):
            return self._stub.Generate(requests, metadata=self._metadata)

        return RemoteSession(open_stream, self._call, terms, self._check_stream)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def _check_stream(self, stream):
        self._check_run(dict(stream.initial_metadata()).get(RUN_KEY))

    def _check_run(self, run):
        if self._run is not None and run != self._run:
            raise ValueError(
                f"{self._address}: the server now has a part of another run, {run!r}, got {self._run!r} before"
            )

    def _decode(self, answer, down):
        try:
            return messages.decode(answer.payload, down)
        except messages.ProtocolError as error:
            raise ValueError(f"{self._address}: the server's answer is not what its run calls for: {error}") from None

    def _retrying(self, call: Callable[[float], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Calls, with the seconds that are left, until it works, or for so long there was no progress."""
        began, told, so_far = time.monotonic(), "", progress()
        while True:
            try:
                return call(max(0.0, began + self._retry_seconds - time.monotonic()))
            except ConnectionError as error:
                reason = str(error)
            if progress() > so_far:
                began, told, so_far = time.monotonic(), "", progress()
            left = began + self._retry_seconds - time.monotonic()
            if left <= 0:
                raise ConnectionError(f"no answer in {self._retry_seconds:g} s of trying: {reason}") from None
            if reason != told:
                self._say(f"{reason}; trying again for up to {left:.0f} s")
                told = reason
            time.sleep(min(0.5, left))

    def _call(self, function):
        try:
            return function()
        except StopIteration:
            raise ConnectionError(f"{self._address}: the server closed the stream") from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ConnectionError(f"{self._address}: nothing answers") from None
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                if fault := self._tls.fault_with(self._address):
                    raise ValueError(f"{self._address}: {fault}") from None
                raise ConnectionError(f"{self._address}: {reason_of(error)}") from None
            if error.code() is grpc.StatusCode.CANCELLED:
                reason = "the server has ended the stream, as others needed its room"
                raise ConnectionError(f"{self._address}: {reason}") from None
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in error.details():
                raise ConnectionError(f"{self._address}: {error.details()}") from None  # others have all its calls
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise ValueError(f"{self._address}: {OTHER_SERVER}") from None
            raise ValueError(error.details()) from None


def _bytes_of(message):
    return sum(map(len, message.payload))


@contextlib.contextmanager
def connected_pair(
    client: TrainedPart,
    link: LinkOptions,
    *,
    retry_seconds: float = 60.0,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Pair]:
    """Gives both parts of a trained network, of which the server's is elsewhere (`msjax serve --part`), for a while.

    Args:
      client: a client's part of the same run.
      link: where the server is, and who asks.
      retry_seconds, tell: see `RemoteServer`.

    Raises:
      ValueError: the parts are not of one run, an option cannot work, or the server refuses.
      ConnectionError: it cannot be reached.
    """
    if client.part != "client":
        raise ValueError(f"part must be that of a client, got that of a {client.part}")
    check_complete(client, "part")
    token = link.token()
    remote = RemoteServer(link.server, link.tls, token, link.compression, retry_seconds=retry_seconds, tell=tell)
    try:
        check_run_ids(client.run_id, remote.describe().run, ("here", "there"))
        yield Pair(client, remote)
    finally:
        remote.close()
