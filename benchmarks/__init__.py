"""What compression costs in time and memory: `python -m benchmarks.codecs`, `programs`, `steps`, `wire`, `link`.

Here is what `codecs`, which needs PyTorch, and `programs`, which does not, have in common.
"""

from collections.abc import Callable
from typing import Any

from msjax import compress

CODECS = (
    compress.MaskEncoded(),
    compress.MaskEncoded(signed=True),
    compress.TopK(),
    compress.RandTopK(),
    compress.RandK(ratio=0.95875),
    compress.Uniform(bits=2),
    compress.StochasticUniform(bits=2),
    compress.EntropyMask(),
)
OPERATIONS = ("encode", "decode", "roundtrip")


def call_of(codec: compress.Codec, operation: str, like: Any) -> Callable:
    """The operation on an array like `like`: `decode` takes a payload, the others an array and a key."""
    return (lambda payload: codec.decode(payload, like)) if operation == "decode" else getattr(codec, operation)
