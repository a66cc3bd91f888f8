"""Texts and tables: from records to tokens and columns, and through networks of their own. Needs no prepared data."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import assemble, config, data, models, runs, train
from msjax.data import _records, _tfds

from .helpers import assert_close

tfds = pytest.importorskip("tensorflow_datasets")
kinds = tfds.features

NEGATIVE, POSITIVE = ("dull", "bleak", "tired"), ("Bright", "lively", "warm")


def sentences(count, seed=0):
    """Sentences of neutral words and one that gives the class away, and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    found = []
    for label in labels:
        words = [f"word{n}" for n in rng.integers(0, 40, rng.integers(2, 9))]
        words.insert(rng.integers(0, len(words)), rng.choice((NEGATIVE, POSITIVE)[label]))
        found.append(" ".join(words).encode())
    return found, labels


class Source(list):
    """Records with the interface of a TFDS data source."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def prepared(tmp_path, monkeypatch, name, features, splits):
    """A data_dir with a set of these features and records, read through TFDS's own classes but for the files."""
    folder = tmp_path / "tfds" / name / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": name, "version": "1.0.0"}))
    (folder / f"{name}-train.array_record-00000-of-00001").touch()
    info = types.SimpleNamespace(supervised_keys=None, features=kinds.FeaturesDict(features), splits=splits)
    builder = types.SimpleNamespace(info=info, as_data_source=lambda split, decoders: Source(splits[split]))
    fake = types.SimpleNamespace(builder_from_directory=lambda path: builder, features=kinds, decode=tfds.decode)
    monkeypatch.setattr(_tfds, "import_tfds", lambda purpose: fake)
    return {"data_dir": tmp_path / "tfds", "cache_dir": tmp_path / "cache"}


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """A set of texts like SST-2: the labels of its test split are hidden."""
    splits = {}
    for seed, (split, count) in enumerate({"train": 600, "validation": 100, "test": 20}.items()):
        texts, labels = sentences(count, seed)
        hidden = split == "test"
        splits[split] = [
            {"idx": n, "sentence": text, "label": -1 if hidden else label}
            for n, (text, label) in enumerate(zip(texts, labels, strict=True))
        ]
    features = {"idx": np.int32, "sentence": kinds.Text(), "label": kinds.ClassLabel(num_classes=2)}
    return prepared(tmp_path, monkeypatch, "reviews", features, splits), splits


@pytest.fixture
def people(tmp_path, monkeypatch):
    """A table of two numbers, one of them constant, and a class."""
    rng = np.random.default_rng(0)

    def rows(count):
        return [
            {"age": 20 + 5 * rng.normal(), "one": 3, "job": rng.integers(0, 3), "label": rng.integers(0, 2)}
            for _ in range(count)
        ]

    splits = {"train": rows(200), "test": rows(30)}
    features = {"age": np.float32, "one": np.int64}
    features |= {"job": kinds.ClassLabel(num_classes=3), "label": kinds.ClassLabel(num_classes=2)}
    return prepared(tmp_path, monkeypatch, "people", features, splits), splits


def test_words_become_tokens():
    hashes = _records.word_hashes(["Good  movie\n", "", "a good one , really"])
    assert hashes.shape == (3, 5) and hashes.dtype == np.uint32
    assert hashes[0, 0] == hashes[2, 1] and (hashes[1] == 0).all() and (hashes[0, 2:] == 0).all()
    found = _records.tokens(hashes, 4, 100)
    assert found.dtype == np.int32 and found.shape == (3, 4)
    assert found[0, 0] == found[2, 1] and (found[0, 2:] == _records.PAD).all() and (found[1] == _records.PAD).all()
    words = found[found != _records.PAD]
    assert len(words) == 6 and words.min() >= 1 and words.max() < 100  # two, none, and the first four of five
    # What a word's number is does not depend on the other texts: parties need not agree on a list of words.
    np.testing.assert_array_equal(_records.tokens(_records.word_hashes(["good one"]), 4, 100)[0, 0], found[0, 0])
    assert _records.tokens(hashes, 9, 100).shape == (3, 9)
    assert set(_records.tokens(hashes, 6, 2).ravel()) == {0, 1}


def test_words_are_spread_over_the_vocabulary():
    found = _records.tokens(_records.word_hashes([" ".join(f"w{n}" for n in range(1000))]), 1000, 65)[0]
    counts = np.bincount(found - 1, minlength=64)
    assert np.sum((counts - 1000 / 64) ** 2 / (1000 / 64)) < 110  # chi-square of 63 degrees, p below 0.001


def test_texts(reviews, monkeypatch):
    place, splits = reviews
    ds = data.load("reviews", text_length=8, vocabulary=500, **place)
    assert ds.train_inputs.shape == (600, 8) and ds.train_inputs.dtype == np.int32
    assert ds.test_inputs.shape == (100, 8)  # of `validation`, since the labels of `test` are hidden
    np.testing.assert_array_equal(ds.test_labels, [row["label"] for row in splits["validation"]])
    assert ds.num_classes == 2 and ds.mean.shape == ds.std.shape == (0,)
    expected = _records.tokens(_records.word_hashes([splits["train"][7]["sentence"].decode()]), 8, 500)
    np.testing.assert_array_equal(ds.train_inputs[7:8], expected)
    # The cache does not depend on how texts are cut and numbered.
    monkeypatch.setattr(_tfds, "open_split", None)
    assert data.load("reviews", text_length=5, vocabulary=50, **place).train_inputs.max() < 50


def test_tables(people):
    place, splits = people
    ds = data.load("people", **place)
    assert ds.train_inputs.shape == (200, 5) and ds.train_inputs.dtype == np.float32
    ages, jobs = (np.array([row[key] for row in splits["train"]]) for key in ("age", "job"))
    np.testing.assert_allclose(ds.train_inputs[:, 0], ages, rtol=1e-6)  # columns by name: age, job's three, one
    np.testing.assert_array_equal(ds.train_inputs[:, 1:4], jobs[:, None] == np.arange(3))
    np.testing.assert_allclose(ds.mean, [ages.mean(), 0, 0, 0, 3], rtol=1e-5)
    np.testing.assert_allclose(ds.std, [ages.std(), 1, 1, 1, 1], rtol=1e-5)  # a constant is not divided by zero
    x = data.normalize(jnp.asarray(ds.train_inputs), ds.mean, ds.std)
    np.testing.assert_allclose(x[:, 0], (ages - ages.mean()) / ages.std(), atol=1e-5)
    np.testing.assert_array_equal(x[:, 1:4], ds.train_inputs[:, 1:4])
    assert (x[:, 4] == 0).all()


def test_breast_cancer_is_embedded():
    ds = data.load("breast_cancer")
    assert ds.train_inputs.shape == (455, 30) and ds.test_inputs.shape == (114, 30)
    assert (np.bincount(ds.test_labels) == 57).all() and ds.num_classes == 2
    x = data.normalize(jnp.asarray(ds.train_inputs), ds.mean, ds.std)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ({"image": kinds.Image(shape=(8, 8, 3)), "id": kinds.Text()}, _records.Images("image", (8, 8, 3))),
        ({"text": kinds.Text(), "more": kinds.Text(), "n": np.int32}, _records.Texts(("more", "text"))),
        (
            {"x": np.float32, "b": np.bool_, "c": kinds.ClassLabel(num_classes=4)},
            _records.Columns(("b", "c", "x"), (0, 4, 0)),
        ),
        ({"x": kinds.Tensor(shape=(3,), dtype=np.float32)}, None),
        ({}, None),
    ],
)
def test_what_is_classified(features, found):
    features = dict(kinds.FeaturesDict(features | {"label": kinds.ClassLabel(num_classes=2)}))
    assert _tfds._inputs(tfds, "set", "folder", features, None, "label") == found


def test_wrong_sets_and_options(tmp_path, monkeypatch, reviews):
    place, _ = reviews
    with pytest.raises(data.DataError, match=r"reviews .* has no images; only they are streamed"):
        data.stream("reviews", **place)
    with pytest.raises(ValueError, match="text_length must be at least 1, got 0"):
        data.load("reviews", text_length=0, **place)
    with pytest.raises(ValueError, match=r"data.vocabulary must be at least 2, got 1"):
        config.Config(data=config.DataConfig(vocabulary=1))
    with pytest.raises(ValueError, match=r'data.augment must be "none" for inputs that are no images'):
        data.augment(jnp.zeros((2, 3), jnp.int32), jax.random.key(0), kind="crop_flip")
    with pytest.raises(
        ValueError, match=r"data.name must be a set of numbers, which the model takes, got one of tokens"
    ):
        data.normalize(jnp.zeros((2, 3), jnp.int32), (), (), jnp.float32)
    splits = {"train": [{"x": [1, 2], "label": 0}]}
    features = {"x": kinds.Sequence(np.int32), "label": kinds.ClassLabel(num_classes=2)}
    (tmp_path / "other").mkdir()
    odd = prepared(tmp_path / "other", monkeypatch, "odd", features, splits)
    with pytest.raises(data.DataError, match=r"odd .* is no set of images, texts or a table"):
        data.load("odd", **odd)


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
        return train.train(cfg, folder, quiet=True)
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
        codec=config.MaskEncoded(signed=True),
        clients=2,
        batch_size=30,
        epochs=3,
        out=str(tmp_path),
    )
    assert trained(cfg, tmp_path)["test"]["top1_percent"] > 90


def test_adamw_is_decoupled_and_scheduled():
    """The first update is the rate times the gradient's sign, plus the rate times the decay times the weight."""
    optim = config.OptimConfig(kind="adamw", learning_rate=0.1, weight_decay=0.5, schedule="constant")
    rule = assemble.make_optimizer(optim, epochs=1, steps_per_epoch=10)
    weights = jnp.array([2.0, -1.0])
    updates, _ = rule.update(jnp.array([3.0, -0.1]), rule.init(weights), weights)
    np.testing.assert_allclose(updates, [-0.1 - 0.1 * 0.5 * 2, 0.1 + 0.1 * 0.5], rtol=1e-4)
