"""The study of language models: its runs, where their texts lie, and what its report says of records."""

import argparse
import math

import jax
import numpy as np
import pytest

from experiments import decoder_features, driver, language, language_schedule, study
from msjax import compress, config, data, wire


def test_the_middle_cut_and_seed_0_come_first_then_seed_by_seed():
    names = list(language.runs("lite"))
    assert names[: len(language.CODECS)] == [f"Shakespeare, full, {codec}, 3, seed 0" for codec in language.CODECS]
    of = [tuple(name.split(", ")) for name in names if name.endswith(("seed 0", "seed 1", "seed 2"))]
    first = next(i for i, (*_, cut, seed) in enumerate(of) if cut != "3" or seed != "seed 0")
    assert all(cut == "3" and seed == "seed 0" for *_, cut, seed in of[:first])
    assert not any(cut == "3" and seed == "seed 0" for *_, cut, seed in of[first:])
    seeds = [seed for *_, seed in of]
    assert seeds == sorted(seeds) and len(set(names)) == 265
    for cut in language.CUTS:  # all three codecs of the paper with three seeds, and what fails with one
        at = [name for name in names if name.startswith("Shakespeare, full, ") and f", {cut}, " in name]
        assert [sum(f" {codec}, {cut}, " in name for name in at) for codec in ("MS", "QU", "top-k, kept")] == [3, 3, 3]
        assert sum(f" RandTopk, {cut}, " in name for name in at) == (3 if cut == language.MIDDLE else 1)
    # Of each text three seeds and one with adapters; and one at the lower rate.
    assert sum("none" in name for name in names) == 2 * 3 + 2 + 1


def test_arms_with_kept_gradients_differ_from_others_in_that_alone():
    for name, fields in language.CODECS.items():
        assert fields["grad_kept_only"] == name.endswith("kept")
        if (other := name.removesuffix(", kept")) in language.CODECS:
            assert fields == language.CODECS[other] | {"grad_kept_only": name.endswith("kept")}


def test_texts_and_weights_lie_where_the_command_says():
    run = language.runs("lite")["WikiText-2, full, MS, 3, seed 0"]
    placed = driver._placed(run, argparse.Namespace(data_dir="/texts", weights="/models", cache_dir=None, out="runs"))
    assert (placed.data.name, placed.data.test) == ("/texts/wikitext2_valid.txt", "/texts/wikitext2_test.txt")
    assert placed.model.weights == "/models/stories260k" and placed.data.data_dir is None
    assert study.key(placed) == study.key(run)


def trained(name, loss):
    """A record of a run of this name that ended with this test loss."""
    cfg = language.runs("lite")[name]
    traffic = {"uplink_feature_bytes": 332, "downlink_gradient_bytes": 3200}
    made = {"test": {"loss": loss}, "traffic": traffic, "uncompressed_feature_bytes": 3200}
    return made | {"config": config.to_json(cfg)}


def test_orderings_within_the_noise_of_seeds_are_called_that():
    assert language._ordering([1.0, 2.0], [1.9, 2.1]) == "within noise"
    assert language._ordering([1.0, 1.1], [1.9, 2.1]) == "holds"
    assert language._ordering([1.9, 2.1], [1.0, 1.1]) == "does not hold"
    assert language._ordering([1.0], [2.0]) == "holds"
    assert language._ordering([2.0], [2.0]) == "within noise"
    assert language._ordering([math.inf, 1.0], [2.0, 3.0]) == "cannot be told"


def test_the_report_says_which_orderings_hold():
    losses = {"none": 1.0, "MS": 1.5, "QU": 1.4, "top-k": 2.0}
    names = {f"Shakespeare, full, {codec}, 3, seed 0": loss for codec, loss in losses.items()}
    records = {name: trained(name, loss) for name, loss in names.items()}
    rows = [{"codec": "none", "cut": "3", "loss": 3.0}, {"codec": "MS", "cut": "1", "loss": 4.0}]
    records["Shakespeare, before"] = {"rows": rows, "config": config.to_json(config.Config())}
    text, figures = language.report("lite", records)
    assert "- MS below QU: does not hold at 3.\n- MS below top-k: holds at 3.\n" in text and "e2m1" not in text
    line = next(line for line in text.splitlines() if line.startswith("| MS |"))
    assert {row.count("|") for row in text.splitlines() if row.startswith("|")} == {line.count("|")}
    assert line == f"| MS | 3.32 / 32.00 | 0.0 / 0.0 | {math.exp(4):.2f} | – | – | – | {math.exp(1.5):.2f} | – | 1 |"
    assert f"| none | 3.32 / 32.00 | 0.0 / 0.0 | {' | '.join([f'{math.exp(3):.2f}'] * 3)} |" in text
    assert figures.keys() == {"language"} and "WikiText" not in text


def test_the_schedule_is_not_chosen_on_the_test_text():
    blocks = np.arange(50).reshape(50, 1)
    whole = data.Dataset(
        "text", data.Arrays(blocks[:40], blocks[:40]), data.Arrays(blocks[40:], blocks[40:]), None, None, None
    )
    found = language_schedule.with_held_out(whole)
    assert found.train.inputs.ravel().tolist() == list(range(16))
    assert found.test.inputs.ravel().tolist() == list(range(36, 40))


def test_outlier_channels_cost_a_tensor_its_scale_and_channels_nothing(monkeypatch):
    monkeypatch.setattr(decoder_features, "BATCHES", 2)
    monkeypatch.setattr(decoder_features, "BATCH", 3)
    h = np.asarray(jax.random.normal(jax.random.key(0), (6, 40, 16)))
    quantile, entropy = str(compress.Quantile(bits=3)), f"{language.entropy(2.0)}{decoder_features.DIVIDED}"
    codings = [{"codec": quantile, "scales": scale} for scale in ("tensor", "channel")]
    codings += [{"codec": entropy, "scales": scale} for scale in decoder_features.DIVISORS]
    rows = []
    for outliers in (False, True):
        found = decoder_features.of_features(h, lambda h: float(h.mean()), codings, outliers=outliers)
        rows += [row | {"outliers": outliers, "text": "noise", "cut": 1} for row in found]
    errors = {(row["codec"], row["scales"], row["outliers"]): row["error"] for row in rows}
    for codec in (quantile, entropy):
        assert errors[codec, "channel", True] == pytest.approx(errors[codec, "channel", False], rel=0.1)
    assert errors[quantile, "tensor", True] > 5 * errors[quantile, "tensor", False]
    assert errors[entropy, "token", True] > 5 * errors[entropy, "token", False]
    assert len({decoder_features._name(row) for row in rows}) == len(rows) == 10
    assert "With two outlier channels" in decoder_features.table(rows)


def test_what_features_are_divided_by():
    h = np.stack([np.full((2, 3, 4), 2.0), np.full((2, 3, 4), 8.0)]).reshape(4, 3, 4)
    found = decoder_features.scales(h, (2,), 1.0)
    np.testing.assert_array_equal(found[:, :, 0], np.repeat([[2.0], [2.0], [8.0], [8.0]], 3, axis=1))
    assert decoder_features.scales(h, (0, 1), 0.5).shape == (1, 1, 4)
    decoded, sent = decoder_features.through(compress.Quantile(bits=3), h.astype(np.float32))
    np.testing.assert_allclose(decoded, h, rtol=0.2, atol=2)
    codec = compress.Quantile(bits=3)
    payload = jax.device_get(jax.jit(codec.encode)(h.astype(np.float32)))
    assert sent == len(wire.encode(payload, codec, h.astype(np.float32), compression="huffman"))
