"""All of it together."""

from typing import Any, NamedTuple

from msjax import build, compress, config
from msjax.plan._link import Link, Row, alternatives, sent, with_codecs
from msjax.plan._memory import Needs, needs, operations
from msjax.plan._run import Counts, Run, describe_data, describe_run
from msjax.split import budget


class Plan(NamedTuple):
    """What a run needs; see `plan`.

    Attributes:
      cfg: its config.
      run: its shapes.
      counts: of its data, where they are known.
      parties: by part: client, server and, U-shaped, the tail, which is the client's, too.
      operations: floating-point ones of a step by party, of the server for all clients; as XLA counts them.
      rows: the codecs of the config first.
      link: of `Sent.seconds`.
    """

    cfg: config.Config
    run: Run
    counts: Counts | None
    parties: dict[str, Needs]
    operations: dict[str, float]
    rows: list[Row]
    link: Link

    @property
    def epoch_steps(self) -> int | None:
        """Steps of an epoch, where the data are known."""
        return None if self.counts is None else self.run.spec.schedule.epoch_steps

    @property
    def cut_bits(self) -> float | None:
        """The budget of features and gradients on the link, in bits a value up and down together; None without one."""
        if self.run.spec.cut_bits is None:
            return None
        return float(budget.budget_bits(self.run.spec, self.link.bytes_per_second(self.run.clients)))

    @property
    def too_slow(self) -> str | None:
        """Why `cut_seconds` cannot be kept on the link, where it cannot."""
        if self.run.spec.cut_seconds is None:
            return None
        return budget.why_too_slow(self.run.spec, self.link.bytes_per_second(self.run.clients))

    @property
    def not_counted(self) -> dict[str, str]:
        """By name those options of the config whose effect is not counted, and what it is."""
        found = {}
        if self.cfg.data.division is not None:
            found["data.division"] = "which may leave samples out"
        if self.cfg.shard_server:
            found["shard_server"] = "which divides most of the server's memory among all devices"
        if self.cfg.clients_per_group is not None:
            group = f"{self.cfg.clients_per_group} clients at a time"
            found["clients_per_group"] = f"with which a device of msjax train has the activations of {group}"
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON-ready values."""
        schedule, features = self.run.spec.schedule, self.run.spec.features
        return {
            "clients": schedule.clients,
            "clients_of_a_step": self.run.clients,
            "batch_size": self.run.batch_size,
            "epoch_steps": self.epoch_steps,
            "epochs": schedule.epochs,
            "features": features.to_json(),
            "parties": {name: needs._asdict() | {"bytes": needs.bytes} for name, needs in self.parties.items()},
            "operations": self.operations,
            "link": self.link._asdict(),
            "cut_bits": self.cut_bits,
            "too_slow": self.too_slow,
            "not_counted": self.not_counted,
            "codecs": [row._asdict() | {"sent": row.sent._asdict()} for row in self.rows],
            "config": config.to_json(self.cfg),
        }


def plan(
    cfg: config.Config,
    *,
    summary: build.DataSummary | None = None,
    counts: Counts | None = None,
    own_data: bool = False,
    codecs: dict[str, tuple[compress.Codec, compress.Codec]] | None = None,
    link: Link = Link(),  # noqa: B008
) -> Plan:
    """Returns what a run of this config needs.

    Args:
      summary: of its data; by default as `describe_data` finds it.
      counts: of its data, likewise.
      own_data: whether each client has so many of its own, in place of a share of them.
      codecs: by name those of features and gradients that are set beside the config's; by default `alternatives`.
      link: on which messages travel.

    Raises:
      ValueError: the config does not work.
      data.DataError: the data set is not known by its name, and cannot be had.
    """
    cfg = build.resolved(cfg)
    if summary is None:
        summary, found = describe_data(cfg)
        counts = counts or found
    run = describe_run(cfg, summary, counts, own_data=own_data)
    parties = {name: needs(run, name) for name in run.parts}
    shown = {"as configured": None} | (alternatives(cfg) if codecs is None else codecs)
    specs = {name: run.spec if pair is None else with_codecs(run.spec, *pair) for name, pair in shown.items()}
    rows = [Row(name, str(spec.codec), str(spec.grad_codec), sent(spec, link)) for name, spec in specs.items()]
    return Plan(cfg, run, counts, parties, operations(run), rows, link)
