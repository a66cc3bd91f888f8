"""The client's end of what a trained server's part does elsewhere: outputs for features, and what comes next in a text.

with connected_pair(msjax.load_part("client.safetensors"), LinkOptions(server="localhost:50052")) as pair:
outputs = msjax.predict(pair, images)
"""

import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import grpc
import jax

from msjax import wire
from msjax.distributed import messages
from msjax.distributed.client_run import Refused
from msjax.distributed.generation import RemoteSession
from msjax.distributed.options import LinkOptions
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc import split_pb2_grpc
from msjax.distributed.rpc.connection import OTHER_SERVER, metadata_of, open_channel, reason_of
from msjax.distributed.rpc.security import TlsFiles
from msjax.pair import Pair
from msjax.parts import TrainedPart, check_complete, check_run_ids
from msjax.session import Terms
from msjax.split.payloads import Payload, PayloadSpec
from msjax.split.trees import TreeSpec

_TRY_SECONDS = 10.0  # of a call that need not wait


class RemoteServer:
    """A trained server part behind a network.

    Args:
      address: host:port.
      tls, token, compression: see `LinkOptions`.

    Raises, from every method:
      Refused: the server will not answer this client, or not this request.
      ConnectionError: it cannot be reached, or was lost.
    """

    def __init__(
        self,
        address: str,
        tls: TlsFiles | None = None,
        token: str | None = None,
        compression: Literal["huffman", "all"] | None = None,
    ):
        self._address, self._tls, self._compression = address, tls or TlsFiles(), compression
        self._channel = open_channel(address, self._tls)
        self._stub = split_pb2_grpc.SplitStub(self._channel)
        self._metadata = metadata_of(token)
        self._requests: queue.Queue[pb.Features | None] = queue.Queue()
        self._stream = None

    def describe(self, seconds: float = 60.0, *, tell: Callable[[str], None] = lambda text: None) -> pb.Description:
        """Returns what the server has.

        Args:
          seconds: for how long one that is away is tried again.
          tell: takes what there is to say meanwhile.
        """
        began, told = time.monotonic(), ""
        while True:
            left = max(0.0, began + seconds - time.monotonic())
            options = {"metadata": self._metadata, "timeout": max(0.1, min(left, _TRY_SECONDS))}
            try:
                return self._call(lambda options=options: self._stub.Describe(pb.DescribeRequest(), **options))
            except ConnectionError as error:
                reason = str(error)
            left = began + seconds - time.monotonic()
            if left <= 0:
                raise ConnectionError(f"no answer in {seconds:g} s of trying: {reason}") from None
            if reason != told:
                tell(f"{reason}; trying again for up to {left:.0f} s")
                told = reason
            time.sleep(min(0.5, left))

    def send(self, payload: Payload, spec: PayloadSpec) -> int:
        """Sends features as `spec` describes them; returns the message's bytes.

        Several may be on their way; `receive` gives the answers in order.
        """
        if self._stream is None:
            self._stream = self._stub.Infer(iter(self._requests.get, None), metadata=self._metadata)
        data = messages.encode(payload, spec, self._compression)
        self._requests.put(pb.Features(payload=data))
        return sum(map(len, data))

    def receive(self) -> list[wire.Message]:
        """Returns the next answer, a message for each array: outputs or, U-shaped, the features for the tail."""
        if self._stream is None:
            raise ValueError("receive must follow a send")
        answer = self._call(lambda: next(self._stream))
        return [wire.decode(data) for data in answer.payload]

    def receive_outputs(self, spec: TreeSpec, batch_size: int) -> Any:
        """Returns the arrays of the next answer, as `spec` describes those of one sample.

        Raises:
          Refused: they are others.
        """
        return outputs_of(self.receive(), spec, batch_size)

    def begin(self, terms: Terms) -> RemoteSession:
        """Returns a session that continues a text with the part, which is a decoder's."""
        return RemoteSession(lambda requests: self._stub.Generate(requests, metadata=self._metadata), self._call, terms)

    def close(self) -> None:
        """Ends the connection."""
        self._requests.put(None)
        self._channel.close()

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
                    raise Refused(f"{self._address}: {fault}") from None
                raise ConnectionError(f"{self._address}: {reason_of(error)}") from None
            if error.code() is grpc.StatusCode.CANCELLED:
                reason = "the server has ended the stream, as others needed its room"
                raise ConnectionError(f"{self._address}: {reason}") from None
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in error.details():
                raise ConnectionError(f"{self._address}: {error.details()}") from None  # others have all its calls
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise Refused(f"{self._address}: {OTHER_SERVER}") from None
            raise Refused(error.details()) from None


def outputs_of(answer: list[wire.Message], spec: TreeSpec, batch_size: int) -> Any:
    """Returns the arrays of an answer of `RemoteServer.receive`, as `spec` describes those of one sample.

    Raises:
      Refused: they are others.
    """
    found = [(message.like.shape, message.like.dtype) for message in answer]
    wanted = [(leaf.shape, leaf.dtype) for leaf in spec.batch_leaves(batch_size)]
    if found != wanted:
        raise Refused(f"the server's answer must be arrays of {_shown(wanted)}, got {_shown(found)}")
    arrays = [message.codec.decode(message.payload, message.like) for message in answer]
    return jax.tree.unflatten(spec.structure, arrays)


def _shown(arrays):
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in arrays)


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
      retry_seconds: for how long a server that is away is tried again.
      tell: takes what there is to say meanwhile.

    Raises:
      ValueError: the parts are not of one run, an option cannot work, or the server refuses; what it refuses while the
        pair is in use raises it, too.
      ConnectionError: it cannot be reached, or was lost.
    """
    if client.part != "client":
        raise ValueError(f"part must be that of a client, got that of a {client.part}")
    check_complete(client, "part")
    remote = RemoteServer(link.server, link.tls, link.token(), link.compression)
    try:
        described = remote.describe(retry_seconds, tell=tell)
        check_run_ids(client.run_id, described.run, ("here", "there"))
        yield Pair(client, remote)
    except Refused as refused:
        raise ValueError(str(refused)) from None
    finally:
        remote.close()
