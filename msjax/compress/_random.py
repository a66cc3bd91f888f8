"""Random words and random subsets, in little more memory than what they return."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt32

from msjax.compress import _bits, _select

_CHUNK = 1 << 16  # words; JAX's generator takes four times the memory of what it draws
_CHUNKS = 16  # at most, so that each fills a GPU
_LISTED = 1 << 10  # words; of fewer, no list is made


def words(key: jax.Array, n: int) -> UInt32[Array, "n"]:
    """Returns n random words, drawn in equal chunks one after another."""
    chunks = min(_CHUNKS, -(-n // _CHUNK))
    if chunks <= 1:
        return jax.random.bits(key, (n,), jnp.uint32)
    keys = jax.random.split(key, chunks)
    return lax.map(lambda key: jax.random.bits(key, (-(-n // chunks),), jnp.uint32), keys).reshape(-1)[:n]


def uniform(key: jax.Array, d: int) -> Float32[Array, "d"]:
    """Returns d numbers, each uniform on the multiples of 2⁻²⁴ in [0, 1), from 9 random bits apiece.

    The upper 8 bits are a number's own, the lower 16 those of its group of 32. Given these, the probability to be below
    p is one of two multiples of 2⁻⁸ next to p, so the events u < p and v < q of two numbers of a group have a
    correlation of at most 2⁻⁸.
    """
    own_key, shared_key = jax.random.split(key)
    groups = -(-d // 32)
    own = _bits.to_bytes(words(own_key, groups * 8)).reshape(groups, 32).astype(jnp.uint32)
    shared = words(shared_key, groups)[:, None] >> jnp.uint32(16)
    return ((own << jnp.uint32(16)) | shared).astype(jnp.float32).reshape(-1)[:d] * jnp.float32(2**-24)


class _Halving(NamedTuple):
    chosen: UInt32[Array, "w"]
    undecided: UInt32[Array, "w"]
    left: Int32[Array, ""]
    """How many are undecided, and how many of them are still wanted."""
    wanted: Int32[Array, ""]
    round: Int32[Array, ""]


def subset(key: jax.Array, among: UInt32[Array, "w"], k: Int32[Array, ""]) -> UInt32[Array, "w"]:
    """Returns k of the entries set in the packed mask `among`, every subset of k equally likely; 0 ≤ k ≤ their number.

    A random bit each halves the undecided: the one half is chosen if it holds no more than k, else the other is
    dropped, and so on with what is left. The entries are treated alike, so the subsets are equally likely.
    """
    n = among.size
    # From so few on, the undecided are listed, and a random word decides on 32 of them, not on 32 entries of the mask.
    few = n if n >= _LISTED else 0
    halving_key, listed_key = jax.random.split(key)

    def unfinished(s):
        return (s.left > few) & (s.wanted > 0) & (s.wanted < s.left)

    def halve(s):
        half = s.undecided & words(jax.random.fold_in(halving_key, s.round), n)
        count = _count(half)
        fits = count <= s.wanted
        return _Halving(
            chosen=jnp.where(fits, s.chosen | half, s.chosen),
            undecided=jnp.where(fits, s.undecided ^ half, half),
            left=jnp.where(fits, s.left - count, count),
            wanted=jnp.where(fits, s.wanted - count, s.wanted),
            round=s.round + 1,
        )

    # Made of the key and of data, so that all vary over a mesh as these do.
    zero = (jax.random.bits(key, (), jnp.uint32) ^ among[0] ^ k.astype(jnp.uint32)) & jnp.uint32(0)
    none = zero.astype(jnp.int32)
    start = _Halving(among & zero, among | zero, _count(among) + none, k + none, jnp.int32(0))
    s = lax.while_loop(unfinished, halve, start)
    chosen = jnp.where(s.wanted == s.left, s.chosen | s.undecided, s.chosen)
    if not few:
        return chosen
    wanted = jnp.where(s.wanted == s.left, 0, s.wanted)
    listed = _select.packed_positions(s.undecided, few, min(n * 32, 2**31 - 1))
    first = lax.iota(jnp.int32, few) < s.left
    taken = _bits.unpack_words(subset(listed_key, _bits.pack_words(first), wanted), few)
    bit = jnp.where(taken, jnp.uint32(1) << (listed % 32).astype(jnp.uint32), jnp.uint32(0))
    return chosen.at[listed // 32].add(bit, mode="drop", indices_are_sorted=True)


def _count(mask):
    return jnp.sum(lax.population_count(mask).astype(jnp.int32), dtype=jnp.int32)
