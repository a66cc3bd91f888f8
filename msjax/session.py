"""The two ends of a text that parties continue together: what each computes of the next tokens, and their messages."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from msjax import models, wire
from msjax.compress import Codec, Exact, Identity
from msjax.models import Cache, ModelPart

_SHORTEST = 16
"""Tokens that prompts and caches are padded to at least; then to powers of two, so that few programs are compiled."""


class Terms(NamedTuple):
    """What both ends of a session agree on when it begins.

    Attributes:
      batch_size: texts.
      capacity: tokens of a text that the cache has room for.
      codec: of features, both ways.
      candidates: how many of the largest logits the server answers with; None for all.
      compression: of messages, as of `wire.encode`.
    """

    batch_size: int
    capacity: int
    codec: Codec = Identity()
    candidates: int | None = None
    compression: str | None = None


class Piece(NamedTuple):
    """Features of the next tokens of one text."""

    count: int
    data: bytes


class Session(Protocol):
    """The server's end of a generation, here or elsewhere."""

    def answer(self, pieces: Sequence[Piece]) -> list[bytes]:
        """Returns what the server answers to features of the next tokens, a piece for each text."""
        ...

    def close(self) -> None:
        """Gives the cache back."""
        ...


def padded(length: int, most: int) -> int:
    """The length that so many tokens are padded to: a power of two, of at least 16, and at most `most`."""
    return min(most, max(_SHORTEST, 1 << (length - 1).bit_length()))


class ServerSession:
    """The server's end of a generation: a part, and a cache of its own.

    Args:
      part: the server's.
      tail: U-shaped, the client's last part, of which the function alone counts.
      key: of random codecs, where the run is U-shaped.

    Raises:
      ValueError: the part is not of a decoder.
    """

    def __init__(self, part: ModelPart, terms: Terms, *, tail: ModelPart | None = None, key: jax.Array | None = None):
        self._stage = Stage(part, terms, returns_all=tail is not None and models.attends(tail))
        self.terms, self._u_shaped, self._key = terms, tail is not None, key

    @staticmethod
    def cache_bytes(part: ModelPart, terms: Terms) -> int:
        """Returns the bytes of a session's cache, from shapes alone."""
        return models.cache_bytes(part, terms.batch_size, terms.capacity)

    def answer(self, pieces: Sequence[Piece]) -> list[bytes]:
        """Returns a message with features for each text or, not U-shaped, one with tokens, one with logits, or both.

        Raises:
          WireError: a piece is not as the terms say, or the cache has no room for its tokens.
        """
        terms = self.terms
        if len(pieces) != terms.batch_size:
            raise wire.WireError(f"pieces must be {terms.batch_size}, one for each text, got {len(pieces)}")
        rows = [decode_piece(self._stage.part, terms, piece) for piece in pieces]
        y = self._stage.extend(rows)
        if self._u_shaped:
            key = None
            if terms.codec.needs_key:
                self._key, key = jax.random.split(self._key)
            return [piece.data for piece in encode_pieces(terms, y, key)]
        logits, tokens = candidates_of(y, terms)
        found = [] if tokens is None else [_bare(Exact(), tokens)]
        return found if terms.candidates == 1 else [*found, _bare(Identity(), logits)]

    def close(self) -> None:
        """Gives the cache back."""
        self._stage = None


class Stage:
    """One part with its cache; takes and returns what belongs to each text, of its own length."""

    def __init__(self, part, terms, *, returns_all):
        self.part, self._returns_all, self._capacity = part, returns_all, terms.capacity
        self._cache: Cache = models.make_cache(part, terms.batch_size, terms.capacity)
        self._lengths = np.zeros(terms.batch_size, np.int64)

    def extend(self, rows: list[np.ndarray]) -> list[Any]:
        """The outputs (1, count or 1, …) for inputs (1, count, …) of the next tokens of each text."""
        counts = np.int32([row.shape[1] for row in rows])
        if models.attends(self.part) and (self._lengths + counts > self._capacity).any():
            most = (self._capacity - self._lengths).min()
            raise wire.WireError(f"tokens must be at most {most}, as the cache has room for, got {counts.max()}")
        fresh = not self._lengths.any()
        self._lengths += counts
        longest = int(counts.max())
        length = 1 if longest == 1 else padded(longest, self._capacity)
        x = np.zeros((len(rows), length, *rows[0].shape[2:]), rows[0].dtype)
        for place, row in zip(x, rows, strict=True):
            place[: row.shape[1]] = row[0]
        y, self._cache = models.extend_cached(
            self.part, jnp.asarray(x), self._cache, jnp.asarray(counts), fresh=fresh, last=not self._returns_all
        )
        if len(rows) == 1 and y.shape[1] == 1:
            return [y]  # stays on the device
        y = np.asarray(y)
        return [y[i : i + 1, : count if self._returns_all else 1] for i, count in enumerate(counts)]


def encode_pieces(terms, rows, key):
    """A piece of each text's features."""
    pieces = []
    for number, row in enumerate(rows):
        payload = terms.codec.encode(jnp.asarray(row), None if key is None else jax.random.fold_in(key, number))
        data = wire.encode_bare(payload, terms.codec, row, compression=terms.compression)
        pieces.append(Piece(row.shape[1], data))
    return pieces


def decode_piece(part, terms, piece):
    """The features (1, count, c) in a piece."""
    if not 1 <= piece.count <= terms.capacity:
        raise wire.WireError(f"tokens of a piece must be in 1..{terms.capacity}, got {piece.count}")
    config, dtype = models.part_config(part), dict(models.decoder_blocks(part)[0].options)["dtype"]
    like = jax.ShapeDtypeStruct((1, piece.count, config.hidden_size), dtype)
    message = wire.decode_bare(piece.data, terms.codec, like)
    return np.asarray(terms.codec.decode(message.payload, like))


def _bare(codec, array):
    """The message of an array as it is; `codec` is Identity or Exact."""
    array = np.asarray(array)
    return wire.encode_bare(codec.encode_numpy(array), codec, array)


def read_array(data, codec, like):
    """The array in such a message."""
    return wire.decode_bare(data, codec, like).payload.values


def candidates_of(rows, terms):
    """(logits, tokens) of as many of the largest ones as the terms say; (all logits, None) for all."""
    logits = (rows[0] if len(rows) == 1 else jnp.concatenate(rows)).reshape(len(rows), -1)
    return (logits, None) if terms.candidates is None else models.largest(logits, terms.candidates)
