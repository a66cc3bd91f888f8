"""What a codec is given: arrays of any library, their shapes and dtypes, and payloads."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def shaped(shape: int | tuple[int, ...], dtype: Any = jnp.uint8) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array of a payload; an int is the length of a vector."""
    return jax.ShapeDtypeStruct((shape,) if isinstance(shape, int) else shape, dtype)


def check_array(h: Any, dtypes: tuple[str, ...], where: str = "", name: str = "h") -> None:
    """Raises TypeError or ValueError for what a codec of arrays of these dtypes cannot take."""
    if h.dtype.name not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(dtypes)}{where}, got {h.dtype.name}")
    if symbols := [size for size in h.shape if not isinstance(size, int | np.integer)]:
        raise ValueError(
            f"{name} must have a shape of numbers, as a payload's size follows from it, got the size {symbols[0]}"
        )
    if math.prod(h.shape) >= 1 << 31:
        raise ValueError(f"{name} must have fewer than 2^31 values, got shape {list(h.shape)}")


def as_array(x: Any, name: str = "h") -> Any:
    """`x`, of whatever library, as an array of JAX or NumPy; TypeError, with the argument's `name`, if it is none."""
    if isinstance(x, jax.Array):
        return x
    if hasattr(x, "__jax_array__"):  # such as a variable of Flax, which may hold a tracer
        return x.__jax_array__()
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


def as_jax(h: Any) -> jax.Array:
    """`h`, of JAX or NumPy, as JAX's; TypeError where it would become another dtype, as 64 bits do by default."""
    x = jnp.asarray(h)
    if x.dtype != h.dtype:
        raise TypeError(f"h must be {x.dtype} where jax_enable_x64 is off, got {h.dtype}")
    return x


def form_of(like: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, or of what has these alone."""
    if not (hasattr(like, "shape") and isinstance(getattr(like, "dtype", None), np.dtype)):
        like = as_array(like)  # another library's dtype
    return shaped(tuple(like.shape), native(like.dtype))


def payload_arrays(payload: Any) -> list:
    """The arrays of a payload, of JAX or NumPy, in this machine's order of bytes."""
    leaves = jax.tree.leaves(payload)
    arrays = [as_array(leaf, "payload") if hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in leaves]
    return [a if isinstance(a, jax.Array) else a.astype(native(a.dtype), copy=False) for a in arrays]


def by_platform(x: jax.Array, *, default: Callable, cpu: Any = None, tpu: Any = None, **options: Any) -> jax.Array:
    """What the function of its platform makes of `x`, with these options.

    All are traced. Those of a platform may reshape across an axis that is sharded explicitly, which cannot be traced:
    of such an array it is the default, which may not.
    """
    default = functools.partial(default, **options)
    if any(axis is not None for axis in jax.typeof(x).sharding.spec):
        return default(x)
    others = {name: functools.partial(by, **options) for name, by in (("cpu", cpu), ("tpu", tpu)) if by is not None}
    return lax.platform_dependent(x, default=default, **others)


def native(dtype):
    """`dtype` in this machine's order of bytes."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype
