"""Text from a decoder, whole or cut in parts: each party keeps keys and values of its own blocks.

    client, server = models.split(model, "medium", weights=models.open_decoder(folder, model))
    generator = msjax.Generator(client, server, codec=compress.MaskEncoded(ratio=0.9, bits=4, signed=True))
    generation = generator.start([tokens], max_tokens=64)       # the prompt, as numbers of tokens
    for (token,) in generation: ...                              # one after the other, as they are chosen
    generation.tokens, generation.traffic

A prompt's features cross the cut in one message, then those of one token a message. Each is compressed by itself, as
float features (1, tokens, c): a codec's statistics are those of the message, also of a single token. Messages are those
of `wire.encode_bare`, so that a token costs its payload and four bytes, and one for each buffer.

What a party has no more use for is not sent: where no attention is behind a cut, features of the last token alone cross
it. The server answers with as many of the largest logits as the client's rule looks at: of greedy decoding the token,
four bytes; of `top_k` logits and tokens, eight bytes each; else all logits, four bytes each. That changes no choice,
which stays the client's. The server sees the features of every token, and what it answers with; it could compute the
choice as well, but is not told. U-shaped, where the last layers are the client's, it answers with features of the same
codec, and sees no logits.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from msjax import models, wire
from msjax.checks import integer
from msjax.compress import Codec, Exact, Identity
from msjax.models import Cache, ModelPart, Sampling

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


@dataclasses.dataclass
class Traffic:
    """Tokens and bytes of a generation so far.

    Attributes:
      prompt_tokens, tokens: of the prompts, and those that were chosen; of all texts.
      prompt_up_bytes, prompt_down_bytes: messages with the prompts' features, and the answers to them.
      up_bytes, down_bytes: messages behind these, and the answers to them.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    prompt_up_bytes: int = 0
    prompt_down_bytes: int = 0
    up_bytes: int = 0
    down_bytes: int = 0


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
        self._stage = _Stage(part, terms, returns_all=tail is not None and models.attends(tail))
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
        rows = [_decode(self._stage.part, terms, piece) for piece in pieces]
        y = self._stage.extend(rows)
        if self._u_shaped:
            key = None
            if terms.codec.needs_key:
                self._key, key = jax.random.split(self._key)
            return [piece.data for piece in _encode(terms, y, key)]
        logits, tokens = _candidates(y, terms)
        found = [] if tokens is None else [_bare(Exact(), tokens)]
        return found if terms.candidates == 1 else [*found, _bare(Identity(), logits)]

    def close(self) -> None:
        """Gives the cache back."""
        self._stage = None


class Generator:
    """Continues texts with a decoder that is whole or cut.

    Args:
      client: the whole decoder, or with others its first part, as `models.split` makes it.
      server: the second part. Of one that is elsewhere the function alone counts: see `connect`.
      tail: U-shaped, the third part, which is the client's as well.
      codec: of the features between the parts.
      compression: None or "huffman", see `wire.encode`.
      connect: opens a session with a server elsewhere; by default `server` is computed here.

    Raises:
      ValueError: a part is not of a decoder, or the parts are not those of one cut.
    """

    def __init__(
        self,
        client: ModelPart,
        server: ModelPart | None = None,
        tail: ModelPart | None = None,
        *,
        codec: Codec | None = None,
        compression: str | None = None,
        connect: Callable[[Terms], Session] | None = None,
    ):
        if server is None and codec is not None:
            raise ValueError(f"codec must be None without a cut, got {codec}")
        parts = [part for part in (client, server, tail) if part is not None]
        names = [block.layer for part in parts for block in models.decoder_blocks(part)]
        config = models.part_config(client)
        if names != list(range(config.num_hidden_layers + 2)):
            raise ValueError(f"parts must have layers 0..{config.num_hidden_layers + 1} of one decoder, got {names}")
        self.config, self.client, self.server, self.tail = config, client, server, tail
        self.codec, self.compression = Identity() if codec is None else codec.at_inference(), compression
        self._connect = connect

    def _open(self, terms: Terms, key: jax.Array) -> Session:
        if self._connect is not None:
            return self._connect(terms)
        return ServerSession(self.server, terms, tail=self.tail, key=jax.random.fold_in(key, 1 << 31))

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        end: Sequence[int] | None = None,
    ) -> "Generation":
        """Returns an iterator that computes one token after the other.

        Args:
          prompts: numbers of tokens of each text, with the one that texts begin with, where there is such.
          max_tokens: how many are chosen at most.
          sampling: how; greedily by default.
          seed: of what is drawn, in sampling and by random codecs.
          end: tokens that end a text; by default the config's `eos_token_id`.

        Raises:
          ValueError: a prompt is empty, has numbers that are no tokens, or does not fit the context with `max_tokens`.
        """
        prompts = self._checked(prompts)
        longest, context = max(map(len, prompts)), self.config.max_position_embeddings
        if type(max_tokens) is not int or not 1 <= max_tokens <= context - longest:
            raise ValueError(
                f"max_tokens must be in 1..{context - longest}, since of a context of {context} tokens "
                f"(max_position_embeddings) the prompt takes {longest}, got {max_tokens!r}"
            )
        if end is None:
            end = () if self.config.eos_token_id is None else (self.config.eos_token_id,)
        sampling = Sampling() if sampling is None else sampling
        # The last token that is chosen is not computed any more.
        capacity = padded(longest + max_tokens - 1, context)
        terms = Terms(len(prompts), capacity, self.codec, sampling.candidates, self.compression)
        return Generation(self, prompts, max_tokens, terms, sampling, seed, frozenset(end))

    def room(self, prompts: Sequence[Sequence[int]]) -> int:
        """Returns the largest `max_tokens` that the context leaves; raises ValueError as `start` for prompts."""
        return self.config.max_position_embeddings - max(map(len, self._checked(prompts)))

    def _checked(self, prompts):
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        if not len(prompts):
            raise ValueError("prompts must have a prompt, got none")
        for prompt in prompts:
            if not 1 <= len(prompt) < context:
                raise ValueError(
                    f"prompt must have 1..{context - 1} tokens, as the context has room for {context} "
                    f"(max_position_embeddings), got {len(prompt)}"
                )
            for token in prompt:
                integer("prompt's tokens", token, 0, vocabulary - 1)
        return [[int(token) for token in prompt] for prompt in prompts]


class Generation(Iterator[list[int | None]]):
    """A generation under way; `next` chooses one token more of each text, None of those that have ended.

    It ends when all texts have, or at `max_tokens`. Texts that have ended are computed on until then. It can be left
    at any time by `close`.

    Attributes:
      tokens: those chosen so far of each text, with the one that ended it.
      traffic: tokens, and bytes of messages.
      session: the server's end; None without a cut.
    """

    def __init__(self, generator, prompts, max_tokens, terms, sampling, seed, end):
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.traffic = Traffic(prompt_tokens=sum(map(len, prompts)))
        self._max_tokens, self._terms, self._sampling, self._end = max_tokens, terms, sampling, end
        self._generator, self._next = generator, [np.int32([prompt]) for prompt in prompts]
        self._count, self._key = 0, jax.random.key(seed)
        parts = [part for part in (generator.client, generator.server, generator.tail) if part is not None]
        attends = [models.attends(part) for part in parts]
        self._client = _Stage(generator.client, terms, returns_all=any(attends[1:]))
        self._tail = None if generator.tail is None else _Stage(generator.tail, terms, returns_all=False)
        self._receives_all = any(attends[2:])
        self.session = None if generator.server is None else generator._open(terms, self._key)

    def __next__(self) -> list[int | None]:
        """Chooses a token of each text that has not ended."""
        if self._count == self._max_tokens or all(self._has_ended(own) for own in self.tokens):
            self.close()
            raise StopIteration
        number = self._count
        self._count += 1
        random = self._sampling.temperature > 0 or self._terms.codec.needs_key
        key, codec_key = jax.random.split(jax.random.fold_in(self._key, number)) if random else (None, None)
        logits, candidates = self._logits(number == 0, codec_key)
        if self._terms.candidates == 1:
            places, candidates = np.zeros(len(self.tokens), np.int32), np.asarray(candidates)
        else:
            places = np.asarray(self._sampling.choose(jnp.asarray(logits), key))
        found: list[int | None] = []
        for row, place in enumerate(places):
            ended = self._has_ended(self.tokens[row])
            token = int(place if candidates is None else candidates[row, place])
            self._next[row] = np.int32([[token]])
            found.append(None if ended else token)
            if not ended:
                self.tokens[row].append(token)
        self.traffic.tokens += sum(token is not None for token in found)
        return found

    def _has_ended(self, tokens):
        return bool(tokens) and tokens[-1] in self._end

    def _logits(self, is_prompt, key):
        """(logits, the tokens that they are of, or None where of all) of the next token of each text."""
        terms = self._terms
        y = self._client.extend(self._next)
        if self.session is None:
            return _candidates(y, terms)
        pieces = _encode(terms, y, key if terms.codec.needs_key else None)
        answer = self.session.answer(pieces)
        up, down = sum(len(piece.data) for piece in pieces), sum(map(len, answer))
        if is_prompt:
            self.traffic.prompt_up_bytes, self.traffic.prompt_down_bytes = up, down
        else:
            self.traffic.up_bytes += up
            self.traffic.down_bytes += down
        if self._tail is not None:
            counts = [piece.count if self._receives_all else 1 for piece in pieces]
            answered = [Piece(count, data) for count, data in zip(counts, answer, strict=True)]
            rows = [_decode(self._tail.part, terms, piece) for piece in answered]
            return _candidates(self._tail.extend(rows), terms)
        count = min(terms.candidates or math.inf, self._generator.config.vocab_size)
        shape = (terms.batch_size, count)
        if terms.candidates is None:
            return _array(answer[0], Identity(), jax.ShapeDtypeStruct(shape, np.float32)), None
        tokens = _array(answer[0], Exact(), jax.ShapeDtypeStruct(shape, np.int32))
        if terms.candidates == 1:
            return None, tokens
        return _array(answer[1], Identity(), jax.ShapeDtypeStruct(shape, np.float32)), tokens

    def close(self) -> None:
        """Gives the caches back."""
        if self.session is not None:
            self.session.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Stage:
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


def _encode(terms, rows, key):
    """A piece of each text's features."""
    pieces = []
    for number, row in enumerate(rows):
        payload = terms.codec.encode(jnp.asarray(row), None if key is None else jax.random.fold_in(key, number))
        data = wire.encode_bare(payload, terms.codec, row, compression=terms.compression)
        pieces.append(Piece(row.shape[1], data))
    return pieces


def _decode(part, terms, piece):
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


def _array(data, codec, like):
    """The array in such a message."""
    return wire.decode_bare(data, codec, like).payload.values


def _candidates(rows, terms):
    """(logits, tokens) of as many of the largest ones as the terms say; (all logits, None) for all."""
    logits = (rows[0] if len(rows) == 1 else jnp.concatenate(rows)).reshape(len(rows), -1)
    return (logits, None) if terms.candidates is None else models.largest(logits, terms.candidates)
