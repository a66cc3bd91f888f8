"""How many clients there are, and how unlike their data: even shares against Dirichlet's.

    python -m experiments.clients --data-dir DIR

A step has the same number of samples in all, so a client's part of it gets smaller, and its batch statistics with it.
At the medium cut; α is the concentration of the Dirichlet distribution of labels, small where clients differ.
"""

import dataclasses
import sys

from benchmarks import timing
from experiments import driver, study
from msjax import compress

TITLE = "Clients"
COUNTS = {"smoke": (4,), "lite": (1, 10, 50), "paper": (1, 2, 5, 10, 25, 50, 125)}
ALPHAS = {"smoke": (0.1,), "lite": (None, 0.1), "paper": (None, 1.0, 0.1)}
CODECS = {"none": compress.Identity(), "MS": compress.MaskEncoded()}


def runs(scale):
    base = study.with_cut(study.base(scale), "medium")
    samples = base.clients * base.batch_size
    codecs = CODECS if scale != "smoke" else {"MS": CODECS["MS"]}
    arms = {}
    for clients in COUNTS[scale]:
        # Unlike data with the usual number of clients; even shares with any.
        for alpha in ALPHAS[scale] if clients == base.clients or scale == "smoke" else (None,):
            for name, codec in codecs.items():
                data = dataclasses.replace(base.data, alpha=alpha)
                batch_size = max(1, round(samples / clients))
                arms[label(clients, alpha, name)] = dataclasses.replace(
                    base, codec=codec, clients=clients, batch_size=batch_size, data=data
                )
    return study.with_seeds(arms, study.seeds(scale))


def label(clients, alpha, codec):
    return f"{clients} client{'s' * (clients > 1)}, {'even' if alpha is None else f'α = {alpha}'}, {codec}"


def report(scale, records):
    found = study.by_arm(records)
    rows = []
    for arm in dict.fromkeys(name.rpartition(", ")[0] for name in found):
        own = [found.get(f"{arm}, {codec}", []) for codec in CODECS]
        config = next(iter(filter(None, own)))[0]["config"]
        cells = [arm, str(config["batch_size"]), *map(study.top1, own)]
        rows.append([*cells, study.counts(own)])
    return study.Page(timing.table(["clients", "samples each", *CODECS, "seeds"], rows) + "\n", {})


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))
