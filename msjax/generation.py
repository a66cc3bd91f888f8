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
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from msjax import models
from msjax.checks import integer, is_integer
from msjax.compress import Codec, Exact, Identity
from msjax.keys import make_key
from msjax.models import ModelPart, Sampling
from msjax.session import (
    Piece,
    ServerSession,
    Session,
    Stage,
    Terms,
    candidates_of,
    decode_piece,
    encode_pieces,
    padded,
    read_array,
)

_log = logging.getLogger("msjax")


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


class Generator:
    """Continues texts with a decoder that is whole or cut.

    Args:
      client: the whole decoder, or with others its first part, as `models.split` makes it.
      server: the second part. Of one that is elsewhere the function alone counts: see `connect`.
      tail: U-shaped, the third part, which is the client's as well.
      codec: of the features between the parts. They cross token by token, so that one with `granularity="channel"`
        sends a scale for each value, and a warning says so.
      compression: None, "huffman" or "all", see `wire.encode`.
      connect: opens a session with a server elsewhere; by default `server` is computed here.

    Raises:
      TypeError: `codec` is none.
      ValueError: a part is not of a decoder, or the parts are not those of one cut; `compression` is none of these.
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
        given = {"codec": codec, "tail": tail, "compression": compression, "connect": connect}
        if server is None and (unused := next((name for name, value in given.items() if value is not None), None)):
            raise ValueError(f"{unused} must be None without a server, got {given[unused]!r}")
        if not isinstance(codec, Codec | None):
            raise TypeError(f"codec must be a codec or None, got {codec!r}")
        if compression not in (None, "huffman", "all"):
            raise ValueError(f'compression must be None, "huffman" or "all", got {compression!r}')
        parts = [part for part in (client, server, tail) if part is not None]
        names = [block.layer for part in parts for block in models.decoder_blocks(part)]
        config = models.part_config(client)
        if names != list(range(config.num_hidden_layers + 2)):
            raise ValueError(f"parts must have layers 0..{config.num_hidden_layers + 1} of one decoder, got {names}")
        self.config, self.client, self.server, self.tail = config, client, server, tail
        self.codec, self.compression = Identity() if codec is None else codec.at_inference(), compression
        if getattr(codec, "granularity", None) == "channel":
            _log.warning("%s sends a scale for each value behind the prompt, as a single token comes at a time", codec)
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
          end: tokens that end a text; by default the config's `end_tokens`. A folder may name more of them:
            `models.end_tokens`.

        Raises:
          TypeError: `prompts` are no lists of integers, `sampling` is none.
          ValueError: a prompt is empty, has numbers that are no tokens, or does not fit the context with `max_tokens`;
            `end` has numbers that are no tokens.
        """
        if not isinstance(sampling, Sampling | None):
            raise TypeError(f"sampling must be a Sampling or None, got {sampling!r}")
        prompts = self._checked(prompts)
        longest, context = max(map(len, prompts)), self.config.max_position_embeddings
        if not is_integer(max_tokens) or not 1 <= max_tokens <= context - longest:
            raise ValueError(
                f"max_tokens must be in 1..{context - longest}, since of a context of {context} tokens "
                f"(max_position_embeddings) the prompt takes {longest}, got {max_tokens!r}"
            )
        if end is None:
            end = self.config.end_tokens
        (end,) = _as_tokens("end must be a sequence of integers", [end])
        for token in end:
            integer("end's tokens", token, 0, self.config.vocab_size - 1)
        sampling = Sampling() if sampling is None else sampling
        # The last token that is chosen is not computed any more.
        max_tokens = int(max_tokens)
        capacity = padded(longest + max_tokens - 1, context)
        terms = Terms(len(prompts), capacity, self.codec, sampling.candidates, self.compression)
        return Generation(self, prompts, max_tokens, terms, sampling, seed, frozenset(end))

    def room(self, prompts: Sequence[Sequence[int]]) -> int:
        """Returns the largest `max_tokens` that the context leaves; raises ValueError as `start` for prompts."""
        return self.config.max_position_embeddings - max(map(len, self._checked(prompts)))

    def _checked(self, prompts):
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        prompts = _as_tokens("prompts must be a sequence of integers for each text", prompts)
        if not prompts:
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


def _as_tokens(rule, rows):
    """Lists of numbers, of Python's or of arrays of any library."""
    try:
        return [[each.item() if hasattr(each, "item") else each for each in row] for row in rows]
    except TypeError:
        raise TypeError(f"{rule}, got {rows!r}") from None


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
        self._count, self._key, self._closed = 0, make_key(seed), False
        parts = [part for part in (generator.client, generator.server, generator.tail) if part is not None]
        attends = [models.attends(part) for part in parts]
        self._client = Stage(generator.client, terms, returns_all=any(attends[1:]))
        self._tail = None if generator.tail is None else Stage(generator.tail, terms, returns_all=False)
        self._receives_all = any(attends[2:])
        self.session = None if generator.server is None else generator._open(terms, self._key)

    def __next__(self) -> list[int | None]:
        """Chooses a token of each text that has not ended."""
        if self._closed or self._count == self._max_tokens or all(self._has_ended(own) for own in self.tokens):
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
            return candidates_of(y, terms)
        pieces = encode_pieces(terms, y, key if terms.codec.needs_key else None)
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
            rows = [decode_piece(self._tail.part, terms, piece) for piece in answered]
            return candidates_of(self._tail.extend(rows), terms)
        count = min(terms.candidates or math.inf, self._generator.config.vocab_size)
        shape = (terms.batch_size, count)
        if terms.candidates is None:
            return read_array(answer[0], Identity(), jax.ShapeDtypeStruct(shape, np.float32)), None
        tokens = read_array(answer[0], Exact(), jax.ShapeDtypeStruct(shape, np.int32))
        if terms.candidates == 1:
            return None, tokens
        return read_array(answer[1], Identity(), jax.ShapeDtypeStruct(shape, np.float32)), tokens

    def close(self) -> None:
        """Gives the caches back; nothing comes after it."""
        self._closed = True
        if self.session is not None:
            self.session.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
