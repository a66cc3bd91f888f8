"""What compression costs in time and memory: `python -m benchmarks.codecs`, `programs`, `steps`, `wire`, `link`.

Here is what `codecs`, which needs PyTorch, has in common with what does not: `programs` and `experiments.accelerator`.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

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


def prepared(codec: Any, operation: str, h: jax.Array) -> tuple[Callable[[], Any], tuple[float, int | None]]:
    """Returns a call of the compiled operation on `h`; the seconds to compile it and its bytes beside input and output.

    The bytes are None where XLA does not tell them.
    """
    key = jax.random.key(1) if codec.needs_key else None
    arguments = (codec.encode(h, key),) if operation == "decode" else (h, key)
    start = time.perf_counter()
    compiled = jax.jit(call_of(codec, operation, h)).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return (lambda: compiled(*arguments)), (seconds, memory and memory.temp_size_in_bytes)
