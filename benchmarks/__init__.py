"""What compression costs in time: `python -m benchmarks.codecs`, `python -m benchmarks.steps`."""

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
