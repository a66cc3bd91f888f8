"""What XLA makes of the codecs for a GPU or TPU, compiled where there is none: instructions, memory, compile time.

    JAX_PLATFORMS=cpu python -m benchmarks.programs               # 16 M values, for an H100; minutes
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.programs --chip v5e --size 4

Says whether every codec compiles for the chip, of how many instructions its program is, and what it takes beside its
input and output. It says nothing of time, which `benchmarks.codecs` measures on the chip itself. On a GPU an
instruction is a kernel to launch, a sort is many: XLA without a GPU cannot plan CUB's, which it would take beside one.
Those within loops count once, however many rounds there are: `MaskEncoded`'s search has one on nearly all inputs,
`RandTopK` and `RandK` draw in up to sixteen. Needs `pip install -e '.[cuda]'`, or `'.[tpu]'`.
"""

import re
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import CODECS, OPERATIONS, call_of, timing

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""As XLA's compiler wants it described."""
CHIPS = {
    "h100": {"topology_name": "h100", "platform": "cuda", "topology": "1x1x1", "target_config": H100},
    "v5e": {"topology_name": "v5e:2x2", "platform": "tpu"},
}
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while")
"""Instructions that do nothing by themselves."""


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.add_argument("--chip", choices=CHIPS, default="h100")
    parser.add_argument("--size", type=float, default=16.0, help="millions (2^20) of values")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    options = parser.parse_args()
    if jax.config.jax_platforms != "cpu":  # else JAX looks for the GPU, and without one forgets all of CUDA
        parser.error(f"JAX_PLATFORMS must be cpu in the environment, got {jax.config.jax_platforms}")
    start = time.monotonic()
    topology = topologies.get_topology_desc(**CHIPS[options.chip])
    chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
    rows = [compiled_for(chip, codec, options.size, dtype) for dtype in options.dtypes for codec in CODECS]
    print(table(rows))
    if options.out:
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    return 0


def compiled_for(chip: jax.sharding.Sharding, codec, size: float, dtype: str) -> dict:
    """Returns, of each operation on `size`·2²⁰ values: instructions, those within loops, extra bytes, seconds."""
    h = jax.ShapeDtypeStruct((int(size * 2**20),), dtype)
    key = jax.eval_shape(lambda: jax.random.key(0)) if codec.needs_key else None
    row = {"codec": str(codec), "values": h.size, "dtype": dtype, "input_bytes": h.size * jnp.dtype(dtype).itemsize}
    for operation in OPERATIONS:
        arguments = (codec.payload_like(h),) if operation == "decode" else (h, key)
        call = jax.jit(call_of(codec, operation, h), in_shardings=chip, out_shardings=chip)
        start = time.perf_counter()
        program = call.lower(*arguments).compile()
        row[f"{operation}_compile_seconds"] = round(time.perf_counter() - start, 1)
        outside, within = instructions(program.as_text())
        row |= {f"{operation}_instructions": outside, f"{operation}_instructions_within_loops": within}
        row[f"{operation}_extra_bytes"] = program.memory_analysis().temp_size_in_bytes
    return row


def instructions(program: str) -> tuple[int, int]:
    """(instructions outside loops, within loops) of an optimized program, as text."""
    counts, of_loops, current = {}, [], None
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = "ENTRY" if head[1] else head[2]
            counts[current] = 0
        elif current and (found := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = .*?\s([a-z][a-z\-]*)\(", line)):
            counts[current] += found[1] not in FREE
            if found[1] == "while":
                of_loops += re.findall(r"(?:condition|body)=%?([\w.\-]+)", line)
    return counts["ENTRY"], sum(counts[name] for name in of_loops)


def table(rows: list[dict]) -> str:
    """Returns instructions (and those within loops) and extra memory, as a Markdown table."""
    header = [
        "codec",
        "dtype",
        *(f"{op}: instructions (in loops)" for op in OPERATIONS),
        "extra, × input",
        "compiled in, s",
    ]
    lines = []
    for row in rows:
        counts = [f"{row[f'{op}_instructions']} ({row[f'{op}_instructions_within_loops']})" for op in OPERATIONS]
        extra = max(row[f"{op}_extra_bytes"] for op in OPERATIONS) / row["input_bytes"]
        seconds = max(row[f"{op}_compile_seconds"] for op in OPERATIONS)
        lines.append([f"`{row['codec']}`", row["dtype"], *counts, f"{extra:.2f}", f"{seconds:.1f}"])
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
