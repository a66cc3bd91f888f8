"""The codec as a layer of a network: the only custom derivative of the package."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msjax.compress._arrays import as_jax
from msjax.compress._codec import Codec, on_any_mesh


def straight_through(
    codec: Codec,
    h: Float[Array, "..."],
    key: jax.Array | None = None,
    grad_codec: Codec | None = None,
    *,
    kept_only: bool = False,
) -> Float[Array, "..."]:
    """Returns `codec.roundtrip(h, key)`; its derivative is the identity, or the gradient as `grad_codec` transmits it.

    The backward pass treats the compressor as the identity (arXiv 2408.13787, section 1): the cotangent g goes on
    unchanged, or as `grad_codec.roundtrip(g, downlink_key(key))` to compress the downlink too. Works under `jit`,
    `vmap`, `grad` and `shard_map`. Reverse mode only: like every `custom_vjp` it has no `jvp`. It can be differentiated
    more than once, but not with `kept_only`.

    With `kept_only` the cotangent is sent only where `codec` has kept the features (`Codec.take_kept`), and is zero
    elsewhere: the derivative of a sparsifier. Behind a ReLU nothing is lost by this where a feature is zero. Where it
    was small and decodes to zero, or to the mean of small ones, the layers before the cut do not learn from it: the
    gradient is biased, as that of the dead zone itself. What is sent is unbiased if `grad_codec` is.

    Args:
      codec: for the features, on their way up.
      h: features, any shape; float32, bfloat16 or float16.
      key: a JAX random key, needed when either codec is random.
      grad_codec: for the cotangent of the result, on its way down; None leaves it as it is.
      kept_only: send the cotangent only where the features were kept.

    Raises:
      TypeError: `h` is not of a supported dtype, or a codec is not a `Codec`.
      ValueError: a codec is random and `key` is None; `grad_codec` takes no values below 0; or it has a granularity
        below the tensor where `kept_only` leaves one vector.

    >>> import jax, jax.numpy as jnp
    >>> from msjax.compress import TopK
    >>> jax.grad(lambda h: straight_through(TopK(0.5), h).sum())(jnp.array([1.0, 2.0]))
    Array([1., 1.], dtype=float32)
    """
    for name, value in (("codec", codec), ("grad_codec", grad_codec)):
        if not isinstance(value, Codec) and not (name == "grad_codec" and value is None):
            raise TypeError(f"{name} must be a Codec, got {value!r}")
    if not getattr(grad_codec, "signed", True):
        raise ValueError(f"grad_codec must have signed=True, as gradients are of both signs, got {grad_codec}")
    if key is None and grad_codec is not None and grad_codec.needs_key:
        raise ValueError(f"key must be a JAX random key for grad_codec {type(grad_codec).__name__}, got None")
    if key is not None and not hasattr(key, "dtype"):
        raise TypeError(f"key must be a JAX random key, got {type(key).__name__}")
    h = as_jax(codec._checked(h, key))
    if kept_only and grad_codec is not None:
        check_granularity_of_kept(grad_codec, codec, h, codec.kept_like(h), "kept_only")
    return _straight_through(codec, _varying_as(key, h), key, grad_codec, kept_only)


def _varying_as(key, h):
    """`h`; where the key varies over the devices of a `shard_map`, so does this from here on, as the result will.

    Of one that does not vary the gradient is then the sum of all devices', as JAX wants it. Elsewhere XLA removes this.
    """
    if key is None:
        return h
    none = jax.random.key_data(key).reshape(-1)[0] & jnp.uint32(0)
    return jnp.where(none == 0, h, jnp.zeros((), h.dtype))


def check_granularity_of_kept(grad_codec: Codec, codec: Any, like: Any, kept: Any, option: str) -> None:
    """Raises ValueError for a granularity that means another thing of what `codec` kept than of features like `like`.

    A sparsifier of whole batches leaves one vector; one of samples or tokens leaves a vector of each, whose values are
    of unlike channels. `option` is what the error calls the choice of these alone.
    """
    own = getattr(grad_codec, "granularity", "tensor")
    if own == "tensor" or kept.shape == like.shape:
        return
    if len(kept.shape) == 1:
        raise ValueError(
            f'grad_codec must have granularity="tensor" where {option} leaves one vector of a batch, as a sparsifier '
            f"of whole batches does, got {grad_codec}"
        )
    if own == "channel" or own != getattr(codec, "granularity", "tensor"):
        raise ValueError(
            f'grad_codec must have granularity="tensor", or "sample" or "token" if codec has the same, where {option} '
            f"sends only gradients of kept features of {codec}, got {grad_codec}"
        )


def downlink_key(key: jax.Array | None) -> jax.Array | None:
    """Returns the key with which the gradient codec draws, given the key of the feature codec."""
    # Far from 0, 1, 2, …: codecs split their key, and split(key)[i] may equal fold_in(key, i).
    return None if key is None else jax.random.fold_in(key, 1 << 31)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _straight_through(codec, h, key, grad_codec, kept_only):
    return codec.roundtrip(h, key)


def _forward(codec, h, key, grad_codec, kept_only):
    if not kept_only:  # by itself, so that the derivative of a derivative knows that this one is the identity
        return _straight_through(codec, h, key, grad_codec, kept_only), (None, key)
    payload = codec.encode(h, key)
    decoded = on_any_mesh(lambda h, payload: codec.decode(payload, h), h, payload, as_first=True)
    return decoded, (payload, key)


def _backward(codec, grad_codec, kept_only, residuals, g):
    payload, key = residuals
    sent = codec.take_kept(payload, g) if kept_only else g
    received = sent if grad_codec is None else _straight_through(grad_codec, sent, downlink_key(key), None, False)
    if not kept_only:
        return received, None
    put = lambda g, payload, received: codec.put_kept(payload, received, g)  # noqa: E731
    return on_any_mesh(put, g, payload, received, as_first=True), None


_straight_through.defvjp(_forward, _backward)
