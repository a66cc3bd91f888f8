r"""What compression buys on a slow link: training steps over gRPC through a link of 100 Mbit/s that ten clients share.

    python -m benchmarks.link                                       # about ten minutes on two CPU cores
    python -m benchmarks.link --cuts medium --codecs none MS --clients 3 --out /tmp/link
    python -m benchmarks.link --model.width 1 --batch 256 --out benchmarks/results/link_paper    # its feature maps
    python -m benchmarks.link --model.name resnet9t --model.width 0.25 --codecs none MS --accuracy 85 \
        --out benchmarks/results/link_lite --steps-to-accuracy experiments/results/lite/resnet9t-*.json

Server and clients are what `msjax serve` and `msjax client` run, in one program with random images; all share their
compiled functions. In turn one step goes through the link as it is and one through the same link slowed down
(`benchmarks.proxy`): their difference is the time on the wire. Its ideal is the bytes that passed the sockets by the
rate, as the two directions do not overlap within a step; the ratio of the two is given of whole steps, and of the
exchanges in them without what the clients compute, which has less noise. The clients share this machine's cores, on
which one would compute while another sends; machines of their own would all be done at the same time. So all wait for
each other before they send, and before they take an answer; `--no-lockstep` leaves that out.

The second table is what the transport itself takes: a step over gRPC on loopback, without link or waiting, less the
same step of the same parties in one program. Finished rows are kept in `--out` and not repeated.
"""

import argparse
import contextlib
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.net import TINY, Case, Net
from msjax import compress, config
from msjax.split import parties
from msjax.split.traffic import exchange_traffic

CUTS = ("shallow", "medium", "deep")
CODECS = {
    # At the paper's rates: SP, RT and MS have the same size, 13.8 times smaller than float32; QU has the next, 3 bits.
    "none": {"codec": compress.Identity()},
    "QU": {"codec": compress.Uniform(bits=3)},
    "SP": {"codec": compress.TopK(ratio=0.95875)},
    "RT": {"codec": compress.RandTopK(ratio=0.95875)},
    "MS": {"codec": compress.MaskEncoded(ratio=0.99, bits=2)},
    # All that is sent, as in `experiments.everything`.
    "EntropyMask, everything": {
        "codec": compress.EntropyMask(bits=2.4, keep_zeros=True),
        "grad_codec": compress.EntropyMask(error=0.3, levels=7, signed=True, rounding="stochastic"),
        "grad_kept_only": True,
        "cut_bits": 2.4,
        "update_codec": compress.EntropyMask(bits=2.0, levels=15, signed=True),
    },
}
"""What is compressed, as fields of a config."""
_RECORDED = {
    "codec": None,
    "grad_codec": "Identity()",
    "grad_kept_only": "False",
    "cut_bits": "None",
    "update_codec": "Identity()",
}
"""What tells what is compressed, as texts, with what it is in rows of earlier versions, which do not say."""
# What does not change a row, or is in it by itself.
_NOT_SETTINGS = ("out", "cuts", "codecs", "only", "steps_to_accuracy", "accuracy")


def main() -> int:
    parser = timing.parser(__doc__)
    parser.set_defaults(out=timing.RESULTS / "link_cpu", repeats=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first that counts")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--model.name", dest="model_name", default="resnet18")
    parser.add_argument("--model.width", dest="model_width", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=25, help="samples of each client in a step")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS))
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument(
        "--grad-codec", default="Identity()", help="of gradients that a row leaves as they are, as the paper does"
    )
    parser.add_argument("--megabits", type=float, default=100.0, help="10⁶ bits a second of each direction")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of the link, one way")
    parser.add_argument("--per-connection", action="store_true", help="the rate is every client's own")
    parser.add_argument("--lockstep", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny-repeats", type=int, default=100, help="--repeats of the tiny network's transport rows")
    parser.add_argument("--only", choices=("link", "transport"), help="one of the two tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps-to-accuracy", type=pathlib.Path, nargs="+", help="records of runs, as experiments/ has"
    )
    parser.add_argument("--accuracy", type=float, help="test top-1 in percent, with --steps-to-accuracy")
    options = parser.parse_args()
    if (options.steps_to_accuracy is None) != (options.accuracy is None):
        parser.error("--steps-to-accuracy and --accuracy go together")
    try:
        rows, wall_seconds = _earlier(options)
    except ValueError as error:
        parser.error(str(error))
    for key, measure in jobs(options):
        if any(key.items() <= row.items() for row in rows):
            continue
        start = time.monotonic()
        print(" ".join(map(str, key.values())), file=sys.stderr, flush=True)
        row = key | measure()
        seconds = time.monotonic() - start
        wall_seconds += seconds
        rows.append(row | {"row_wall_seconds": round(seconds, 1), "settings": _settings(options)})
        timing.save(options.out, timing.record(options, rows, wall_seconds))
    records = [json.loads(path.read_text()) for path in options.steps_to_accuracy or ()]
    print(table(rows, accuracy_hours(rows, records, options)), transport_table(rows), sep="\n\n")
    return 0


def jobs(options) -> list[tuple[dict[str, Any], Callable[[], dict]]]:
    """Returns what tells each row from the others, and a call that measures it."""
    found = []
    if options.only != "transport":
        for cut in options.cuts:
            for name in options.codecs:
                key = {"kind": "link", "cut": cut, "name": name}
                found.append((key, lambda cut=cut, name=name: on_link(options, cut, **CODECS[name])))
    if options.only != "link":
        big = {"model_name": options.model_name, "model_width": options.model_width}
        for model, repeats in ((TINY, options.tiny_repeats), (big, options.repeats)):
            for clients in sorted({1, options.clients}):
                key = {"kind": "transport", "model": model["model_name"], "clients": clients}
                small = argparse.Namespace(**vars(options) | model | {"clients": clients, "repeats": repeats})
                found.append((key, lambda small=small: beside_program(small)))
    return found


def _settings(options):
    return {k: v for k, v in json.loads(json.dumps(vars(options), default=str)).items() if k not in _NOT_SETTINGS}


def _earlier(options):
    """(rows, wall seconds) of an interrupted run."""
    file = options.out.with_suffix(".json")
    if not file.exists():
        return [], 0.0
    record = json.loads(file.read_text())
    if any(row["settings"] != _settings(options) for row in record["rows"]):
        raise ValueError(f"--out must be new, or of a run with the same options: {file} is of {record['command']!r}")
    return record["rows"], record["wall_seconds"]


# -- The measurements. ---------------------------------------------------------------------------------------------


class Clock:
    """Reads what has passed between two readings: seconds, CPU seconds of this program, bytes."""

    def __init__(self, net: Net | None = None):
        self._net, self._last = net, None

    def start(self) -> None:
        self._last = self._read()

    def stop(self) -> dict[str, float]:
        """Returns the differences to `start`."""
        return {name: value - self._last[name] for name, value in self._read().items()}

    def _read(self):
        used = resource.getrusage(resource.RUSAGE_SELF)
        found = {"seconds": time.perf_counter(), "cpu_seconds": used.ru_utime + used.ru_stime}
        if self._net is not None and self._net.link is not None:
            counts = self._net.link.counts()
            sent = self._net.metrics.totals()
            found |= {"uplink_socket_bytes": counts.up, "downlink_socket_bytes": counts.down}
            found |= {"uplink_message_bytes": sent["received_bytes"], "downlink_message_bytes": sent["sent_bytes"]}
        return found


def _case(options, cut, steps, **compressed):
    return Case.of(options, cut, steps=steps, **{"grad_codec": compress.from_string(options.grad_codec)} | compressed)


def on_link(options: argparse.Namespace, cut: str, **compressed: Any) -> dict[str, Any]:
    """Returns one row: medians over steps through the slow link, and through the same link without its limit.

    `compressed` are fields of a config, as in `CODECS`.
    """
    case = _case(options, cut, options.warmup + 2 * options.repeats, **compressed)
    link = {"megabits": None, "delay_ms": options.delay_ms, "per_connection": options.per_connection}
    seen = {"warmup": [], "free": [], "slow": []}
    with _folder() as folder, Net(case, folder, link=link, lockstep=options.lockstep) as net:
        clock, kinds = Clock(net), ["warmup"] * options.warmup + ["free", "slow"] * options.repeats

        def on_step():
            exchange_seconds = sum(b - a for a, b in zip(net.marks[::2], net.marks[1::2], strict=True))
            seen[kinds.pop(0)].append(clock.stop() | {"exchange_seconds": exchange_seconds})
            net.marks.clear()
            net.link.shape(options.megabits if kinds and kinds[0] == "slow" else None)
            clock.start()

        clock.start()
        net.train(on_step)
    slow, free = (medians(seen[kind]) for kind in ("slow", "free"))
    traffic = exchange_traffic(case.run.spec, case.exchanges)
    rate = options.megabits * 1e6 / 8 * (options.clients if options.per_connection else 1)
    # Of each exchange, up and down; in both kinds of steps.
    delays = 2 * len(case.exchanges) * options.delay_ms / 1e3
    ideal = (slow["uplink_socket_bytes"] + slow["downlink_socket_bytes"]) / rate
    wire = slow["seconds"] - free["seconds"]
    return {
        **{name: str(getattr(case.cfg, name)) for name in _RECORDED},
        "entropy_coded": case.run.spec.codec.entropy_coded or case.run.spec.grad_codec.entropy_coded,
        "step_seconds": slow["seconds"],
        "free_step_seconds": free["seconds"],
        "free_step_cpu_seconds": free["cpu_seconds"],
        "wire_seconds": wire,
        "ideal_wire_seconds": ideal,
        "wire_to_ideal": wire / ideal,
        # The same difference without the clients' computing, which is the same in both and varies from step to step.
        "exchange_wire_seconds": slow["exchange_seconds"] - free["exchange_seconds"] if options.lockstep else None,
        "delay_seconds": delays,
        **{name: value for name, value in slow.items() if name.endswith("bytes")},
        "uplink_nominal_bytes": traffic.uplink_bytes,
        "downlink_nominal_bytes": traffic.downlink_bytes,
        "uplink_feature_bytes": traffic.uplink_feature_bytes,
        "first_step_seconds": seen["warmup"][0]["seconds"] if options.warmup else None,
        "steps": {kind: seen[kind] for kind in ("slow", "free")},
    }


def beside_program(options: argparse.Namespace) -> dict[str, Any]:
    """Returns one row: medians of a step over gRPC on loopback, and of the same parties' in one program, in turn."""
    case = _case(options, "medium", options.warmup + options.repeats)
    clients = [case.client(number) for number in range(options.clients)]
    server = case.server()
    exchanges = parties.run(server, clients)
    seen = {"grpc": [], "program": []}
    clock = Clock()

    def in_program():
        for _ in case.exchanges:
            next(exchanges)
        jax.block_until_ready([server.state, *(c.state for c in clients)])

    def on_step():
        seen["grpc"].append(clock.stop())
        clock.start()
        in_program()
        seen["program"].append(clock.stop())
        clock.start()

    with _folder() as folder, Net(case, folder, link=None, lockstep=False) as net:
        clock.start()
        net.train(on_step)
        for ours, theirs in zip(clients, net.clients.values(), strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours.state, theirs.state)
    medians_of = {way: medians(steps[options.warmup :]) for way, steps in seen.items()}
    grpc_, program = medians_of["grpc"], medians_of["program"]
    traffic = exchange_traffic(case.run.spec, case.exchanges)
    return {
        "model_width": options.model_width,
        "cut": "medium",
        "exchanges": len(case.exchanges),
        "repeats": options.repeats,
        "nominal_bytes": traffic.uplink_bytes + traffic.downlink_bytes,
        **{f"grpc_{name}": value for name, value in grpc_.items()},
        **{f"program_{name}": value for name, value in program.items()},
        "overhead_seconds": grpc_["seconds"] - program["seconds"],
        "overhead_cpu_seconds": grpc_["cpu_seconds"] - program["cpu_seconds"],
    }


@contextlib.contextmanager
def _folder():
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each quantity over steps."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def accuracy_hours(rows: list[dict], records: list[dict], options: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Returns hours on the slow link to `options.accuracy`, by (cut, name): steps of a recorded run by seconds a step.

    Only where a record is of the row's model, cut, codec, clients and batch, and came to that accuracy.
    """
    found = {}
    for record in records:
        cfg = config.from_json({k: v for k, v in record["config"].items() if k != "data"})
        like = (options.model_name, options.model_width, options.clients, options.batch)
        if (cfg.model.name, cfg.model.width, cfg.clients, cfg.batch_size) != like:
            continue
        sent = tuple(str(getattr(cfg, name)) for name in _RECORDED)
        reached = [e["step"] for e in record["history"] if e.get("test", {}).get("top1_percent", 0) >= options.accuracy]
        for row in rows:
            of_row = tuple(row.get(name, default) for name, default in _RECORDED.items())
            if row["kind"] == "link" and reached and (cfg.model.cut, *sent) == (row["cut"], *of_row):
                found[row["cut"], row["name"]] = reached[0] * row["step_seconds"] / 3600
    return found


# -- The tables. ---------------------------------------------------------------------------------------------------


def table(rows: list[dict], hours: dict[tuple[str, str], float]) -> str:
    """Returns the steps on the slow link as a Markdown table; × is against no compression at the same cut."""
    rows = [row for row in rows if row["kind"] == "link"]
    rows.sort(key=lambda row: list(CODECS).index(row["name"]))
    rows.sort(key=lambda row: CUTS.index(row["cut"]) if row["cut"] in CUTS else len(CUTS))
    plain = {row["cut"]: row["step_seconds"] for row in rows if row["name"] == "none"}
    header = ["cut, codec", "step, s", "×", "unshaped, s", "on the wire, s", "ideal, s", "ratio", "of exchanges"]
    header += ["up, MB (nominal)", "down, MB (nominal)", "gRPC adds"] + ["hours to accuracy"] * bool(hours)
    lines = []
    for row in rows:
        seconds = [row[f"{name}_seconds"] for name in ("step", "free_step", "wire", "ideal_wire")]
        cells = [f"{row['cut']}, {row['name']}", *(f"{s:.3f}" for s in seconds), f"{row['wire_to_ideal']:.3f}"]
        exchanges = row["exchange_wire_seconds"]
        cells.append("–" if exchanges is None else f"{exchanges / row['ideal_wire_seconds']:.3f}")
        cells.insert(2, f"{plain[row['cut']] / row['step_seconds']:.2f}" if row["cut"] in plain else "–")
        nominal, real = 0, 0
        for way in ("uplink", "downlink"):
            nominal += row[f"{way}_nominal_bytes"]
            real += row[f"{way}_socket_bytes"]
            cells.append(f"{row[f'{way}_socket_bytes'] / 1e6:.3f} ({row[f'{way}_nominal_bytes'] / 1e6:.3f})")
        cells.append("–" if row.get("entropy_coded") else f"{(real / nominal - 1) * 100:.2f} %")
        if hours:
            at = hours.get((row["cut"], row["name"]))
            cells.append("–" if at is None else f"{at:.2f}")
        lines.append(cells)
    return timing.table(header, lines)


def transport_table(rows: list[dict]) -> str:
    """Returns what the transport takes of a step as a Markdown table."""
    lines = []
    for row in (row for row in rows if row["kind"] == "transport"):
        cells = [f"{row['model']}, {row['clients']} client{'s' * (row['clients'] > 1)}"]
        cells.append(f"{row['nominal_bytes'] / 1e6:.3f}")
        for name in ("seconds", "cpu_seconds"):
            cells += [f"{row[f'{what}_{name}'] * 1e3:.2f}" for what in ("grpc", "program", "overhead")]
        lines.append(cells)
    header = ["step of", "MB"]
    for what in ("", "CPU "):
        header += [f"gRPC, {what}ms", f"one program, {what}ms", f"transport, {what}ms"]
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
