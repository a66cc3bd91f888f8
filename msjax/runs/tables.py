"""Finished runs beside each other, as a table."""

import sys
from typing import Any

import rich.console
import rich.table

from msjax.runs.progress import format_metric

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
    headline = summaries[0].get("headline", "top1_percent").replace("_percent", ", %")
    for name in (headline, "features up, MB", "saved", "all up, MB", "all down, MB", "seconds"):
        table.add_column(name, justify="right")
    for s in summaries:
        traffic, gradients = s["traffic"], s["config"]["grad_codec"]
        averages = s["config"].get("update_codec", "Identity()")  # summaries of before there was one
        features, up, down = _as_sent(traffic)
        table.add_row(
            s["config"]["codec"]
            + (f"\ngradients: {gradients}" if gradients != "Identity()" else "")
            + (f"\naverages: {averages}" if averages != "Identity()" else ""),
            _headline(s),
            f"{features / 1e6:,.2f}",
            f"{s['uncompressed_feature_bytes'] / features:.2f}×",
            f"{up / 1e6:,.2f}",
            f"{down / 1e6:,.2f}",
            f"{s['wall_seconds']:.1f}",
        )
    # A fixed width where there is no terminal, so that a log shows whole columns.
    rich.console.Console(width=None if sys.stdout.isatty() else 150).print(table)


def _headline(summary):
    name = summary.get("headline", "top1_percent")
    if not summary.get("test"):
        return "–"
    return format_metric(name, summary["test"][name]).removesuffix(" %").removeprefix(f"{name} ")


def cut_bytes(traffic: dict[str, int]) -> int:
    """Returns the bytes of features and gradients, both ways over the cut; where entropy-coded, as messages."""
    if "coded_uplink_bytes" in traffic and not traffic["uplink_gradient_bytes"]:
        return traffic["coded_uplink_bytes"] + traffic["coded_downlink_bytes"]
    names = ("uplink_feature_bytes", "uplink_gradient_bytes", "downlink_feature_bytes", "downlink_gradient_bytes")
    return sum(traffic.get(name, 0) for name in names)


def total_bytes(traffic: dict[str, int]) -> int:
    """Returns all bytes of training, both ways; where entropy-coded, as messages."""
    _, up, down = _as_sent(traffic)
    return up + down


def _as_sent(traffic):
    """Bytes of the features up, of all up and of all down; where entropy-coded, as messages."""
    features, up, down = (traffic[name] for name in ("uplink_feature_bytes", "uplink_bytes", "downlink_bytes"))
    # U-shaped, features and gradients go both ways and are counted as one.
    if "coded_uplink_bytes" in traffic and not traffic["uplink_gradient_bytes"]:
        coded = traffic["coded_uplink_bytes"]
        up, features = up - features + coded, coded
        down += traffic["coded_downlink_bytes"] - traffic["downlink_gradient_bytes"]
    if "coded_uplink_synchronization_bytes" in traffic:
        up += traffic["coded_uplink_synchronization_bytes"] - traffic["uplink_synchronization_bytes"]
        down += traffic["coded_downlink_synchronization_bytes"] - traffic["downlink_synchronization_bytes"]
    return features, up, down
