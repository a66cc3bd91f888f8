"""MS and EntropyMask at three cuts against no compression: `configs/cifar10_lite.py`, a small, real Table 1.

python -m experiments.cifar10_lite --data-dir DIR        # a TFDS directory; without it CIFAR-10 is downloaded

Each run takes about half an hour on two CPU cores; `--only` names some. Interrupt it and start it again: finished runs
are not repeated, others go on where they stopped. Each finished run leaves one record in
`experiments/results/cifar10_lite/`: its config, command, versions, hardware, wall time, result and history. Ends with
the README's table; `--table` prints it from the records alone.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import NamedTuple

from msjax import compress, config, runs, simulate, train

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results" / "cifar10_lite"
CUTS = ("shallow", "medium", "deep")
# The error of MS on these features; and of the gradient an unbiased code, of two bits.
ENTROPY = compress.EntropyMask(error=0.07)
ENTROPY_DOWN = compress.EntropyMask(bits=2.0, signed=True, rounding="stochastic")


class Run(NamedTuple):
    cut: str
    codec: compress.Codec = compress.Identity()
    grad_codec: compress.Codec = compress.Identity()
    seed: int = 0


RUNS = {"uncompressed": Run("medium")}
RUNS |= {f"ms_{cut}": Run(cut, compress.MaskEncoded()) for cut in CUTS}
RUNS |= {f"entropy_up_{cut}": Run(cut, ENTROPY) for cut in CUTS}
RUNS |= {f"entropy_both_{cut}": Run(cut, ENTROPY, ENTROPY_DOWN) for cut in CUTS}
RUNS |= {f"{name}_seed{seed}": run._replace(seed=seed) for seed in (1, 2) for name, run in list(RUNS.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="a TFDS data directory")
    parser.add_argument("--cache-dir", help="where the decoded images are kept")
    parser.add_argument("--out", default="runs", help="where the run folders are")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--table", action="store_true", help="print the table of the records, run nothing")
    options = parser.parse_args()
    if not options.table:
        for name in options.only:
            if not (RESULTS / f"{name}.json").exists():
                try:
                    run(name, options)
                except train.Interrupted:
                    return 130
    print(table())
    return 0


def run(name: str, options: argparse.Namespace) -> None:
    """Trains one of `RUNS`, or goes on with it, and writes its record."""
    cut, codec, grad_codec, seed = RUNS[name]
    cfg = config.load_preset(str(ROOT.parent / "configs" / "cifar10_lite.py"))
    data = dataclasses.replace(cfg.data, data_dir=options.data_dir, cache_dir=options.cache_dir)
    model = dataclasses.replace(cfg.model, cut=cut)
    cfg = dataclasses.replace(
        cfg, model=model, codec=codec, grad_codec=grad_codec, data=data, seed=seed, out=options.out
    )
    simulate.split_cpu(cfg.clients)
    folder, cfg = runs.RunFolder.open_or_create(cfg, f"cifar10_lite-{name}")
    summary = train.train(cfg, folder)
    folder.close()
    history = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    # Where the data lay on that machine says nothing about the result.
    for private in ("data_dir", "cache_dir"):
        summary["config"]["data"].pop(private)
    summary["config"].pop("out")
    summary["command"] = f"python -m experiments.cifar10_lite --only {name}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(summary | {"history": history}, indent=1) + "\n")


def table() -> str:
    """Returns the Markdown table of the records that are there."""
    lines = [
        "| cut | up | down | seed | test top-1, % | features, MB | gradients, MB | saved, both | all, MB | minutes |"
    ]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, (cut, codec, grad_codec, seed) in RUNS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text())
        traffic = record["traffic"]
        features, gradients = traffic["uplink_feature_bytes"], traffic["downlink_gradient_bytes"]
        rest = traffic["uplink_bytes"] + traffic["downlink_bytes"] - features - gradients
        # As messages, where they are entropy-coded: estimated within the program, to 2 %.
        features = traffic.get("coded_uplink_bytes", features)
        gradients = traffic.get("coded_downlink_bytes", gradients)
        saved = 2 * record["uncompressed_feature_bytes"] / (features + gradients)
        megabytes = " | ".join(f"{n / 1e6:,.0f}" for n in (features, gradients))
        names = " | ".join("–" if type(c) is compress.Identity else type(c).__name__ for c in (codec, grad_codec))
        lines.append(
            f"| {cut} | {names} | {seed} | {record['test']['top1_percent']:.2f} | {megabytes} | {saved:.2f}× "
            f"| {(features + gradients + rest) / 1e6:,.0f} | {record['wall_seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
