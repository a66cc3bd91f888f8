"""A run folder at a glance, as `msjax runs` and `msjax compare` show it."""

import dataclasses
import pathlib
from typing import Any

from msjax.compress import Identity
from msjax.config import Config
from msjax.runs.folder import RunFolder
from msjax.runs.progress import bare_metric
from msjax.split.sent import cut_bytes, total_bytes


@dataclasses.dataclass(frozen=True)
class Overview:
    """A run folder as tables and pictures show it; of a run that was not finished, what there is."""

    path: str
    config: Config
    history: list[dict[str, Any]]
    headline: str
    is_finished: bool
    is_served: bool

    @classmethod
    def read(cls, path: str) -> "Overview":
        """Reads a run folder, which may still be written to.

        Raises:
          ValueError: there is no run at `path`, or one of its files is damaged.
        """
        folder, config = RunFolder.open(path, read_only=True)
        try:
            history = folder.read_history() if (folder.path / "metrics.jsonl").exists() else []
            summary = folder.read_summary()
            for record in history:
                if not isinstance(record.get("train"), dict) or not isinstance(record.get("traffic"), dict):
                    raise ValueError(f"{folder.path / 'metrics.jsonl'} must have a line of metrics for each epoch")
            # The first metric of a task comes behind the loss.
            names = [name for record in history[:1] for name in record["train"] if name != "loss"]
            headline = (summary or {}).get("headline", next(iter(names), "loss"))
            return cls(str(path), config, history, headline, summary is not None, folder.is_served)
        finally:
            folder.close()

    @property
    def name(self) -> str:
        """The folder's name."""
        return pathlib.Path(self.path).resolve().name

    def describe(self) -> dict[str, Any]:
        """What `--json` prints."""
        last = self.history[-1] if self.history else {}
        traffic = last.get("traffic")
        return {
            "run": self.path,
            "model": self.config.model.name,
            "data": self.config.data.name,
            "cut": str(self.config.model.cut),
            **{name: str(getattr(self.config, name)) for name in ("codec", "grad_codec", "update_codec")},
            "cut_bits": self.config.cut_bits,
            "cut_seconds": self.config.cut_seconds,
            "seed": self.config.seed,
            "clients": self.config.clients,
            "epochs": len(self.history),
            "of_epochs": self.config.epochs,
            "finished": self.is_finished,
            "served": self.is_served,
            "headline": self.headline,
            "train": last.get("train"),
            "test": self.test,
            "cut_bytes": traffic and cut_bytes(traffic),
            "total_bytes": traffic and total_bytes(traffic),
            "seconds": last.get("seconds"),
        }

    @property
    def test(self) -> dict[str, float] | None:
        """Loss and metrics on test data, of the last epoch that was tested."""
        return next((record["test"] for record in reversed(self.history) if record.get("test")), None)

    @property
    def metric(self) -> str:
        """The first metric on test data, as a person reads it."""
        if self.test is None or self.headline not in self.test:
            return "–"
        return bare_metric(self.headline, self.test[self.headline])

    @property
    def epochs(self) -> str:
        """How many are done, of how many."""
        return f"{len(self.history)}/{self.config.epochs}"

    @property
    def codecs(self) -> str:
        """What is compressed, and how, a line each, with what is not as by default."""
        found = [_brief(self.config.codec)]
        for name, codec in (("gradients", self.config.grad_codec), ("averages", self.config.update_codec)):
            if codec != Identity():
                found.append(f"{name}: {_brief(codec)}")
        if self.config.cut_bits is not None:
            found.append(f"{self.config.cut_bits:g} bits both ways")
        if self.config.cut_seconds is not None:
            found.append(f"{self.config.cut_seconds:g} s on the wire")
        return "\n".join(found)


def _brief(codec):
    default, options = type(codec)(), []
    for field in dataclasses.fields(codec):
        value = getattr(codec, field.name)
        if value is not None and value != getattr(default, field.name):
            options.append(f"{field.name}={value!r}")
    return f"{type(codec).__name__}({', '.join(options)})"
