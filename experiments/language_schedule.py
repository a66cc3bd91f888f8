"""Which learning rates `language` has: chosen on a part of Shakespeare's training text.

    python -m experiments.language_schedule --data-dir TEXTS --weights DIR     # some minutes on two CPU cores

The network of `language`, without compression, is trained on the first two fifths of the training text for one epoch
and tested on its last tenth, so that the test text has no part in it: all weights, and adapters alone, with rates of
AdamW. What is done is kept, and not done again; the record was made beside other work, which took most of its time.
"""

import argparse
import dataclasses
import os
import sys
import time

from benchmarks import timing
from experiments import language, study
from msjax import build, data, train
from msjax.config import LoraConfig
from msjax.models import TARGETS
from msjax.training.devices import split_cpu

OUT = study.RESULTS / "language_schedule"
RATES = {"all weights": (3e-3, 1e-2, 1e-3), "adapters": (1e-2, 3e-3)}
TRAINED_ON, HELD_OUT = 0.4, 0.1
COMMAND = "python -m experiments.language_schedule --data-dir TEXTS --weights DIR"


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--data-dir", required=True, help="the folder of the texts")
    parser.add_argument("--weights", required=True, help="the folder that has stories260k")
    options = parser.parse_args()
    made = timing.Continued(options.out)
    rows = made.rows
    split_cpu(1)
    done = {(row["trained"], row["learning_rate"]) for row in rows}
    # Where things lie on this machine says nothing of the run.
    said = argparse.Namespace(out=options.out)
    for row in measure(options.data_dir, options.weights, done):
        print(row, flush=True)
        rows.append(row)
        made.save(said, command=COMMAND)
    print(table(rows))
    return 0


def measure(texts, weights, done):
    """Rows that are not `done`: perplexity on the held-out part of the training text, by what is trained and rate."""
    cfg = study.with_cut(language.base("lite"), language.MIDDLE)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, weights=os.path.join(weights, language.WEIGHTS)),
        data=dataclasses.replace(cfg.data, name=os.path.join(texts, cfg.data.name)),
    )
    held_out = with_held_out(build.load_data(build.resolved(cfg)))
    for trained, rate in ((trained, rate) for trained, rates in RATES.items() for rate in rates):
        if (trained, rate) in done:
            continue
        lora = LoraConfig(rank=8, targets=TARGETS) if trained == "adapters" else LoraConfig()
        optim = dataclasses.replace(cfg.optim, learning_rate=rate)
        one = build.resolved(dataclasses.replace(cfg, lora=lora, optim=optim))
        parts = build.make_parts(one, build.DataSummary.of(held_out), weights=one.model.weights)
        begun = time.monotonic()
        options = {"task": "next_token", "codec": language.NONE, "clients": 1, "optimizer": optim}
        found = train(parts, held_out, batch_size=one.batch_size, epochs=one.epochs, **options)
        row = {"trained": trained, "learning_rate": rate, "epochs": one.epochs}
        row["seconds"] = round(time.monotonic() - begun, 1)
        yield row | {"perplexity": found.history[-1]["test"]["perplexity"]}


def with_held_out(dataset: data.Dataset) -> data.Dataset:
    """The first part of the training text, to be tested on the last."""
    whole = dataset.train
    trained, held_out = (round(share * len(whole)) for share in (TRAINED_ON, HELD_OUT))
    parts = [data.Arrays(*whole[at]) for at in (slice(trained), slice(len(whole) - held_out, None))]
    return dataclasses.replace(dataset, train=parts[0], test=parts[1])


def table(rows):
    cells = [[r["trained"], f"{r['learning_rate']:g}", f"{r['perplexity']:.2f}"] for r in rows]
    return timing.table(["trained", "learning rate", "perplexity, held-out training text"], cells)


if __name__ == "__main__":
    sys.exit(main())
