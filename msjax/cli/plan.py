"""`msjax plan`: what a run needs before it is begun: parameters, memory, bytes and seconds on a link."""

import dataclasses
import pathlib

import rich.table

from msjax import config, plan
from msjax.checks import integer
from msjax.cli.options import DEFAULT, PresetFlag, check_new_config, fields_of, parse, preset_of, split_options
from msjax.references import is_reference
from msjax.runs import to_json
from msjax.runs.tables import console

DESCRIPTION = (
    "Say what a run needs before it is begun, from shapes alone: parameters, memory, bytes, and seconds on a link. "
    "Nothing is trained and no weights are made. Options are those of msjax train; sets of images that are known by "
    "name and texts for a decoder need not be at hand, nor need images and tables with --input-shape."
)
PARTS = {"client": "client", "server": "server", "tail": "client, behind the server"}


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Beside the config's."""

    link_mbit: float | None = None
    """10⁶ bits a second of each client's link, in each direction; by default link_bytes_per_second, or 100."""
    server_mbit: float | None = None
    """The same of the server's link, which all clients of a step share; by default no limit."""
    samples: int | None = None
    """Training samples of all clients, where the data are not at hand, such as blocks of a text."""
    test_samples: int = 0
    """With --samples: those of the test set."""
    own_data: bool = False
    """Each client has as many samples of its own as are given or at hand, as with `msjax client --own-data`."""
    input_shape: tuple[int, ...] | None = None
    """Of one example, where the data are not at hand: height, width and channels of images, or columns of a table."""
    num_classes: int | None = None
    """With --input-shape: the number of classes; not for regression."""
    json: bool = False
    """Print JSON in place of tables."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        for name in ("link_mbit", "server_mbit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        if self.samples is not None:
            integer("samples", self.samples, 1)
        elif self.test_samples:
            raise ValueError(f"test_samples must be 0 where samples are not given, got {self.test_samples}")
        integer("test_samples", self.test_samples, 0)
        if self.num_classes is not None:
            integer("num_classes", self.num_classes, 1)
            if self.input_shape is None:
                raise ValueError(f"num_classes must go with input_shape, got {self.num_classes} without it")

    def link(self, cfg: config.Config) -> plan.Link:
        """Returns the link on which messages travel."""
        if self.link_mbit is not None:
            return plan.Link(self.link_mbit, self.server_mbit)
        known = cfg.link_bytes_per_second
        return plan.Link(plan.Link().client_mbit if known is None else 8e-6 * known, self.server_mbit)


@dataclasses.dataclass(frozen=True)
class _Flags(config.Config, PlanOptions, PresetFlag):
    """The config's and these, in one list."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    where, rest = split_options(arguments, "--config")
    preset = preset_of(where)
    default = _Flags(**vars(preset or DEFAULT))
    flags = parse(_Flags, rest, default=default, prog="msjax plan", description=DESCRIPTION)
    options = fields_of(PlanOptions, flags)
    options.check()
    cfg = check_new_config(fields_of(config.Config, flags), preset)
    counts = None if options.samples is None else plan.Counts(options.samples, options.test_samples)
    summary = None
    if options.input_shape is not None:
        summary = plan.describe_elsewhere(cfg, options.input_shape, options.num_classes)
    found = plan.plan(cfg, summary=summary, counts=counts, own_data=options.own_data, link=options.link(cfg))
    if options.json:
        print(to_json(found.to_json()))
        return 0
    print(f"msjax plan: {_headline(found)}")
    console().print(_parties(found))
    console().print(_codecs(found))
    print(_notes(found))
    return 0


def _headline(found):
    run, schedule = found.run, found.run.spec.schedule
    name = _name(found.cfg.model) + (f" cut at {found.cfg.model.cut}" if found.cfg.has_cut else "")
    words = [f"{name}, features {run.spec.features} a sample"]
    at_once = "" if run.clients == schedule.clients else f", {run.clients} at a time"
    clients = "1 client" if schedule.clients == 1 else f"{schedule.clients:,} clients"
    words.append(f"{clients}{at_once}, {run.batch_size:,} samples each in a step")
    if found.counts is None:
        words.append("how many samples there are is not known (--samples)")
    else:
        words.append(f"{schedule.samples:,} samples each in {schedule.epoch_steps:,} steps an epoch")
    return "; ".join(words)


def _name(model):
    """The network's name; of a function in a file without the folders, which the config has in full."""
    return pathlib.PurePath(model.name).name if is_reference(model.name) else model.name


def _parties(found):
    table = rich.table.Table(title="in memory, MB of 10⁶ bytes")
    table.add_column("part")
    names = ("trained, M", "frozen, M", "weights", "gradients", "optimizer", "averages", "activations", "all")
    for name in (*names, "10⁹ operations a step"):
        table.add_column(name, justify="right")
    for name, needs in found.parties.items():
        sizes = [value for field, value in needs._asdict().items() if field.endswith("_bytes")]
        counts = (needs.trained_values, needs.frozen_values, *sizes, needs.bytes)
        operations = found.operations.get(name)
        last = "with the first" if operations is None else _short(operations / 1e9)
        table.add_row(PARTS[name], *(_short(count / 1e6) for count in counts), last)
    return table


def _short(number):
    return f"{number:,.2f}" if number >= 0.1 or not number else f"{number:.2g}"


def _codecs(found):
    link = found.link
    shared = "" if link.server_mbit is None else f", {link.server_mbit:g} Mbit/s of the server"
    table = rich.table.Table(title=f"a step of one client, MB; on {link.client_mbit:g} Mbit/s{shared}")
    table.add_column("codec")
    names = ["features up", "down", "averages up", "averages down", "all up", "all down", "seconds"]
    epochs = []
    if found.epoch_steps is not None:
        per_epoch = found.epoch_steps * found.run.clients
        most = max(max(row.sent.up_bytes, row.sent.down_bytes) for row in found.rows) * per_epoch
        size, size_name = _unit(most, (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        longest = max(row.sent.seconds for row in found.rows) * found.epoch_steps
        time, time_name = _unit(longest, (3600, "hours"), (60, "minutes"), (1, "seconds"))
        epochs = [f"epoch up, {size_name}", f"down, {size_name}", f"in {time_name}"]
    for name in (*names, *epochs):
        table.add_column(name, justify="right")
    for row in found.rows:
        sent = row.sent
        sizes = sent.feature_bytes, sent.gradient_bytes, sent.average_up_bytes, sent.average_down_bytes
        cells = [f"{size / 1e6:,.4g}" for size in (*sizes, sent.up_bytes, sent.down_bytes)]
        cells.append(f"{sent.seconds:,.3g}")
        if epochs:
            cells += [f"{nbytes * per_epoch / size:,.4g}" for nbytes in (sent.up_bytes, sent.down_bytes)]
            cells.append(f"{sent.seconds * found.epoch_steps / time:,.3g}")
        table.add_row(row.name + ("" if sent.exact else " *"), *cells)
    return table


def _unit(most, *units):
    """The first of these units, from large to small, that `most` has one of, else the last; and its name."""
    return next((unit for unit in units if most >= unit[0]), units[-1])


def _notes(found):
    lines = [
        f"As configured: features {found.rows[0].codec}, gradients {found.rows[0].grad_codec}.",
        "Activations are what a step's forward pass leaves for its backward pass, before XLA fuses any of it;",
        "the server has those of all clients of a step.",
        "Seconds are of the messages alone, up and then down. Epochs are of all clients, without tests.",
    ]
    if found.run.spec.mode.hands_parts_on(found.run.spec.schedule):
        lines.append("Steps and epochs are the mean over the run; in its first epoch fewer parts are handed on.")
    lines += [f"Not counted: {name}, {why}." for name, why in found.not_counted.items()]
    if not all(row.sent.exact for row in found.rows):
        lines.append(
            "*: entropy-coded: the bits that it aims at, or without such the most that it can be before coding, "
            "with headers."
        )
    if found.cut_bits is not None:
        lines.append(
            f"As configured, features and gradients have {found.cut_bits:.3g} bits a value together (cut_bits). Here "
            "features have six tenths of them, as in the first step; in training they get what gradients leave."
        )
    if found.too_slow is not None:
        lines.append(f"As configured, {found.too_slow}.")
    return "\n".join(lines)
