"""How far estimated bytes are from those of real messages, in the trainings that save 20 and 40 times.

    python -m experiments.estimated_bytes --data-dir DIR            # twenty minutes on two CPU cores

A training in one program sends nothing. What its messages would take with an entropy-coded codec it estimates in each
step (`wire.estimate_bytes`), and a budget of real bits is steered by that. Here a server and ten clients of the arms of
`everything` with a budget train for one epoch by messages, and of every tenth step all messages are encoded. Each row
is a cut, an arm, and features up, gradients down or averages both ways: the bits a value of real messages, and by how
much the estimates are below them, in all and in single steps. Writes a record; what is done is kept, and not done
again.
"""

import collections
import dataclasses
import functools
import sys

import jax

from benchmarks import timing
from experiments import everything, study
from msjax import data
from msjax.distributed import messages
from msjax.split import parties
from msjax.split.schedule import Phase
from msjax.training.from_config import load_run

OUT = study.RESULTS / "estimated_bytes"
TITLE = "Estimated bytes beside those of real messages"
ARMS = {
    "averages 2 bits, 1.6 bits both ways, gradient's noise 1": study.CUTS,
    "averages 2 bits, 2.4 bits both ways": ("shallow", "medium"),
    "averages 1.5 bits, 2.4 bits both ways": ("deep",),
}
EVERY = 10


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--data-dir", help="where CIFAR-10 is, as --data.data-dir of msjax train")
    parser.add_argument("--scale", choices=("smoke", "lite"), default="lite", help="smoke: to see that it works")
    options = parser.parse_args()
    made = timing.Continued(options.out)
    rows = made.rows
    done = {(row["arm"], row["cut"]) for row in rows}
    for arm, cuts in ARMS.items():
        for cut in cuts:
            if (arm, cut) in done:
                continue
            rows += [{"arm": arm, "cut": cut, **row} for row in measure(config_of(options, arm, cut))]
            print(table(rows[-3:]), flush=True)
            made.save(options)
    print(table(rows))
    return 0


def config_of(options, arm, cut):
    """The run of an arm at a cut, for one epoch and without tests."""
    base = study.base(options.scale)
    model = dataclasses.replace(base.model, cut=cut)
    where = {} if options.scale == "smoke" else {"data_dir": options.data_dir}
    return dataclasses.replace(
        base, **everything.ARMS[arm], model=model, data=dataclasses.replace(base.data, **where), epochs=1
    )


def measure(cfg):
    """Yields a row for what goes up over the cut, what goes down, and averages, over an epoch."""
    server, clients = parties_of(cfg)
    spec, found = server.spec, collections.defaultdict(list)
    for exchange in spec.schedule.exchanges():
        if exchange.phase in (Phase.TEST, Phase.RESULT):
            continue
        sent = {client: clients[client].send(exchange) for client in exchange.clients}
        answers = server.handle(exchange, sent)
        if exchange.step % EVERY == 0:
            over_cut = exchange.phase == Phase.FEATURES
            for kind, payload_spec, of_clients in (
                ("features" if over_cut else "averages", spec.up(exchange), sent),
                ("gradients" if over_cut else "averages", spec.down(exchange), answers),
            ):
                payloads = [message.payload for message in of_clients.values()]
                real = sum(len(b) for one in payloads for b in messages.encode(one, payload_spec, "huffman"))
                estimated = sum(float(estimate(payload_spec, one)) for one in payloads)
                found[kind].append((real, estimated, len(payloads) * payload_spec.float_values))
        for client, answer in answers.items():
            clients[client].receive(exchange, answer)
    for kind, counts in found.items():
        real, estimated, values = map(sum, zip(*counts, strict=True))
        below = [100 * (1 - of_step / in_truth) for in_truth, of_step, _ in counts]
        yield {
            "kind": kind,
            "bytes": real,
            "bits": 8 * real / values,
            "below_percent": 100 * (1 - estimated / real),
            "below_percent_by_step": [round(percent, 2) for percent in below],
        }


@functools.partial(jax.jit, static_argnums=0)
def estimate(payload_spec, payload):
    """About the bytes of a message, as a program estimates them."""
    return payload_spec.estimated_bytes(payload)


def parties_of(cfg):
    """A server, and clients with their shares of the data."""
    run = load_run(cfg)
    shares = (data.Arrays(*run.dataset.train.fetch(own)) for own in run.client_indices)
    clients = [
        parties.Client(client_id, run.spec, run.state.client, parties.ClientData(share, run.dataset.test), run.seed)
        for client_id, share in enumerate(shares)
    ]
    return parties.Server(run.spec, run.state.server, run.seed), clients


def table(rows: list[dict]) -> str:
    """Returns the rows as Markdown."""
    header = ["cut", "arm", "messages", "real bits a value", "estimates below, %", "of a step, %"]
    lines = [
        [
            row["cut"],
            row["arm"],
            row["kind"],
            f"{row['bits']:.3f}",
            f"{row['below_percent']:.2f}",
            f"{min(row['below_percent_by_step']):.2f} to {max(row['below_percent_by_step']):.2f}",
        ]
        for row in rows
    ]
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
