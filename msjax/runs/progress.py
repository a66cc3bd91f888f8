"""What a person sees of a run while it trains."""

import time
from typing import Any

import rich.console
import rich.progress

_SECONDS_BETWEEN_LINES = 60  # where there is no terminal and an epoch is long


class Progress:
    """A live line in a terminal, plain lines elsewhere: samples/s, accuracy, MB sent, time left."""

    def __init__(
        self,
        title: str,
        *,
        headline: str,
        total_steps: int,
        done_steps: int,
        samples_per_step: float,
        quiet: bool = False,
    ):
        self._console = rich.console.Console(quiet=quiet)
        self._title, self._headline = title, headline
        self._total, self._done, self._first = total_steps, done_steps, done_steps
        self._samples_per_step = samples_per_step
        self._start = self._last_line = time.monotonic()
        self._shown = "–"
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
            self._shown = format_metric(self._headline, record["test"][self._headline])
        trained = format_metric(self._headline, record["train"][self._headline])
        self.note(
            f"{self._title} epoch {record['epoch']}/{epochs}: loss {record['train']['loss']:.4f}, "
            f"train {trained}, {self._status(sent_bytes)}"
        )

    def note(self, text: str) -> None:
        """Prints a line above the live one."""
        self._last_line = time.monotonic()
        (self._live.console if self._live else self._console).print(text, highlight=False, markup=False, soft_wrap=True)

    def _status(self, sent_bytes):
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._first) / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        speed = f"{rate * self._samples_per_step:,.0f} samples/s"
        return f"{speed}, test {self._shown}, {sent_bytes / 1e6:,.1f} MB sent, {left / 60:.1f} min left"


def format_metric(name: str, value: float) -> str:
    """Returns a metric as a person reads it: a percentage with its sign, another with its name."""
    return f"{value:.2f} %" if name.endswith("_percent") else f"{name} {value:.4g}"
