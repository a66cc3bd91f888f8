"""Over the cut in one program: what is sent through codecs, and the gradient that comes back through others."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from msjax import compress, wire
from msjax.split.payloads import Codecs, encode_at_bits, leaf_key
from msjax.split.trees import TreeSpec, is_float


def cross_cut(
    codecs: Codecs,
    grad_codecs: Codecs,
    h: Any,
    key: jax.Array,
    byte_slot: jax.Array,
    *,
    counts: bool,
    kept_only: bool = False,
    bits: jax.Array | None = None,
    grad_bits: jax.Array | None = None,
) -> tuple[Any, jax.Array]:
    """Takes the features of one client over the cut, in one program.

    Args:
      h: features, a tree of arrays of a batch.
      byte_slot: float32 (), a zero. A backward pass returns nothing but gradients, so the bytes of the gradients'
        messages are returned as the gradient of this argument.
      counts: whether bytes are counted, as they have to be in a run of which any codec is entropy-coded.
      kept_only: gradients are sent only where the features were kept.
      bits: what features are aimed at, in place of their codecs' own targets.
      grad_bits: the same of the gradients, of which `grad_codecs` may need fewer.

    Returns:
      The features as they are behind the cut, whose gradient goes through `grad_codecs`; and about the bytes of their
      message without arrays that are not floating, 0 where they are not counted.
    """
    spec = TreeSpec.of(h)
    crossed, up = [], jnp.float32(0)
    pairs = zip(codecs.for_tree(spec), grad_codecs.for_tree(spec, "grad_codec"), strict=True)
    for place, (leaf, (codec, grad_codec)) in enumerate(zip(jax.tree.leaves(h), pairs, strict=True)):
        if not is_float(leaf):
            crossed.append(leaf)
            continue
        leaf_key_ = leaf_key(key, place)
        if counts:
            payload = encode_at_bits(codec, jax.lax.stop_gradient(leaf), leaf_key_, bits)
            up += wire.estimate_bytes(payload, codec, leaf)
            decoded = codec.decode(payload, leaf)
            args = (codec if kept_only else None, grad_codec, leaf, decoded, payload, leaf_key_, grad_bits, byte_slot)
            crossed.append(_cross_counted(*args))
        else:
            crossed.append(compress.straight_through(codec, leaf, leaf_key_, grad_codec, kept_only=kept_only))
    return jax.tree.unflatten(spec.structure, crossed), up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_counted(keeper, grad_codec, h, decoded, payload, key, grad_bits, byte_slot):
    """Returns `decoded`, the features `h` behind the cut, of which `keeper` kept some if there is one.

    The gradient of `h` is as `grad_codec` transmits it, and that of `byte_slot` is about the bytes of its message.
    """
    return decoded


def _cross_forward(keeper, grad_codec, h, decoded, payload, key, grad_bits, byte_slot):
    return decoded, (payload, key, grad_bits)


def _cross_backward(keeper, grad_codec, residuals, g):
    payload, key, grad_bits = residuals
    sent = g if keeper is None else keeper.take_kept(payload, g)
    message = encode_at_bits(grad_codec, sent, compress.downlink_key(key), grad_bits)
    received = grad_codec.decode(message, sent)
    received = received if keeper is None else keeper.put_kept(payload, received, g)
    return received, None, None, None, None, wire.estimate_bytes(message, grad_codec, sent)


_cross_counted.defvjp(_cross_forward, _cross_backward)


def cross_in_test(codecs: Codecs, h: Any, key: jax.Array, bits: jax.Array | None = None) -> Any:
    """Returns features, a tree of arrays, as they are behind the cut in a test, where no gradient comes back.

    Args:
      bits: as of `cross_cut`.
    """
    leaves, structure = jax.tree.flatten(h)
    of_leaf = zip(codecs.for_tree(TreeSpec.of(h)), leaves, strict=True)
    through = []
    for place, (codec, leaf) in enumerate(of_leaf):
        payload = encode_at_bits(codec, leaf, leaf_key(key, place), bits)
        through.append(codec.decode(payload, leaf))
    return jax.tree.unflatten(structure, through)
