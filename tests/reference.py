"""The codecs as slow numpy loops, written from the paper (arXiv 2408.13787); nothing of the package, no jax.

Codecs go by class name and a dict of fields. `ENCODE` and `DECODE` see one vector; `check_encoded` and `decode_array`
add the granularity. Codes are computed in float32, in the order the paper writes them, so that they come out
equal to the bit.
"""

import itertools
import math
from decimal import Decimal, localcontext

import ml_dtypes
import numpy as np
import scipy.stats

f32 = np.float32


def num_kept(ratio, d):
    """k = ⌊(1 − r)·d⌋ in decimal arithmetic; at least one of a vector that has any."""
    with localcontext() as context:
        context.prec = 1200  # the smallest positive float is 5e-324
        k = math.floor((1 - Decimal(str(ratio))) * d)
    return min(d, max(1, k))


def pack(codes, bits):
    """Code i is written to bits i·b, i·b + 1, … of one long little-endian integer, which is cut into bytes."""
    total = 0
    for i, code in enumerate(codes):
        total |= int(code) << (i * bits)
    return list(total.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


def unpack(packed, bits, d):
    total = int.from_bytes(bytes(int(byte) for byte in packed), "little")
    return [(total >> (i * bits)) % 2**bits for i in range(d)]


def largest(scores, k):
    """Positions, ascending, of the k largest: NaN above everything, the earlier of two equals first."""
    order = sorted(
        range(len(scores)), key=lambda i: (not math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i], i)
    )
    return sorted(order[:k])


def _scores(x, by_magnitude):
    return [abs(f32(v)) if by_magnitude else f32(v) for v in x]


def ms_threshold(values, signed):
    """τ, the smallest kept score; +Inf stands for NaN, the largest of all."""
    return min(f32(np.inf) if np.isnan(s) else s for s in _scores(values, signed))


def ms_codes(x, ratio, bits, rounding, signed):
    """(positions that are kept, code of every element, whether its sign bit is set): Algorithm 1."""
    top = 2**bits - 1
    kept = largest(_scores(x, signed), num_kept(ratio, len(x)))
    tau = ms_threshold([x[i] for i in kept], signed)
    codes, signs = [], []
    for i, score in enumerate(_scores(x, signed)):
        if i in set(kept):
            code = top
        elif not 0 < tau < np.inf or not score > 0:
            code = 0
        else:
            scale = f32(2.0**-32 if tau > 1e30 else 1)  # so that nothing overflows
            steps = score * scale * f32(top) / (tau * scale)  # float32, multiplied first
            steps = np.floor(steps) if rounding == "floor" else np.rint(steps)
            code = min(int(steps), top - 1)
        codes.append(code)
        signs.append(bool(0 < code < top and x[i] < 0))
    return kept, codes, signs


def _ms_encode(x, fields):
    if len(x) == 0:
        return x, [], []
    signed, bits = fields["signed"], fields["bits"]
    kept, codes, signs = ms_codes(x, fields["ratio"], bits, fields["rounding"], signed)
    return x[kept], pack(codes, bits), pack(signs, 1) if signed else []


def _ms_decode(payload, d, dtype, fields):
    """Algorithm 2, in float64 up to the last step."""
    values, codes, signs = payload
    top, signed = 2 ** fields["bits"] - 1, fields["signed"]
    if d == 0:
        return np.zeros(0, dtype)
    tau = max(0.0, float(ms_threshold(values, signed)))
    signs = unpack(signs, 1, d) if signed else [0] * d
    queue, out = list(values), []
    for code, sign in zip(unpack(codes, fields["bits"], d), signs, strict=True):
        out.append(queue.pop(0) if code == top else (-1 if sign else 1) * (code * tau) / top)
    assert not queue, "as many codes of all ones as values"
    return np.array([f32(v) for v in out]).astype(dtype)


def _sparse_encode(x, kept):
    return x[kept], pack([i in set(kept) for i in range(len(x))], 1)


def _topk_encode(x, fields):
    return _sparse_encode(x, largest(_scores(x, True), num_kept(fields["ratio"], len(x))))


def _sparse_decode(payload, d, dtype, fields):
    values, mask = payload
    queue = list(values)
    out = [f32(queue.pop(0)) if bit else f32(0) for bit in unpack(mask, 1, d)]
    assert not queue, "as many mask bits as values"
    return np.array(out, f32).astype(dtype)


def _randk_decode(payload, d, dtype, fields):
    scaled = payload[0].astype(np.float64) * float(f32(d / max(len(payload[0]), 1)))
    return _sparse_decode((_clamped(scaled, dtype), payload[1]), d, dtype, fields)


def _clamped(values, dtype):
    """Float64 values in `dtype`: its largest numbers for those that are beyond them and finite."""
    values, largest = np.array(values, np.float64), float(ml_dtypes.finfo(dtype).max)
    return np.where(np.isinf(values), values, np.clip(values, -largest, largest)).astype(f32).astype(dtype)


def uniform_steps(x, bits):
    """((x − min)·(2^q − 1)/(max − min) of every element, or 0 where that is not a number; min; max)."""
    if len(x) == 0:
        return [], f32(0), f32(0)
    low, high = f32(np.min(x.astype(f32))), f32(np.max(x.astype(f32)))
    scale = f32(2.0**-32 if max(abs(low), abs(high)) > 1e30 else 1)  # so that nothing overflows
    above = [f32(v) * scale - low * scale for v in x]
    steps = [a * f32(2**bits - 1) / (high * scale - low * scale) for a in above]
    return [f32(0) if np.isnan(s) else s for s in steps], low, high


def _uniform_encode(x, fields):
    steps, low, high = uniform_steps(x, fields["bits"])
    top = 2 ** fields["bits"] - 1
    return pack([int(np.rint(min(s, top))) for s in steps], fields["bits"]), low, high


def _uniform_decode(payload, d, dtype, fields):
    codes, low, high = payload
    spread = float(f32(high) - f32(low))
    spread = spread if np.isfinite(spread) else float(high) - float(low)
    levels = [float(low) + code * spread / (2 ** fields["bits"] - 1) for code in unpack(codes, fields["bits"], d)]
    return _clamped(levels, dtype)


def normal_float(bits):
    """Appendix E of arXiv 2305.14314: quantiles from an offset to one half, on each side, and one 0."""
    half = 2 ** (bits - 1)
    offset = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above = scipy.stats.norm.ppf(np.linspace(offset, 0.5, half + 1)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, half)[:-1])
    return np.sort(np.concatenate([below, [0.0], above]) / above.max()).astype(f32)


def small_float(exponent_bits, mantissa_bits):
    """Magnitudes of every code, in units of the smallest that is not 0."""
    ones = 2**mantissa_bits
    return [float(m if e == 0 else (ones + m) * 2 ** (e - 1)) for e in range(2**exponent_bits) for m in range(ones)]


def _scale(x):
    largest = f32(max((abs(f32(v)) for v in x), key=lambda v: (np.isnan(v), v), default=0))
    return largest if np.isfinite(largest) else f32(np.nan)


def _quantile_encode(x, fields):
    levels, scale = normal_float(fields["bits"]), _scale(x)
    middles = [(a + b) * f32(0.5) for a, b in itertools.pairwise(levels)]
    codes = [sum(f32(v) > middle * scale for middle in middles) if scale > 0 else len(levels) // 2 - 1 for v in x]
    return pack(codes, fields["bits"]), scale


def _quantile_decode(payload, d, dtype, fields):
    levels = normal_float(fields["bits"]).astype(np.float64)
    return _clamped([levels[code] * float(payload[1]) for code in unpack(payload[0], fields["bits"], d)], dtype)


def _small_float_encode(x, fields):
    numbers, scale = small_float(fields["exponent_bits"], fields["mantissa_bits"]), _scale(x)
    octave = max(-126, min(126, math.floor(math.log2(scale)))) if scale > 0 else 0  # so that nothing overflows
    down, codes = f32(2.0**-octave), []
    for v in x:
        units = float(abs(f32(v)) * down * (f32(numbers[-1]) / (scale * down))) if scale > 0 else 0.0
        code = min(range(len(numbers)), key=lambda c: (abs(numbers[c] - units), c % 2))
        codes.append(code + len(numbers) * bool(v < 0 and code > 0))
    return pack(codes, 1 + fields["exponent_bits"] + fields["mantissa_bits"]), scale


def _small_float_decode(payload, d, dtype, fields):
    numbers = small_float(fields["exponent_bits"], fields["mantissa_bits"])
    numbers = [n / numbers[-1] for n in numbers]
    numbers += [-n for n in numbers]
    codes = unpack(payload[0], 1 + fields["exponent_bits"] + fields["mantissa_bits"], d)
    return _clamped([numbers[code] * float(payload[1]) for code in codes], dtype)


def _digits(packed, base, d):
    """Codes to a base, as many in a byte as fit, the first lowest."""
    per_byte = math.floor(math.log(256, base) + 1e-9)
    return [int(byte) // base**i % base for byte in packed for i in range(per_byte)][:d]


def entropy_most(fields):
    return fields["levels"] // 2 if fields["signed"] else fields["levels"] - 1


def check_entropy(x, payload, fields):
    """Raises unless `payload` is a quantization of `x` with the step that it names."""
    packed, outliers, means, step = payload
    levels, most, k = fields["levels"], entropy_most(fields), num_kept(fields["ratio"], len(x))
    codes, seen, overflown = _digits(packed, levels + 1, len(x)), 0, False
    steps = [np.abs(f32(v)) if fields["signed"] else f32(0) if v < 0 else f32(v) for v in x]
    if np.isnan(step):
        assert sum(not np.isfinite(v) for v in x) and sum(code == levels for code in codes) == k
        return
    assert all(np.isfinite(means)) and step >= 0
    for value, magnitude, code in zip(x, steps, codes, strict=True):
        s = magnitude * (f32(1) / f32(step)) if step > 0 else f32(0)
        if fields["rounding"] == "stochastic":
            allowed = {math.floor(s), math.ceil(s)} if np.isfinite(s) else {s}
        else:
            # A product and a sum may be fused: next to an edge either side will do.
            near = [s * f32(1 + e) for e in (-1e-6, 0, 1e-6)] if np.isfinite(s) else [s]
            allowed = {
                n if not np.isfinite(n) else 0 if n < f32(0.5 + fields["dead_zone"]) else math.floor(n + f32(0.5))
                for n in near
            }
        sign = -1 if fields["signed"] and value < 0 else 1
        if code == levels:
            assert any(not a <= most for a in allowed), (value, code)
            exact = sign * (np.float64(s) if fields["rounding"] == "nearest" else np.float64(max(allowed)))
            got = np.float64(outliers[seen])
            assert np.isnan(got) == np.isnan(exact)
            if np.isfinite(exact) and fields["rounding"] == "nearest":
                np.testing.assert_allclose(got, np.clip(exact, -65504, 65504), rtol=2**-10)
            elif np.isfinite(exact):
                assert abs(got - exact) <= max(1, abs(exact) * 2**-10)
            seen += 1
        else:
            magnitude_code = (code - most) * sign if fields["signed"] else code
            assert any(magnitude_code == a or (magnitude_code == most and not a <= most) for a in allowed), (
                value,
                code,
            )
            overflown |= all(not a <= most for a in allowed)
    assert seen <= k and not np.any(outliers[seen:]) and (seen == k or not overflown)


def _entropy_decode(payload, d, dtype, fields):
    packed, outliers, means, step = payload
    levels, queue, out = [float(mean) * float(step) for mean in means], list(outliers), []
    if fields["signed"]:
        levels = [-level for level in levels[:0:-1]] + levels
    for code in _digits(packed, fields["levels"] + 1, d):
        out.append(float(queue.pop(0)) * float(step) if code == fields["levels"] else levels[code])
    return _clamped(out, dtype)


def _half(fields):
    return np.dtype(ml_dtypes.bfloat16 if fields["dtype"] == "bfloat16" else np.float16)


ENCODE = {
    "Identity": lambda x, fields: (x,),
    "Cast": lambda x, fields: (_clamped(x, _half(fields)),),
    "MaskEncoded": _ms_encode,
    "TopK": _topk_encode,
    "Uniform": _uniform_encode,
    "Quantile": _quantile_encode,
    "SmallFloat": _small_float_encode,
}
"""The deterministic codecs; what the others encode to is checked by `check_random`."""

DECODE = {
    "Identity": lambda payload, d, dtype, fields: payload[0],
    "Cast": lambda payload, d, dtype, fields: _clamped(payload[0].ravel(), dtype),
    "MaskEncoded": _ms_decode,
    "TopK": _sparse_decode,
    "RandTopK": _sparse_decode,
    "RandK": _randk_decode,
    "Uniform": _uniform_decode,
    "StochasticUniform": _uniform_decode,
    "Quantile": _quantile_decode,
    "SmallFloat": _small_float_decode,
    "EntropyMask": _entropy_decode,
}


def check_random(name, x, payload, fields):
    """Raises unless `payload` is one that the codec, random or not, may give for the vector `x`."""
    if name == "EntropyMask":
        return check_entropy(x, payload, fields)
    if name == "StochasticUniform":
        codes, low, high = payload
        steps, expected_low, expected_high = uniform_steps(x, fields["bits"])
        np.testing.assert_array_equal([low, high], [expected_low, expected_high])
        for code, step in zip(unpack(codes, fields["bits"], len(x)), steps, strict=True):
            assert code in (math.floor(step), math.ceil(step)), (code, step)
        return
    k = num_kept(fields["ratio"], len(x))
    kept = [i for i, bit in enumerate(unpack(payload[1], 1, len(x))) if bit]
    assert len(kept) == k
    np.testing.assert_array_equal(payload[0].astype(f32), x[kept].astype(f32))
    assert list(payload[1]) == _sparse_encode(x, kept)[1], "spare bits are zero"
    if name == "RandTopK" and fields["alpha"] in (0, 1):
        top = set(largest(_scores(x, True), k))
        assert len(top & set(kept)) == (k if fields["alpha"] == 0 else max(0, 2 * k - len(x)))


def payload_bits(name, d, itemsize, fields):
    """The paper's size of one vector in bits, before rounding each part up to a byte (f = 8·itemsize bits a value)."""
    f, k = 8 * itemsize, num_kept(fields["ratio"], d) if "ratio" in fields else 0
    if name == "Identity":
        return [d * f]
    if name == "Cast":
        return [16 * d]
    if name == "EntropyMask":
        per_byte = math.floor(math.log(256, fields["levels"] + 1) + 1e-9)
        return [8 * math.ceil(d / per_byte), 16 * k, 16 * (entropy_most(fields) + 1), 32]
    if name == "MaskEncoded":
        return [k * f, d * fields["bits"], d if fields["signed"] else 0]
    if "Uniform" in name:
        return [d * fields["bits"], 32, 32]  # the paper does not count the two ends
    if name == "Quantile":
        return [d * fields["bits"], 32]
    if name == "SmallFloat":
        return [d * (1 + fields["exponent_bits"] + fields["mantissa_bits"]), 32]
    return [k * f, d]


def _rows(shape, fields):
    """(vectors, values in each) that are compressed one by one, or the whole array as one."""
    d = math.prod(shape)
    rows = {
        "tensor": lambda: 1,
        "sample": lambda: shape[0],
        "token": lambda: math.prod(shape[:-1]),
        "channel": lambda: shape[-1],
    }[fields.get("granularity", "tensor")]()
    return (rows, shape[-1]) if fields.get("granularity") == "token" else (rows, d // max(rows, 1))


def _vectors(x, fields):
    """The vectors of `x` (n, …): one a sample, one for each of the first axes' places, or one for each of the last."""
    rows, d = _rows(x.shape, fields)
    if fields.get("granularity") == "channel":
        return [x[..., c].reshape(d) for c in range(rows)]
    return list(x.reshape(rows, d))


def payload_bytes(name, shape, itemsize, fields):
    rows, d = _rows(shape, fields)
    return rows * sum(math.ceil(bits / 8) for bits in payload_bits(name, d, itemsize, fields))


def check_encoded(name, x, payload, fields):
    """Raises unless `payload` (numpy arrays) is what `x` encodes to."""
    one = fields.get("granularity", "tensor") == "tensor"
    with np.errstate(all="ignore"):
        for i, row in enumerate(_vectors(x, fields)):
            part = payload if one else [leaf[i] for leaf in payload]
            if name not in ENCODE:
                check_random(name, row, part, fields)
                continue
            for got, want in zip(part, ENCODE[name](row, fields), strict=True):
                want = np.asarray(want)
                np.testing.assert_array_equal(np.asarray(got, f32).reshape(want.shape), want.astype(f32))


def decode_array(name, payload, shape, dtype, fields):
    rows, d = _rows(shape, fields)
    one = fields.get("granularity", "tensor") == "tensor"
    with np.errstate(all="ignore"):
        parts = [DECODE[name](payload if one else [leaf[i] for leaf in payload], d, dtype, fields) for i in range(rows)]
    if fields.get("granularity") == "channel" and rows:
        return np.stack([np.array(part, dtype).reshape(shape[:-1]) for part in parts], axis=-1)
    return np.array(parts, dtype).reshape(shape)
