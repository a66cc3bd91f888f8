"""Codecs for the feature map at the cut: array → payload → array, in pure JAX.

    codec = compress.MaskEncoded(ratio=0.99, bits=2)
    payload = codec.encode(h)                  # packed arrays: what goes over the wire
    h_hat = codec.decode(payload, like=h)
    h_hat = codec.roundtrip(h)                 # the same numbers without the payload
    codec.payload_bytes(h)                     # from the shape alone
    y = compress.straight_through(codec, h)    # as a layer: the gradient passes through

`FeatureMemory` sends what has changed of samples that come again, through any codec for both signs; it has a state.

Needs JAX and jaxtyping alone; works in Flax Linen, Flax NNX, Equinox, Haiku or none of them, under `jit`, `vmap`,
`shard_map` and, through `straight_through`, `grad`. A random codec takes a `key`. Across a sharded axis, call a codec
inside `shard_map`, once a client: a selection over the whole array would gather it.
"""

from msjax.compress._bounds import mask_encoded_error_bound, topk_error_bound, uniform_error_bound
from msjax.compress._cast import Cast
from msjax.compress._codec import Codec
from msjax.compress._entropy_mask import EntropyMask, EntropyPayload
from msjax.compress._exact import Exact
from msjax.compress._feature_memory import FeatureMemory, MemoryPayload, MemoryState
from msjax.compress._identity import DensePayload, Identity
from msjax.compress._mask_encoded import MaskEncoded, MaskPayload
from msjax.compress._parse import codec_from_string
from msjax.compress._quantile import Quantile
from msjax.compress._randk import RandK
from msjax.compress._randtopk import RandTopK
from msjax.compress._scaled import ScaledPayload
from msjax.compress._small_float import SmallFloat
from msjax.compress._straight_through import downlink_key, straight_through
from msjax.compress._topk import SparsePayload, TopK
from msjax.compress._uniform import StochasticUniform, Uniform, UniformPayload
from msjax.compress._vector_codec import VectorCodec

CODECS: tuple[type[Codec], ...] = (
    Identity,
    Cast,
    MaskEncoded,
    TopK,
    RandTopK,
    Uniform,
    StochasticUniform,
    Quantile,
    SmallFloat,
    RandK,
    EntropyMask,
)
"""Every codec, in the order in which tables show them."""


def from_string(text: str) -> Codec:
    """Returns the codec that `text` names, `"TopK"` or `"TopK(ratio=0.9)"`: the inverse of `repr`.

    Raises:
      ValueError: there is no such codec or option, or its value is out of range.

    >>> from_string("Uniform(bits=4)").bits
    4
    """
    return codec_from_string(text, (*CODECS, Exact))


__all__ = [
    "CODECS",
    "Cast",
    "Codec",
    "DensePayload",
    "EntropyMask",
    "EntropyPayload",
    "Exact",
    "FeatureMemory",
    "Identity",
    "MaskEncoded",
    "MaskPayload",
    "MemoryPayload",
    "MemoryState",
    "Quantile",
    "RandK",
    "RandTopK",
    "ScaledPayload",
    "SmallFloat",
    "SparsePayload",
    "StochasticUniform",
    "TopK",
    "Uniform",
    "UniformPayload",
    "VectorCodec",
    "downlink_key",
    "from_string",
    "mask_encoded_error_bound",
    "straight_through",
    "topk_error_bound",
    "uniform_error_bound",
]
