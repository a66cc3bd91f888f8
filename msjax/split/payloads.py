"""From features to payloads and back: each array of a tree through a codec of its own."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msjax import compress, wire
from msjax.compress import Codec, EntropyMask, Exact
from msjax.split.trees import TreeSpec, is_float

Payload = tuple[Any, ...]
"""What one message carries: a codec's payload for each array, in the order of the tree."""


@dataclasses.dataclass(frozen=True)
class Codecs:
    """Which codec each floating array of a tree goes through.

    Integer and boolean arrays travel as they are; see `compress.Exact`.

    Attributes:
      default: of every array that has no codec of its own.
      named: pairs of an array's name in the tree, as "skips/0", and its codec.
    """

    default: Codec
    named: tuple[tuple[str, Codec], ...] = ()

    @classmethod
    def of(cls, codec: "Codec | Mapping[str, Codec] | Codecs", name: str = "codec") -> "Codecs":
        """Returns the codecs that a user gave: one for all, or by name, with the key "" for all others.

        Raises:
          TypeError: `codec` is neither a codec nor a mapping of names to codecs.
        """
        if isinstance(codec, Codecs):
            return codec
        by_name = dict(codec) if isinstance(codec, Mapping) else {"": codec}
        for key, value in by_name.items():
            if not isinstance(value, Codec):
                where = f"{name}[{key!r}]" if isinstance(codec, Mapping) else name
                raise TypeError(f"{where} must be a codec of msjax.compress, got {value!r}")
        return cls(by_name.pop("", compress.Identity()), tuple(sorted(by_name.items())))

    def for_tree(self, spec: TreeSpec, name: str = "codec") -> tuple[Codec, ...]:
        """Returns the codec of each array.

        Raises:
          ValueError: a name is that of no floating array of the tree.
        """
        named = dict(self.named)
        floats = [n for n, leaf in zip(spec.names, spec.leaves, strict=True) if is_float(leaf)]
        if unknown := sorted(named.keys() - set(floats)):
            known = ", ".join(map(repr, floats)) or "none"
            raise ValueError(f"{name} must name floating arrays of the features, which are {known}; got {unknown[0]!r}")
        pairs = zip(spec.names, spec.leaves, strict=True)
        return tuple(named.get(n, self.default) if is_float(leaf) else Exact() for n, leaf in pairs)

    def at_inference(self) -> "Codecs":
        """Returns the codecs to use on test data; see `Codec.at_inference`."""
        return Codecs(self.default.at_inference(), tuple((n, c.at_inference()) for n, c in self.named))

    @property
    def all(self) -> tuple[Codec, ...]:
        """Every codec, the default first."""
        return (self.default, *(codec for _, codec in self.named))

    @property
    def entropy_coded(self) -> bool:
        """Whether any is entropy-coded, so that bytes depend on values."""
        return any(codec.entropy_coded for codec in self.all)

    def __str__(self):
        return repr(self.default) if not self.named else repr({"": self.default, **dict(self.named)})


@dataclasses.dataclass(frozen=True)
class PayloadSpec:
    """What one message carries, known from shapes alone: both ends know it, and a message that differs is refused.

    Attributes:
      structure: of the tree that is decoded.
      codecs: of each array.
      likes: shape and dtype that each array decodes to.
      places: the place of each array among the features, by which it draws its random numbers.
      downlink: whether these are gradients of such features, which draw other numbers.
      kept_by: of gradients that are sent only where the features were kept, the features' codecs, one an array; else
        empty.
      wholes: then, shape and dtype of each whole gradient, of which `likes` says what is sent.
    """

    structure: Any
    codecs: tuple[Codec, ...]
    likes: tuple[jax.ShapeDtypeStruct, ...]
    places: tuple[int, ...]
    downlink: bool = False
    kept_by: tuple[Codec, ...] = ()
    wholes: tuple[jax.ShapeDtypeStruct, ...] = ()

    @classmethod
    def of_features(cls, spec: TreeSpec, codecs: Codecs, batch_size: int) -> "PayloadSpec":
        """Returns the spec of the features of a batch."""
        places = tuple(range(len(spec.leaves)))
        return cls(spec.structure, codecs.for_tree(spec), spec.batch_leaves(batch_size), places)

    @classmethod
    def of_gradients(
        cls, spec: TreeSpec, codecs: Codecs, batch_size: int, kept_by: Codecs | None = None
    ) -> "PayloadSpec":
        """Returns the spec of the gradients of such features: a list of those of the floating arrays.

        Args:
          kept_by: the features' codecs, where gradients are sent only where these kept the features.
        """
        places = tuple(i for i, leaf in enumerate(spec.leaves) if is_float(leaf))
        by_place = codecs.for_tree(spec, "grad_codec")
        batch = spec.batch_leaves(batch_size)
        wholes = tuple(batch[i] for i in places)
        structure = jax.tree.structure([0] * len(places))
        own = tuple(by_place[i] for i in places)
        if kept_by is None:
            return cls(structure, own, wholes, places, True)
        features = kept_by.for_tree(spec)
        keepers = tuple(features[i] for i in places)
        likes = tuple(codec.kept_like(like) for codec, like in zip(keepers, wholes, strict=True))
        return cls(structure, own, likes, places, True, keepers, wholes)

    @classmethod
    def of_vector(cls, size: int) -> "PayloadSpec":
        """Returns the spec of a float32 vector that travels uncompressed."""
        like = jax.ShapeDtypeStruct((size,), np.dtype(np.float32))
        return cls(jax.tree.structure(0), (compress.Identity(),), (like,), (0,))

    @classmethod
    def of_vectors(cls, vectors: list[tuple[int, Codec]]) -> "PayloadSpec":
        """Returns the spec of a list of float32 vectors, each of a size and through a codec."""
        likes = tuple(jax.ShapeDtypeStruct((size,), np.dtype(np.float32)) for size, _ in vectors)
        places = tuple(range(len(vectors)))
        return cls(jax.tree.structure(list(places)), tuple(codec for _, codec in vectors), likes, places)

    def key(self, key: jax.Array | None, place: int) -> jax.Array | None:
        """Returns the key that the array at `place` is encoded with, given that of the message."""
        key = leaf_key(key, place)
        return compress.downlink_key(key) if self.downlink else key

    def encode(self, tree: Any, key: jax.Array | None = None, bits: jax.Array | None = None) -> Payload:
        """Returns the payload of each array of `tree`; inside `jit` or outside.

        Args:
          bits: what codecs that can aim at a number of bits are to aim at, in place of their own target.
        """
        leaves = self.structure.flatten_up_to(tree)
        return tuple(
            encode_at_bits(codec, leaf, self.key(key, place), bits)
            for codec, leaf, place in zip(self.codecs, leaves, self.places, strict=True)
        )

    def encode_numpy(self, leaves: list[Any]) -> Payload:
        """Returns the same payloads, made by NumPy alone; see `Codec.encode_numpy`."""
        return tuple(codec.encode_numpy(np.asarray(leaf)) for codec, leaf in zip(self.codecs, leaves, strict=True))

    def decode(self, payload: Payload) -> Any:
        """Returns the tree in a payload."""
        leaves = [codec.decode(p, like) for codec, p, like in zip(self.codecs, payload, self.likes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def take_kept(self, features: Payload, tree: Any) -> Any:
        """Returns of gradients, a list, what is sent; all of them, unless they are sent where features were kept.

        Args:
          features: the payload of the features whose gradients these are; see `Codec.take_kept`.
        """
        if not self.kept_by:
            return tree
        triples = zip(self.kept_by, self.places, tree, strict=True)
        return [codec.take_kept(features[place], g) for codec, place, g in triples]

    def put_kept(self, features: Payload, tree: Any) -> Any:
        """Returns the whole gradients from what was sent of them: the inverse of `take_kept`, zero elsewhere."""
        if not self.kept_by:
            return tree
        quadruples = zip(self.kept_by, self.places, tree, self.wholes, strict=True)
        return [codec.put_kept(features[place], g, like) for codec, place, g, like in quadruples]

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the payload: exact, but for entropy-coded codecs, whose bytes before coding these are."""
        return sum(codec.payload_bytes(like) for codec, like in zip(self.codecs, self.likes, strict=True))

    @functools.cached_property
    def aimed_bytes(self) -> int:
        """About the bytes of the message, before there is one: those of the payload, or what its codec aims at."""
        return sum(aimed_bytes(codec, like) for codec, like in zip(self.codecs, self.likes, strict=True))

    @functools.cached_property
    def float_values(self) -> int:
        """How many values go through codecs: those of floating arrays."""
        return sum(like.size for like in self.likes if is_float(like))

    @functools.cached_property
    def exact_bytes(self) -> int:
        """Bytes of the messages of all other arrays, which travel as they are."""
        return sum(wire.most_bytes(Exact(), like) for like in self.likes if not is_float(like))

    def estimated_bytes(self, payload: Payload) -> jax.Array:
        """Returns about the bytes of the messages of floating arrays, float32 (), inside `jit`."""
        triples = zip(payload, self.codecs, self.likes, strict=True)
        return sum((wire.estimate_bytes(*triple) for triple in triples if is_float(triple[2])), jnp.float32(0))

    def dense(self) -> "PayloadSpec":
        """Returns the spec of the same arrays, uncompressed."""
        codecs = tuple(codec if isinstance(codec, Exact) else compress.Identity() for codec in self.codecs)
        return dataclasses.replace(self, codecs=codecs)


def header_bytes(codec: Codec, like: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of an array's message beside its payload."""
    return wire.most_bytes(codec, like) - codec.payload_bytes(like)


def aimed_bytes(codec: Codec, like: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of an array's payload; of an entropy-coded codec that aims at a number of bits, those bits'."""
    nominal, bits = codec.payload_bytes(like), getattr(codec, "bits", None)
    return min(nominal, round(bits * like.size / 8)) if codec.entropy_coded and bits else nominal


def encode_at_bits(codec: Codec, h: Any, key: jax.Array | None, bits: jax.Array | None) -> Any:
    """Returns the payload of one array, at so many bits a value where they are given and the codec can aim at them."""
    if bits is None or not isinstance(codec, EntropyMask):
        return codec.encode(h, key)
    return codec.encode_at_bits(h, bits, key)


def vector_payload(vector: Any) -> Payload:
    """Returns the payload of a vector as `PayloadSpec.of_vector` describes it."""
    return (compress.DensePayload(vector),)


def payload_vector(payload: Payload) -> Any:
    """Returns the vector in such a payload."""
    return payload[0].values


def leaf_key(key: jax.Array | None, place: int) -> jax.Array | None:
    """Returns the random key of the array at `place` among the features of a message with this key."""
    # Far from 0, 1, 2, …: codecs split their key, and split(key)[i] may equal fold_in(key, i).
    return key if key is None or place == 0 else jax.random.fold_in(key, (1 << 29) + place)
