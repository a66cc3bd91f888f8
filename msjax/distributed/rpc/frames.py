"""Messages as the frames that gRPC carries: one each, or several where a message is large.

gRPC and protobuf count a message's bytes in 32 bits, with a sign. The bytes of a larger message's payload go ahead of
it in frames of their own, each a `Chunk`; the message itself comes last, without them.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError, EncodeError

from msjax.distributed.rpc import split_pb2 as pb

FRAME_BYTES = 64 << 20
"""Of a message's payload in one frame. A larger message is sent in chunks of so many bytes."""

BESIDE_BYTES = 1 << 20
"""What a frame may have beside the payload: the config, a description, metrics, and the fields' own headers."""

DESCRIPTION_BYTES = 1 << 20
"""Of what a client says of its data and run: parsed, JSON can take twenty times its bytes."""

_LARGE_FIELDS = {"request": ("payload", "labels", "part"), "answer": ("payload",), "start": ("part",)}


class FrameError(ValueError):
    """What has come is no frame, or of a message that is too large."""


def to_frames(message: pb.FromClient | pb.FromServer, frame_bytes: int | None = None) -> Iterator[bytes]:
    """Yields the frames of a message, in the order in which they are sent.

    Args:
      frame_bytes: of the payload in a frame; by default `FRAME_BYTES`.
    """
    frame_bytes = FRAME_BYTES if frame_bytes is None else frame_bytes
    kind = message.WhichOneof("kind")
    inner = getattr(message, kind) if kind in _LARGE_FIELDS else None
    large = [] if inner is None else [(name, data) for name in _LARGE_FIELDS[kind] for data in _elements(inner, name)]
    if sum(len(data) for _, data in large) <= frame_bytes:
        yield message.SerializeToString()
        return
    for name, data in large:
        field = inner.DESCRIPTOR.fields_by_name[name].number
        for start in range(0, max(1, len(data)), frame_bytes):
            stop = start + frame_bytes
            chunk = pb.Chunk(field=field, data=data[start:stop], more=stop < len(data))
            yield type(message)(chunk=chunk).SerializeToString()
    rest = type(message)()
    small = getattr(rest, kind)
    for field, value in inner.ListFields():
        if field.name in _LARGE_FIELDS[kind]:
            continue
        if field.message_type is None:
            setattr(small, field.name, value)
        else:
            getattr(small, field.name).CopyFrom(value)
    small.SetInParent()
    yield rest.SerializeToString()


def nbytes_of(message: pb.FromClient | pb.FromServer) -> int:
    """Returns the bytes of a message, as serialized."""
    try:
        return message.ByteSize()
    except EncodeError:  # 2 GiB or more
        return sum(len(frame) for frame in to_frames(message))


class Joiner:
    """Puts the frames of one sender's messages together.

    Args:
      kind: of the messages, `FromClient` or `FromServer`.
      max_bytes: of a message, over all its frames; -1 for any.
    """

    def __init__(self, kind: type, max_bytes: int = -1):
        self._kind, self.max_bytes = kind, max_bytes
        self.nbytes = 0
        """Of the message that was ended last, over all its frames."""
        self._begin()

    def _begin(self):
        self._found: list[tuple[int, bytes]] = []
        self._pieces: list[bytes] = []
        self._nbytes = 0

    def add(self, frame: bytes) -> Any:
        """Returns the message that a frame ends; None where more of it is to come.

        Raises:
          FrameError: it is none, or the message is too large.
        """
        self._nbytes += len(frame)
        if 0 <= self.max_bytes < self._nbytes:  # before it is parsed, which can take many times its bytes
            raise FrameError(f"a message must have at most {self.max_bytes:,} bytes in all its frames")
        try:
            message = self._kind.FromString(frame)
        except DecodeError:
            raise FrameError("a frame must be a message of this protocol") from None
        kind = message.WhichOneof("kind")
        if kind == "chunk":
            self._pieces.append(message.chunk.data)
            if not message.chunk.more:
                self._found.append((message.chunk.field, b"".join(self._pieces)))
                self._pieces = []
            return None
        if self._found or self._pieces:
            self._fill(message, kind)
        self.nbytes = self._nbytes
        self._begin()
        return message

    def _fill(self, message, kind):
        allowed = _LARGE_FIELDS.get(kind, ())
        inner = getattr(message, kind) if allowed else None
        names = {inner.DESCRIPTOR.fields_by_name[name].number: name for name in allowed}
        if self._pieces or any(field not in names for field, _ in self._found):
            raise FrameError(f"chunks must be whole, and of fields of the message behind them, which is {kind}")
        for field, data in self._found:
            name = names[field]
            if isinstance(getattr(inner, name), bytes):
                setattr(inner, name, data)
            else:
                getattr(inner, name).append(data)


def _elements(inner, name):
    """The values of a field of bytes, none where it is empty."""
    value = getattr(inner, name)
    if isinstance(value, bytes):
        return [value] if value else []
    return list(value)
