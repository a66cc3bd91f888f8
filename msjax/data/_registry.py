"""Everything that is known of a data set by its name, in one table."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_CVDF = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_IMAGENET_BY_HAND = (
    "ImageNet has to be fetched by hand from https://image-net.org/download-images: put ILSVRC2012_img_train.tar and "
    "ILSVRC2012_img_val.tar into DIR/downloads/manual and, with tensorflow installed (once, on any machine), run "
    "`tfds build imagenet2012 --file_format=array_record --data_dir=DIR`; then give DIR as data_dir"
)


class Published(NamedTuple):
    """What is known of a set of images before it is at hand.

    Attributes:
        shape: of an image (H, W, C), as `load` gives it without `image_size`.
        num_classes: how many classes there are.
        train, test: examples.
    """

    shape: tuple[int, int, int]
    num_classes: int
    train: int
    test: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a set.

    Attributes:
        mean, std: per channel, of pixels / 255, as published; None: measured on the training images.
        augment: the usual one of `AUGMENTATIONS`.
        num_classes: where the set's own files do not say it.
        test_of_class: of an embedded set: so many examples a class are the test set.
        sources: (address, SHA-256) of the files that the authors published.
        file_format: how they are to be read: CIFAR's records, or MNIST's IDX files, which are train images, train
            labels, test images, test labels.
        label_bytes: before the pixels of a CIFAR record, of which the last is the label.
        streamed: too large for memory, unless it is asked for.
        random_crop: training images are random-resized-crops, test images the middle, where the set is streamed.
        by_hand: how to get a set that no program may download.
        published: what its authors say of it.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str = "none"
    num_classes: int | None = None
    test_of_class: int | None = None
    sources: tuple[tuple[str, str], ...] = ()
    file_format: Literal["cifar", "idx"] | None = None
    label_bytes: int = 1
    streamed: bool = False
    random_crop: bool = False
    by_hand: str | None = None
    published: Published | None = None


def _idx(address: str, *digests: str) -> tuple[tuple[str, str], ...]:
    """The four files of a set like MNIST."""
    files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple((f"{address}{file}-ubyte.gz", digest) for file, digest in zip(files, digests, strict=True))


ENTRIES: Mapping[str, Entry] = MappingProxyType(
    {
        "digits": Entry(num_classes=10, test_of_class=36),
        "breast_cancer": Entry(num_classes=2, test_of_class=57),
        # The paper's statistics. The std is the usual one of the CIFAR-10 literature, the mean over images of each
        # image's own; the pixels' is about 0.25.
        "cifar10": Entry(
            (0.4914, 0.4822, 0.4465),
            (0.2023, 0.1994, 0.2010),
            augment="crop_flip",
            num_classes=10,
            sources=(
                (
                    _TORONTO + "cifar-10-binary.tar.gz",
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                ),
            ),
            published=Published((32, 32, 3), 10, 50_000, 10_000),
            file_format="cifar",
        ),
        "cifar100": Entry(
            (0.5071, 0.4865, 0.4409),
            (0.2673, 0.2564, 0.2762),
            augment="crop_flip",
            num_classes=100,
            sources=(
                (
                    _TORONTO + "cifar-100-binary.tar.gz",
                    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                ),
            ),
            published=Published((32, 32, 3), 100, 50_000, 10_000),
            file_format="cifar",
            label_bytes=2,
        ),
        "mnist": Entry(
            (0.1307,),
            (0.3081,),
            num_classes=10,
            sources=_idx(
                _CVDF,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
            published=Published((28, 28, 1), 10, 60_000, 10_000),
            file_format="idx",
        ),
        "fashion_mnist": Entry(
            (0.2860,),
            (0.3530,),
            augment="crop_flip",
            num_classes=10,
            sources=_idx(
                _ZALANDO,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
            published=Published((28, 28, 1), 10, 60_000, 10_000),
            file_format="idx",
        ),
        "tiny_imagenet": Entry(augment="crop_flip", published=Published((64, 64, 3), 200, 100_000, 10_000)),
        # The random crop needs the full-size image and is taken on the host (`ImageStream`): only the flip is left.
        "imagenet2012": Entry(
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            augment="flip",
            num_classes=1000,
            streamed=True,
            random_crop=True,
            by_hand=_IMAGENET_BY_HAND,
            published=Published((224, 224, 3), 1000, 1_281_167, 50_000),
        ),
    }
)


def find(name: str) -> Entry:
    """The entry of a set; an empty one where nothing is known of it."""
    return ENTRIES.get(name, Entry())


def is_known(name: str) -> bool:
    """Whether this package knows a set of that name."""
    return name in ENTRIES


def published(name: str) -> Published | None:
    """What is known of a set of images by its name alone: shape, classes and counts; None of all others."""
    return find(name).published


def is_embedded(name: str) -> bool:
    """Whether a set comes with this package."""
    return find(name).test_of_class is not None


def is_streamed(name: str) -> bool:
    """Whether `load` gives splits that are not in memory, for a set of this name."""
    return find(name).streamed


def default_augmentation(name: str) -> str:
    """The usual one of `AUGMENTATIONS` for a data set; "none" for digits, mnist and sets not known here."""
    return find(name).augment


def test_splits(name: str) -> tuple[str, ...]:
    """The splits that may be set aside for testing, the best first; ImageNet's `test` never had labels published."""
    return ("validation", "test") if name.startswith("imagenet") else ("test", "validation")
