"""Folders of images as data sets."""

import dataclasses
import io
import shutil
import struct
import zlib

import numpy as np
import pytest

from msjax import build, config, data
from msjax.cli.options import with_places
from msjax.data import _folder, _images

from .data_helpers import Image, prepare_tiny


@pytest.fixture
def animals(tmp_path):
    """`animals/cat` and `animals/dog`: 10 grey PNG images of several sizes each, and a file that is none."""
    rng = np.random.default_rng(0)
    for name in ("dog", "cat"):
        folder = tmp_path / "animals" / name / "deep"
        folder.mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (8 + i, 12), dtype=np.uint8)).save(folder / f"{i}.PNG")
        (folder / "notes.txt").touch()
        (folder / "._0.png").touch()
        (folder / ".thumbnails").mkdir()
        Image.fromarray(rng.integers(0, 256, (8, 12), dtype=np.uint8)).save(folder / ".thumbnails" / "0.png")
    return tmp_path / "animals"


def test_classes_and_share(animals):
    ds = data.from_image_folder(animals, image_size=8)
    assert ds.num_classes == 2 and (len(ds.train), len(ds.test)) == (16, 4)
    assert ds.input_like.shape == (8, 8, 1) and ds.input_like.dtype == np.uint8 and ds.mean.shape == (1,)
    assert np.bincount(ds.test_labels).tolist() == [2, 2]
    whole = data.from_image_folder(animals, image_size=8, test_share=None)
    assert whole.train_labels.tolist() == [0] * 10 + [1] * 10  # cat, dog
    first = np.asarray(Image.open(animals / "cat" / "deep" / "0.PNG"))
    np.testing.assert_array_equal(whole.train_inputs[0, ..., 0], first[:, 2:10])
    assert data.from_image_folder(animals, image_size=8, channels=3).input_like.shape == (8, 8, 3)


def test_train_and_test_folders(animals):
    (animals / "train").mkdir()
    for name in ("cat", "dog"):
        (animals / name).rename(animals / "train" / name)
    assert len(data.from_image_folder(animals, image_size=8).test) == 4
    (animals / "val" / "dog").mkdir(parents=True)
    for i in (3, 4):
        (animals / "train" / "dog" / "deep" / f"{i}.PNG").rename(animals / "val" / "dog" / f"{i}.PNG")
    ds = data.from_image_folder(animals, image_size=8)
    assert ds.num_classes == 2 and len(ds.train) == 18 and ds.test_labels.tolist() == [1, 1]
    (animals / "val" / "dog").rename(animals / "val" / "cow")
    wrong = r"val must have classes that are given or are there to train on \(cat, dog\), got cow"
    with pytest.raises(data.DataError, match=wrong):
        data.from_image_folder(animals, image_size=8)
    names = ["ant", "cat", "cow", "dog"]
    ds = data.from_image_folder(animals, image_size=8, classes=names)
    assert ds.num_classes == 4 and ds.classes == tuple(names)
    assert set(ds.train_labels) == {1, 3} and ds.test_labels.tolist() == [2, 2]


def test_a_folder_that_each_client_has(animals, monkeypatch):
    """Under the name that the server's config has, in the client's own folder of data or where it runs."""
    there = animals.parent
    of = lambda name: config.Config(data=config.DataConfig(name, image_size=8, classes=("ant", "cat", "dog")))  # noqa: E731
    for name in ("animals", "./animals"):
        own = config.with_own_paths(of(name), data_dir=str(there), tokenizer=None)
        assert build.load_data(own).classes == ("ant", "cat", "dog")
    with pytest.raises(ValueError, match=r"data.name must be .* a folder of images that is there .*, got 'animals'"):
        build.load_data(of("animals"))
    elsewhere = config.without_paths(of("/not/here/animals"))  # an absolute path of the machine that began the run
    own = config.with_own_paths(elsewhere, data_dir=str(there), tokenizer=None)
    assert own.data.name == str(animals)
    with pytest.raises(ValueError, match=r"tokenizer must be None for data.name='animals', which no tokenizer"):
        config.with_own_paths(of("animals"), data_dir=None, tokenizer="here")
    monkeypatch.chdir(there)
    assert len(build.load_data(of("animals")).train) == 16
    config.check_received(of("animals/train"))
    animals.rename(there / "cifar10")
    assert config.with_own_paths(of("cifar10"), data_dir=str(there), tokenizer=None) == of("cifar10")
    assert not config.is_local_path("cifar10") and config.is_local_path("./cifar10")
    # One's own folder stays one, whatever it is called.
    received = config.without_paths(of("/not/here/cifar10"))
    config.check_received(received)
    own = config.with_own_paths(received, data_dir=str(there), tokenizer=None)
    assert build.load_data(own).classes == ("ant", "cat", "dog") and config.without_paths(own) == received


def test_train_may_be_a_class(tmp_path, caplog):
    for name in ("bus/a.png", "train/2019/b.png", "train/2020/c.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(file)
    options = {"image_size": None, "test_share": None}
    assert data.from_image_folder(tmp_path, **options).classes == ("2019", "2020")
    assert "only the images in train are used, not those in bus. If these folders are classes" in caplog.text
    ds = data.from_image_folder(tmp_path, classes=["bus", "train"], **options)
    assert ds.train_labels.tolist() == [0, 1, 1]
    shutil.rmtree(tmp_path / "train" / "2019")
    (tmp_path / "train" / "2020" / "c.png").rename(tmp_path / "train" / "c.png")
    (tmp_path / "train" / "2020").rmdir()
    assert data.from_image_folder(tmp_path, **options).classes == ("bus", "train")
    (tmp_path / "bus").rename(tmp_path / "test")  # two splits without classes
    with pytest.raises(data.DataError, match="train must hold a folder of images for each class"):
        data.from_image_folder(tmp_path, **options)
    shutil.rmtree(tmp_path / "test")
    for name in ("bus", "train"):  # a split that has a class of its own name
        (tmp_path / "train" / name).mkdir()
        shutil.copy(tmp_path / "train" / "c.png", tmp_path / "train" / name / "d.png")
    ds = data.from_image_folder(tmp_path, classes=["bus", "train"], **options)
    assert ds.train_labels.tolist() == [0, 1]


def test_images_behind_links_are_there(tmp_path):
    for name in ("a/0.png", "elsewhere/1.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(file)
    (tmp_path / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "elsewhere")
    assert [file.name for file in _folder.images_in(tmp_path / "a")] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    "name", ["C:secret.csv", r"\\server\share", r"\Users\x.csv", "/Users/x.csv", "~/x.csv", r"a\..\x"]
)
def test_what_a_server_sends_leads_out_of_no_folder_on_any_system(name):
    with pytest.raises(ValueError, match=r"data.name must not lead out of the folder where data are looked for, got"):
        config.check_received(config.Config(data=config.DataConfig(name)))


def test_images_are_numbered_by_their_names_on_any_system(tmp_path, monkeypatch):
    """Windows compares paths without their case; and macOS may have an accent as a character of its own."""
    for name in ("B.png", "a.png", "c/d.png"):
        file = tmp_path / "A\u0308" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), ord(name[0]), np.uint8)).save(file)
    monkeypatch.setattr(type(tmp_path), "__lt__", lambda a, b: str(a).lower() < str(b).lower())
    ds = data.from_image_folder(tmp_path, image_size=None, test_share=None, classes=["\u00c4"])
    assert ds.train_inputs[:, 0, 0, 0].tolist() == [ord("B"), ord("a"), ord("c")]
    listed = data.from_image_folder(tmp_path, image_size=None, test_share=None, classes=["A\u0308"])
    assert listed.num_classes == 1


def test_a_folder_may_be_where_it_was_or_elsewhere(animals):
    cfg = config.Config(data=config.DataConfig(str(animals.parent / "." / "animals"), image_size=8))
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name="./animals"))  # no longer there
    moved, rest = with_places(cfg, ["--data.name", str(animals), "--epochs", "2"])
    assert moved.data.name == str(animals) and rest == ["--epochs", "2"]
    read = with_places(cfg, ["--data.workers", "0", "--data.cache-dir", "there"])[0].data
    assert (read.workers, read.cache_dir) == (0, "there")
    with pytest.raises(ValueError, match=r"--data.workers must be an integer of at least 0, got 'two'"):
        with_places(cfg, ["--data.workers", "two"])
    for other in (str(animals / "cat"), "digits"):
        with pytest.raises(ValueError, match=r"--data.name must be where the file or folder of its data is now, under"):
            with_places(cfg, ["--data.name", other])
    assert not config.is_same_name("./digits", "digits") and not config.is_same_name("a.py:f", "b/a.py:f")


def test_images_are_turned_and_flattened(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 200  # the stored first row is the last column when seen: orientation 6 turns clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png", exif=exif)
    rgba = np.full((4, 4, 4), 100, np.uint8)
    rgba[:2, :, 3], rgba[2:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a" / "1.png")
    Image.fromarray(np.full((4, 4), 0x1234, np.uint16)).save(tmp_path / "a" / "2.png")
    ds = data.from_image_folder(tmp_path, image_size=None, test_share=None)
    turned, flat, deep = ds.train_inputs
    assert (turned[:, 3] == 200).all() and (turned[:, :3] == 0).all()
    assert (flat[:2] == 0).all() and (flat[2:] == 100).all()  # transparent pixels are black
    assert (deep == 0x12).all()


def test_images_that_use_few_of_their_16_bits_are_told(tmp_path, caplog):
    """As of 12 bits, which would keep 16 levels; the same spread over 16 bits are not."""
    for factor in (1, 16):
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 4096, (6, 6), dtype=np.uint16)
            pixels[0, 0] = 4095
            (tmp_path / f"{factor}" / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels * np.uint16(factor)).save(tmp_path / f"{factor}" / "a" / f"{i}.png")
        ds = data.from_image_folder(tmp_path / f"{factor}", image_size=None, test_share=None)
        levels = len(np.unique(ds.train_inputs))
        assert levels == 16 if factor == 1 else levels > 16
        said = "use values of at most 4095: of the upper 8 bits, which alone are used, these leave 16 levels"
        assert (said in caplog.text) == (factor == 1)
        caplog.clear()


def test_a_colour_image_among_grey_ones_is_named(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for i, mode in enumerate(("L", "RGB", "L")):
        Image.new(mode, (4, 4), 7).save(tmp_path / "a" / f"{i}.png")
    cfg = config.Config(data=config.DataConfig(name=str(tmp_path)))
    assert build.load_data(cfg).input_like.shape == (4, 4, 3)
    assert f"{tmp_path / 'a' / '1.png'} is a colour image, and those before it are grey" in caplog.text
    assert build.load_data(config.with_fields(cfg, {"data.channels": 1})).input_like.shape == (4, 4, 1)
    with pytest.raises(ValueError, match=r"data\.channels must be one of 1, 3 or None, got 2"):
        config.with_fields(cfg, {"data.channels": 2})
    with pytest.raises(ValueError, match=r"data\.channels must be None where data.name is no folder of images, got 1"):
        build.load_data(config.with_fields(cfg, {"data.channels": 1, "data.name": "digits"}))


RAMP = np.array([[0, 21845, 43690, 65535]], np.uint16)  # 0, 1/3, 2/3, 1


def deep_png(colour, samples):
    """A PNG of 16 bits a channel, which Pillow writes of grey ones alone; `colour` is PNG's: 2 RGB, 4 LA, 6 RGBA."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def tiff12(values):
    """A TIFF of 12 bits a value, which Pillow only reads."""
    bits = "".join(f"{value:012b}" for value in values)
    strip = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


LIGHT = np.stack([RAMP] * 3, -1)
DEEP = {
    "PNG, grey": (1, lambda: saved(Image.fromarray(RAMP), "png")),
    "PGM": (1, lambda: b"P5 4 1 65535\n" + RAMP.astype(">u2").tobytes()),
    "PGM, 10 bits": (1, lambda: b"P5 4 1 1023\n" + np.array([0, 341, 682, 1023], ">u2").tobytes()),
    "TIFF": (1, lambda: saved(Image.fromarray(RAMP), "tiff")),
    "TIFF, 12 bits": (1, lambda: tiff12([0, 1365, 2730, 4095])),
    "PNG, RGB": (3, lambda: deep_png(2, LIGHT)),
    "PNG, grey and opaque": (3, lambda: deep_png(4, np.stack([RAMP, 0 * RAMP + 65535], -1))),  # RGBA to Pillow
    "PNG, RGB and opaque": (3, lambda: deep_png(6, np.concatenate([LIGHT, 0 * LIGHT[..., :1] + 65535], -1))),
}


@pytest.mark.parametrize("what", DEEP)
def test_more_than_8_bits_become_8(what, tmp_path):
    channels, encode = DEEP[what]
    for wanted in (1, 3):
        pixels = _images.to_array(_images.decode(encode(), wanted))
        assert pixels.dtype == np.uint8 and pixels.shape == (1, 4, wanted)
        assert (pixels == np.array([0, 85, 170, 255])[:, None]).all()
    image = _images.flatten(Image.open(io.BytesIO(encode())))  # as from_sequence does
    assert _images.to_array(image).shape == (1, 4, channels)
    np.testing.assert_array_equal(_images.to_array(image)[0, :, 0], [0, 85, 170, 255])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_range_are_refused(dtype, tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "a" / "0.tif")
    with pytest.raises(data.DataError, match=r"0.tif cannot be decoded: images must have 8 or 16 bits .* mode [IF]$"):
        data.from_image_folder(tmp_path, image_size=None)


def test_prepared_sets_and_items_are_seen_as_folders_are(tmp_path, monkeypatch):
    """EXIF turns, transparent pixels are black: in every way to read an image."""
    pixels = np.random.default_rng(0).integers(1, 256, (12, 10, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(np.arange(10) < 5, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    encoded = saved(Image.fromarray(pixels), "png", exif=exif)
    expected = np.where(pixels[..., 3:] > 0, pixels[..., :3], 0)[::-1, ::-1]
    directory, splits = prepare_tiny(tmp_path, monkeypatch)
    splits["train"].encoded[5] = encoded
    np.testing.assert_array_equal(data.load("tiny", data_dir=directory).train_inputs[5], expected)
    stream = data.stream("tiny", data_dir=directory, image_size=10, crop="middle")
    plain = data.stream("tiny", "test", data_dir=directory, image_size=10, crop="middle")
    plain._source.records.encoded[0] = saved(Image.fromarray(expected), "png")
    np.testing.assert_array_equal(stream.fetch(np.array([5]))[0], plain.fetch(np.array([0]))[0])
    ds = data.from_sequence([(Image.open(io.BytesIO(encoded)), 0)] * 2)
    np.testing.assert_array_equal(ds.train_inputs[0], expected)
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "0.png").write_bytes(encoded)
    ds = data.from_image_folder(tmp_path / "folder", image_size=None, test_share=None)
    np.testing.assert_array_equal(ds.train_inputs[0], expected)
    exif[0x0112] = 6  # a quarter, which changes the sides
    splits["train"].encoded[5] = saved(Image.fromarray(pixels), "png", exif=exif)
    with pytest.raises(
        data.DataError, match=r"image 5 of tiny .*12 x 10 pixels as it is seen, and the set says 10 x 12"
    ):
        data.load("tiny", data_dir=directory, cache_dir=tmp_path / "other")
    assert data.load("tiny", data_dir=directory, image_size=8).train_inputs.shape == (40, 8, 8, 3)


def test_damaged_exif_data_are_passed_over(tmp_path):
    pixels = np.full((4, 4), 7, np.uint8)
    encoded = saved(Image.fromarray(pixels), "png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(_images.decode(encoded, 1), pixels)


def test_streamed(animals):
    whole = data.from_image_folder(animals, image_size=8)
    ds = data.from_image_folder(animals, image_size=8, streamed=True)
    assert not ds.train.in_memory and ds.num_classes == 2
    np.testing.assert_array_equal(ds.mean, whole.mean)
    np.testing.assert_array_equal(ds.test.labels(), whole.test_labels)
    ((x, y),) = data.batches(ds.train, np.arange(16).reshape(1, 4, 4))
    np.testing.assert_array_equal(x.reshape(16, 8, 8, 1), whole.train_inputs)
    np.testing.assert_array_equal(y.reshape(16), whole.train_labels)


@pytest.mark.parametrize("names", [("training", "test"), ("Train", "test"), ("train", "dev"), ("train", "Test")])
def test_folders_that_look_like_splits_are_no_classes(tmp_path, names):
    for split in names:
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / split / name / "1.png")
    wrong = names if "train" not in names else names[1:]
    told = rf"splits in folders named train and test \(or val, .* got '({'|'.join(wrong)})'"
    with pytest.raises(data.DataError, match=told):
        data.from_image_folder(tmp_path, image_size=None)
    if "train" not in names:  # they may be meant
        ds = data.from_image_folder(tmp_path, image_size=None, classes=sorted(names), test_share=None)
        assert ds.classes == tuple(sorted(names))


def test_errors(animals, tmp_path):
    with pytest.raises(
        data.DataError, match=r"images must have one size where image_size is None: .*PNG has \(12, 9\)"
    ):
        data.from_image_folder(animals, image_size=None)
    with pytest.raises(ValueError, match="image_size must be an integer of at least 1, got 0"):
        data.from_image_folder(animals, image_size=0)
    with pytest.raises(ValueError, match=r"image_size must be an integer of at least 1, got 8\.5"):
        data.from_image_folder(animals, image_size=8.5)
    with pytest.raises(data.DataError, match="channels must be 1 or 3, got 4"):
        data.from_image_folder(animals, image_size=8, channels=4)
    with pytest.raises(data.DataError, match="nowhere must be a folder of images"):
        data.from_image_folder(tmp_path / "nowhere", image_size=8)
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(data.DataError, match="empty must hold a folder of images for each class"):
        data.from_image_folder(tmp_path / "empty", image_size=8)
    file = animals / "dog" / "deep" / "3.PNG"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(data.DataError, match=r"image .*dog.deep.3.PNG cannot be decoded"):
        data.from_image_folder(animals, image_size=8)
    file.write_bytes(b"no image")
    with pytest.raises(data.DataError, match=r"image .*3.PNG cannot be opened"):
        data.from_image_folder(animals, image_size=8)
