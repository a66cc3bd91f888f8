"""What each device holds of a server's part that is sharded over many, from shapes and a compiled program alone.

    python -m benchmarks.shards --out benchmarks/results/shards_qwen3        # minutes

The part is that of Qwen3-1.7B behind its first block, all weights trained: `programs.server_step`, as `msjax serve` and
`msjax train` compute it with `shard_server`, on a batch of `--batch` texts of 256 tokens. Nothing is run or drawn: each
row is a process in which XLA sees as many CPU devices. "State" are weights and optimizer state by the rule of
`msjax.split.shards`, "temporary" what XLA's compiler for a CPU allots beside a program's arguments: gradients,
activations and gathered weights. "All of a step" has the state twice, before the step and after it, which a server
has, too. For that the compiler is told to order operations by memory, see `LESS_MEMORY`: by default that for a CPU
gathers all weights before the first layer and adds up all gradients behind the last, and what it allots does not fall
with the devices. Those for a GPU or TPU have rules of their own, and allot otherwise.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import timing
from experiments import language_sizes
from msjax import plan
from msjax.config import OptimConfig
from msjax.split import programs, shards
from msjax.split.state import client_keys

GIB = 1 << 30
LESS_MEMORY = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner",
}
"""Options of XLA's compiler for a CPU, which by default gathers all weights first and adds all gradients up last."""
OPTIMIZERS = {"sgd": OptimConfig(momentum=0.0, weight_decay=0.0), "adamw": OptimConfig(kind="adamw")}


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=8, help="texts of a step")
    parser.add_argument("--layers", type=int, default=28, help="of the network, to compile less")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--row", type=int, help="one row alone, in this process: the number of devices")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options.layers, options.batch, options.optimizer)))
        return 0
    start, rows = time.monotonic(), []
    for devices in options.devices:
        same = ["--batch", str(options.batch), "--layers", str(options.layers), "--optimizer", options.optimizer]
        command = [sys.executable, "-m", "benchmarks.shards", "--row", str(devices), *same]
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | {"XLA_FLAGS": flags}, check=True)
        rows.append(json.loads(done.stdout))
        print(rows[-1], flush=True)
    print(table(rows))
    if options.out:
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    return 0


def measure(devices, layers, batch, optimizer):
    """Bytes of each device, of a network of so many layers."""
    cfg = language_sizes.config_of("Qwen3-1.7B", 1, adapters=False)
    decoder = json.loads(cfg.model.decoder) | {"num_hidden_layers": layers}
    model = dataclasses.replace(cfg.model, decoder=json.dumps(decoder))
    cfg = dataclasses.replace(cfg, model=model, optim=OPTIMIZERS[optimizer], batch_size=batch)
    run = language_sizes.described_run(cfg)
    spec, server = run.spec, run.parts["server"]
    mesh = shards.mesh_of(jax.devices()[:devices])
    start = time.monotonic()
    memory = compiled(spec, server, mesh, batch).memory_analysis()
    return {
        "devices": devices,
        "parameters": plan.values(server.params),
        "state_bytes": held(mesh, server),
        "argument_bytes": memory.argument_size_in_bytes,
        "result_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(time.monotonic() - start, 1),
    }


def held(mesh, tree):
    """Bytes that each device holds of a part's arrays."""
    if mesh is None:
        return plan.nbytes(tree)
    leaves = jax.tree.leaves(tree)
    shapes = (shards.sharding_of(mesh, leaf).shard_shape(leaf.shape) for leaf in leaves)
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))


def compiled(spec, server, mesh, batch):
    """The program of a server's step of one client, from shapes."""
    like = jax.ShapeDtypeStruct
    payload = tuple(codec.payload_like(h) for codec, h in zip(*_of(spec.feature_payload(batch)), strict=True))
    stacked = jax.tree.map(lambda leaf: like((1, *leaf.shape), leaf.dtype), (payload, spec.labels.batch(batch)))
    keys = jax.eval_shape(lambda: client_keys(jax.random.key(0), jnp.int32(0), jnp.arange(1)))
    if mesh is not None:
        server = jax.tree.map(
            lambda leaf, where: like(leaf.shape, leaf.dtype, sharding=where), server, shards.shardings_of(mesh, server)
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        stacked = jax.tree.map(lambda leaf: like(leaf.shape, leaf.dtype, sharding=everywhere), stacked)
    lowered = programs.server_step.lower(spec, server, *stacked, keys, batch_size=batch, mesh=mesh)
    return lowered.compile(LESS_MEMORY)


def _of(payload_spec):
    return payload_spec.codecs, payload_spec.likes


def table(rows):
    """Returns the rows as a Markdown table."""
    lines = [
        [
            str(row["devices"]),
            *(f"{row[name] / GIB:.2f}" for name in ("state_bytes", "temporary_bytes")),
            f"{sum(row[f'{kind}_bytes'] for kind in ('argument', 'result', 'temporary')) / GIB:.2f}",
        ]
        for row in rows
    ]
    return timing.table(["devices", "state of each, GiB", "temporary, GiB", "all of a step, GiB"], lines)


if __name__ == "__main__":
    sys.exit(main())
