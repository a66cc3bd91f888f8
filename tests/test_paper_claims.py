"""Verdicts on claims: of made-up records they flip as they should, and every claim is judged on those there are."""

import dataclasses
import json

import pytest

from experiments import claims, convergence, judges_own, judges_theory, judges_training, published_cuts, study, verdicts
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


def test_arms_are_compared_by_the_seeds_that_both_have(tmp_path):
    """As in the studies' own tables: what other seeds of one arm came to says nothing of the other."""
    put(tmp_path, "none, medium", [82.0, 80.0, 80.0])
    put(tmp_path, "MS, medium", [81.0])
    found = judges_training.near_baseline(Results(tmp_path))
    assert "1.00 ±" in found.numbers and found.scope.endswith("1 seed")


def test_noise_is_of_runs_alike(tmp_path):
    """Whatever field of the config a record of before lacks; seeds of another network or schedule do not count."""
    results = Results(tmp_path)
    put(tmp_path, "none, medium", [80.0, 81.0])
    own = json.loads(next((tmp_path / "lite").glob("*seed1*.json")).read_text())
    del own["config"]["optim"]["clip_norm"]
    next((tmp_path / "lite").glob("*seed1*.json")).write_text(json.dumps(own))
    for epochs, network in ((1, "resnet9"), (3, "resnet20")):
        for seed in range(2):
            run = dataclasses.replace(RUNS["none, medium, seed 0"], seed=seed, epochs=epochs)
            run = dataclasses.replace(run, model=dataclasses.replace(run.model, name=network))
            made = {"config": config.to_json(config.without_paths(run)), "test": {"top1_percent": 80.0 + 0.01 * seed}}
            (tmp_path / "lite" / f"{study.key(run)}.json").write_text(json.dumps(made))
    found = results.typical_deviation(verdicts.ORIGINAL, own["config"])
    assert 0.5 < found < 1.5  # not 0.007, which is that of the others


def test_trainings_of_unlike_schedules_are_not_set_beside_each_other(tmp_path):
    def row(codec, epochs, top1, samples=50_000):
        history = [{"epoch": 30, "test": {"top1_percent": top1}}]
        of = {"stage": "train", "codec": codec, "train_samples": samples, "history": history}
        return of | {"config": {"epochs": epochs, "model": {"name": "vgg19"}, "data": {"name": "cifar10"}}}

    def judge(*rows):
        (tmp_path / "accelerator.json").write_text(json.dumps({"rows": rows}))
        return judges_training.published_end(Results(tmp_path))

    assert judge(row("none", 200, 80.0), row("MS", 30, 89.9)) is None
    assert judge(row("none", 30, 90.0, 20_000), row("MS", 30, 89.9, 20_000)) is None
    found = judge(row("none", 30, 90.0), row("MS", 30, 92.0), row("none", 200, 80.0))
    assert "none 90.00, MS 92.00" in found.numbers and found.verdict == NOT_TESTED  # the claim is of the whole schedule


@pytest.mark.parametrize(("first", "last", "verdict"), [(0.015, 0.8, HOLDS), (0.03, 0.8, DOES_NOT)])
def test_steps_are_judged_before_all_trainings_are_as_far_apart(tmp_path, first, last, verdict):
    row = {"codec": "MS", "steps": 50, "losses": 0.2, "losses_again": 0.2, "weights_1": first, "weights_1_again": 0.01}
    row |= {"weights_50": last, "weights_50_again": 0.7}
    (tmp_path / "beside_pytorch.json").write_text(json.dumps({"rows": [row]}))
    assert judges_own.same_steps(Results(tmp_path)).verdict == verdict


def test_the_published_shallow_cut_of_a_resnet_is_the_papers():
    for name, run in convergence.runs("paper").items():
        own = run.model.cut == "shallow" and run.model.name.startswith("resnet")
        assert (run.model.first_block == "paper") == own, name


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

    def verdict(tops, trial=None):
        named = {"none": compress.Identity(), **published_cuts.EQUAL}
        of = {"model": "resnet20", "block": "stem", "bits": 2.0}
        rows = [of | {"codec": str(named[n]), "top1_percent": top, "images": 10_000} for n, top in tops.items()]
        rows += [of | {"codec": str(named[n]), "top1_percent": top, "images": 250} for n, top in (trial or {}).items()]
        (tmp_path / "published_cuts.json").write_text(json.dumps({"rows": rows}))
        found = judges_own.untrained_at_equal_size(Results(tmp_path))
        return found and found.verdict

    assert verdict({"none": 92, "EntropyMask": 91.5, "MS": 90, "QU": 89, "SP": 60}) == HOLDS
    assert verdict({"none": 92, "EntropyMask": 89.9, "MS": 90, "QU": 89, "SP": 60}) == HOLDS
    assert verdict({"none": 92, "EntropyMask": 88, "MS": 90, "QU": 89, "SP": 60}) == DOES_NOT
    assert verdict({"none": 92, "EntropyMask": 88, "MS": 90}) is None
    # A later try of few images changes nothing.
    assert verdict({"none": 92, "EntropyMask": 91.5, "MS": 90, "QU": 89, "SP": 60}, {"EntropyMask": 10}) == HOLDS


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
