"""Verdicts on claims: of made-up records they flip as they should, and every claim is judged on those there are."""

import dataclasses
import json

import pytest

from experiments import claims, convergence, judges_own, judges_theory, judges_training, published_cuts, study
from experiments.verdicts import (
    DOES_NOT,
    HOLDS,
    IN_PART,
    NOT_TESTED,
    WITHIN_NOISE,
    Claim,
    Results,
    combined,
    judged,
    span,
    table,
)
from msjax import compress, config

RUNS = convergence.runs("lite")


def put(results, arm, tops, folder="lite"):
    """Writes records of an arm of `convergence`, one a seed, with these accuracies."""
    (results / folder).mkdir(parents=True, exist_ok=True)
    for seed, value in enumerate(tops):
        run = dataclasses.replace(RUNS[f"{arm}, seed 0"], seed=seed)
        last = {"epoch": 1, "test": {"top1_percent": value}, "traffic": TRAFFIC}
        made = {"config": config.to_json(config.without_paths(run)), "history": [last], **last, "train": {"loss": 1.0}}
        made["uncompressed_feature_bytes"] = 13.79e6
        (results / folder / f"{study.key(run)}.json").write_text(json.dumps(made))


TRAFFIC = {
    "uplink_feature_bytes": 10**6,
    "downlink_gradient_bytes": 10**6,
    "uplink_label_bytes": 1,
    "uplink_synchronization_bytes": 1,
    "downlink_synchronization_bytes": 1,
}


@pytest.mark.parametrize(
    ("plain", "ms", "verdict"),
    [
        ([80.0, 80.1, 79.9], [79.9, 80.0, 79.8], HOLDS),
        ([80.0, 80.1, 79.9], [77.0, 77.1, 76.9], DOES_NOT),
        ([80.0, 80.1, 79.9], [79.3, 79.4, 79.2], WITHIN_NOISE),
        ([80.0, 82.0, 78.0], [79.9, 81.0, 79.0], WITHIN_NOISE),  # seeds that differ much
        ([80.0], [79.9], WITHIN_NOISE),
        ([80.0], [77.0], DOES_NOT),
    ],
)
def test_training_near_the_baseline(tmp_path, plain, ms, verdict):
    put(tmp_path, "none, medium", plain)
    put(tmp_path, "MS, medium", ms)
    found = judges_training.near_baseline(Results(tmp_path))
    assert found.verdict == verdict
    assert found.scope == f"lite: ResNet9, CIFAR-10, {len(ms)} seed{'s' * (len(ms) > 1)}"
    assert ("One seed" in found.numbers) == (len(ms) == 1 and verdict == WITHIN_NOISE)


def test_original_pixels_come_before_the_lossy_copy(tmp_path):
    put(tmp_path, "none, medium", [80.0, 80.1, 79.9], study.LOSSY)
    put(tmp_path, "MS, medium", [70.0, 70.1, 69.9], study.LOSSY)
    found = judges_training.near_baseline(Results(tmp_path))
    assert found.verdict == DOES_NOT and "lossy CIFAR-10" in found.scope
    put(tmp_path, "none, medium", [90.0, 90.1, 89.9])
    assert judges_training.near_baseline(Results(tmp_path)).verdict == DOES_NOT  # of MS there is nothing yet
    put(tmp_path, "MS, medium", [90.0, 90.1, 89.9])
    found = judges_training.near_baseline(Results(tmp_path))
    assert found.verdict == HOLDS and "lossy" not in found.scope


@pytest.mark.parametrize(("ms", "verdict"), [(80.5, HOLDS), (79.9, WITHIN_NOISE), (70.0, DOES_NOT)])
def test_reaching_the_baseline(tmp_path, ms, verdict):
    put(tmp_path, "none, medium", [80.0])
    put(tmp_path, "MS, medium", [ms])
    found = judges_training.reaches_baseline(Results(tmp_path))
    assert found.verdict == verdict and ("13.79×" in found.numbers) == (ms > 77)


def test_published_networks_cut(tmp_path):
    """The order of codecs flips with their accuracies; a tie does not count against it."""

    def verdict(tops):
        named = {"none": compress.Identity(), **published_cuts.EQUAL}
        rows = [
            {"model": "resnet20", "block": "stem", "codec": str(named[name]), "top1_percent": top, "bits": 2.0}
            for name, top in tops.items()
        ]
        (tmp_path / "published_cuts.json").write_text(json.dumps({"rows": rows}))
        found = judges_own.untrained_at_equal_size(Results(tmp_path))
        return found and found.verdict

    assert verdict({"none": 92, "EntropyMask": 91.5, "MS": 90, "QU": 89, "SP": 60}) == HOLDS
    assert verdict({"none": 92, "EntropyMask": 89.9, "MS": 90, "QU": 89, "SP": 60}) == HOLDS
    assert verdict({"none": 92, "EntropyMask": 88, "MS": 90, "QU": 89, "SP": 60}) == DOES_NOT
    assert verdict({"none": 92, "EntropyMask": 88, "MS": 90}) is None


def test_how_parts_combine():
    assert [judged(margin, 0.5) for margin in (1.0, 0.1, -0.1, -1.0)] == [HOLDS, WITHIN_NOISE, WITHIN_NOISE, DOES_NOT]
    assert combined([HOLDS, HOLDS]) == HOLDS and combined([HOLDS, WITHIN_NOISE]) == WITHIN_NOISE
    assert combined([HOLDS, DOES_NOT]) == IN_PART and combined([DOES_NOT, WITHIN_NOISE]) == DOES_NOT
    assert combined([]) == NOT_TESTED
    assert span([1.0, 1.001]) == "1.00" and span([1.0, 2.0]) == "1.00 to 2.00"


def test_explanations_are_shown_where_a_claim_does_not_hold(tmp_path):
    claim = Claim("Figure 3", "Near.", judges_training.near_baseline, "For a reason.")
    assert "| *not tested* | – | – |  |" in table([claim, Claim("Nothing", "Measures it.", None)], Results(tmp_path))
    put(tmp_path, "none, medium", [80.0])
    put(tmp_path, "MS, medium", [70.0])
    assert "For a reason." in table([claim], Results(tmp_path))
    put(tmp_path, "MS, medium", [82.0])
    assert "For a reason." not in table([claim], Results(tmp_path))


@pytest.mark.parametrize("title", claims.LISTS)
def test_every_claim_is_judged_on_the_records_that_there_are(title, tmp_path):
    made = table(claims.LISTS[title], Results())
    assert len(made.splitlines()) == len(claims.LISTS[title]) + 2
    assert not any(word in made for word in ("nan", "None", "inf "))
    assert all(line.count(" | ") == 4 for line in made.splitlines())
    # Without records nothing is known but what is computed on the spot.
    without = table(claims.LISTS[title], Results(tmp_path, tmp_path))
    assert without.count("*not tested*") == len(claims.LISTS[title]) - ("Figure 1:" in without)


def test_the_worked_example():
    assert judges_theory.figure_1(Results()).verdict == HOLDS
