"""Finished runs beside each other, as a table."""

import sys
from typing import Any

import rich.table

from msjax.runs.progress import Console, bare_metric, column_name
from msjax.split.sent import by_direction, feature_bytes

_FIELDS = {
    "traffic": ("uplink_feature_bytes", "uplink_bytes", "downlink_bytes", "uplink_gradient_bytes"),
    "config": ("codec", "grad_codec"),
}
_NUMBERS = ("uncompressed_feature_bytes", "wall_seconds")


def check_summary(summary: dict[str, Any], file: str) -> None:
    """Raises ValueError where a summary that was read from a file lacks what the table shows."""
    headline = summary.get("headline", "top1_percent")
    places = [(summary, name, int | float) for name in _NUMBERS]
    places += [(summary.get(s), name, int | float if s == "traffic" else str) for s, n in _FIELDS.items() for name in n]
    places += [(summary["test"], headline, int | float | None)] if summary.get("test") else []
    for section, name, kind in places:
        if not isinstance(section, dict) or not isinstance(section.get(name), kind):
            raise ValueError(f"{file} must be the summary of a run of msjax train, but {name} is not there or no value")


def print_summaries(summaries: list[dict[str, Any]]) -> None:
    """Prints finished runs beside each other: the first metric on test data, bytes, and what of the features was saved.

    Bytes of entropy-coded codecs are those of messages, where they are known by direction.
    """
    table = rich.table.Table()
    table.add_column("codec", min_width=24)
    headline = summaries[0].get("headline", "top1_percent")
    for name in (column_name(headline), "features up, MB", "saved", "all up, MB", "all down, MB", "seconds"):
        table.add_column(name, justify="right")
    for s in summaries:
        traffic, gradients = s["traffic"], s["config"]["grad_codec"]
        averages = s["config"].get("update_codec", "Identity()")  # summaries of before there was one
        features, (up, down) = feature_bytes(traffic), by_direction(traffic)
        table.add_row(
            s["config"]["codec"]
            + (f"\ngradients: {gradients}" if gradients != "Identity()" else "")
            + (f"\naverages: {averages}" if averages != "Identity()" else ""),
            _headline(s),
            "–" if features is None else f"{features / 1e6:,.2f}",
            "–" if features is None else f"{s['uncompressed_feature_bytes'] / features:.2f}×",
            f"{up / 1e6:,.2f}",
            f"{down / 1e6:,.2f}",
            f"{s['wall_seconds']:.1f}",
        )
    console().print(table)


def _headline(summary):
    name = summary.get("headline", "top1_percent")
    if not summary.get("test"):
        return "–"
    return bare_metric(name, summary["test"][name])


def print_table(texts: tuple[str, ...], numbers: tuple[str, ...], rows: list[list[str]]) -> None:
    """Prints a table of columns of texts, then of numbers."""
    table = rich.table.Table()
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def console() -> Console:
    """Returns where tables go: of a fixed width where there is no terminal, so that a log shows whole columns."""
    return Console(width=None if sys.stdout.isatty() else 150)
