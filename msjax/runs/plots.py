"""Pictures of a run, and TensorBoard events."""

import contextlib
import functools
import importlib.util
import logging
import pathlib
import time
from typing import Any

from msjax.runs.progress import column_name
from msjax.split.sent import total_bytes

_log = logging.getLogger("msjax")


def available() -> bool:
    """Returns whether the extra `plots` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("matplotlib", "tensorboardX"))


def draw_curves(history: list[dict[str, Any]], headline: str, title: str, path: pathlib.Path) -> None:
    """Draws the loss and the metric `headline` by epoch as a PNG; where it cannot be written, the log says so."""
    # Imported here: it takes a second that `msjax eval` need not wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, metric = figure.subplots(1, 2)
    for split, style in (("train", "--"), ("test", "-")):
        found = [record for record in history if split in record]
        epochs = [record["epoch"] for record in found]
        loss.plot(epochs, [record[split]["loss"] for record in found], style, label=split)
        metric.plot(epochs, [record[split][headline] for record in found], style, label=split)
    loss.set(xlabel="epoch", ylabel="loss")
    metric.set(xlabel="epoch", ylabel=column_name(headline))
    loss.legend()
    figure.suptitle(title, fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        _log.warning("no picture: %s", error)


def draw_comparison(groups: list[tuple[str, list[list[dict[str, Any]]]]], headline: str, path: pathlib.Path) -> None:
    """Draws the metric `headline` on test data of several runs against all bytes and against seconds.

    Args:
      groups: a name, and the histories of one run or, in one colour, of several.
      path: its suffix says which format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    for number, (name, histories) in enumerate(groups):
        for label, history in zip([name, *[None] * (len(histories) - 1)], histories, strict=True):
            tested = [record for record in history if headline in record.get("test", {})]
            values = [record["test"][headline] for record in tested]
            sent, seconds = ([total_bytes(r["traffic"]) / 1e6 for r in tested], [r["seconds"] for r in tested])
            by_bytes.plot(sent, values, ".-", label=label, color=f"C{number}")
            by_time.plot(seconds, values, ".-", color=f"C{number}")
    by_bytes.set(xlabel="MB sent, both ways", ylabel=column_name(headline), xscale="log")
    by_time.set(xlabel="seconds")
    figure.legend(*by_bytes.get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def tensorboard(path: pathlib.Path, *, first_epoch: int):
    """Yields `write(record)`, which adds a finished epoch's record to TensorBoard events under `path`.

    Where they cannot be written, it says so once, and training goes on without.
    """
    # Not by `SummaryWriter`, whose thread ends where the clock jumps, and whoever waits for it then waits for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

    writer, failed = None, False

    def attempt(act, *args):
        nonlocal failed
        try:
            if not failed:
                act(*args)
        except OSError as error:
            failed = True
            _log.warning("no TensorBoard events from here on: %s", error)

    def begin():
        nonlocal writer
        path.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(path / "events"))
        # Events of epochs that a resumed run repeats are dropped.
        writer.write_event(Event(wall_time=time.time(), step=first_epoch, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=first_epoch, session_log=start))

    def add(record):
        for group in ("train", "test", "traffic"):
            for name, value in record.get(group, {}).items():
                summary = scalar(f"{group}/{name}", value)
                writer.write_event(Event(wall_time=time.time(), step=record["epoch"], summary=summary))
        writer.flush()

    attempt(begin)
    try:
        yield functools.partial(attempt, add)
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
