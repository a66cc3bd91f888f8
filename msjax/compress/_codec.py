"""What every codec has in common: the interface, and the flattening behind it."""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

FLOAT_DTYPES = ("float32", "bfloat16", "float16")

Granularity = Literal["tensor", "sample", "token", "channel"]


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
    """Whether the payload is made for lossless coding, so that `msjax.wire` always codes it."""

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
          TypeError: `h` is no array, has another dtype, or has a mask.
          ValueError: the codec is random and `key` is None, or `h` has 2^31 values or more.
        """
        return _encode(self, jnp.asarray(self._checked(h, key)), key)

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
        return _roundtrip(self, jnp.asarray(self._checked(h, key)), key)

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
        where the features decode to zero: behind a ReLU their derivative is zero. Of sparsifiers it is short, the
        gradient of the kept values alone (Zheng et al., IJCAI 2023, arXiv 2305.18469).

        Args:
          payload: of features like `g`, by this codec.
          g: the gradient of the decoded features.

        Raises:
          TypeError, ValueError: as `decode`; `g` is of another dtype than features may have.
        """
        g = jnp.asarray(as_array(g, "g"))
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
        return type(wanted)(*map(jnp.asarray, given))

    @abc.abstractmethod
    def _payload_like(self, like): ...

    @abc.abstractmethod
    def _encode(self, h, key): ...

    @abc.abstractmethod
    def _decode(self, payload, like): ...

    def _kept_like(self, like):
        return shaped(like.shape, like.dtype)

    def _is_kept(self, payload, like):
        """bool, of the shape of `like`: where the features do not decode to zero."""
        return self._decode(payload, like) != 0

    def _take_kept(self, payload, g):
        return jnp.where(self._is_kept(payload, g), g, jnp.zeros((), g.dtype))

    def _put_kept(self, payload, kept, like):
        return jnp.where(self._is_kept(payload, like), kept, jnp.zeros((), kept.dtype))

    def _encode_numpy(self, h):
        raise ValueError(f"codec must be one that has a NumPy encoder, got {self}")

    def _roundtrip(self, h, key):
        return self._decode(self._encode(h, key), h)

    def _checked(self, h, key=...):
        """`h` as an array of JAX or NumPy that this codec takes."""
        h = as_array(h)
        h = h if isinstance(h, jax.Array) else h.astype(_native(h.dtype), copy=False)
        self._check(h, key)
        return h

    def _check(self, h, key=...):
        check_array(h, FLOAT_DTYPES)
        if self.needs_key and key is None:
            raise ValueError(f"key must be a JAX random key for {type(self).__name__}, got None")


# Traced once for a codec and a shape, however many programs use it; called outside of one, each is a program.
_program = functools.partial(jax.jit, inline=True)


@functools.partial(_program, static_argnames="codec")
def _encode(codec, h, key):
    return codec._encode(h, key)


@functools.partial(_program, static_argnames=("codec", "like"))
def _decode(codec, payload, like):
    return codec._decode(payload, like)


@functools.partial(_program, static_argnames="codec")
def _roundtrip(codec, h, key):
    return codec._roundtrip(h, key)


@functools.partial(_program, static_argnames="codec")
def _take_kept(codec, payload, g):
    return codec._take_kept(payload, g)


@functools.partial(_program, static_argnames=("codec", "like"))
def _put_kept(codec, payload, kept, like):
    return codec._put_kept(payload, kept, like)


@dataclasses.dataclass(frozen=True, repr=False)
class VectorCodec(Codec):
    """A codec that sees its input as one vector, or as several that it compresses one by one.

    Where there are several, the payload's arrays have a leading axis with their number, each has its own scale, and
    packed codes begin with a new byte in each:

      - `granularity="tensor"`: the whole array at once, as the paper does with the batch of one client.
      - `"sample"`: each `h[i]`, so what one sample decodes to does not depend on its neighbours.
      - `"token"`: each vector along the last axis, as a transformer's features have one a token (`h[i, t]`).
      - `"channel"`: each `h[..., c]`, as a transformer has few channels whose values are far larger than all others.
    """

    granularity: Granularity = dataclasses.field(default="tensor", kw_only=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name), str(field.type)))
        check_choice("granularity", self.granularity, get_args(Granularity))

    @abc.abstractmethod
    def _encode_vector(self, x, key):
        """Payload of the vector `x` (d,)."""

    @abc.abstractmethod
    def _decode_vector(self, payload, like):
        """Vector (d,) and dtype of `like` from its payload."""

    def _roundtrip_vector(self, x, key):
        return self._decode_vector(self._encode_vector(x, key), x)

    def _encode_vector_numpy(self, x):
        """`_encode_vector` by NumPy, of a codec that is not random."""
        return Codec._encode_numpy(self, x)

    @abc.abstractmethod
    def _vector_like(self, d: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the payload of a vector of `d` values of `dtype`."""

    def _payload_like(self, like):
        rows, d = self._rows(like)
        payload = self._vector_like(d, like.dtype)
        return payload if rows is None else jax.tree.map(lambda leaf: shaped((rows, *leaf.shape), leaf.dtype), payload)

    def _rows(self, h) -> tuple[int | None, int]:
        """(number of vectors or None for one unbatched vector, values in each)."""
        if self.granularity == "tensor":
            return None, h.size
        if not h.shape:
            axis = "batch" if self.granularity == "sample" else "last"
            raise ValueError(f'h must have a {axis} axis with granularity="{self.granularity}", got a scalar')
        if self.granularity == "token":
            return math.prod(h.shape[:-1]), h.shape[-1]
        rows = h.shape[0 if self.granularity == "sample" else -1]
        return rows, h.size // max(rows, 1)

    def _split(self, h):
        """The vectors (rows, d) of an array, of JAX or NumPy, or the one vector (d,)."""
        rows, d = self._rows(h)
        if rows is None:
            return h.reshape(d)
        return h.reshape(d, rows).T if self.granularity == "channel" else h.reshape(rows, d)

    def _joined(self, vectors, shape):
        """The inverse of `_split`."""
        return (vectors.T if self.granularity == "channel" else vectors).reshape(shape)

    def _encode(self, h, key):
        return self._over_rows(self._encode_vector, h, key)

    def _encode_numpy(self, h):
        rows, d = self._rows(h)
        if rows is None:
            return self._encode_vector_numpy(self._split(h))
        # One more than there are, so that there is one.
        payloads = [self._encode_vector_numpy(row) for row in np.ascontiguousarray(self._split(h))]
        payloads.append(self._encode_vector_numpy(np.zeros(d, h.dtype)))
        return type(payloads[0])(*(np.stack(arrays)[:rows] for arrays in zip(*payloads, strict=True)))

    def _roundtrip(self, h, key):
        return self._joined(self._over_rows(self._roundtrip_vector, h, key), h.shape)

    def _over_rows(self, fun, h, key):
        rows, _ = self._rows(h)
        if rows is None:
            return fun(self._split(h), key)
        keys = None if key is None else jax.random.split(key, rows)
        return jax.vmap(fun)(self._split(h), keys)

    def _decode(self, payload, like):
        rows, d = self._rows(like)
        vector = jax.ShapeDtypeStruct((d,), like.dtype)
        if rows is None:
            return self._decode_vector(payload, vector).reshape(like.shape)
        return self._joined(jax.vmap(lambda p: self._decode_vector(p, vector))(payload), like.shape)


def shaped(shape: int | tuple[int, ...], dtype: Any = jnp.uint8) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array of a payload; an int is the length of a vector."""
    return jax.ShapeDtypeStruct((shape,) if isinstance(shape, int) else shape, dtype)


def check_array(h: Any, dtypes: tuple[str, ...], where: str = "") -> None:
    """Raises TypeError or ValueError for what a codec of arrays of these dtypes cannot take."""
    if h.dtype.name not in dtypes:
        raise TypeError(f"h must be one of {', '.join(dtypes)}{where}, got {h.dtype.name}")
    if math.prod(h.shape) >= 1 << 31:
        raise ValueError(f"h must have fewer than 2^31 values, got shape {list(h.shape)}")


def as_array(x: Any, name: str = "h") -> Any:
    """`x`, of whatever library, as an array of JAX or NumPy; TypeError, with the argument's `name`, if it is none."""
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must have no mask: fill it first, as with {name}.filled(0), got a masked array")
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    try:
        return np.asarray(x)
    except Exception as error:  # whatever the other library raises
        try:  # NumPy has no bfloat16
            return jnp.from_dlpack(x, copy=True)
        except Exception:
            raise TypeError(f"{name} must be an array, got {type(x).__name__}: {error}") from None


def form_of(like: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, or of what has these alone."""
    if not (hasattr(like, "shape") and isinstance(getattr(like, "dtype", None), np.dtype)):
        like = as_array(like)  # another library's dtype
    return shaped(tuple(like.shape), _native(like.dtype))


def payload_arrays(payload: Any) -> list:
    """The arrays of a payload, of JAX or NumPy."""
    leaves = jax.tree.leaves(payload)
    return [as_array(leaf, "payload") if hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in leaves]


def _native(dtype):
    """`dtype` in this machine's order of bytes."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def check_payload(codec: Codec, like: Any, wanted: tuple, given: list) -> None:
    """Raises ValueError where the arrays `given` have not the shapes and dtypes of the payload `wanted`."""
    if [(leaf.shape, leaf.dtype) for leaf in given] != [(leaf.shape, leaf.dtype) for leaf in wanted]:
        found, right = (", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) for leaves in (given, wanted))
        of = f"{jnp.dtype(like.dtype).name}{list(like.shape)}"
        raise ValueError(f"payload must be what {codec} makes of {of}, got {found} instead of {right}")


def _plain(value, wanted):
    """A NumPy scalar, or an int for a float or bool, as what it is meant for: equal codecs print the same text."""
    if isinstance(value, np.generic):
        # As the decimal that it prints as: float32's 0.99 in more digits is another number.
        number = value.item()
        value = float(str(value)) if isinstance(number, (float, np.floating)) else number
    if "float" in wanted and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    return bool(value) if "bool" in wanted and type(value) in (int, float) and value in (0, 1) else value


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bits(bits: int) -> None:
    check_integer("bits", bits, 1, 8)


def check_integer(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer in {least}..{most}, got {value!r}")


def check_ratio(ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(f"ratio must be a number in [0, 1), got {ratio!r}")
