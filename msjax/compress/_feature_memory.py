"""What a sample's features were when it last came: only their change is sent."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from msjax.compress import _bits, _finite
from msjax.compress._arrays import FLOAT_DTYPES, check_array, form_of, payload_arrays, shaped
from msjax.compress._codec import Codec, on_any_mesh
from msjax.compress._exact import Exact
from msjax.compress._options import check_choice, check_integer, plain


class MemoryState(NamedTuple):
    """What the receiver last reconstructed of each sample, equal to the bit at both ends; a pytree for checkpoints."""

    values: jax.Array
    """(N, …) features, finite; zeros where there are none."""
    seen: jax.Array
    """bool (N,): whether there are any."""


class MemoryPayload(NamedTuple):
    changes: tuple[jax.Array, ...]
    """The base codec's payload of the changes, whole features of new samples among them."""
    sent: jax.Array
    """uint8 (⌈B/8⌉,), least significant bit first: 0 where the receiver is to take what it has."""


@dataclasses.dataclass(frozen=True)
class FeatureMemory:
    """Sends the change of a sample's features since it last came, through a base codec, or nothing where it is small.

    For samples that come again unchanged, as texts and tables do and images without augmentation. Both ends keep what
    was last reconstructed of each sample, m. Of a sample that has come before, h − m is encoded, and m plus what that
    decodes to is the new m and what the receiver goes on with; of a new one, h itself. What the base codec loses of a
    change is part of the next one, so features that do not change come closer with every epoch.

    In training, let gradients go on only where `is_sent`: other samples' features at the receiver do not depend on the
    sender's parameters, and gradients passed straight through would drive features on that the receiver does not see
    move.

    State is explicit: `encode` and `decode` take it and return the new one; save it with the parameters. Features of
    samples without a slot, and of test data, which comes with none, go whole.

    Attributes:
      base: of the changes; a codec for both signs, at the cost of a sign also where features have none. At the base's
        `granularity`: with "tensor", new samples and changes share a message. In the first epoch, when all are new, a
        finer base may be used, with the same state (AQ-SGD sends it uncompressed).
      threshold: a sample with ‖h − m‖ ≤ threshold·‖h‖ is not sent, in [0, 1). 0 sends every change.
      dtype: of the memory: "float32", or "bfloat16" or "float16" for half of it.

    Payload: that of the base, of the whole batch, and a bit a sample. Shapes are static, so a sample that is not sent
    is zeros to the base: it saves bytes where these are coded, as of an `entropy_coded` base by `msjax.wire`. There
    `bits` is a mean over the batch, so that others get what one does not take; `error` is relative to the changes.
    Memory: N·(d·itemsize + 1) bytes at either end, for d values a sample; twice as much while a step is computed,
    unless the state is donated: `jax.jit(lambda h, state, slots: memory.encode(h, state, slots), donate_argnums=1)`.

    Corners:
      - A sample whose change would decode to something no closer to h than m is not sent either; so no base, not even a
        random one with a large variance, lets memory and features drift apart.
      - Of a sample that comes twice in a batch the last one is remembered.
      - A slot outside of 0 … N − 1 is none: what N does not hold goes whole, and is not remembered.
      - What decodes to NaN or Inf is shown as such and not remembered: the sample counts as new.
      - The change of finite features is finite: it is clamped to the largest number.

    Bias: what is not sent keeps its error, so the result is biased even where the base is not.

    Sources: AQ-SGD, arXiv 2206.01299, the change; SplitCom, arXiv 2602.10564, the threshold. Counter-evidence, for
    top-k: arXiv 2401.07788.

    >>> import jax, jax.numpy as jnp
    >>> from msjax.compress import Uniform
    >>> memory = FeatureMemory(Uniform(bits=4))
    >>> samples = jax.random.normal(jax.random.key(0), (8, 100))
    >>> client = server = memory.init(8, samples)
    >>> for epoch in range(3):
    ...     slots = jax.random.permutation(jax.random.key(epoch), 8)
    ...     h = samples[slots] + 0.01 * epoch
    ...     payload, client = memory.encode(h, client, slots)
    ...     received, server = memory.decode(payload, server, slots, like=h)
    ...     print(f"{jnp.sum((received - h) ** 2) / jnp.sum(h**2):.0e}")
    2e-02
    7e-05
    3e-07
    """

    base: Codec
    threshold: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        if not isinstance(self.base, Codec):
            raise TypeError(f"base must be a Codec, got {self.base!r}")
        if not getattr(self.base, "signed", True):
            raise ValueError(f"base must be signed, as changes have both signs, got {self.base}")
        if isinstance(self.base, Exact):
            raise ValueError(f"base must take floats, as changes are, got {self.base}")
        object.__setattr__(self, "threshold", plain(self.threshold, "float"))
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not (number and 0 <= self.threshold < 1):
            raise ValueError(f"threshold must be a number in [0, 1), got {self.threshold!r}")
        check_choice("dtype", self.dtype, FLOAT_DTYPES)

    def init(self, samples: int, like: Any) -> MemoryState:
        """Returns the empty memory of `samples` samples.

        Args:
          samples: N, at least 1.
          like: features (B, …), or an array's shape and dtype; B does not count.

        Raises:
          TypeError: `like` has not a dtype that `encode` takes.
          ValueError: `samples` is no such number, or `like` has no batch axis.
        """
        like = self._form(like, "like")
        check_integer("samples", plain(samples, "int"), 1, 2**31 - 1)
        return MemoryState(jnp.zeros((samples, *like.shape[1:]), self.dtype), jnp.zeros(samples, jnp.bool_))

    def memory_bytes(self, samples: int, like: Any) -> int:
        """Returns the bytes of `init(samples, like)`, from shapes alone."""
        return samples * (math.prod(self._form(like, "like").shape[1:]) * jnp.dtype(self.dtype).itemsize + 1)

    def encode(
        self, h: Shaped[Array, "..."], state: MemoryState, slots: Shaped[Array, "..."], key: jax.Array | None = None
    ) -> tuple[MemoryPayload, MemoryState]:
        """Returns the payload of `h`, and the memory after it.

        Args:
          h: features (B, …), float32, bfloat16 or float16; what is decoded has the same dtype. Arithmetic is float32.
          state: of the sender, from `init` or the last call.
          slots: integers (B,): where each sample is in the memory; one outside of 0 … N − 1 is none.
          key: a JAX random key; needed by random base codecs alone.

        Raises:
          TypeError: `h` is not of these dtypes, `slots` are no integers, or `state` is no memory's.
          ValueError: `h` has no batch axis, `slots` or `state` do not fit, or the base is random and `key` is None.
        """
        payload, _, state = self._call(h, state, slots, key)
        return payload, state

    def decode(
        self, payload: MemoryPayload, state: MemoryState, slots: Shaped[Array, "..."], like: Any
    ) -> tuple[Shaped[Array, "..."], MemoryState]:
        """Returns the features in `payload`, in the shape and dtype of `like`, and the memory after it.

        Args:
          state: of the receiver, equal to the sender's before it encoded.
          slots: those that the sender had.

        Raises:
          TypeError, ValueError: as `encode`, or the payload is not that of an array like `like`.
        """
        like = self._form(like)
        state, slots = self._checked(like, state, slots)
        changes, sent = payload
        return _receive(self, self.base.decode(changes, like), self._sent_of(sent, like), state, slots)

    def roundtrip(
        self, h: Shaped[Array, "..."], state: MemoryState, slots: Shaped[Array, "..."], key: jax.Array | None = None
    ) -> tuple[Shaped[Array, "..."], MemoryState]:
        """Returns what `decode` gives of what `encode` made, and the memory after it; see `encode`."""
        _, decoded, state = self._call(h, state, slots, key)
        return decoded, state

    def is_sent(self, payload: MemoryPayload, like: Any) -> Shaped[Array, "b"]:
        """Returns bool (B,): whose features of a payload of an array like `like` are new to the receiver.

        Raises:
          ValueError: the payload is not that of as many samples.
        """
        like = self._form(like)
        return _bits.unpack(self._sent_of(payload.sent, like), 1, like.shape[0]) == 1

    def payload_like(self, like: Any) -> MemoryPayload:
        """Returns shapes and dtypes of the payload of an array like `like`, from its shape and dtype alone."""
        like = self._form(like)
        return MemoryPayload(self.base.payload_like(like), self._sent_like(like))  # type: ignore[arg-type]  # shapes

    def payload_bytes(self, like: Any) -> int:
        """Returns the exact size in bytes of that payload, before any coding."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.payload_like(like)))

    def _call(self, h, state, slots, key):
        h = self.base._checked(h, key)
        state, slots = self._checked(self._form(h), state, slots)
        return _send(self, jnp.asarray(h), state, slots, key)

    def _sent_like(self, like):
        return shaped(_bits.packed_bytes(like.shape[0], 1))

    def _sent_of(self, sent, like):
        """The flags of a payload of features like `like`, checked."""
        (sent,), wanted = payload_arrays((sent,)), self._sent_like(like)
        if (sent.shape, sent.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"payload.sent must be uint8{list(wanted.shape)}, got {sent.dtype}{list(sent.shape)}")
        return jnp.asarray(sent)

    def _form(self, like, name="h"):
        like = form_of(like)
        check_array(like, FLOAT_DTYPES)
        if not like.shape:
            raise ValueError(f"{name} must have a batch axis, got a scalar")
        return like

    def _checked(self, like, state, slots):
        """State and slots as JAX's arrays, which fit features like `like`; slots as int32, N of those outside."""
        if not (isinstance(state, tuple | list) and len(state) == 2):
            raise TypeError(f"state must be a MemoryState, or its two arrays, got {type(state).__name__}")
        values, seen = state
        if self.dtype == "bfloat16" and getattr(values, "dtype", None) == np.dtype("V2"):  # as np.load reads it
            values = values.view(jnp.dtype(self.dtype))
        values, seen = jnp.asarray(values), jnp.asarray(seen)
        wanted = (*seen.shape, *like.shape[1:])
        if seen.ndim != 1 or seen.dtype != jnp.bool_ or (values.shape, values.dtype.name) != (wanted, self.dtype):
            raise ValueError(
                f"state must be {self.dtype}[N, {str(list(like.shape[1:]))[1:-1]}] and bool[N], got "
                f"{values.dtype}{list(values.shape)} and {seen.dtype}{list(seen.shape)}"
            )
        slots = slots if isinstance(slots, jax.Array) else np.asarray(slots)  # which has 64 bits
        if not jnp.issubdtype(slots.dtype, jnp.integer):
            raise TypeError(f"slots must be integers, got {slots.dtype}")
        if slots.shape != like.shape[:1]:
            raise ValueError(f"slots must be one a sample, {list(like.shape[:1])}, got shape {list(slots.shape)}")
        dtype, n = jnp.iinfo(slots.dtype), seen.size
        # Narrow dtypes cannot hold N, and wide ones would wrap around in int32.
        lowest, highest = max(int(dtype.min), -1), min(int(dtype.max), 2**31 - 1)
        slots = jnp.asarray(slots.clip(lowest, highest).astype(np.int32))
        return MemoryState(values, seen), jnp.where(slots < 0, n, jnp.minimum(slots, n))


@functools.partial(jax.jit, static_argnames="memory", inline=True)
def _send(memory, h, state, slots, key):
    """(payload, what it decodes to, state after it)."""
    return on_any_mesh(functools.partial(_sent_and_kept, memory), h, state, slots, key)


def _sent_and_kept(memory, h, state, slots, key):
    held, seen = _recall(state, slots)
    given = h.astype(jnp.float32)
    change = jnp.where(_beside(seen, h), _sum(given, -held, h.dtype), given)
    scale = jnp.maximum(_largest(given), _largest(change))
    moved = _energy(change, scale)
    skipped = seen & (moved <= jnp.float32(memory.threshold**2) * _energy(given, scale))
    change = jnp.where(_beside(skipped, h), jnp.float32(0), change)
    changes = memory.base.encode(change.astype(h.dtype), key)
    decoded = memory.base.decode(changes, h)
    lost = _energy(_sum(change, -decoded.astype(jnp.float32), jnp.float32), scale)
    # Not the other way round: of what is not finite every comparison is false, and it is sent.
    skipped |= seen & (lost >= moved)
    decoded, state = _update(memory, decoded, held, seen, ~skipped, state, slots)
    return MemoryPayload(changes, _bits.pack((~skipped).astype(jnp.uint8), 1)), decoded, state


@functools.partial(jax.jit, static_argnames="memory", inline=True)
def _receive(memory, decoded, sent, state, slots):
    return on_any_mesh(functools.partial(_received_and_kept, memory), decoded, sent, state, slots)


def _received_and_kept(memory, decoded, sent, state, slots):
    held, seen = _recall(state, slots)
    sent = _bits.unpack(sent, 1, decoded.shape[0]) == 1
    return _update(memory, decoded, held, seen, sent, state, slots)


def _recall(state, slots):
    """(float32 features, whether there are any) of the samples at `slots`."""
    seen = state.seen.at[slots].get(mode="fill", fill_value=False)
    return state.values.at[slots].get(mode="fill", fill_value=0).astype(jnp.float32), seen


def _update(memory, decoded, held, seen, sent, state, slots):
    """What both ends do with the decoded changes: (features, state)."""
    dtype = decoded.dtype
    decoded = decoded.astype(jnp.float32)
    features = jnp.where(_beside(seen, held), _sum(held, decoded, dtype), decoded)
    # A sample that is new is sent, whatever a damaged payload says.
    features = jnp.where(_beside(sent | ~seen, held), features, _rounded(held, dtype))
    finite = jnp.all(jnp.isfinite(features), axis=tuple(range(1, features.ndim)))
    values = _rounded(jnp.where(_beside(finite, held), features, jnp.float32(0)), memory.dtype).astype(memory.dtype)
    at = jnp.where(_is_last(slots, state.seen.size), slots, state.seen.size)
    state = MemoryState(state.values.at[at].set(values, mode="drop"), state.seen.at[at].set(finite, mode="drop"))
    return features.astype(dtype), state


def _is_last(slots, samples):
    """Whether no later sample has the same slot, of 0 … samples - 1; those outside of them do not matter."""
    position = jnp.arange(slots.size, dtype=jnp.int32)
    last = jnp.full(samples + 1, -1, jnp.int32).at[slots].max(position, mode="drop")
    return last.at[slots].get(mode="fill", fill_value=-1) == position


def _sum(a, b, dtype):
    """float32 a + b as a number of `dtype`: where both are finite, its largest at most, with no Inf on the way."""
    # Through a choice on either side: LLVM would fuse a decoder's product with the sum in some programs and not in
    # others, and the two ends would differ in the last bit.
    is_large = (jnp.abs(a) > _finite.LARGE) | (jnp.abs(b) > _finite.LARGE)
    total = _finite.lowered(a, is_large) + _finite.lowered(b, is_large)
    finite = jnp.isfinite(a) & jnp.isfinite(b)
    total = jnp.where(finite, _finite.raised(total, is_large, jnp.float32), total)
    return jnp.where(finite, _rounded(jnp.where(finite, total, jnp.float32(0)), dtype), total)


def _rounded(x, dtype):
    """Finite float32 as numbers of `dtype`, still float32: XLA drops the casts to a narrower dtype and back."""
    info = jnp.finfo(dtype)
    x = jnp.clip(x, -_finite.largest(dtype), _finite.largest(dtype))
    return lax.reduce_precision(x, info.nexp, info.nmant)


def _beside(flags, like):
    """Flags (B,) with as many axes as `like`."""
    return flags.reshape(-1, *(1,) * (like.ndim - 1))


def _largest(x):
    return jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)


def _energy(x, scale):
    """The squared norm of each sample, by the square of its scale, so that it is in range."""
    scale = jnp.clip(scale, 1 / _finite.LARGE, _finite.LARGE)  # whose inverse is a normal number
    return jnp.sum(jnp.square(x / _beside(scale, x)), axis=tuple(range(1, x.ndim)))
