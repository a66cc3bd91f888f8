"""Every codec's operations and NumPy encoder beside MS in PyTorch and a plain copy, in one process.

    python -m benchmarks.codecs                                    # 4 M and 16 M values, float32: about three minutes
    python -m benchmarks.codecs --sizes 0.5 1 4 16 64 --dtypes float32 bfloat16
    python -m benchmarks.codecs --out benchmarks/results/codecs_cpu

Sizes are in millions (2²⁰) of values of relu(N(0, 1)), as one client's feature map. PyTorch's MS must give the same
codes, or the benchmark stops. Needs `pip install -e '.[bench]'`.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import CODECS, OPERATIONS, prepared, timing, torch_ms
from msjax import compress


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[4, 16], help="millions (2^20) of values")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    options = parser.parse_args()
    start = time.monotonic()
    rows = [row for dtype in options.dtypes for size in options.sizes for row in measure(size, dtype, options.repeats)]
    print(table(rows))
    if options.out:
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start), plot(rows))
    return 0


def measure(size: float, dtype: str, repeats: int) -> list[dict]:
    """Returns one row a codec, of medians in seconds, for `size`·2²⁰ values."""
    d = int(size * 2**20)
    h = jnp.maximum(jax.random.normal(jax.random.key(0), (d,), jnp.float32), 0).astype(dtype)
    h_torch = torch.from_numpy(np.array(h.astype(jnp.float32))).to(getattr(torch, dtype))
    if jax.default_backend() == "gpu":
        h_torch = h_torch.cuda()
    check_same_codes(h, h_torch)
    encoded, on_host = torch_ms.encode(h_torch), np.asarray(h)
    contenders = {
        "copy": lambda: copy(h),
        "torch copy": waited(lambda: h_torch.clone()),
        "torch encode": waited(lambda: torch_ms.encode(h_torch)),
        "torch decode": waited(lambda: torch_ms.decode(*encoded)),
    }
    copy = jax.jit(jnp.copy)
    compiled, rows = {}, []
    for codec in CODECS:
        for operation in OPERATIONS:
            contenders[f"{codec} {operation}"], compiled[codec, operation] = prepared(codec, operation, h)
        if has_numpy(codec):
            contenders[f"{codec} numpy"] = functools.partial(codec.encode_numpy, on_host)
    seconds = timing.interleaved(contenders, repeats=repeats)
    torch_seconds = {op: seconds[f"torch {op}"] for op in ("encode", "decode")}
    torch_seconds["roundtrip"] = sum(torch_seconds.values())
    for codec in CODECS:
        row = {"codec": str(codec), "values": d, "dtype": dtype, "copy_seconds": seconds["copy"]}
        for operation in OPERATIONS:
            row[f"{operation}_seconds"] = seconds[f"{codec} {operation}"]
            row[f"{operation}_compile_seconds"], row[f"{operation}_extra_bytes"] = compiled[codec, operation]
            row[f"torch_{operation}_seconds"] = torch_seconds[operation]
        row["numpy_encode_seconds"] = seconds.get(f"{codec} numpy")
        rows.append(row | {"torch_copy_seconds": seconds["torch copy"], "input_bytes": h.nbytes})
    return rows


def has_numpy(codec) -> bool:
    """Whether NumPy can encode for it."""
    return not codec.needs_key and not isinstance(codec, compress.EntropyMask)


def check_same_codes(h, h_torch):
    """Raises RuntimeError unless MS in PyTorch and here give the same codes and keep the same values.

    Of values equal to the threshold `torch.topk` keeps any, ours the first: there, codes may differ.
    """
    ours = compress.MaskEncoded().encode(h)
    values, codes = torch_ms.encode(h_torch)
    values, codes = values.float().cpu().numpy(), codes.cpu().numpy()
    own_values = np.asarray(ours.values, np.float32)
    packed = np.asarray(ours.codes)
    own_codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)[: h.size]
    differ = (own_codes != codes) & (np.asarray(h, np.float32) != own_values.min())
    if differ.any() or not np.array_equal(np.sort(own_values), np.sort(values)):
        raise RuntimeError(f"MS in PyTorch and MaskEncoded() differ on {h.size} values of {h.dtype}")


def waited(call):
    """`call`, and on a GPU PyTorch's work waited for."""
    if not torch.cuda.is_available():
        return call

    def run():
        call()
        torch.cuda.synchronize()

    return run


def table(rows: list[dict]) -> str:
    """Returns milliseconds, and how many times as long a copy takes and MS in PyTorch, as a Markdown table."""
    header = [
        "codec",
        "values, M",
        "dtype",
        *(f"{op}, ms (copies; PyTorch/ours)" for op in OPERATIONS),
        "extra, × input",
        "encode by NumPy, ms",
    ]
    lines = []
    for row in rows:
        cells = [f"`{row['codec']}`", f"{row['values'] / 2**20:g}", row["dtype"]]
        for op in OPERATIONS:
            ours = row[f"{op}_seconds"]
            against = f"; {row[f'torch_{op}_seconds'] / ours:.1f}×" if row["codec"].startswith("MaskEncoded") else ""
            cells.append(f"{ours * 1e3:.2f} ({ours / row['copy_seconds']:.1f}{against})")
        extra = [row[f"{op}_extra_bytes"] for op in OPERATIONS]
        cells.append("–" if None in extra else f"{max(extra) / row['input_bytes']:.2f}")
        by_numpy = row["numpy_encode_seconds"]
        cells.append("–" if by_numpy is None else f"{by_numpy * 1e3:.2f}")
        lines.append(cells)
    return timing.table(header, lines)


def plot(rows: list[dict]):
    """Returns a figure of nanoseconds a value against the number of values, one panel an operation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4))
    axes = figure.subplots(1, len(OPERATIONS), sharey=True)
    kinds = sorted({(row["codec"], row["dtype"]) for row in rows})
    for ax, operation in zip(axes, OPERATIONS, strict=True):
        for codec, dtype in kinds:
            own = [row for row in rows if (row["codec"], row["dtype"]) == (codec, dtype)]
            nanoseconds = [1e9 * row[f"{operation}_seconds"] / row["values"] for row in own]
            ax.loglog([row["values"] for row in own], nanoseconds, "o-", label=f"{codec}, {dtype}")
        first = [row for row in rows if row["codec"] == rows[0]["codec"] and row["dtype"] == rows[0]["dtype"]]
        for name, key in (("MS in PyTorch", f"torch_{operation}_seconds"), ("copy", "copy_seconds")):
            nanoseconds = [1e9 * row[key] / row["values"] for row in first]
            ax.loglog([row["values"] for row in first], nanoseconds, "k:" if name == "copy" else "k--", label=name)
        ax.set(title=operation, xlabel="values")
    axes[0].set_ylabel("ns a value")
    axes[-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(main())
