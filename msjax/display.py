"""What a person sees of a run: progress while it trains, a table and a picture at its end."""

import contextlib
import pathlib
import sys
import time
from typing import Any

import rich.console
import rich.progress
import rich.table

_SECONDS_BETWEEN_LINES = 60  # where there is no terminal and an epoch is long


class Progress:
    """A live line in a terminal, plain lines elsewhere: samples/s, accuracy, MB sent, time left."""

    def __init__(self, title: str, *, total_steps: int, done_steps: int, samples_per_step: float, quiet: bool = False):
        self._console = rich.console.Console(quiet=quiet)
        self._title = title
        self._total, self._done, self._first = total_steps, done_steps, done_steps
        self._samples_per_step = samples_per_step
        self._start = self._last_line = time.monotonic()
        self._accuracy = "–"
        self._live = None
        if self._console.is_terminal and not quiet:
            columns = ["{task.description}", rich.progress.BarColumn(8), "{task.fields[status]}"]
            self._live = rich.progress.Progress(*columns, console=self._console, transient=True)

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
            # Eighty columns hold the codec's name, the bar and the status; the epochs' lines have the whole title.
            self._task = self._live.add_task(
                self._title.split()[-1], total=self._total, completed=self._done, status="compiling …"
            )
        else:
            self._console.print(f"{self._title}: {self._total - self._done} steps to go, the first compiles")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            self._live.stop()

    def step(self, steps: int, sent_bytes: int) -> None:
        """Notes that `steps` more steps are on their way, and the bytes sent by all so far."""
        self._done += steps
        if self._live:
            self._live.update(self._task, completed=self._done, status=self._status(sent_bytes))
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self.note(f"{self._title} step {self._done}/{self._total}: {self._status(sent_bytes)}")

    def epoch(self, record: dict[str, Any], epochs: int, sent_bytes: int) -> None:
        """Shows a finished epoch's record."""
        if "test" in record:
            self._accuracy = f"{record['test']['top1_percent']:.2f} %"
        line = (
            f"{self._title} epoch {record['epoch']}/{epochs}: loss {record['train']['loss']:.4f}, "
            f"train {record['train']['top1_percent']:.2f} %, test {self._accuracy}, {self._status(sent_bytes)}"
        )
        self.note(line)

    def note(self, text: str) -> None:
        self._last_line = time.monotonic()
        (self._live.console if self._live else self._console).print(text, highlight=False, soft_wrap=True)

    def _status(self, sent_bytes):
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._first) / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        speed = f"{rate * self._samples_per_step:,.0f} samples/s"
        return f"{speed}, test {self._accuracy}, {sent_bytes / 1e6:,.1f} MB sent, {left / 60:.1f} min left"


def print_summaries(summaries: list[dict[str, Any]]) -> None:
    """Prints finished runs beside each other: accuracy, bytes, and what of the features was saved.

    Bytes of entropy-coded codecs are those of messages, where they are known by direction.
    """
    table = rich.table.Table()
    table.add_column("codec", min_width=24)
    for name in ("top-1, %", "features up, MB", "saved", "all up, MB", "all down, MB", "seconds"):
        table.add_column(name, justify="right")
    for s in summaries:
        traffic, gradients = s["traffic"], s["config"]["grad_codec"]
        features, up, down = _as_sent(traffic)
        table.add_row(
            s["config"]["codec"] + (f"\ngradients: {gradients}" if gradients != "Identity()" else ""),
            f"{s['test']['top1_percent']:.2f}",
            f"{features / 1e6:,.2f}",
            f"{s['uncompressed_feature_bytes'] / features:.2f}×",
            f"{up / 1e6:,.2f}",
            f"{down / 1e6:,.2f}",
            f"{s['wall_seconds']:.1f}",
        )
    # A fixed width where there is no terminal, so that a log shows whole columns.
    rich.console.Console(width=None if sys.stdout.isatty() else 150).print(table)


def _as_sent(traffic):
    """Bytes of the features up, of all up and of all down; where entropy-coded, as messages."""
    features, up, down = (traffic[name] for name in ("uplink_feature_bytes", "uplink_bytes", "downlink_bytes"))
    # U-shaped, features and gradients go both ways and are counted as one.
    if "coded_uplink_bytes" in traffic and not traffic["uplink_gradient_bytes"]:
        coded = traffic["coded_uplink_bytes"]
        up, features = up - features + coded, coded
        down += traffic["coded_downlink_bytes"] - traffic["downlink_gradient_bytes"]
    return features, up, down


def draw_curves(history: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Draws loss and accuracy by epoch as a PNG."""
    # Imported here: it takes a second that `msjax eval` need not wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for split, style in (("train", "--"), ("test", "-")):
        found = [record for record in history if split in record]
        epochs = [record["epoch"] for record in found]
        loss.plot(epochs, [record[split]["loss"] for record in found], style, label=split)
        accuracy.plot(epochs, [record[split]["top1_percent"] for record in found], style, label=split)
    loss.set(xlabel="epoch", ylabel="loss, nats")
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    loss.legend()
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def tensorboard(path: pathlib.Path, *, first_epoch: int):
    """Yields `write(record)`, which adds a finished epoch's record to TensorBoard events under `path`."""
    from tensorboardX import SummaryWriter

    # Events of epochs that a resumed run repeats are dropped.
    writer = SummaryWriter(str(path), purge_step=first_epoch)

    def write(record: dict[str, Any]) -> None:
        for group in ("train", "test", "traffic"):
            for name, value in record.get(group, {}).items():
                writer.add_scalar(f"{group}/{name}", value, record["epoch"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
