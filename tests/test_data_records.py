"""Texts and tables of prepared sets: from records to tokens and columns. Needs no prepared data."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import build, config, data, parts
from msjax.data import _records, _tfds, _words
from msjax.data._records import Feature
from msjax.distributed import agreement
from msjax.distributed.client_program import ClientProgram
from msjax.distributed.options import ClientOptions
from msjax.runs import RunFolder
from msjax.split.spec import Preprocess
from msjax.training import loaded, program, saved
from msjax.training.from_config import load_run, train_config

from .data_helpers import Records, prepare_reviews, prepared

tfds = pytest.importorskip("tensorflow_datasets")
kinds = tfds.features


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    return prepare_reviews(tmp_path, monkeypatch)


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
    hashes = _words.word_hashes(["Good  movie\n", "", "a good one, really"])
    assert hashes.shape == (3, 5) and hashes.dtype == np.uint32
    assert hashes[0, 0] == hashes[2, 1] and (hashes[1] == 0).all() and (hashes[0, 2:] == 0).all()
    found = _records.tokens(hashes, 4, 100)
    assert found.dtype == np.int32 and found.shape == (3, 4)
    assert found[0, 0] == found[2, 1] and (found[0, 2:] == _records.PAD).all() and (found[1] == _records.PAD).all()
    words = found[found != _records.PAD]
    assert len(words) == 6 and words.min() >= 1 and words.max() < 100  # two, none, and the first four of five
    # What a word's number is does not depend on the other texts: parties need not agree on a list of words.
    np.testing.assert_array_equal(_records.tokens(_words.word_hashes(["good one"]), 4, 100)[0, 0], found[0, 0])
    assert _records.tokens(hashes, 9, 100).shape == (3, 9)
    assert set(_records.tokens(hashes, 6, 2).ravel()) == {0, 1}


SAME = {
    "composed and decomposed": ("Caf\u00e9", "Cafe\u0301", ["caf\u00e9"]),
    "full width, ligatures": ("\uff27\uff4f \ufb01ne", "go fine", ["go", "fine"]),
    "case": (
        "STRASSE \u039f\u0394\u039f\u03a3",
        "stra\u00dfe \u03bf\u03b4\u03bf\u03c2",
        ["strasse", "\u03bf\u03b4\u03bf\u03c3"],
    ),
    "zero width": ("go\u200bo\u00add\ufeff \u200edog\u2060", "good dog", ["good", "dog"]),
    "zero width before an accent": ("e\u200d\u0301e\ufe00\u0327", "\u00e9\u0229", ["\u00e9\u0229"]),
    "half of a pair": ("a\ud800", "a \ud800", ["a", "\ud800"]),
    "variation selectors": ("\u2764\ufe0f", "\u2764", ["\u2764"]),
    "controls": ("go\x00od\x1fdog", "good dog", ["good", "dog"]),
    "spaces": ("a\u00a0b\u3000c\u2028d", "a b\tc\nd", ["a", "b", "c", "d"]),
    "punctuation": (
        "It's good. (Really_3!)",
        "it ' s good . ( really _ 3 ! )",
        ["it", "'", "s", "good", ".", "(", "really", "_", "3", "!", ")"],
    ),
    "punctuation of others": (
        "\u201cgut\u201d\u2026",
        "\u201c gut \u201d ...",
        ["\u201c", "gut", "\u201d", ".", ".", "."],
    ),
    "vowel signs": (
        "\u0939\u093f\u0928\u094d\u0926\u0940\u0964",
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u0964",
        ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0964"],
    ),
    "nothing": ("\u200b \ufeff", "", []),
}


@pytest.mark.parametrize("what", SAME)
def test_texts_that_say_the_same_have_the_same_words(what):
    one, other, expected = SAME[what]
    assert _words.words(one) == _words.words(other) == expected
    assert _words.words(" ".join(expected)) == expected  # so it does not matter how often
    np.testing.assert_array_equal(_words.word_hashes([one]), _words.word_hashes([other]))


def test_words_have_these_hashes_on_every_machine():
    """If this fails after a change that was meant: raise `_words.TOKENIZER`, and write down the new hashes."""
    hashes = _words.word_hashes(["Good caf\u00e9, \ufb01ne!"])
    assert _words.TOKENIZER == 2
    assert hashes.tolist() == [[1820610194, 2561491637, 3772416878, 3198768274, 2657877971]]


def test_every_ascii_character():
    found = _words.words("".join(map(chr, range(128))))
    alone = "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"
    assert "".join(found) == alone.lower()
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert [word for word in found if len(word) > 1] == ["0123456789", letters, letters]


def test_caches_of_another_tokenizer_are_made_again(reviews, monkeypatch):
    place, _ = reviews
    ds = data.load("reviews", **place)
    assert ds.tokenizer == _words.TOKENIZER and data.load().tokenizer is None
    (meta,) = place["cache_dir"].glob("*/meta.json")
    kept = json.loads(meta.read_text())
    assert kept["tokenizer"] == _words.TOKENIZER
    for tokenizer in ({}, {"tokenizer": 3}):  # the first version did not write it down
        meta.write_text(json.dumps({n: v for n, v in kept.items() if n != "tokenizer"} | tokenizer))
        np.testing.assert_array_equal(data.load("reviews", **place).train_inputs, ds.train_inputs)
        assert json.loads(meta.read_text())["tokenizer"] == _words.TOKENIZER
    meta.write_text(json.dumps({n: v for n, v in kept.items() if n != "tokenizer"}))
    monkeypatch.setattr(_tfds, "locate", lambda *args: None)
    with pytest.raises(data.DataError, match=r"cannot be used \(its words are those of tokenizer 1, .* has 2\)"):
        data.load("reviews", **place)


def test_parties_and_runs_know_the_tokenizer(reviews):
    place, _ = reviews
    summary = build.DataSummary.of(data.load("reviews", **place))
    assert build.DataSummary.from_json(summary.to_json()).tokenizer == _words.TOKENIZER
    assert "tokenizer" not in build.DataSummary.of(data.load()).to_json()  # what other sets say is as it was
    here, there = ({"data": s.to_json()} for s in (summary, summary._replace(tokenizer=3)))
    assert agreement.differences(here, there) == "tokenizer is 2 here and 3 there"
    for present, trained in ((2, 2), (1, None), (None, None)):
        build.check_tokenizer(present, trained)
    for trained in (None, 1):
        with pytest.raises(ValueError, match=r"words of tokenizer 2, .*trained on those of tokenizer 1: train it anew"):
            build.check_tokenizer(2, trained)


def test_a_client_goes_on_with_its_own_tokenizer_alone(tmp_path):
    client = ClientProgram(ClientOptions(client_id=0, state=str(tmp_path)))
    client.session.name = "0" * 32
    client._check_tokenizer(2)  # nothing is trained yet
    (tmp_path / "checkpoints" / client.session.name / "10").mkdir(parents=True)
    client._check_tokenizer(2)
    client._check_tokenizer(None)
    with pytest.raises(ValueError, match="words of tokenizer 3"):
        client._check_tokenizer(3)
    (tmp_path / "checkpoints" / f"{client.session.name}.tokenizer").unlink()  # as the first version left it
    with pytest.raises(ValueError, match="trained on those of tokenizer 1"):
        client._check_tokenizer(2)


@pytest.mark.slow
def test_a_run_on_texts_goes_on_with_its_own_tokenizer_alone(reviews, tmp_path, monkeypatch):
    place, _ = reviews
    cfg = config.Config(
        model=config.ModelConfig(name="transformer", width=0.25),
        data=config.DataConfig(
            name="reviews", text_length=8, data_dir=str(place["data_dir"]), cache_dir=str(place["cache_dir"])
        ),
        clients=2,
        batch_size=100,
        epochs=1,
        out=str(tmp_path / "runs"),
    )
    folder = RunFolder.create(cfg, "run")
    train_config(cfg, folder, quiet=True)
    folder.close()
    run = load_run(cfg)
    folder, _ = RunFolder.open(tmp_path / "runs" / "run")
    state = program.place(run.spec, run.state, loaded.mesh_of(run.spec))
    assert saved.restore(folder, run, state, loaded.mesh_of(run.spec))[2]["tokenizer"] == 2
    older = run._replace(dataset=dataclasses.replace(run.dataset, tokenizer=3))
    with pytest.raises(ValueError, match=r"words of tokenizer 3, .*trained on those of tokenizer 2"):
        saved.restore(folder, older, state, loaded.mesh_of(run.spec))
    folder.close()
    assert parts.load_part(tmp_path / "runs" / "run" / "client.safetensors").summary.tokenizer == 2


def test_words_are_spread_over_the_vocabulary():
    found = _records.tokens(_words.word_hashes([" ".join(f"w{n}" for n in range(1000))]), 1000, 65)[0]
    counts = np.bincount(found - 1, minlength=64)
    assert np.sum((counts - 1000 / 64) ** 2 / (1000 / 64)) < 110  # chi-square of 63 degrees, p below 0.001


def test_texts(reviews, monkeypatch):
    place, splits = reviews
    ds = data.load("reviews", text_length=8, vocabulary=500, **place)
    assert ds.train_inputs.shape == (600, 8) and ds.train_inputs.dtype == np.int32
    assert ds.test_inputs.shape == (100, 8)  # of `validation`, since the labels of `test` are hidden
    np.testing.assert_array_equal(ds.test_labels, [row["label"] for row in splits["validation"]])
    assert ds.num_classes == 2 and ds.mean.shape == ds.std.shape == (0,)
    expected = _records.tokens(_words.word_hashes([splits["train"][7]["sentence"].decode()]), 8, 500)
    np.testing.assert_array_equal(ds.train_inputs[7:8], expected)
    # The cache does not depend on how texts are cut and numbered.
    monkeypatch.setattr(_tfds, "open_split", None)
    assert data.load("reviews", text_length=5, vocabulary=50, **place).train_inputs.max() < 50


def test_tables(people):
    place, splits = people
    ds = data.load("people", **place)
    assert ds.train_inputs.shape == (200, 5) and ds.train_inputs.dtype == np.float32
    ages, jobs = (np.array([row[key] for row in splits["train"]]) for key in ("age", "job"))
    assert [name for column in ds.columns for name in column.names] == ["age", "job=0", "job=1", "job=2", "one"]
    np.testing.assert_allclose(ds.train_inputs[:, 0], (ages - ages.mean()) / ages.std(), atol=1e-6)
    np.testing.assert_array_equal(ds.train_inputs[:, 1:4], jobs[:, None] == np.arange(3))
    assert (ds.train_inputs[:, 4] == 0).all()  # a constant is not divided by zero
    test_ages = np.array([row["age"] for row in splits["test"]])
    np.testing.assert_allclose(ds.test_inputs[:, 0], (test_ages - ages.mean()) / ages.std(), atol=1e-6)
    mean, std = data.column_statistics(ds.columns)
    np.testing.assert_allclose(mean, [ages.mean(), 0, 0, 0, 3], rtol=1e-12)
    np.testing.assert_allclose(std, [ages.std(), 1, 1, 1, 1], rtol=1e-12)
    assert ds.mean is None and ds.std is None
    with pytest.raises(
        ValueError, match=r"data.name must be a set of tokens, which the model takes, got one of numbers"
    ):
        Preprocess(dtype="int32")(ds.train_inputs[:2])


def test_large_numbers_of_a_table(people):
    place, splits = people
    for i, row in enumerate(splits["train"]):
        row["one"] = 20200101 + i % 28  # in float32 there are 15 of them
    ds = data.load("people", **place)
    dates = np.array([row["one"] for row in splits["train"]])
    assert len(np.unique(ds.train_inputs[:, 4])) == 28
    np.testing.assert_allclose(ds.train_inputs[:, 4], (dates - dates.mean()) / dates.std(), atol=1e-6)


def test_missing_values_of_a_table(people, monkeypatch):
    place, splits = people
    for split, row, value in (("train", 3, np.nan), ("train", 5, -np.inf), ("test", 2, np.nan)):
        splits[split][row]["age"] = value
    splits["test"][4]["one"] = np.nan
    with pytest.raises(
        data.DataError, match=r"got nan at index 3 of people \(train\), column 'age': training with missing="
    ):
        data.load("people", **place)
    monkeypatch.setattr(_tfds, "open_split", None)  # the cache holds what the set says: no choice is made in it
    ds = data.load("people", missing="median", **place)
    ages = np.array([row["age"] for row in splits["train"]])
    is_there = np.isfinite(ages)
    filled = np.where(is_there, ages, np.median(ages[is_there]))
    assert ds.train_inputs.shape == (
        200,
        6,
    )  # age, whether it is missing, three jobs, and one, which no training row misses
    np.testing.assert_allclose(ds.train_inputs[:, 0], (filled - filled.mean()) / filled.std(), atol=1e-6)
    np.testing.assert_array_equal(ds.train_inputs[:, 1], ~is_there)
    assert ds.test_inputs[2, 1] == 1 and ds.test_inputs[:, 1].sum() == 1 and ds.test_inputs[4, 5] == 0
    assert ds.columns[0].median == np.median(ages[is_there]) and ds.test_inputs[2, 0] == ds.train_inputs[3, 0]


def test_only_tables_miss_values(reviews):
    with pytest.raises(data.DataError, match=r'missing must be "refuse" for reviews, a set of texts .*got \'median\''):
        data.load("reviews", missing="median", **reviews[0])
    for streamed in (None, True):
        with pytest.raises(data.DataError, match='missing must be "refuse" for digits, a set of images and not'):
            data.load("digits", missing="median", streamed=streamed)
    with pytest.raises(data.DataError, match='missing must be "refuse" or "median", got \'mean\''):
        data.load("breast_cancer", missing="mean")
    assert data.load("breast_cancer", missing="median").train_inputs.shape == (455, 30)


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
            _records.Columns((Feature("b"), Feature("c", ("0", "1", "2", "3")), Feature("x"))),
        ),
        (
            {"x": kinds.Tensor(shape=(3,), dtype=np.float64), "d": {"a": np.int64, "b": {"c": np.str_}}},
            _records.Columns((Feature("d/a"), Feature("d/b/c", is_text=True), Feature("x", length=3))),
        ),
        ({"d": {"pixels": kinds.Image(shape=(8, 8, 1))}}, _records.Images("d/pixels", (8, 8, 1))),
        ({"d": {"review": kinds.Text()}}, _records.Texts(("d/review",))),
        ({"x": kinds.Sequence(np.float32)}, None),
        ({"x": kinds.Tensor(shape=(3, 4), dtype=np.float32)}, None),
        ({}, None),
    ],
)
def test_what_is_classified(features, found):
    features = _tfds._leaves(kinds, kinds.FeaturesDict(features | {"label": kinds.ClassLabel(num_classes=2)}))
    assert _tfds._inputs(tfds, "set", "folder", features, None, "label") == found


@pytest.mark.parametrize(
    ("supervised", "found"),
    [
        (None, (None, "label")),
        (("x", "y"), ({"x"}, "y")),
        (({"a": "a", "b": {"c": "d"}}, "y"), ({"a", "d"}, "y")),
        ((("a", "b"), "y"), ({"a", "b"}, "y")),
        (({"a": "a"}, {"y": "y"}, "weight"), ({"a"}, "y")),
    ],
)
def test_which_features_a_set_names(supervised, found):
    assert _tfds._keys(supervised) == found


VECTORS = np.random.default_rng(0).normal(size=(40, 4))
DATES, TOWNS = 20200101 + np.arange(40) % 28, np.array(["Rome", "Oslo", "Bonn"])


def table_set(tmp_path, monkeypatch, features, rows, supervised=None, **splits):
    """A set `table` with a train split, whose first rows are also a test split."""
    splits = {"train": rows, "test": rows[:10]} | splits
    splits = {name: rows for name, rows in splits.items() if rows is not None}
    features = features | {"label": kinds.ClassLabel(num_classes=2)}
    return prepared(tmp_path, monkeypatch, "table", features, splits, supervised)


def test_a_vector_is_columns(tmp_path, monkeypatch):
    rows = [{"features": x, "label": i % 2} for i, x in enumerate(VECTORS)]
    features = {"features": kinds.Tensor(shape=(4,), dtype=np.float64)}
    place = table_set(tmp_path, monkeypatch, features, rows, ("features", "label"))
    ds = data.load("table", **place)
    assert [column.name for column in ds.columns] == ["features/0", "features/1", "features/2", "features/3"]
    np.testing.assert_allclose(ds.train_inputs, (VECTORS - VECTORS.mean(0)) / VECTORS.std(0), atol=1e-6)
    some = data.load("table", drop=("features/0", "features/2"), **place)
    np.testing.assert_array_equal(some.train_inputs, ds.train_inputs[:, [1, 3]])
    np.testing.assert_array_equal(some.test_inputs, ds.test_inputs[:, [1, 3]])


@pytest.mark.parametrize("supervised", [None, ("features", "label"), ({"features": "features"}, "label")])
def test_dicts_of_columns_are_flattened(tmp_path, monkeypatch, supervised):
    rows = [
        {"features": {"date": d, "deep": {"town": TOWNS[i % 3].encode()}}, "label": i % 2} for i, d in enumerate(DATES)
    ]
    features = {"features": {"date": np.int64, "deep": {"town": np.str_}}}
    ds = data.load("table", **table_set(tmp_path, monkeypatch, features, rows, supervised))
    names = [name for column in ds.columns for name in column.names]
    assert names == ["features/date", *(f"features/deep/town={town}" for town in ("Bonn", "Oslo", "Rome"))]
    assert len(np.unique(ds.train_inputs[:, 0])) == 28
    np.testing.assert_array_equal(ds.train_inputs[:, 1:], TOWNS[np.arange(40) % 3][:, None] == np.sort(TOWNS))


def test_only_the_columns_that_a_set_names(tmp_path, monkeypatch):
    rows = [{"a": x[0], "b": x[1], "id": i, "label": i % 2} for i, x in enumerate(VECTORS)]
    features = {"a": np.float64, "b": np.float64, "id": np.int64}
    ds = data.load("table", **table_set(tmp_path, monkeypatch, features, rows, ({"a": "a"}, "label")))
    assert [column.name for column in ds.columns] == ["a"]


def test_columns_of_texts_are_classes_of_the_training_rows(tmp_path, monkeypatch):
    features = {"town": np.str_, "ticket": np.str_, "many": kinds.Sequence(np.int32), "age": np.float32}
    rows = [
        {"town": TOWNS[i % 3].encode(), "ticket": f"T{i}".encode(), "many": [1] * i, "age": i, "label": i % 2}
        for i in range(120)
    ]
    test = [rows[3] | {"town": b"Paris"}, rows[0]]
    place = table_set(tmp_path, monkeypatch, features, rows, test=test)
    with pytest.raises(
        data.DataError, match=r"column 'many' of table must be one value or a vector of fixed length, got Sequence"
    ):
        data.load("table", drop="ticket", **place)
    with pytest.raises(
        data.DataError,
        match=r"column 'ticket' must be .*at most 100 different texts, got 120 such as 'T0': leave it out",
    ):
        data.load("table", drop="many", **place)
    ds = data.load("table", drop=("ticket", "many"), **place)
    assert ds.input_like.shape == (4,) and ds.columns[1].texts == ("Bonn", "Oslo", "Rome")
    np.testing.assert_array_equal(ds.test_inputs[:, 1:], [[0, 0, 0], [0, 0, 1]])
    with pytest.raises(data.DataError, match=r"drop must name columns of table, which has age, many, .*got 'name'"):
        data.load("table", drop=("name",), **place)
    with pytest.raises(data.DataError, match="drop must leave columns of table, got all of them"):
        data.load("table", drop=("ticket", "many", "town", "age"), **place)
    cfg = config.Config(data=config.DataConfig(name="table", drop=("ticket", "many")))
    same = build.load_data(config.from_json(json.loads(json.dumps(config.to_json(cfg)))), **place)
    np.testing.assert_array_equal(same.train_inputs, ds.train_inputs)


def test_a_share_of_a_set_without_test_data_is_set_aside(tmp_path, monkeypatch):
    rows = [{"x": x[0], "label": i % 2} for i, x in enumerate(VECTORS)]
    place = table_set(tmp_path, monkeypatch, {"x": np.float64}, rows, test=None)
    ds = data.load("table", **place)
    assert (len(ds.train), len(ds.test)) == (32, 8) and np.bincount(ds.test_labels).tolist() == [4, 4]
    np.testing.assert_allclose([ds.train_inputs.mean(), ds.train_inputs.std()], [0, 1], atol=1e-6)  # of training rows
    monkeypatch.setattr(_tfds, "open_split", None)
    again = data.load("table", **place)
    np.testing.assert_array_equal(again.test_inputs, ds.test_inputs)
    half = build.load_data(config.Config(data=config.DataConfig(name="table", test_share=0.5)), **place)
    assert (len(half.train), len(half.test)) == (20, 20)
    whole = data.load("table", test_share=None, **place)
    assert (len(whole.train), len(whole.test)) == (40, 0)
    with pytest.raises(data.DataError, match=r"test_share must be between 0 and 1, .*got 1.5"):
        data.load("table", test_share=1.5, **place)


def test_images_and_hidden_labels_without_test_data(tmp_path, monkeypatch):
    images = Records(40, (6, 6, 1), 2)
    rows = [{"image": image, "label": i % 2} for i, image in enumerate(images.encoded)]
    hidden = [row | {"label": -1} for row in rows[:5]]
    place = table_set(tmp_path, monkeypatch, {"image": kinds.Image(shape=(6, 6, 1))}, rows, test=hidden)
    ds = data.load("table", **place)
    assert (len(ds.train), len(ds.test)) == (32, 8)
    np.testing.assert_allclose(ds.mean, [ds.train_inputs.mean() / 255], rtol=1e-6)  # of training images alone
    with pytest.raises(
        data.DataError, match=r"drop must be empty for table, a set of images and not a table, got .*'x'"
    ):
        data.load("table", drop="x", **place)
    with pytest.raises(data.DataError, match=r"has no test or validation split; none that has examples whose labels"):
        data.stream("table", "test", **place)


def test_an_empty_test_split_is_none(tmp_path, monkeypatch):
    images = Records(40, (6, 6, 1), 2)
    rows = [{"image": image, "label": i % 2} for i, image in enumerate(images.encoded)]
    place = table_set(tmp_path, monkeypatch, {"image": kinds.Image(shape=(6, 6, 1))}, rows, test=[])
    ds = data.load("table", **place)
    assert (len(ds.train), len(ds.test)) == (32, 8)
    with pytest.raises(data.DataError, match="has no test or validation split; none that has examples"):
        data.stream("table", "test", **place)


def test_images_in_a_dict(tmp_path, monkeypatch):
    images = Records(12, (6, 6, 1), 2)
    rows = [{"sample": {"pixels": image}, "label": i % 2} for i, image in enumerate(images.encoded)]
    features = {"sample": {"pixels": kinds.Image(shape=(6, 6, 1)), "id": np.int64}}
    place = table_set(tmp_path, monkeypatch, features, rows)
    np.testing.assert_array_equal(data.load("table", **place).train_inputs, images.images)
    assert data.stream("table", image_size=4, **place).fetch(np.array([1, 2]))[0].shape == (2, 4, 4, 1)


def test_wrong_sets_and_options(tmp_path, monkeypatch, reviews):
    place, _ = reviews
    with pytest.raises(data.DataError, match=r"reviews .* has no images; only they are streamed"):
        data.stream("reviews", **place)
    with pytest.raises(ValueError, match="text_length must be at least 1, got 0"):
        data.load("reviews", text_length=0, **place)
    with pytest.raises(ValueError, match=r"vocabulary must be at least 2, got 1"):
        data.load("reviews", vocabulary=1, **place)
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
