"""MS at three cuts against no compression: `configs/cifar10_lite.py`, the smallest real version of the paper's Table 1.

    python -m experiments.cifar10_lite --data-dir DIR        # a TFDS directory; without it CIFAR-10 is downloaded

Four runs, each about half an hour on two CPU cores. Interrupt it and start it again: finished runs are not repeated,
others go on where they stopped. Each finished run leaves one record in `experiments/results/cifar10_lite/`: its config,
command, versions, hardware, wall time, result and history. Ends with the README's table; `--table` prints it from the
records alone.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from msjax import compress, config, runs, simulate, train

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results" / "cifar10_lite"
RUNS = {
    "uncompressed": ("medium", compress.Identity()),
    "ms_shallow": ("shallow", compress.MaskEncoded()),
    "ms_medium": ("medium", compress.MaskEncoded()),
    "ms_deep": ("deep", compress.MaskEncoded()),
}


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
    cut, codec = RUNS[name]
    cfg = config.load_preset(str(ROOT.parent / "configs" / "cifar10_lite.py"))
    data = dataclasses.replace(cfg.data, data_dir=options.data_dir, cache_dir=options.cache_dir)
    cfg = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, cut=cut), codec=codec, data=data, out=options.out
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
    lines = ["| cut | codec | test top-1, % | features up, MB | saved | all up, MB | all down, MB | minutes |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for name, (cut, codec) in RUNS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            lines.append(f"| {cut} | {type(codec).__name__} | not run | | | | | |")
            continue
        record = json.loads(file.read_text())
        traffic = record["traffic"]
        saved = record["uncompressed_feature_bytes"] / traffic["uplink_feature_bytes"]
        megabytes = [f"{traffic[key] / 1e6:,.0f}" for key in ("uplink_feature_bytes", "uplink_bytes", "downlink_bytes")]
        lines.append(
            f"| {cut} | {type(codec).__name__} | {record['test']['top1_percent']:.2f} | {megabytes[0]} | {saved:.2f}× "
            f"| {megabytes[1]} | {megabytes[2]} | {record['wall_seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
