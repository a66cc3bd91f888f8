"""What every codec has in common: the interface."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from msjax.compress._arrays import (
    FLOAT_DTYPES,
    as_array,
    as_jax,
    check_array,
    form_of,
    native,
    payload_arrays,
    shaped,
)


@dataclasses.dataclass(frozen=True, repr=False)
class Codec(abc.ABC):
    """A compressor of feature maps whose fields are its whole configuration.

    Codecs are frozen and hashable: compare them, print them, use them as static arguments. They hold no arrays.
    """

    needs_key: ClassVar[bool] = False
    """Whether `encode` draws random numbers; such a codec raises `ValueError` when it gets no key."""

    unbiased: ClassVar[bool] = False
    """Whether the mean over keys of what is decoded is the input. An error that such a codec makes may be larger than
    what is encoded, so it is not to be added to what is encoded next (error feedback)."""

    entropy_coded: ClassVar[bool] = False
    """Whether the payload is made for lossless coding: `msjax.wire` then always codes its arrays of uint8, and leaves
    out zeros at the end of others."""

    def __new__(cls, *args: Any, **options: Any):
        _check_class(cls)
        return super().__new__(cls)

    def __repr__(self):
        # A subclass's own fields before the inherited options; dataclasses would print those first. A field that came
        # later hides its default, so that the codecs of before keep the text that messages and records have.
        hidden = [f.name for f in dataclasses.fields(self) if f.metadata.get("hide_default")]
        fields = [f for f in dataclasses.fields(self) if f.name not in hidden or getattr(self, f.name) != f.default]
        fields = sorted(fields, key=lambda field: field.kw_only)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"

    def encode(self, h: Shaped[Array, "..."], key: jax.Array | None = None) -> tuple[Array, ...]:
        """Returns the payload of `h`: a NamedTuple of arrays, packed to the size they have on the wire.

        Args:
          h: features, any shape; float32, bfloat16 or float16. An array of JAX, NumPy or a library that gives its
            arrays to either, as PyTorch does; in any order of axes and bytes.
          key: a JAX random key; needed by random codecs alone.

        Raises:
          TypeError: `h` is no array, has another dtype, or has a mask; `key` is needed and no array.
          ValueError: the codec is random and `key` is None, or `h` has 2^31 values or more, or an axis whose size is a
            symbol, as `jax.export` has them.
        """
        return _encode(self, as_jax(self._checked(h, key)), key)

    def encode_numpy(self, h: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the payload that `encode` gives, bit for bit, as NumPy arrays and made by NumPy alone.

        For clients whose accelerator, or none, should not do it; subnormal numbers may come out otherwise.

        Raises:
          TypeError: `h` is no array, has another dtype, or has a mask.
          ValueError: the codec is random, as its numbers are drawn by JAX, or has no NumPy encoder.
        """
        h = self._checked(h)
        if self.needs_key:
            raise ValueError(f"codec must not be random to encode with NumPy, got {self}")
        with np.errstate(all="ignore"):  # NaN and Inf have their codes
            return self._encode_numpy(np.asarray(h))

    def decode(self, payload: Any, like: Any) -> Shaped[Array, "..."]:
        """Returns the features in `payload`, in the shape and dtype of `like` (an array or a `ShapeDtypeStruct`).

        The payload's arrays may be NumPy's, as they come off a wire.

        Raises:
          TypeError: an array of the payload has a mask.
          ValueError: the payload is not that of an array like `like`.
        """
        like = form_of(like)
        return _decode(self, self._given(payload, like), like)

    def roundtrip(self, h: Shaped[Array, "..."], key: jax.Array | None = None) -> Shaped[Array, "..."]:
        """Returns the same numbers as `decode(encode(h, key), h)`, where it can without the packing; see `encode`."""
        return _roundtrip(self, as_jax(self._checked(h, key)), key)

    def payload_like(self, like: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns shapes and dtypes of the payload of an array like `like`, from its shape and dtype alone."""
        like = form_of(like)
        self._check(like)
        return self._payload_like(like)

    def payload_bytes(self, like: Any) -> int:
        """Returns the exact size in bytes of the payload of an array like `like`, from its shape and dtype alone."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.payload_like(like))

    def at_inference(self) -> "Codec":
        """Returns the codec to use on test data: this one, unless its source says otherwise."""
        return self

    def kept_like(self, like: Any) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of what `take_kept` gives for features like `like`."""
        like = form_of(like)
        self._check(like)
        return self._kept_like(like)

    def take_kept(self, payload: Any, g: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Returns a gradient where `payload` has kept the features, as `kept_like` says.

        What a sender of gradients needs to send to one who throws the others away. Of most codecs it is `g` with zeros
        where the features decode to zero, or, of `EntropyMask`, have the code 0: behind a ReLU the derivative of zeros
        is zero. Of sparsifiers it is short, the
        gradient of the kept values alone (Zheng et al., IJCAI 2023, arXiv 2305.18469).

        Args:
          payload: of features like `g`, by this codec.
          g: the gradient of the decoded features.

        Raises:
          TypeError, ValueError: as `decode`; `g` is of another dtype than features may have.
        """
        g = jnp.asarray(as_array(g, "g"))
        check_array(g, FLOAT_DTYPES, name="g")
        return _take_kept(self, self._given(payload, form_of(g)), g)

    def put_kept(self, payload: Any, kept: Shaped[Array, "..."], like: Any) -> Shaped[Array, "..."]:
        """Returns the gradient of features like `like` from what `take_kept` gave: zero where they were not kept.

        A sparsifier's is its derivative: of `RandK`, which multiplies what it keeps by d/k, d/k times the kept ones.

        Raises:
          TypeError, ValueError: as `decode`; `kept` has not the shape and dtype that `kept_like` says.
        """
        like, kept = form_of(like), jnp.asarray(as_array(kept, "kept"))
        wanted = self.kept_like(like)
        if form_of(kept) != wanted:
            right, found = (f"{jnp.dtype(a.dtype).name}{list(a.shape)}" for a in (wanted, kept))
            raise ValueError(f"kept must be {right}, as kept_like says, got {found}")
        return _put_kept(self, self._given(payload, like), kept, like)

    def _given(self, payload, like):
        """A payload of an array like `like`, whose shapes and dtypes are checked, of JAX's arrays."""
        wanted = self.payload_like(like)
        given = payload_arrays(payload)
        check_payload(self, like, wanted, given)
        return jax.tree.unflatten(jax.tree.structure(wanted), map(jnp.asarray, given))

    @abc.abstractmethod
    def _payload_like(self, like): ...

    @abc.abstractmethod
    def _encode(self, h, key): ...

    @abc.abstractmethod
    def _decode(self, payload, like): ...

    def _kept_like(self, like):
        return shaped(like.shape, like.dtype)

    def _is_kept(self, payload, like):
        """bool, of the shape of `like`: where the features were kept, by default those that do not decode to zero."""
        return self._decode(payload, like) != 0

    def _take_kept(self, payload, g):
        return jnp.where(self._is_kept(payload, g), g, jnp.zeros((), g.dtype))

    def _put_kept(self, payload, kept, like):
        return jnp.where(self._is_kept(payload, like), kept, jnp.zeros((), kept.dtype))

    def _encode_numpy(self, h):
        raise ValueError(f"codec must be one that has a NumPy encoder, got {self}")

    def _roundtrip(self, h, key):
        return _decode_as_said(self, _encode_as_said(self, h, key), h)

    def _checked(self, h, key=...):
        """`h` as an array of JAX or NumPy that this codec takes."""
        h = as_array(h)
        h = h if isinstance(h, jax.Array) else h.astype(native(h.dtype), copy=False)
        self._check(h, key)
        return h

    def _check(self, h, key=...):
        check_array(h, FLOAT_DTYPES)
        if self.needs_key and key is None:
            raise ValueError(f"key must be a JAX random key for {type(self).__name__}, got None")
        if self.needs_key and key is not ... and not hasattr(key, "dtype"):
            raise TypeError(f"key must be a JAX random key, got {type(key).__name__}")


@functools.cache
def _check_class(cls):
    """Raises TypeError where codecs of a class with unlike options would be equal, and so share a compiled program."""
    for one in cls.__mro__[: cls.__mro__.index(Codec)]:
        made = one.__dict__.get("__dataclass_params__")
        if "__init__" in one.__dict__ if made is None else not (made.frozen and made.eq):
            raise TypeError(
                f"{one.__name__} must be decorated with @dataclasses.dataclass(frozen=True), as a codec's fields are "
                "all that tells it from others"
            )


# Traced once for a codec and a shape, however many programs use it; called outside of one, each is a program.
_program = functools.partial(jax.jit, inline=True)


@functools.partial(_program, static_argnames="codec")
def _encode(codec, h, key):
    return on_any_mesh(functools.partial(_encode_as_said, codec), h, key)


@functools.partial(_program, static_argnames=("codec", "like"))
def _decode(codec, payload, like):
    return on_any_mesh(lambda payload: _decode_as_said(codec, payload, like), payload)


@functools.partial(_program, static_argnames="codec")
def _roundtrip(codec, h, key):
    return on_any_mesh(codec._roundtrip, h, key, as_first=True)


@functools.partial(_program, static_argnames="codec")
def _take_kept(codec, payload, g):
    return on_any_mesh(lambda g, payload: codec._take_kept(payload, g), g, payload)


@functools.partial(_program, static_argnames=("codec", "like"))
def _put_kept(codec, payload, kept, like):
    return on_any_mesh(lambda kept, payload: codec._put_kept(payload, kept, like), kept, payload)


def on_any_mesh(fun: Callable[..., Any], *args: Any, as_first: bool = False) -> Any:
    """Returns `fun(*args)`; where an argument is on a mesh with explicit axes, XLA decides what is where on the way.

    Then each device has the whole result or, with `as_first`, its part of it, as of the first argument.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(args)]
    on = next((sharding for sharding in shardings if sharding.mesh.explicit_axes), None)
    if on is None:
        return fun(*args)
    spec = shardings[0].spec if as_first else jax.sharding.PartitionSpec()
    out = jax.sharding.NamedSharding(on.mesh, spec)
    return jax.sharding.auto_axes(fun, axes=on.mesh.explicit_axes, out_sharding=out)(*args)


def _encode_as_said(codec, h, key):
    """The payload, checked on shapes: messages are read, and bytes counted, by what a codec says of itself."""
    payload = jax.tree.map(rounded, codec._encode(h, key))
    found, right = _listed(jax.tree.leaves(payload)), _listed(codec._payload_like(form_of(h)))
    if found != right:
        raise ValueError(f"_encode of {codec} must return what its _payload_like says, {right}, got {found}")
    return payload


def rounded(leaf: Any) -> Any:
    """Returns an array of a payload; of 16-bit floats XLA then keeps no more bits where one program has both ends."""
    narrow = isinstance(leaf, jax.Array) and leaf.dtype.itemsize == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.lax.optimization_barrier(leaf) if narrow else leaf


def _decode_as_said(codec, payload, like):
    decoded = codec._decode(payload, like)
    found, right = _listed([decoded]), _listed([like])
    if found != right:
        raise ValueError(f"_decode of {codec} must return shape and dtype of `like`, {right}, got {found}")
    return decoded


def _listed(leaves):
    return ", ".join(f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}" for leaf in leaves)


def check_payload(codec: Codec, like: Any, wanted: tuple, given: list) -> None:
    """Raises ValueError where the arrays `given` have not the shapes and dtypes of the payload `wanted`."""
    if [(leaf.shape, leaf.dtype) for leaf in given] != [(leaf.shape, leaf.dtype) for leaf in wanted]:
        found, right = _listed(given), _listed(wanted)
        of = f"{jnp.dtype(like.dtype).name}{list(like.shape)}"
        raise ValueError(f"payload must be what {codec} makes of {of}, got {found} instead of {right}")
