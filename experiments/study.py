"""What the studies share: what a run is, where its record is, and how tables name it. `driver` does the runs.

A study is a module of this package with

    TITLE                            a line
    runs(scale) -> {name: Run}       what has to be trained or measured; `scale` is "smoke", "lite" or "paper"
    report(scale, records) -> Page   what comes out, of the records that there are, by name

and is run with `python -m experiments.<study> --scale lite`. A run is known by its config: a finished one has a record
in `experiments/results/<scale>/` and is never repeated, whichever study asks for it; an interrupted one goes on from
its checkpoint in the run folder.

smoke: seconds, on the embedded data, to see that a study works; its numbers mean nothing and are not committed.
lite: CIFAR-10's original pixels, a narrow ResNet9 and a short schedule, about five minutes a run on two CPU cores; see
`base`. `lite_jpeg` has earlier records of the same runs on a lossy copy of CIFAR-10.
paper: the published setting, for a GPU or TPU.
"""

import dataclasses
import hashlib
import json
import pathlib
import statistics
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

from msjax import config as config_lib
from msjax.compress import Identity
from msjax.config import Config, DataConfig, ModelConfig, OptimConfig
from msjax.split.sent import cut_bytes, feature_bytes, other_bytes

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results"
SCALES = ("smoke", "lite", "paper")
LOSSY = "lite_jpeg"
"""The folder of lite runs on a JPEG-coded copy of CIFAR-10."""
CUTS = ("shallow", "medium", "deep")
PLAIN_CUT = "medium"
"""Where a run that compresses nothing is cut; it would be the same anywhere."""
Record = dict[str, Any]


class Measured(NamedTuple):
    """A measurement on a trained network: `by` names "module:function".

    That gets the run's folder, its config and the scale, and returns rows, JSON-ready dicts. A network whose folder is
    gone is trained anew.
    """

    config: Config
    by: str


Run = Config | Measured


class Page(NamedTuple):
    """What a study has to say: Markdown, and figures by name, which the Markdown names as ![…](name.png)."""

    text: str
    figures: dict[str, Any]


def base(scale: str) -> Config:
    """The network, data and schedule that a study varies, where it is not about those."""
    if scale == "smoke":
        return Config(model=ModelConfig(name="convnet", width=0.25), clients=2, batch_size=64, epochs=1)
    if scale == "paper":
        return preset("vgg19_cifar10")
    return Config(
        model=ModelConfig(name="resnet9", width=0.25),
        data=DataConfig(name="cifar10"),
        optim=OptimConfig(learning_rate=0.3, nesterov=True, weight_decay=7e-4, warmup_epochs=1.0, label_smoothing=0.1),
        clients=10,
        batch_size=25,
        epochs=3,
    )


def preset(name: str) -> Config:
    """The config of `configs/<name>.py`."""
    return config_lib.load_preset(str(ROOT.parent / "configs" / f"{name}.py"))


def seeds(scale: str, *, lite: int = 1) -> range:
    """One, or at lite scale as many as the differences that a study shows need: three where they are under a point."""
    return range(lite if scale == "lite" else 1)


def legend(axes: Any, **options: Any) -> None:
    """Matplotlib's legend, on the first of these axes with anything to explain."""
    for one in axes:
        if one.get_legend_handles_labels()[0]:
            one.legend(**options)
            return


def with_cut(cfg: Config, cut: str) -> Config:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, cut=cut))


def with_published_cut(cfg: Config, cut: str) -> Config:
    """As `with_cut`; a ResNet's shallow cut is the paper's, which its published figures are of."""
    cfg = with_cut(cfg, cut)
    if cut != "shallow" or not cfg.model.name.startswith("resnet"):
        return cfg
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, first_block="paper"))


def key(run: Run) -> str:
    """The name of a run's record and folder: what it is, and a hash of all in which its config differs from `Config()`.

    So a record outlives new fields of the config. Where the data lies and where the run folder is does not count.
    """
    if isinstance(run, Measured):
        return f"{run.by.partition(':')[0].rpartition('.')[2]}-{key(run.config)}"
    own, default = (config_lib.earlier_names(config_lib.to_json(c)) for c in (config_lib.without_paths(run), Config()))
    differing = _differing(own, default)
    digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()
    codecs = "-".join(type(codec).__name__.lower() for codec in (run.codec, run.grad_codec))
    data = config_lib.without_paths(run).data.name.replace("/", "_")
    return f"{run.model.name}-{data}-{run.model.cut}-{codecs}-seed{run.seed}-{digest[:8]}"


def _differing(tree, default):
    """The part of `tree` that is not as in `default`."""
    parts = {n: _differing(v, default[n]) if isinstance(v, dict) else v for n, v in tree.items()}
    return {n: v for n, v in parts.items() if v != ({} if isinstance(v, dict) else default[n])}


def record(scale: str, run: Run, results: pathlib.Path = RESULTS) -> Record | None:
    """The record of a run or measurement, or None where there is none."""
    file = results / scale / f"{key(run)}.json"
    return json.loads(file.read_text()) if file.exists() else None


def records(
    study: ModuleType, scale: str, results: pathlib.Path = RESULTS, folder: str | None = None
) -> dict[str, Record]:
    """The records that there are of a study's runs, by name; in the folder of the scale, or another one."""
    found = {name: record(folder or scale, run, results) for name, run in study.runs(scale).items()}
    return {name: one for name, one in found.items() if one is not None}


def cuts(scale: str) -> tuple[str, ...]:
    """The three of the paper; at smoke scale one."""
    return CUTS if scale != "smoke" else ("medium",)


def label(*parts: str) -> str:
    """The name of a run or a setting: the parts that are not empty, with commas between them."""
    return ", ".join(part for part in parts if part)


def at_cuts(arms: dict[str, Config], cuts: Iterable[str], with_cut: Any = with_cut) -> dict[str, Config]:
    """Each of the arms at each cut, “arm, cut”; where nothing is compressed, at `PLAIN_CUT` in place of those like it.

    There the cut changes nothing but the bytes, and these are known. Unlike it is a cut with which `with_cut` changes
    the network, too.
    """
    cuts, found = tuple(cuts), {}
    for arm, cfg in arms.items():
        own = {cut: with_cut(cfg, cut) for cut in (*cuts, PLAIN_CUT)}
        at = dict.fromkeys(cuts)
        if (cfg.codec, cfg.grad_codec) == (Identity(), Identity()):
            at = dict.fromkeys(cut if _network(own[cut]) != _network(own[PLAIN_CUT]) else PLAIN_CUT for cut in cuts)
        found |= {f"{arm}, {cut}": own[cut] for cut in at}
    return found


def _network(cfg):
    """What a run trains, wherever it is cut."""
    return dataclasses.replace(cfg.model, cut=PLAIN_CUT)


def at_cut(groups: dict[str, list[Record]], arm: str, cut: str) -> list[Record]:
    """The records of an arm at a cut, as `at_cuts` and `by_arm` name them; of “none” those of its network."""
    own = groups.get(f"{arm}, {cut}", [])
    return groups.get(f"{arm}, {PLAIN_CUT}", []) if arm.endswith("none") and not own else own


def measured(scale: str, by: str) -> dict[str, Measured]:
    """The measurement `by` on a network that was trained without compression, of each seed."""
    cfg = with_cut(dataclasses.replace(base(scale), codec=Identity()), PLAIN_CUT)
    return {f"seed {seed}": Measured(dataclasses.replace(cfg, seed=seed), by) for seed in seeds(scale, lite=3)}


def places(cfg: Config) -> dict[str, str | None]:
    """Where the data is on this machine, as keywords of `feature_maps`."""
    return {"data_dir": cfg.data.data_dir, "cache_dir": cfg.data.cache_dir}


def with_seeds(arms: dict[str, Config], seeds: Iterable[int]) -> dict[str, Config]:
    """Each of the arms with each seed, the first seed of all of them first: “arm, seed 0”, …"""
    return {f"{arm}, seed {seed}": dataclasses.replace(cfg, seed=seed) for seed in seeds for arm, cfg in arms.items()}


def by_arm(records: dict[str, Record]) -> dict[str, list[Record]]:
    """The records of `with_seeds`, those of all seeds together."""
    found = {}
    for name, one in records.items():
        found.setdefault(name.rpartition(", ")[0], []).append(one)
    return found


def measurements(records: dict[str, Record]) -> list[dict[str, Any]]:
    """The rows of all records of a `Measured`, each with its seed."""
    return [row | {"seed": r["config"]["seed"]} for r in records.values() for row in r.get("rows", [])]


def grouped(rows: list[dict[str, Any]], by: str) -> dict[Any, list[dict[str, Any]]]:
    """Rows by what they have under a name."""
    found = {}
    for row in rows:
        found.setdefault(row[by], []).append(row)
    return found


def trained(records: dict[str, Record]) -> dict[str, Record]:
    """The records that are not of a `Measured`."""
    return {name: record for name, record in records.items() if "rows" not in record}


def top1(found: list[Record]) -> str:
    """Test accuracy at the end, in percent, over seeds."""
    return mean_and_deviation([one["test"]["top1_percent"] for one in found])


def counts(groups: Iterable[list[Record]]) -> str:
    """How many records, thus seeds, these arms have: “3”, or “1/3” where they differ."""
    return "/".join(sorted({str(len(found)) for found in groups}))


def lost(plain: list[Record], found: list[Record]) -> list[float]:
    """By how many points of test accuracy each record is below that of the same seed in `plain`, where there is one."""
    before = {one["config"]["seed"]: one["test"]["top1_percent"] for one in plain}
    pairs = [(before.get(one["config"]["seed"]), one["test"]["top1_percent"]) for one in found]
    return [reached - top1 for reached, top1 in pairs if reached is not None]


def saved(record: Record, *, everything: bool = False) -> float:
    """By which factor less crossed the cut than without compression; or less was sent in all."""
    plain, crossed = 2 * record["uncompressed_feature_bytes"], cut_bytes(record["traffic"])
    if not everything:
        return plain / crossed
    traffic, other = record["traffic"], other_bytes(record["traffic"])
    # Records of before averages could be compressed do not say it.
    names = ("uplink_synchronization_bytes", "downlink_synchronization_bytes")
    synchronization = record.get("uncompressed_synchronization_bytes", sum(traffic[name] for name in names))
    return (plain + traffic["uplink_label_bytes"] + synchronization) / (crossed + other)


def feature_bits(one: Record) -> float:
    """Bits a value of the features, as `uplink_feature_bytes` counts them."""
    return 32 * feature_bytes(one["traffic"]) / one["uncompressed_feature_bytes"]


def mean_and_deviation(values: list[float], digits: int = 2) -> str:
    """“mean ± standard deviation” of a sample; without the second of a single value."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
