"""What a person sees of a run while it trains."""

import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import rich.console
import rich.progress

NOBODY_READS = "nobody reads the standard output any more; training goes on"
SECONDS_BETWEEN_LINES = 60
"""Where there is no terminal and an epoch is long."""


class Pace:
    """How fast steps are done, and how long the rest will take.

    The first step of a shape compiles, and says nothing about the others; nor does the first end of an epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()
        self._shapes: set[Hashable] = set()
        self._steps, self._samples, self._step_seconds, self._other_seconds = 0, 0.0, 0.0, 0.0
        self._epoch_ended = False

    def begin(self, at: float) -> None:
        """Notes that the next step has begun at this time of the clock: what passed before was a wait."""
        self._last = at

    def step(self, steps: int, samples: float, shape: Hashable) -> None:
        """Notes that `steps` more steps are done, of so many samples in all, in arrays of this shape."""
        seconds = self._lap()
        if shape in self._shapes:
            self._steps, self._step_seconds = self._steps + steps, self._step_seconds + seconds
            self._samples += samples
        self._shapes.add(shape)

    def epoch(self) -> None:
        """Notes that an epoch has ended, with its test."""
        seconds = self._lap()
        self._other_seconds += seconds if self._epoch_ended else 0.0
        self._epoch_ended = True

    def status(self, steps_left: int) -> str:
        """Returns samples a second, and the time left with `steps_left` steps to go."""
        if not steps_left and not self._steps:
            return "0.0 min left"
        if not self._steps:
            return "compiling …"
        speed = self._samples / max(self._step_seconds, 1e-9)
        left = steps_left * (self._step_seconds + self._other_seconds) / self._steps
        return f"{speed:,.0f} samples/s, {left / 60:.1f} min left"

    def _lap(self):
        now, last = self._clock(), self._last
        self._last = now
        return now - last


class Console(rich.console.Console):
    """Where text goes. Where its reader has gone, as `head` does, it raises BrokenPipeError, as `print` does."""

    def on_broken_pipe(self) -> None:
        """Raises what rich is handling; by itself it would end the program with status 1, and say nothing."""
        raise


class Progress:
    """A live line in a terminal, plain lines elsewhere, also in a notebook.

    It has samples/s, accuracy, the MB of all that was sent, both ways, and the time left.
    """

    def __init__(
        self,
        title: str,
        *,
        headline: str,
        total_steps: int,
        done_steps: int,
        samples_per_step: float,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        console: Console | None = None,
    ):
        self._console = _console(quiet) if console is None else console
        self._title, self._headline = title, headline
        self._total, self._done = total_steps, done_steps
        self._pace, self._clock, self._last_line = Pace(clock), clock, clock()
        self._samples_per_step = samples_per_step
        self._tested = ""
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
            self._say(f"{self._title}: {self._total - self._done} steps to go, the first compiles")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            self._live.stop()

    def step(self, steps: int, sent_bytes: int | None, shape: Hashable = None) -> None:
        """Notes that `steps` more steps are done, in arrays of this shape, and the bytes sent so far, if known."""
        self._done += steps
        self._pace.step(steps, steps * self._samples_per_step, shape)
        if self._live:
            self._live.update(self._task, completed=self._done, status=self._status(sent_bytes))
        elif self._clock() - self._last_line > SECONDS_BETWEEN_LINES:
            self.note(f"{self._title} step {self._done}/{self._total}: {self._status(sent_bytes)}")

    def epoch(self, record: dict[str, Any], epochs: int, sent_bytes: int) -> None:
        """Shows a finished epoch's record."""
        self._pace.epoch()
        found = {s: format_metric(self._headline, record[s][self._headline]) for s in ("train", "test") if s in record}
        if "test" in found:
            self._tested = f", test {found['test']}"
        shown = ", ".join(f"{split} {metric}" for split, metric in found.items())
        self.note(
            f"{self._title} epoch {record['epoch']}/{epochs}: loss {record['train']['loss']:.4f}, {shown}, "
            f"{self._speed(sent_bytes)}"
        )

    def note(self, text: str) -> None:
        """Prints a line above the live one."""
        self._last_line = self._clock()
        self._say(text)

    def _say(self, text):
        """Prints a line; where nobody reads it any more, as behind `head`, training goes on without."""
        try:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        except BrokenPipeError:
            self._console.quiet = True
            logging.getLogger("msjax").warning(NOBODY_READS)

    def _status(self, sent_bytes):
        return f"{self._speed(sent_bytes)}{self._tested}"

    def _speed(self, sent_bytes):
        sent = "" if sent_bytes is None else f", {sent_bytes / 1e6:,.1f} MB sent"
        return f"{self._pace.status(self._total - self._done)}{sent}"


def _console(quiet):
    console = Console(quiet=quiet)
    # A notebook cannot move a cursor up, and its kernel says that colours are to be forced as in a terminal.
    return Console(quiet=quiet, force_jupyter=False, force_terminal=False) if console.is_jupyter else console


def format_metric(name: str, value: float | None) -> str:
    """Returns a metric as a person reads it: a percentage with its sign, another with its name; – where it is none."""
    if value is None:  # as a file has what is not finite
        return "–"
    return f"{value:.2f} %" if name.endswith("_percent") else f"{name} {value:.4g}"


def bare_metric(name: str, value: float | None) -> str:
    """Returns a metric without its name and sign, as below `column_name`."""
    return format_metric(name, value).removesuffix(" %").removeprefix(f"{name} ")


def column_name(name: str) -> str:
    """Returns what a column or an axis of a metric is called."""
    return name.replace("_percent", ", %")
