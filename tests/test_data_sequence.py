"""Anything with `__len__` and `__getitem__` as a data set, and `as_dataset`."""

import io
import threading
import types

import jax
import numpy as np
import pytest

from msjax import data

from .data_helpers import Image, png

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 4, 5, 3), dtype=np.uint8)
CLASSES = np.arange(50) % 3


class Pairs:
    """As PyTorch's map-style sets; counts how many read it at once."""

    def __init__(self, inputs=IMAGES, labels=CLASSES):
        self.inputs, self.labels = inputs, labels
        self.reading = self.most = 0
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        with self.lock:
            self.reading += 1
            self.most = max(self.most, self.reading)
        item = self.inputs[index], self.labels[index]
        with self.lock:
            self.reading -= 1
        return item


class Records:
    """As Hugging Face's and TFDS's: dicts, many at a time."""

    def __init__(self):
        self.features = {"label": types.SimpleNamespace(num_classes=4)}

    def __len__(self):
        return 50

    def __getitem__(self, index):
        raise AssertionError("__getitems__ is faster")

    def __getitems__(self, indices):
        return [{"image": Image.fromarray(IMAGES[i]), "label": int(CLASSES[i]), "id": "x"} for i in indices]


class Tensor:
    """As far as PyTorch's go."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_small_ones_are_read_into_memory():
    ds = data.from_sequence(Pairs(), Pairs(IMAGES[:9], CLASSES[:9]))
    assert ds.in_memory and ds.num_classes == 3 and (len(ds.train), len(ds.test)) == (50, 9)
    np.testing.assert_array_equal(ds.train_inputs, IMAGES)
    np.testing.assert_array_equal(ds.train_labels, CLASSES)
    np.testing.assert_allclose(ds.mean, (IMAGES / 255).mean((0, 1, 2)), rtol=1e-5)
    shared = data.from_sequence(Pairs(), test_share=0.2)
    assert np.bincount(shared.test_labels).tolist() == [4, 3, 3]


def test_large_ones_are_streamed(monkeypatch):
    monkeypatch.setattr(data._sequence, "_IN_MEMORY_BYTES", 1000)
    ds = data.from_sequence(Pairs(), num_classes=3, test_share=0.2)
    assert not ds.train.in_memory and (len(ds.train), len(ds.test)) == (40, 10)
    assert isinstance(ds.train, data.Split) and ds.input_like == jax.ShapeDtypeStruct((4, 5, 3), np.uint8)
    order = RNG.permutation(40).reshape(2, 4, 5)
    train = ds.train.fetch(np.arange(40))
    for step, (x, y) in enumerate(data.batches(ds.train, order, threads=3)):
        np.testing.assert_array_equal(x, train[0][order[step]])
        np.testing.assert_array_equal(y, train[1][order[step]])
    rest = np.concatenate([ds.train.labels(), ds.test.labels()])
    np.testing.assert_array_equal(np.sort(rest), np.sort(CLASSES))
    with pytest.raises(data.DataError, match="num_classes must be given for sequence: its labels are not in memory"):
        data.from_sequence(Pairs())


def test_dicts_of_many_things():
    ds = data.from_sequence(Records())
    np.testing.assert_array_equal(ds.train_inputs, IMAGES)
    assert ds.num_classes == 4  # as the features say
    assert data.from_sequence(Records(), streamed=True).num_classes == 4
    items = [{"a": Tensor(np.float64([i, 1])), "b": [1, 2], "c": Tensor(np.array(i, np.float32))} for i in range(5)]
    ds = data.from_sequence(items, inputs=("a", "b"), labels="c")
    assert ds.input_like == {"a": jax.ShapeDtypeStruct((2,), np.float32), "b": jax.ShapeDtypeStruct((2,), np.int32)}
    np.testing.assert_array_equal(ds.train_labels, np.arange(5, dtype=np.float32))
    triples = [(i, [i] * 3, np.array([i])) for i in range(4)]
    assert data.from_sequence(triples, inputs=1, labels=2).num_classes == 4


def test_one_thread_where_asked():
    pairs = Pairs()
    ds = data.from_sequence(pairs, streamed=True, num_classes=3, threads=1)
    list(data.batches(ds.train, np.arange(48).reshape(1, 48), threads=8))
    assert pairs.most == 1


def uneven(index, value):
    items = [(IMAGES[i], CLASSES[i]) for i in range(20)]
    items[index] = value
    return items


BAD = {
    r"inputs of item 7 of .*must be as the first item's, uint8\[4, 5, 3\], got uint8\[3, 5, 3\]": uneven(
        7, (IMAGES[0, 1:], 0)
    ),
    r"labels of item 9 of .*int32\[\], got float32\[\]": uneven(9, (IMAGES[0], 0.5)),
    r"item 3 of sequence \(train\) must be a pair \(input, label\) or a dict, got int": uneven(3, 5),
    r"labels of item 4 must be numbers, got <U3": uneven(4, (IMAGES[0], "cat")),
    r"item 0 of .* must be a pair \(input, label\), got 3 values": [(1, 2, 3)],
    r"labels must name a key of item 0 of .*, which has image, kind": [{"image": 1, "kind": 2}],
    r"train of sequence must have examples, got none": [],
    r"train must have __len__ and __getitem__, got generator": (x for x in ()),
}


@pytest.mark.parametrize("message", BAD)
def test_rules(message):
    with pytest.raises(data.DataError, match=message):
        data.from_sequence(BAD[message])


def test_what_is_streamed_is_checked_when_read():
    floats = np.ones((20, 2))
    floats[13, 1] = np.nan
    ds = data.from_sequence(Pairs(floats, np.arange(20)), streamed=True, num_classes=15)
    with pytest.raises(data.DataError, match=r"train inputs must be finite .*got nan at index 13 at \(1,\)"):
        list(data.batches(ds.train, np.array([[2, 13]])))
    with pytest.raises(data.DataError, match=r"train labels must be in 0..14 .*got 17 at index 17"):
        list(data.batches(ds.train, np.array([[2, 17]])))


def test_as_dataset():
    table, pair = RNG.normal(size=(50, 2)), (IMAGES, CLASSES)
    ds = data.from_arrays(pair, pair)
    assert data.as_dataset(ds) is ds
    for value, inputs, tests in (
        (pair, IMAGES, 0),
        ((pair, pair), IMAGES, 50),
        ((*pair, *pair), IMAGES, 50),
        ({"x_train": table, "y_train": CLASSES, "x_test": table, "y_test": CLASSES}, table.astype(np.float32), 50),
        ({"train": pair, "validation": pair}, IMAGES, 50),
        ({"train": {"x": table, "y": CLASSES}}, table.astype(np.float32), 0),
        ({"train": Records(), "test": Records()}, IMAGES, 50),
        (Pairs(), IMAGES, 0),
        ((Pairs(), Pairs()), IMAGES, 50),
        (list(zip(IMAGES, CLASSES, strict=True)), IMAGES, 0),
    ):
        found = data.as_dataset(value)
        np.testing.assert_array_equal(found.train_inputs, inputs)
        assert len(found.test) == tests and found.num_classes in (3, 4)
    assert data.as_dataset(pair, test_share=0.2, name="mine").name == "mine"


def test_as_dataset_errors():
    for value, message in (
        (IMAGES, r"data must be \(inputs, labels\), got one ndarray"),
        ((IMAGES, CLASSES, CLASSES), "two such pairs or four arrays, got a tuple of 3"),
        ({"a": IMAGES}, "the dict must have arrays named x_train"),
        (
            {"train": (IMAGES, CLASSES), "tst": (IMAGES, CLASSES)},
            r"splits as train and test \(or .* got .tst.,",
        ),
        (
            {"train": {"x": IMAGES, "y": CLASSES}, "test": {"x": IMAGES, "label": CLASSES}},
            "test must have the arrays of train, x, y, got none named 'y'",
        ),
        (7, "or have __len__ and __getitem__, got int"),
        (types.SimpleNamespace(dataset=[(IMAGES[0], 0)]), "got SimpleNamespace: batches .* so give its .dataset"),
        (iter([]), "got list_iterator: samples are drawn anew in each epoch, so they must be found by number"),
        (
            ((IMAGES, IMAGES), (CLASSES, CLASSES)),
            r"\(a tuple of two pairs is taken for what to train and what to test on",
        ),
    ):
        with pytest.raises(data.DataError, match=message):
            data.as_dataset(value)
    with pytest.raises(TypeError, match="a Dataset takes no options, got seed"):
        data.as_dataset(data.from_arrays((IMAGES, CLASSES)), seed=1)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", x=IMAGES, y=CLASSES)
    for found in (data.load("set.npz"), data.as_dataset(tmp_path / "set.npz"), data.as_dataset("./set.npz")):
        assert found.name == "set.npz" and (len(found.train), len(found.test)) == (40, 10)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.fromarray(IMAGES[0]).save(tmp_path / "photos" / "a" / "0.png")
    options = {"image_size": 4, "test_share": None}
    for found in (data.load("./photos", **options), data.as_dataset(tmp_path / "photos", **options)):
        assert found.name == "photos" and found.input_like.shape == (4, 4, 3)
    for value, message in (
        ("none.npz", "none.npz does not exist"),
        (tmp_path / "set.h5", "must be an .npz, .csv or .txt file"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.as_dataset(value)
    with pytest.raises(data.DataError, match="image_size is for folders of images and sets by name"):
        data.load("set.npz", image_size=4)
    with pytest.raises(TypeError, match="load takes label only where name is a path, got 'digits'"):
        data.load("digits", label="x")


def test_floats_of_both_kinds_are_normalized_together():
    items = [(np.float32([i]) if i % 2 else [float(i)], 0) for i in range(6)]
    x = data.from_sequence(items, normalize=True).train_inputs
    np.testing.assert_allclose(x[:, 0], (np.arange(6) - 2.5) / np.arange(6).std(), atol=1e-6)


def test_a_bad_pil_image_is_named():
    good = png(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8))
    items = [(Image.open(io.BytesIO(good[: len(good) - 40 * (i == 3)])), 0) for i in range(5)]  # decoded when used
    with pytest.raises(data.DataError, match="sequence: train inputs of item 3 cannot be decoded: OSError: "):
        data.from_sequence(items)


def test_images_of_pytorch_have_their_channels_first(caplog):
    """Bytes are refused; floats may be anything, and are told."""
    with pytest.raises(data.DataError, match=r"must have the channels of images last, \(H, W, C\), got \(3, 8, 8\)"):
        data.from_sequence([(np.zeros((3, 8, 8), np.uint8), n % 2) for n in range(4)])
    floats = [(np.zeros((3, 8, 8), np.float32) + n, n % 2) for n in range(4)]
    assert data.from_sequence(floats).input_like.shape == (3, 8, 8)
    assert "(3, 8, 8) each, look like images with their channels first" in caplog.text
    data.from_sequence([(np.moveaxis(x, 0, -1), y) for x, y in floats])
    assert len(caplog.records) == 1


class Indexed:
    """As Hugging Face's sets, which are asked for many at once."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise OSError("broken file")
        return np.zeros(3, np.float32), index % 2

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_one_of_many_that_cannot_be_read_is_named():
    with pytest.raises(data.DataError, match=r"item 2 of sequence \(train\) cannot be read: OSError: broken file"):
        data.from_sequence(Indexed())


def test_names_of_classes_of_features():
    class Named(list):
        features = {"x": None, "label": types.SimpleNamespace(num_classes=2, names=["cat", "dog"])}  # noqa: RUF012

    items = Named({"x": np.float32([n, n]), "label": n % 2} for n in range(4))
    assert data.from_sequence(items).classes == ("cat", "dog")
    assert data.from_sequence(items, num_classes=3).classes is None


def test_an_attention_mask_that_nobody_reads_is_told(caplog):
    items = [{"input_ids": [1, 2], "attention_mask": [1, 0], "label": n % 2} for n in range(4)]
    assert data.from_sequence(items).input_like.shape == (2,)
    assert caplog.text.count("train of sequence: attention_mask is not used; inputs=('input_ids', 'att") == 1
    both = data.from_sequence(items, inputs=("input_ids", "attention_mask"))
    assert both.input_like.keys() == {"input_ids", "attention_mask"} and len(caplog.records) == 1
