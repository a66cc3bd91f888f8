"""Texts and tables through networks of their own. Needs no prepared data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import compress, config, models, runs
from msjax.training.from_config import train_config

from .data_helpers import prepare_reviews
from .helpers import assert_close

pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    return prepare_reviews(tmp_path, monkeypatch)


@pytest.mark.slow
def test_transformer():
    model = models.build("transformer", input_shape=(12,), num_classes=3, width=0.25, vocabulary=50, activation="gelu")
    assert model.input_dtype == jnp.int32
    assert [cut.shape for cut in models.list_cuts(model)] == [(12, 32)] * 5
    block = 2 * 2 * 32 + 4 * (32 * 32 + 32) + 2 * 4 * 32 * 32 + 4 * 32 + 32  # norms, attention, dense layers
    assert models.count_params(model) == 50 * 32 + 12 * 32 + 4 * block + 2 * 32 + 32 * 3 + 3
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 12)), jnp.int32)
    whole = models.whole(model, seed=1)
    logits, stats = whole.apply(whole.params, whole.stats, tokens, train=True, key=jax.random.key(2))
    assert logits.shape == (4, 3) and logits.dtype == jnp.float32 and stats == {}
    for cut in (1, "shallow", "deep"):
        client, server = models.split(model, cut, seed=1)
        h, _ = client.apply(client.params, client.stats, tokens, train=True, key=jax.random.key(2))
        found, _ = server.apply(server.params, server.stats, h, train=True, key=jax.random.key(2))
        assert_close(found, logits, 1e-5)
    # Every token is seen, and so is its place.
    plain, _ = whole.apply(whole.params, whole.stats, tokens, train=False)
    swapped = tokens[:, ::-1]
    assert (whole.apply(whole.params, whole.stats, swapped, train=False)[0] != plain).all() and (plain != logits).all()


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [("transformer", (8, 8, 1), "one positive integer"), ("mlp", (), "positive integers"), ("mlp", (3, 0), "positive")],
)
def test_shapes_that_models_do_not_take(name, shape, rule):
    with pytest.raises(ValueError, match=f"input_shape must be {rule}"):
        models.build(name, input_shape=shape, num_classes=2)


def trained(cfg, tmp_path):
    folder = runs.RunFolder.create(cfg, "run")
    try:
        return train_config(cfg, folder, quiet=True)
    finally:
        folder.close()


@pytest.mark.slow
def test_a_table_is_learned(tmp_path):
    cfg = config.Config(
        model=config.ModelConfig(name="mlp", width=0.25),
        data=config.DataConfig(name="breast_cancer"),
        clients=2,
        batch_size=32,
        epochs=5,
        out=str(tmp_path),
    )
    summary = trained(cfg, tmp_path)
    assert summary["test"]["top1_percent"] > 90
    assert 13 < summary["uncompressed_feature_bytes"] / summary["traffic"]["uplink_feature_bytes"] < 14


@pytest.mark.slow
def test_texts_are_learned(reviews, tmp_path):
    """By the words that say the class, wherever they stand; with signed features through the codec, and AdamW."""
    place, _ = reviews
    place = {name: str(path) for name, path in place.items()}
    cfg = config.Config(
        model=config.ModelConfig(name="transformer", width=0.25, activation="gelu"),
        data=config.DataConfig(name="reviews", text_length=12, vocabulary=500, **place),
        optim=config.OptimConfig(kind="adamw", learning_rate=3e-3, weight_decay=0.01, warmup_epochs=0.5),
        codec=compress.MaskEncoded(signed=True),
        clients=2,
        batch_size=30,
        epochs=3,
        out=str(tmp_path),
    )
    assert trained(cfg, tmp_path)["test"]["top1_percent"] > 90


def test_a_vocabulary_has_a_word_and_padding():
    with pytest.raises(ValueError, match=r"data.vocabulary must be at least 2, got 1"):
        config.Config(data=config.DataConfig(vocabulary=1))
