"""A run folder at a glance, as `msjax runs` and `msjax compare` show it."""

import dataclasses
import json
import pathlib
import re
from typing import Any

from msjax.compress import Identity, from_string
from msjax.config import Config, to_json, without_paths
from msjax.paths import expand
from msjax.runs.folder import RunFolder, is_of_python
from msjax.runs.progress import bare_metric
from msjax.split.sent import cut_bytes, is_coded, total_bytes


@dataclasses.dataclass(frozen=True)
class Overview:
    """A run folder as tables and pictures show it; of a run that was not finished, what there is."""

    path: str
    settings: dict[str, Any]
    """What `--json` prints of its config; of a run from Python what is known, and None for the rest."""
    recipe: str
    """All that its config or description says, but for the seed and the places of files: equal for repeated runs."""
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
        place = expand("the run", path)
        of_python = is_of_python(place)
        if of_python:
            folder = RunFolder(place, read_only=True)
            spec = folder.read_spec()
            settings, recipe = _settings_of_python(spec), _recipe(spec, None)
        else:
            folder, config = RunFolder.open(path, read_only=True)
            settings, recipe = (
                _settings(config),
                _recipe(to_json(without_paths(config), paths=False), folder.read_data()),
            )
        try:
            history = folder.read_history() if (folder.path / "metrics.jsonl").exists() else []
            summary = folder.read_summary()
            done = of_python and (place / "server.safetensors").exists()
            ended = summary is not None or (done and len(history) >= settings["of_epochs"])
            for record in history:
                if not isinstance(record.get("train"), dict) or not isinstance(record.get("traffic"), dict):
                    raise ValueError(f"{folder.path / 'metrics.jsonl'} must have a line of metrics for each epoch")
            # The first metric of a task comes behind the loss.
            names = [name for record in history[:1] for name in record["train"] if name != "loss"]
            headline = (summary or {}).get("headline", next(iter(names), "loss"))
            return cls(str(path), settings, recipe, history, headline, ended, folder.is_served)
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
            **{name: value for name, value in self.settings.items() if name != "of_epochs"},
            "epochs": len(self.history),
            "of_epochs": self.settings["of_epochs"],
            "finished": self.is_finished,
            "served": self.is_served,
            "headline": self.headline,
            "train": last.get("train"),
            "test": self.test,
            "cut_bytes": traffic and cut_bytes(traffic),
            "total_bytes": traffic and total_bytes(traffic),
            "entropy_coded": traffic and is_coded(traffic),
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
        return f"{len(self.history)}/{self.settings['of_epochs']}"

    @property
    def codecs(self) -> str:
        """What is compressed, and how, a line each, with what is not as by default."""
        settings = self.settings
        found = [_brief(settings["codec"])]
        for name, field in (("gradients", "grad_codec"), ("averages", "update_codec")):
            if (text := settings[field]) != str(Identity()):
                found.append(f"{name}: {_brief(text)}")
        if settings["cut_bits"] is not None:
            found.append(f"{settings['cut_bits']:g} bits both ways")
        if settings["cut_seconds"] is not None:
            found.append(f"{settings['cut_seconds']:g} s on the wire")
        return "\n".join(found)


def _recipe(described: dict[str, Any], data_digests: dict[str, Any] | None) -> str:
    found: dict[str, Any] = {"digests": data_digests}
    found |= {name: value for name, value in described.items() if name not in ("seed", "out")}
    if isinstance(mode := found.get("mode"), str):  # of Python: one that draws has the run's seed
        found["mode"] = re.sub(r"\bseed=\w+", "", mode)
    return json.dumps(found, sort_keys=True)


def _settings(config: Config) -> dict[str, Any]:
    return {
        "model": config.model.name,
        "data": config.data.name,
        "cut": str(config.model.cut),
        **{name: str(getattr(config, name)) for name in ("codec", "grad_codec", "update_codec")},
        **{name: getattr(config, name) for name in ("cut_bits", "cut_seconds", "seed", "clients")},
        "of_epochs": config.epochs,
    }


def _settings_of_python(spec: dict[str, Any]) -> dict[str, Any]:
    known = ("codec", "grad_codec", "cut_bits", "cut_seconds", "seed", "clients")
    return {
        **dict.fromkeys(("model", "data", "cut")),
        **{name: spec.get(name) for name in known},
        "update_codec": spec.get("update_codec", str(Identity())),
        "of_epochs": spec.get("epochs"),
    }


def _brief(text):
    """A codec without the options that are as by default; one of a user's as it says itself."""
    try:
        codec = from_string(text)
        default, options = type(codec)(), []
    except (ValueError, TypeError):
        return text
    for field in dataclasses.fields(codec):
        value = getattr(codec, field.name)
        if value is not None and value != getattr(default, field.name):
            options.append(f"{field.name}={value!r}")
    return f"{type(codec).__name__}({', '.join(options)})"
