"""The arithmetic of `docs/scaling.md`: the paper's ImageNet run on 8 and 64 accelerators, and with up to 10⁵ clients.

    python -m experiments.scaling      # a minute or two; writes the tables of the page anew, makes no weights

Nothing is measured. Bytes, memory and operations are those of `msjax.plan`, from the shapes of
`configs/resnet34_imagenet.py`; times are these by the speeds of `ASSUMED`, which are stated there with where they are
from. The tests evaluate the formulas anew and compare them with the page.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import NamedTuple

from benchmarks import timing
from experiments import study
from msjax import compress, plan
from msjax.split.payloads import aimed_bytes

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "scaling.md"
CUTS = {"shallow": "2", "medium": "15", "deep": "27"}
"""As in the paper; the shallow one, in the first block, with `first_block="paper"`."""
ACCELERATORS = (8, 64)
CLIENTS = (8, 64, 100_000)
EPOCHS = 90
CODECS = {
    "none": (compress.Identity(), compress.Identity()),
    "MS": (compress.MaskEncoded(), compress.Identity()),
    "EntropyMask, 2 bits up, 1.5 down": (
        compress.EntropyMask(bits=2.0),
        compress.EntropyMask(bits=1.5, signed=True, rounding="stochastic"),
    ),
}


class Assumption(NamedTuple):
    """A number that is not ours, in a unit of `scale`, and where it is from."""

    number: float
    unit: str
    scale: float
    source: str


_H100 = "NVIDIA H100 SXM data sheet"
ASSUMED = {
    "memory of an accelerator": Assumption(80, "GB", 1e9, _H100),
    "peak of an accelerator": Assumption(
        494.7, "· 10¹² operations/s", 1e12, f"{_H100}: TF32, half of what it has with sparsity"
    ),
    "share of the peak that a step reaches": Assumption(10, "%", 1e-2, "ours, to be measured"),
    "link of an accelerator to 7 others": Assumption(450, "GB/s one way", 1e9, f"{_H100}: NVLink, half of both ways"),
    "link of an accelerator to other machines": Assumption(50, "GB/s one way", 1e9, "DGX H100 data sheet: 400 Gbit/s"),
    "link of an accelerator to its host": Assumption(64, "GB/s one way", 1e9, f"{_H100}: PCIe 5, half of both ways"),
    "a client's processor": Assumption(1, "· 10¹² operations/s", 1e12, "ours, for a small device"),
    "a client's link": Assumption(100, "Mbit/s one way", 1e6, "the paper, arXiv 2408.13787"),
    "the server's link": Assumption(10, "Gbit/s one way", 1e9, "ours, for a network card"),
}


def assumed(name: str) -> float:
    """Returns an assumed value, in bytes, bits, operations or seconds."""
    return ASSUMED[name].number * ASSUMED[name].scale


# -- Formulas. -----------------------------------------------------------------------------------------------------


def ring_seconds(nbytes: float, devices: int, bytes_per_second: float) -> float:
    """Returns how long a ring takes to sum so many bytes over devices: each sends 2 (D − 1) / D of them."""
    return 2 * (devices - 1) / devices * nbytes / bytes_per_second


def compute_seconds(operations: float) -> float:
    """Returns how long an accelerator computes."""
    return operations / (assumed("peak of an accelerator") * assumed("share of the peak that a step reaches"))


class Network(NamedTuple):
    """The network at a cut, by sample and by part.

    Attributes:
      needs: of client and server, with the activations of one sample.
      operations: of client and server, of one sample.
      run: of one client.
    """

    needs: dict[str, plan.Needs]
    operations: dict[str, float]
    run: plan.Run


@functools.cache
def network(cut: str) -> Network:
    """Returns the paper's network at one of `CUTS`."""
    run = described(cut, 1)
    batch = run.batch_size
    needs = {
        name: plan.state_needs(part)._replace(activation_bytes=plan.sample_activation_bytes(run, name))
        for name, part in run.parts.items()
    }
    return Network(needs, {name: count / batch for name, count in plan.operations(run).items()}, run)


def described(cut: str, clients: int) -> plan.Run:
    """Returns the paper's run with so many clients."""
    cfg = study.with_published_cut(study.preset("resnet34_imagenet"), cut)
    cfg = dataclasses.replace(cfg, clients=clients)
    return plan.describe_run(cfg, *plan.describe_data(cfg))


class OnAccelerators(NamedTuple):
    """A step of `msjax train` with one client on each accelerator."""

    devices: int
    bytes: float
    compute_seconds: float
    ring_seconds: float
    input_seconds: float
    epoch_steps: int

    @property
    def step_seconds(self) -> float:
        """With nothing done beside anything else."""
        return self.compute_seconds + self.ring_seconds + self.input_seconds


def on_accelerators(cut: str, devices: int) -> OnAccelerators:
    """Returns what a step on so many accelerators takes; each has a client, and a copy of the server's part."""
    found, schedule = network(cut), described(cut, devices).spec.schedule
    batch = schedule.full_batch_size
    states = sum(n.bytes - n.activation_bytes for n in found.needs.values())
    activations = batch * sum(n.activation_bytes for n in found.needs.values())
    summed = sum(n.gradient_bytes for n in found.needs.values())
    link = assumed(f"link of an accelerator to {'7 others' if devices <= 8 else 'other machines'}")
    return OnAccelerators(
        devices,
        states + activations,
        compute_seconds(batch * sum(found.operations.values())),
        ring_seconds(summed, devices, link),
        batch * found.run.inputs.nbytes / assumed("link of an accelerator to its host"),
        schedule.epoch_steps,
    )


class OverNetwork(NamedTuple):
    """A step with clients elsewhere and a server of one accelerator."""

    clients: int
    batch_size: int
    sent: plan.Sent
    client_link_seconds: float
    server_link_seconds: float
    client_seconds: float
    server_seconds: float
    server_bytes: float
    epoch_steps: int

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of a step by what takes them; of the two links the slower, as they work at the same time."""
        links = {"clients' links": self.client_link_seconds, "server's link": self.server_link_seconds}
        slower = max(links, key=links.get)
        return {slower: links[slower], "clients": self.client_seconds, "server": self.server_seconds}

    @property
    def step_seconds(self) -> float:
        """One after the other, as in a step."""
        return sum(self.parts.values())


def over_network(cut: str, clients: int, codec: str) -> OverNetwork:
    """Returns what a step of so many clients takes with one of `CODECS`."""
    found, run = network(cut), described(cut, clients)
    spec = plan.with_codecs(run.spec, *CODECS[codec])
    sent = plan.sent(spec, plan.Link())
    both = 8 * (sent.up_bytes + sent.down_bytes)
    server = found.needs["server"]
    return OverNetwork(
        clients,
        run.batch_size,
        sent,
        both / assumed("a client's link"),
        clients * both / assumed("the server's link"),
        run.batch_size * found.operations["client"] / assumed("a client's processor"),
        compute_seconds(clients * run.batch_size * found.operations["server"]),
        server.bytes + (clients * run.batch_size - 1) * server.activation_bytes,
        spec.schedule.epoch_steps,
    )


# -- The page. -----------------------------------------------------------------------------------------------------


def tables() -> dict[str, str]:
    """Returns the blocks of the page by name, in Markdown."""
    return {
        "assumptions": assumptions_table(),
        "parts": parts_table(),
        "accelerators": accelerators_table(),
        "network": network_table(),
        "server": server_table(),
        "cuts": cuts_table(),
    }


def number(value: float) -> str:
    """Returns three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def assumptions_table() -> str:
    rows = [[name, f"{it.number:,.10g} {it.unit}", it.source] for name, it in ASSUMED.items()]
    return timing.table(["", "value", "from"], rows).replace("--:", "---")


def parts_table() -> str:
    rows = []
    for cut in CUTS:
        found = network(cut)
        like = found.run.spec.features.batch(256)
        sizes = [aimed_bytes(up, like) / 256 for up, _ in CODECS.values()]
        rows.append(
            [
                f"{cut} ({CUTS[cut]})",
                "×".join(map(str, found.run.spec.features.leaves[0].shape)),
                *(number(found.needs[name].trained_values / 1e6) for name in ("client", "server")),
                *(number(found.needs[name].activation_bytes / 1e6) for name in ("client", "server")),
                *(number(found.operations[name] / 1e9) for name in ("client", "server")),
                *(number(size / 1e3) for size in sizes),
            ]
        )
    sides = ("client", "server")
    header = ["cut", "features", *(f"{s}, M parameters" for s in sides), *(f"{s}, MB" for s in sides)]
    header += [*(f"{s}, 10⁹ operations" for s in sides), *(f"{name.partition(' up')[0]}, kB" for name in CODECS)]
    return timing.table(header, rows)


def accelerators_table() -> str:
    rows = []
    for devices in ACCELERATORS:
        it = on_accelerators("medium", devices)
        rows.append(
            [
                str(devices),
                number(it.bytes / 1e9),
                *(number(1e3 * s) for s in (it.compute_seconds, it.ring_seconds, it.input_seconds, it.step_seconds)),
                f"{it.epoch_steps:,}",
                number(EPOCHS * it.epoch_steps * it.step_seconds / 3600),
            ]
        )
    header = ["accelerators", "memory of each, GB", "computing, ms", "sum of gradients, ms", "images in, ms"]
    return timing.table([*header, "step, ms", "steps an epoch", f"{EPOCHS} epochs, h"], rows)


def network_table() -> str:
    rows = []
    for clients in CLIENTS:
        for codec in CODECS:
            it = over_network("medium", clients, codec)
            seconds = (it.client_link_seconds, it.server_link_seconds, it.client_seconds, it.server_seconds)
            rows.append(
                [
                    f"{clients:,}: {codec}",
                    *(number(size / 1e6) for size in (it.sent.up_bytes, it.sent.down_bytes)),
                    *map(number, seconds),
                    max(it.parts, key=it.parts.get),
                    number(it.epoch_steps * it.step_seconds / 3600),
                ]
            )
    header = ["clients: codec", "MB up", "MB down", "clients' links, s", "server's link, s", "clients, s", "server, s"]
    return timing.table([*header, "bottleneck", "an epoch, h"], rows)


def server_table() -> str:
    rows = []
    for clients in CLIENTS:
        it = over_network("medium", clients, "MS")
        per_client = it.server_bytes / clients
        averages = clients * (it.sent.average_up_bytes + it.sent.average_down_bytes)
        rows.append(
            [
                f"{clients:,}",
                str(it.batch_size),
                number(it.server_bytes / 1e9),
                number(it.server_bytes / assumed("memory of an accelerator")),
                number(per_client / 1e9),
                number(averages / 1e9),
                number(averages / (clients * (it.sent.up_bytes + it.sent.down_bytes)) * 100),
            ]
        )
    header = ["clients", "samples each", "server, GB", "in accelerators", "a client, GB", "averages a step, GB"]
    return timing.table([*header, "of all bytes, %"], rows)


def cuts_table() -> str:
    rows = []
    for cut in CUTS:
        for codec in CODECS:
            it = over_network(cut, 8, codec)
            name = max(it.parts, key=it.parts.get)
            seconds = (it.client_link_seconds, it.client_seconds, it.server_seconds, it.step_seconds)
            rows.append([f"{cut}: {codec}", *map(number, seconds), name])
    header = ["cut: codec", "clients' links, s", "clients, s", "server, s", "step, s", "bottleneck"]
    return timing.table(header, rows)


def with_tables(text: str, made: dict[str, str]) -> str:
    """Returns a page with the blocks between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew."""
    for name, block in made.items():
        before, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not begin or not end:
            raise ValueError(f"the page must have a place for the table {name!r}")
        text = f"{before}{begin}\n{block}\n\n{end}{after}"
    return text


def main() -> int:
    PAGE.write_text(with_tables(PAGE.read_text(), tables()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
