"""How a claim is judged from records: what there is of it, how large the noise of seeds is, and what both come to.

A claim is taken apart into parts, such as one a cut. Of each part a margin says by how much the numbers speak for it:
it holds where the margin is above the noise, it does not where the margin is below minus the noise, and otherwise the
records cannot tell. Noise is twice the standard error of the difference of two means. The standard deviation between
seeds that it needs is an arm's own, but no less than the typical one of the arms with several seeds of the same
network, data and epochs: with two or three seeds an arm's own can be small by chance, and of a single seed it is
unknown. Arms are compared by the seeds that both have, as in the studies' own tables.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import scipy.stats

from benchmarks import timing
from experiments import study
from msjax import config as config_lib
from msjax.config import Config

HOLDS, IN_PART, DOES_NOT = "holds", "in part", "does not"
WITHIN_NOISE, NOT_TESTED = "within noise", "not tested"
SEEDS = range(5)
"""Of an arm records with these seeds are looked for."""
Value = Callable[[study.Record], float]


def top1(record: study.Record) -> float:
    """Test accuracy at the end, in percent."""
    return record["test"]["top1_percent"]


def train_loss(record: study.Record) -> float:
    """Training loss of the last epoch, in nats."""
    return record["train"]["loss"]


DEVIATIONS = {top1: 0.35, train_loss: 0.01}
"""Between seeds, where no arm on the same data has several: so one seed tells differences above a point."""


class Source(NamedTuple):
    """Where records lie, and which images they are of."""

    scale: str
    folder: str
    images: str = ""


PAPER = Source("paper", "paper")
ORIGINAL = Source("lite", "lite")
LOSSY = Source("lite", study.LOSSY, "lossy ")
LITE = (ORIGINAL, LOSSY)
SOURCES = (PAPER, *LITE)
"""The best first. Whatever a claim needs is taken from the first that has it."""


class Part(NamedTuple):
    """A part of a claim: what became of it, the numbers, and what they were measured on with how many seeds."""

    verdict: str
    text: str
    where: str
    seeds: tuple[int, ...] = ()
    noise: float | None = None


class Found(NamedTuple):
    """What the records say of a claim."""

    verdict: str
    numbers: str
    scope: str


class Claim(NamedTuple):
    """A claim, where it is from, and what judges it; `why` is shown where it does not simply hold."""

    source: str
    claim: str
    judge: Callable[["Results"], Found | None] | None
    why: str = ""


class Difference(NamedTuple):
    """The difference of two arms' means, the noise that it is to be compared with, and how many seeds they have."""

    mean: float
    noise: float
    seeds: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.noise:.2f}"


class Results:
    """The records in a folder, those of the benchmarks in another."""

    def __init__(self, results: pathlib.Path = study.RESULTS, benchmarks: pathlib.Path = timing.RESULTS):
        self._results, self._benchmarks = results, benchmarks
        # Of a trained network by the name of its file; each file is read once.
        self._record = functools.cache(lambda folder, key: self._read(results / folder / f"{key}.json"))
        self.arms = functools.cache(self._arms)
        self._seeds = functools.cache(self._arms_of)
        self._deviation = functools.cache(self._deviation_of)

    @staticmethod
    def _read(file):
        return json.loads(file.read_text()) if file.exists() else None

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Returns the rows of a study with a record of its own; none where there is no record."""
        return (self._read(self._results / f"{name}.json") or {"rows": []})["rows"]

    def benchmark(self, name: str) -> list[dict[str, Any]]:
        """Returns the rows of a benchmark's record."""
        return (self._read(self._benchmarks / f"{name}.json") or {"rows": []})["rows"]

    def measured(self, module: ModuleType) -> tuple[Source, list[dict[str, Any]]] | None:
        """Returns the rows of a study's measurements, from the first source that has any."""
        for source in SOURCES:
            if rows := study.measurements(study.records(module, source.scale, self._results, source.folder)):
                return source, rows
        return None

    def _arms(self, module, source):
        """{arm: its records of all seeds}, whichever study asked for them."""
        found = {}
        for name, run in module.runs(source.scale).items():
            arm = name.rpartition(", ")[0]
            if isinstance(run, Config) and arm not in found:
                keys = (study.key(dataclasses.replace(run, seed=seed)) for seed in SEEDS)
                found[arm] = [record for key in keys if (record := self._record(source.folder, key))]
        return {arm: records for arm, records in found.items() if records}

    def first(
        self, module: ModuleType, *arms: str, sources: Iterable[Source] = SOURCES
    ) -> tuple[Source, list[list[study.Record]]] | None:
        """Returns the records of each of these arms, from the first source that has all of them."""
        for source in sources:
            found = self.arms(module, source)
            if all(arm in found for arm in arms):
                return source, [found[arm] for arm in arms]
        return None

    def typical_deviation(self, source: Source, config: dict[str, Any], value: Value = top1) -> float:
        """Returns the standard deviation between seeds of a typical arm of such runs, or else on the same data."""
        folders = [source.folder, *(other.folder for other in SOURCES)]
        kind = _kind(config)
        found = (self._deviation(folder, like, value) for like in (kind, kind[:1]) for folder in folders)
        return next(filter(None, found), DEVIATIONS[value])

    def _arms_of(self, folder):
        """[(kind, records)] of the arms whose records lie there."""
        arms = {}
        for file in sorted((self._results / folder).glob("*.json")):
            record = self._record(folder, file.stem)
            if "rows" not in record:
                # By the name of a record, which outlives new fields of the config.
                arm = study.key(dataclasses.replace(config_lib.from_json(record["config"], own_code=True), seed=0))
                arms.setdefault(arm, []).append(record)
        return [(_kind(records[0]["config"]), records) for records in arms.values()]

    def _deviation_of(self, folder, kind, value):
        arms = [list(map(value, records)) for own, records in self._seeds(folder) if own[: len(kind)] == kind]
        # A variance of few has its median below its mean; the median, so that one arm far from all others counts once.
        variances = [
            statistics.variance(values) * (n - 1) / float(scipy.stats.chi2.median(n - 1))
            for values in arms
            if (n := len(values)) > 1
        ]
        return math.sqrt(statistics.median(variances)) if variances else None

    def difference(
        self, source: Source, a: list[study.Record], b: list[study.Record], value: Value = top1
    ) -> Difference:
        """Returns how much more arm `a` has than arm `b`, and the noise; of the seeds that both have, if any."""
        common = {record["config"]["seed"] for record in a} & {record["config"]["seed"] for record in b}
        if common:
            a, b = ([record for record in arm if record["config"]["seed"] in common] for arm in (a, b))
        typical = self.typical_deviation(source, a[0]["config"], value)
        values = [[value(record) for record in arm] for arm in (a, b)]
        squares = sum(max(statistics.stdev(v) if len(v) > 1 else 0.0, typical) ** 2 / len(v) for v in values)
        a_mean, b_mean = map(statistics.mean, values)
        return Difference(a_mean - b_mean, 2 * math.sqrt(squares), (len(a), len(b)))


def _kind(config):
    """What arms have in common whose seeds differ alike: the data first."""
    model = config["model"]
    return config["data"]["name"], model["name"], config["epochs"], model.get("weights") is not None


def judged(margin: float, noise: float) -> str:
    """Returns the verdict of a part that numbers speak for by this margin."""
    return HOLDS if margin > noise else DOES_NOT if margin < -noise else WITHIN_NOISE


def combined(verdicts: Iterable[str]) -> str:
    """Returns the verdict of the whole: in part where some parts hold and others do not."""
    found = set(verdicts)
    if DOES_NOT in found or IN_PART in found:
        return IN_PART if found & {HOLDS, IN_PART} else DOES_NOT
    return WITHIN_NOISE if WITHIN_NOISE in found else HOLDS if found else NOT_TESTED


def together(parts: list[Part], numbers: str | None = None, verdict: str | None = None) -> Found | None:
    """Returns what the parts come to, None without any; `numbers` and `verdict` in place of what follows from them."""
    if not parts:
        return None
    said = "; ".join(part.text for part in parts if part.text) if numbers is None else numbers
    single = [p.noise for p in parts if p.verdict == WITHIN_NOISE and p.noise and min(p.seeds, default=2) == 1]
    if single:
        said += f". One seed: cannot tell differences below about {max(single):.1f} points"
    seeds = {}
    for part in parts:
        seeds.setdefault(part.where, set()).update(part.seeds)
    scope = "; ".join(f"{where}{_seeds(counts)}" for where, counts in seeds.items())
    return Found(verdict or combined(part.verdict for part in parts), said, scope)


def _seeds(counts):
    if not counts:
        return ""
    most = max(counts)
    return f", {span(counts, '{}')} seed{'s' if most > 1 else ''}"


def span(values: Iterable[float], form: str = "{:.2f}") -> str:
    """Returns “least to most”, or one number where both read the same."""
    values = list(values)
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} to {most}"


NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet2012": "ImageNet",
    "tiny_imagenet": "Tiny ImageNet",
    "adult": "Adult",
    "glue/sst2": "SST-2",
    "mlp": "an MLP",
    "transformer": "a transformer",
}


def place(source: Source, record: study.Record) -> str:
    """Returns scale, network and data of a record, as a reader is told them."""
    model, data = record["config"]["model"]["name"], record["config"]["data"]["name"]
    network = NAMES.get(model, model.replace("resnet", "ResNet").replace("vgg", "VGG"))
    return f"{source.scale}: {network}, {source.images if data == 'cifar10' else ''}{NAMES.get(data, data)}"


def behind(
    results: Results,
    module: ModuleType,
    plain: str,
    arm: str,
    name: str,
    *,
    at_most: float | None = None,
    by_more_than: float | None = None,
    sources: Iterable[Source] = SOURCES,
) -> list[Part]:
    """Judges how far one arm ends behind another: `at_most` so many points, or `by_more_than` so many.

    Returns one part, or none where no source has both arms.
    """
    if not (found := results.first(module, plain, arm, sources=sources)):
        return []
    source, (before, after) = found
    lost = results.difference(source, before, after)
    margin = at_most - lost.mean if by_more_than is None else lost.mean - by_more_than
    where = place(source, after[0])
    return [Part(judged(margin, lost.noise), f"{name} {lost}", where, lost.seeds, lost.noise)]


def table(claims: Iterable[Claim], results: Results) -> str:
    """Returns the claims and what became of them as a Markdown table."""
    lines = []
    for claim in claims:
        found = (claim.judge and claim.judge(results)) or Found(NOT_TESTED, "–", "–")
        verdict = f"*{found.verdict}*" if found.verdict == NOT_TESTED else f"**{found.verdict}**"
        why = "" if found.verdict == HOLDS else claim.why
        if why and found.verdict == WITHIN_NOISE:
            why = f"If it is more than noise: {why}"
        numbers = re.sub(r"(?<![\w.])-(?=\d)", "−", found.numbers)
        cells = [f"{claim.source}: {claim.claim}", verdict, numbers, found.scope, why]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    header = "| claim | verdict | numbers | scale, data, seeds | our explanation |\n| --- | --- | --- | --- | --- |\n"
    return header + "\n".join(lines) + "\n"
