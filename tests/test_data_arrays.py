"""A user's arrays and .npz files as data sets, and the rules that every set must keep."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import build, config, data
from msjax.distributed import agreement

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
TABLE = RNG.normal(size=(20, 4))
CLASSES = np.arange(20) % 3


def test_images_are_measured_and_labels_counted():
    ds = data.from_arrays((IMAGES, CLASSES), (IMAGES[:4], CLASSES[:4]))
    assert ds.num_classes == 3 and len(ds.train) == 20 and len(ds.test) == 4 and ds.in_memory
    assert ds.train_inputs is IMAGES  # not copied
    assert ds.train_labels.dtype == np.int32
    np.testing.assert_allclose(ds.mean, (IMAGES / 255).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(ds.std, (IMAGES / 255).std((0, 1, 2)), rtol=1e-5)
    assert ds.input_like == jax.ShapeDtypeStruct((6, 5, 3), np.uint8)
    assert ds.label_like == jax.ShapeDtypeStruct((), np.int32)
    assert isinstance(ds.train, data.Split) and ds.augment == "none"
    x, y = ds.train.fetch(np.array([3, 1]))
    np.testing.assert_array_equal(x, IMAGES[[3, 1]])
    np.testing.assert_array_equal(y, [0, 1])


def test_dtypes_and_shapes_become_those_that_networks_take(caplog):
    grey = data.from_arrays((IMAGES[..., 0], CLASSES.astype(np.uint8)[:, None]))  # as Keras and MedMNIST have them
    assert grey.input_like.shape == (6, 5, 1) and grey.label_like == jax.ShapeDtypeStruct((), np.int32)
    for inputs, dtype in (
        (TABLE, np.float32),
        (TABLE > 0, np.float32),
        (jnp.asarray(TABLE, jnp.bfloat16), np.float32),
        (np.arange(40).reshape(20, 2), np.int32),
        (TABLE.tolist(), np.float32),
    ):
        ds = data.from_arrays((inputs, CLASSES.tolist()))
        assert ds.input_like.dtype == dtype and ds.mean is None and ds.num_classes == 3
    assert data.from_arrays((TABLE, CLASSES == 0)).num_classes == 2
    assert data.from_arrays((TABLE, CLASSES), num_classes=7).num_classes == 7
    assert not caplog.messages
    assert data.from_arrays((TABLE, CLASSES + 2), (TABLE, CLASSES + 1)).num_classes == 5
    assert "labels of arrays are from 1 to 4; they count from 0, so the classes below 1 have no samples" in caplog.text


def test_numbers_that_are_no_classes_make_no_network(tmp_path):
    """A network would have half a million outputs; to predict numbers they are what they are."""
    labels = np.linspace(50_000, 500_000, len(TABLE)).astype(np.int64)
    np.savez(tmp_path / "a.npz", x=TABLE, y=labels)
    cfg = config.Config(data=config.DataConfig(name=str(tmp_path / "a.npz")))
    wrong = r"labels of a.npz must be numbers of classes, .* got \d+ different ones up to 500,000: number them anew"
    with pytest.raises(data.DataError, match=wrong):
        build.load_data(cfg)
    numbers = build.load_data(dataclasses.replace(cfg, task=config.TaskConfig("regression")))
    assert len(numbers.train) + len(numbers.test) == len(TABLE)


def test_labels_that_are_no_classes():
    numbers = data.from_arrays((TABLE, TABLE[:, 0]))
    assert numbers.num_classes is None and numbers.train_labels.dtype == np.float32
    pixels = data.from_arrays((IMAGES, IMAGES[..., 0] > 99))
    assert pixels.num_classes is None and pixels.label_like == jax.ShapeDtypeStruct((6, 5), np.int32)
    assert data.from_arrays((IMAGES, IMAGES[..., 0]), num_classes=4).num_classes == 4  # for the task to check


def test_trees_of_arrays():
    inputs, labels = {"image": IMAGES, "age": TABLE[:, 0]}, (CLASSES, TABLE[:, 1])
    ds = data.from_arrays((inputs, labels), test_share=0.25)
    assert len(ds.test) == 5 and ds.num_classes is None and ds.mean is None
    assert ds.input_like == {
        "image": jax.ShapeDtypeStruct((6, 5, 3), np.uint8),
        "age": jax.ShapeDtypeStruct((), np.float32),
    }
    (x, y), *_ = data.batches(ds.train, np.arange(8).reshape(2, 2, 2))
    assert x["image"].shape == (2, 2, 6, 5, 3) and x["age"].shape == y[0].shape == (2, 2)


def test_missing_values_of_a_table(tmp_path):
    table = TABLE.copy()
    table[[2, 5], 1], table[3, 2] = np.nan, np.inf
    test = TABLE[:4].copy()
    test[1, 0] = test[2, 1] = np.nan
    ds = data.from_arrays((table, CLASSES), (test, CLASSES[:4]), missing="median")
    known = np.float32(np.delete(table[:, 1], [2, 5]))
    assert ds.train_inputs.shape == (20, 6)  # two of four columns miss values
    np.testing.assert_array_equal(ds.train_inputs[[2, 5], 1], [np.median(known)] * 2)
    np.testing.assert_array_equal(np.flatnonzero(ds.train_inputs[:, 2]), [2, 5])
    np.testing.assert_array_equal(np.flatnonzero(ds.train_inputs[:, 4]), [3])
    np.testing.assert_array_equal(ds.train_inputs[:, [0, 5]], np.float32(TABLE[:, [0, 3]]))
    # Of a column that only test rows miss values of there is the median, and no column that says so.
    assert ds.test_inputs[1, 0] == np.median(np.float32(TABLE[:, 0])) and ds.test_inputs[2, 2] == 1
    np.savez(tmp_path / "set.npz", x_train=table, y_train=CLASSES, x_test=test, y_test=CLASSES[:4])
    same = data.load(str(tmp_path / "set.npz"), missing="median")
    np.testing.assert_array_equal(same.train_inputs, ds.train_inputs)
    np.testing.assert_array_equal(same.test_inputs, ds.test_inputs)
    scaled = data.from_arrays((table, CLASSES), missing="median", normalize=True)
    x = data.normalize(jnp.asarray(scaled.train_inputs), scaled.mean, scaled.std)
    np.testing.assert_allclose(x[:, [0, 1, 3, 5]].mean(0), 0, atol=1e-6)
    with pytest.raises(data.DataError, match=r'missing must be "refuse" for inputs that are no table, .*\(6, 5, 3\)'):
        data.from_arrays((IMAGES, CLASSES), missing="median")
    with pytest.raises(data.DataError, match="column '1' must have values, got none"):
        data.from_arrays((np.where(np.arange(4) == 1, np.nan, TABLE), CLASSES), missing="median")
    with pytest.raises(data.DataError, match='missing must be "refuse" or "median", got \'drop\''):
        data.from_arrays((TABLE, CLASSES), missing="drop")


def test_floats_are_normalized_where_asked():
    ds = data.from_arrays((TABLE * 3 + 5, CLASSES), normalize=True)
    x = data.normalize(jnp.asarray(ds.train_inputs), ds.mean, ds.std)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-5)
    plain = data.from_arrays((TABLE, CLASSES))
    np.testing.assert_array_equal(data.normalize(jnp.asarray(plain.train_inputs), None, None), plain.train_inputs)
    constant = data.from_arrays((np.ones((4, 2, 1), np.float32), np.zeros(4)), normalize=True)
    assert constant.std == [1] and constant.columns is None


DATES = 20200101 + np.arange(84) % 28
"""In float32 there are 15 of them."""


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint32])
@pytest.mark.parametrize("axes", [1, 2])
def test_large_numbers_are_centred_before_they_are_rounded(dtype, axes):
    inputs = np.stack([DATES, np.arange(84) % 5], axis=1).astype(dtype)
    inputs = inputs.reshape(-1, *(3,) * (axes - 1), 2)
    expected = (inputs - inputs.reshape(-1, 2).mean(0)) / inputs.reshape(-1, 2).std(0)
    pair = (inputs, np.arange(len(inputs)) % 2)
    ds = data.from_arrays(pair, (inputs[:9].astype(np.float64), pair[1][:9]), normalize=True)
    assert ds.mean is None and ds.std is None and len(np.unique(ds.train_inputs[..., 0])) == 28
    np.testing.assert_allclose(ds.train_inputs, expected, atol=1e-6)
    np.testing.assert_array_equal(ds.test_inputs, ds.train_inputs[:9])
    np.testing.assert_allclose([ds.columns[0].mean, ds.columns[0].std], [DATES.mean(), DATES.std()], rtol=1e-12)
    items = list(zip(inputs, pair[1].tolist(), strict=True))
    for in_memory in (True, False):
        same = data.from_sequence(items, streamed=not in_memory, num_classes=2, normalize=True, test_share=0.5)
        chosen = same.train.fetch(np.arange(len(same.train)))[0]
        assert chosen.dtype == same.input_like.dtype == np.float32
        if in_memory:
            np.testing.assert_allclose(chosen.reshape(-1, 2).mean(0), 0, atol=1e-6)
            np.testing.assert_allclose(chosen.reshape(-1, 2).std(0), 1, atol=1e-6)
        assert len(np.unique(chosen[..., 0])) > 15


def test_large_numbers_are_not_rounded_in_silence(tmp_path):
    dates = np.stack([np.ones(84), DATES], axis=1).astype(np.float64)
    with pytest.raises(
        data.DataError,
        match=r"train inputs must be .* numbers up to 20200128 in column 1, .* steps of 2 .*normalize=True",
    ):
        data.from_arrays((dates, DATES % 2))
    assert len(data.from_arrays((dates.astype(np.float32), DATES % 2)).train) == 84  # it is the user who has rounded
    np.savez(tmp_path / "dates.npz", x=dates, y=DATES % 2)
    cfg = config.Config(data=config.DataConfig(name=str(tmp_path / "dates.npz"), normalize=True))
    assert len(np.unique(build.load_data(cfg).train_inputs[:, 1])) > 24  # of 28, in four of five rows


def test_integers_are_tokens_unless_they_are_normalized():
    assert data.from_arrays((DATES[:, None], DATES % 2)).input_like.dtype == np.int32
    small = data.from_arrays((np.uint8(DATES % 28)[:, None], DATES % 2), normalize=True)  # uint8, but no images
    assert small.input_like == jax.ShapeDtypeStruct((1,), np.float32) and small.columns[0].mean == 13.5
    assert data.from_arrays((IMAGES, CLASSES), normalize=True).input_like.dtype == np.uint8


def test_images_of_other_integers_are_refused():
    for dtype in (np.int64, np.uint16, np.int8):
        with pytest.raises(
            data.DataError, match=rf"inputs must be uint8 where they are images .*got {np.dtype(dtype)} "
        ):
            data.from_arrays((IMAGES.astype(dtype), CLASSES))
        with pytest.raises(
            data.DataError, match=rf"item 0 must be uint8 where they are images .*got {np.dtype(dtype)} "
        ):
            data.from_sequence([(image, 0) for image in IMAGES.astype(dtype)])
        assert data.from_arrays((IMAGES.astype(dtype), CLASSES), normalize=True).input_like.dtype == np.float32
    assert data.from_arrays((IMAGES.astype(int)[..., 0], CLASSES)).input_like.shape == (6, 5)  # which may be tokens


def test_columns_make_inputs_of_other_rows():
    table = np.stack([DATES, np.where(np.arange(84) == 3, np.nan, 1)], axis=1)
    ds = data.from_arrays((table, DATES % 2), normalize=True, missing="median")
    summary = build.DataSummary.from_json(json.loads(json.dumps(build.DataSummary.of(ds).to_json())))
    np.testing.assert_array_equal(data.table_inputs(summary.columns, table[:5], "new rows"), ds.train_inputs[:5])
    description = agreement.describe(types.SimpleNamespace(describe=dict), summary)
    assert "columns" not in agreement.parse(description)["data"]  # which says what is in a client's rows
    # A config's mean and std are of the columns as they were.
    cfg = config.DataConfig(mean=(20200100.0, 0.0, 0.0), std=(10.0, 1.0, 1.0))
    given = summary.normalized_as(cfg)
    x = data.normalize(jnp.asarray(ds.train_inputs), given.mean, given.std)
    np.testing.assert_allclose(x[:, 0], (DATES - 20200100) / 10, rtol=1e-5)


@pytest.mark.parametrize(
    "table",
    [
        lambda dates: pytest.importorskip("pandas").DataFrame({"when": dates, "one": 1.0}),
        lambda dates: {"when": dates},
        lambda dates: np.where(np.arange(len(dates)) == 3, np.nan, dates)[:, None],
        lambda dates: dates[:, None].astype(">f8"),
        lambda dates: dates[:, None].astype(object),
    ],
    ids=["pandas", "dict", "missing", "big-endian", "objects"],
)
def test_what_float32_would_round_is_refused_in_whatever_form(table):
    dates = 1.7e9 + np.arange(84.0)
    options = {"missing": "median"} if table(dates[:5]).__class__ is np.ndarray else {}
    with pytest.raises(data.DataError, match=r"must be such as float32 tells apart, got numbers up to 1\.7"):
        data.from_arrays((table(dates), np.arange(84) % 2), **options)


def test_equal_numbers_differ_by_nothing():
    """Their mean is rounded, and what is left of it is no deviation."""
    table = np.stack([np.full(84, 0.1), np.arange(84.0)], 1)
    y = np.arange(84) % 2
    for inputs in (table, pytest.importorskip("pandas").DataFrame(table), table.tolist()):
        assert data.from_arrays((inputs, y)).input_like.shape == (2,)
    ds = data.from_arrays((table, y), (table + 0.1, y), normalize=True)
    assert not ds.train_inputs[:, 0].any() and ds.test_inputs[0, 0] == pytest.approx(0.1)
    series = np.stack([table] * 3, 1)
    ds = data.from_arrays((series, y), (series + 0.1, y), normalize=True)
    assert not ds.train_inputs[..., 0].any() and np.abs(ds.test_inputs[..., 0] - 0.1).max() < 1e-6


def test_doubles_of_another_order_of_bytes_are_centred_before_they_are_rounded():
    table = (1.7e9 + np.arange(84.0))[:, None]
    found, other = (data.from_arrays((x, np.arange(84) % 2), normalize=True) for x in (table, table.astype(">f8")))
    np.testing.assert_array_equal(found.train_inputs, other.train_inputs)
    assert found.train_inputs.std() == pytest.approx(1, rel=0.1)


def test_tables_whose_columns_are_in_another_order_are_refused():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(8.0), "b": 1.0})
    y = np.arange(8) % 2
    with pytest.raises(data.DataError, match=r"must have the columns of train, .* got 'b' in place of 'a' as column 0"):
        data.from_arrays((frame, y), (frame[["b", "a"]], y))
    assert len(data.from_arrays((frame, y), (frame, y)).test) == 8


def test_a_summary_keeps_how_arrays_are_nested():
    """A server builds its part from it, whose labels are then what the loss takes: in order, whatever their number."""
    many = tuple(np.full((20, 2), n, np.float32) for n in range(12))
    cases = [
        ((IMAGES, CLASSES), CLASSES),
        ({"a": IMAGES, "b": CLASSES}, CLASSES),
        ((many[0], CLASSES), {"main": {"y": CLASSES}, "weight": many[1]}),
        (many, (CLASSES, CLASSES)),
    ]
    for inputs, labels in cases:
        summary = build.DataSummary.of(data.from_arrays((inputs, labels), num_classes=3))
        written = summary.to_json()
        found = build.DataSummary.from_json(json.loads(json.dumps(written)))
        assert (found.inputs, found.labels) == (summary.inputs, summary.labels)
        assert ("labels_structure" in written) == (labels is not CLASSES)
    assert "inputs_structure" not in build.DataSummary.of(data.from_arrays(cases[1])).to_json()
    deep = 0
    for _ in range(40):
        deep = {"tuple": [deep]}
    for wrong in (7, True, "a", {"tuple": 0}, {"set": [0]}, {"tuple": [1, 0]}, {"tuple": [0]}, {"dict": [0, 1]}, deep):
        with pytest.raises(ValueError, match="description must be that of a client's data and run"):
            agreement.summary_of({"data": written | {"normalized channels": None, "labels_structure": wrong}})


def test_a_skewed_division_needs_one_array_of_classes():
    ds = data.from_arrays((IMAGES, {"y": CLASSES, "weight": np.ones(20, np.float32)}))
    with pytest.raises(ValueError, match=r"alpha must be None where labels are several arrays, got 0.5: give"):
        build.divide(ds, 2, alpha=0.5, seed=0)
    assert len(build.divide(ds, 2, alpha=None, seed=0)[0]) == 2


def test_a_share_is_set_aside_of_each_class_alike():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    inputs = np.arange(100.0)[:, None]
    ds = data.from_arrays((inputs, labels), test_share=0.2)
    assert np.bincount(ds.test_labels).tolist() == [12, 6, 2]
    assert sorted(np.concatenate([ds.train_inputs, ds.test_inputs])[:, 0]) == list(range(100))
    again, other = (data.from_arrays((inputs, labels), test_share=0.2, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.test_inputs, ds.test_inputs)
    assert (other.test_inputs != ds.test_inputs).any()
    assert len(data.from_arrays((inputs, labels)).test) == 0


def test_names_of_classes(tmp_path, unchecked):
    names = ("a", "b", "c", "d", "e")
    np.savez(tmp_path / "own.npz", x=TABLE, y=CLASSES)
    found = build.load_data(config.Config(data=config.DataConfig(str(tmp_path / "own.npz"), classes=names)))
    assert found.classes == names and found.num_classes == 5 > CLASSES.max() + 1
    for wrong in ("cat", (), ("a", "a"), ("a", ""), (1, 2), {"a", "b"}):
        with pytest.raises(data.DataError, match="classes must be the different names of all classes, in order, got "):
            data.from_arrays((TABLE, CLASSES), classes=wrong)
    with pytest.raises(data.DataError, match="classes of arrays must be as many as num_classes, 3, got 5"):
        data.from_arrays((TABLE, CLASSES), classes=names, num_classes=3)
    for wrong in ("4", 4.0, True):
        with pytest.raises(data.DataError, match="num_classes of arrays must be an integer of at least 1, got "):
            data.from_arrays((TABLE, CLASSES), num_classes=wrong)
    for cfg in (
        config.Config(data=config.DataConfig("own.npz", classes=names), task=config.TaskConfig("regression")),
        config.Config(data=config.DataConfig(classes=names)),
        config.Config(data=config.DataConfig("own.TXT", classes=names)),
        config.Config(data=config.DataConfig(":load", classes=names)),
    ):
        with pytest.raises(ValueError, match=r"data.classes must be \(\) with .*, got \('a', 'b', 'c', 'd', 'e'\)"):
            build.load_data(cfg)
    with pytest.raises(ValueError, match=r"data.name must be .* where data.classes names classes, got 'mine'"):
        build.load_data(config.Config(data=config.DataConfig("mine", classes=names)))


BAD = {
    r"labels must be in 0..2 \(num_classes is 3\), got 5 at index 7": ((TABLE, np.r_[CLASSES[:7], 5, CLASSES[8:]]), 3),
    r"train labels must be in 0..\d \(num_classes is \d\), got -1 at index 2": ((TABLE, [0, 1, -1] + [1] * 17), None),
    r"labels must be integers where there are classes, got float32": ((TABLE, TABLE[:, 0]), 3),
    r"must have one length, got 20 inputs, 19 labels": ((TABLE, CLASSES[:-1]), None),
    r"train inputs must be finite .*, got nan at index 4 at \(2,\)": (
        (np.where(np.arange(80).reshape(20, 4) == 18, np.nan, TABLE), CLASSES),
        None,
    ),
    r"train labels must be finite .*, got inf at index 19": ((TABLE, np.r_[TABLE[:19, 0], 1e300]), None),
    r"train labels must be numbers, got <U3 .*'cat'.*number the classes": ((TABLE, ["cat"] * 20), None),
    r"train inputs must be numbers, got object .*'b'": ((np.array([1.0, True, "b", None] * 5, object), CLASSES), None),
    r"train inputs must make one array": (([[1, 2], [3]], [0, 1]), None),
    r"train inputs must be in -2147483648..2147483647 \(int32\), got 0..4294967296": (([[0], [2**32]], [0, 1]), None),
    r"must have examples to train on, got none": ((TABLE[:0], CLASSES[:0]), None),
    r"must have the examples along a first axis": ((TABLE, 3), None),
    r"channels of images last.*got \(3, 6, 5\)": ((np.moveaxis(IMAGES, -1, 1), CLASSES), None),
    r"must be a plain array, got a masked one": ((np.ma.masked_less(TABLE, 0), CLASSES), None),
    r"train must be \(inputs, labels\), got 3 of them": ((TABLE, TABLE, CLASSES), None),
    r"must be integers, floats or bools, got complex128": ((TABLE * 1j, CLASSES), None),
}


@pytest.mark.parametrize("message", BAD)
def test_rules(message, unchecked):
    train, num_classes = BAD[message]
    with pytest.raises(data.DataError, match=message):
        data.from_arrays(train, num_classes=num_classes)


def test_rules_of_train_and_test():
    train = (TABLE, CLASSES)
    with pytest.raises(
        data.DataError, match=r"inputs of train and test must have one shape.*float32\[4\].*float32\[3\]"
    ):
        data.from_arrays(train, (TABLE[:, :3], CLASSES))
    with pytest.raises(data.DataError, match=r"labels of train and test must have one .*int32\[\] and float32\[\]"):
        data.from_arrays(train, (TABLE, TABLE[:, 0]))
    with pytest.raises(data.DataError, match="inputs of train and test must have one structure"):
        data.from_arrays(train, ({"x": TABLE}, CLASSES))
    with pytest.raises(data.DataError, match="test must have examples, got none"):
        data.from_arrays(train, (TABLE[:0], CLASSES[:0]))
    with pytest.raises(data.DataError, match="test_share must be None where test is given"):
        data.from_arrays(train, train, test_share=0.5)
    for share, message in ((1.5, "between 0 and 1"), (0.01, "leave examples to test on"), (0.99, "to train on")):
        with pytest.raises(data.DataError, match=f"test_share must .*{message}"):
            data.from_arrays(train, test_share=share)
    with pytest.raises(data.DataError, match="normalize must be False for inputs that are no images or one array"):
        data.from_arrays(({"x": TABLE}, CLASSES), normalize=True)


def test_a_streamed_split_has_no_arrays():
    ds = data.from_arrays((TABLE, CLASSES))
    ds = dataclasses.replace(
        ds, train=data.from_sequence(list(zip(TABLE, CLASSES, strict=True)), streamed=True, num_classes=3).train
    )
    assert not ds.in_memory and len(ds.test_labels) == 0
    with pytest.raises(data.DataError, match=r"the train split of arrays is not in memory: read it by data.batches"):
        _ = ds.train_inputs


def test_objects_that_are_numbers_are_taken_as_such():
    """As of a table whose columns differ in type; what lacks is NaN, and refused as such."""
    mixed = np.array([[0.5, True, 3], [1.5, False, np.int64(4)]], object)
    found = data.from_arrays((mixed, np.array([0, True], object)))
    np.testing.assert_array_equal(found.train_inputs, np.float32([[0.5, 1, 3], [1.5, 0, 4]]))
    assert found.num_classes == 2
    bools = data.from_arrays((np.array([[True], [False]], object), [0, 1]))
    assert bools.train_inputs.dtype == np.float32
    mask = np.array([[True], [False]])
    with_mask = data.from_arrays(({"x": mask.astype(int), "mask": mask}, [0, 1]))
    assert with_mask.train_inputs["mask"].dtype == bool and with_mask.train_inputs["x"].dtype == np.int32
    with pytest.raises(data.DataError, match=r"train inputs must be in .* \(int32\), got 1180591620717411303424"):
        data.from_arrays((np.array([[2**70], [1]], object), [0, 1]))
    mixed[1, 0] = None
    with pytest.raises(data.DataError, match=r"train inputs must be finite .*, got nan at index"):
        data.from_arrays((mixed, [0, 1]))


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    for names in (
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ):
        np.savez(
            path, **dict(zip(names, (IMAGES, CLASSES[:, None], IMAGES[:6], CLASSES[:6, None]), strict=True)), val=1
        )
        ds = data.from_npz(path)
        assert (len(ds.train), len(ds.test), ds.num_classes, ds.name) == (20, 6, 3, "set.npz")
    np.savez(path, x=TABLE, y=CLASSES)
    assert len(data.from_npz(path).test) == 4 and len(data.from_npz(path, test_share=None).test) == 0
    np.savez(path, mine=TABLE, yours=CLASSES)
    assert data.from_npz(path, inputs="mine", labels="yours").input_like.shape == (4,)
    with pytest.raises(data.DataError, match=r"set.npz must have arrays named x_train, .*it has mine, yours"):
        data.from_npz(path)
    np.savez(path, x=TABLE, y=CLASSES, values=1, latest=2, contests=3)
    assert len(data.from_npz(path).train) == 16
    for more in ({"x_test": TABLE}, {"x_val": TABLE, "y_val": CLASSES}, {"Xtest": TABLE}, {"validImages2": TABLE}):
        np.savez(path, x_train=TABLE, y_train=CLASSES, **more)
        with pytest.raises(data.DataError, match=f"set.npz has arrays that would not be used, {', '.join(more)}: name"):
            data.from_npz(path)
    np.savez(path, mine=TABLE, yours=CLASSES)
    with pytest.raises(data.DataError, match="has no array hers; it has mine, yours"):
        data.from_npz(path, inputs="hers", labels="yours")
    with pytest.raises(data.DataError, match="inputs and labels must both be named"):
        data.from_npz(path, inputs="mine")
    np.savez(path, x=TABLE, y=np.array([{}] * 20))
    with pytest.raises(data.DataError, match=r"array y of .*set.npz cannot be read: .*allow_pickle=False"):
        data.from_npz(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(data.DataError, match=r"set.npz cannot be read as an .npz file"):
        data.from_npz(path)
