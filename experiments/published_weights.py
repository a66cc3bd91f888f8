"""Published PyTorch weights of the CIFAR ResNets, tested by msjax on CIFAR-10's original test images.

    python -m experiments.published_weights --weights DIR --data-dir DIR      # a few minutes on two cores

The weights are those of github.com/akamaster/pytorch_resnet_cifar10 as safetensors files named `resnet20.safetensors`
and so on. Each network is tested as a run tests it that starts from them: cut in two, its batches through both parts,
features uncompressed.
"""

import argparse
import hashlib
import pathlib
import sys
import time

from benchmarks import timing
from experiments import feature_maps
from msjax import config
from msjax.compress import Identity
from msjax.training import evaluator, loaded
from msjax.training.devices import split_cpu
from msjax.training.from_config import load_run

OUT = pathlib.Path(__file__).parent / "results" / "published_weights"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the program that trained them
PUBLISHED_TOP1 = {"resnet20": 91.73, "resnet32": 92.63, "resnet56": 93.39}  # percent


def main() -> int:
    parser = parser_of(__doc__, OUT)
    parser.add_argument("--models", nargs="+", choices=list(PUBLISHED_TOP1), default=list(PUBLISHED_TOP1))
    options = parser.parse_args()
    start = time.monotonic()
    rows = []
    for name in options.models:
        rows.append(test(name, options.weights / f"{name}.safetensors", options.data_dir))
        print(f"{name}: {rows[-1]['top1_percent']:.2f} %", flush=True)
    print(table(rows))
    timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    return 0


def parser_of(description: str, out: pathlib.Path) -> argparse.ArgumentParser:
    """Returns the parser of a study of published weights: what benchmarks have, and where weights and data are."""
    parser = timing.parser(description, repeats=False)
    parser.set_defaults(out=out)
    parser.add_argument("--weights", type=pathlib.Path, required=True, help="the folder of the safetensors files")
    parser.add_argument("--data-dir", required=True, help="where CIFAR-10 is, as --data.data-dir of msjax train")
    return parser


def run_config(name: str, weights: pathlib.Path, data_dir: str) -> config.Config:
    """Returns the config of a run that starts from these weights, nothing compressed."""
    return config.Config(
        model=config.ModelConfig(name, shortcut="zero_padding", weights=str(weights)),
        data=config.DataConfig("cifar10", data_dir=data_dir, mean=MEAN, std=STD),
        codec=Identity(),
    )


def network(name: str, weights: pathlib.Path, data_dir: str) -> feature_maps.Network:
    """Returns the network with these weights, whole, with CIFAR-10."""
    cfg = run_config(name, weights, data_dir)
    run = load_run(cfg)
    params, stats = (getattr(run.state.client, n) | getattr(run.state.server, n) for n in ("params", "stats"))
    return feature_maps.Network(cfg, run, params, stats)


def test(name: str, weights: pathlib.Path, data_dir: str) -> dict:
    """Returns what a network with these weights has on the test images, beside what was published."""
    start = time.monotonic()
    cfg = run_config(name, weights, data_dir)
    split_cpu(cfg.clients)
    run = load_run(cfg)
    state, mesh = loaded.placed(run)
    result = evaluator.Evaluator(run, mesh)(state)
    return {
        "model": name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "images": len(run.dataset.test),
        "published_top1_percent": PUBLISHED_TOP1[name],
        **result,
        "seconds": round(time.monotonic() - start, 1),
    }


def table(rows: list[dict]) -> str:
    """Returns published and measured accuracies as a Markdown table."""
    return timing.table(
        ["network", "published top-1, %", "with msjax, %"],
        [[row["model"], f"{row['published_top1_percent']:.2f}", f"{row['top1_percent']:.2f}"] for row in rows],
    )


if __name__ == "__main__":
    sys.exit(main())
