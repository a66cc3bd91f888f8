"""CIFAR and MNIST from where their authors put them.

TFDS 4.9.10 cannot prepare these four without TensorFlow (its builders read through `tf.io.gfile` and encode with
`tf.image`), so what it would download is read here: same addresses, same checksums (tensorflow_datasets/url_checksums),
exact pixels.
"""

import gzip
import hashlib
import http.client
import io
import logging
import tarfile
import urllib.request
from collections.abc import Iterator

import numpy as np

from msjax.data._error import DataError

_log = logging.getLogger("msjax")

_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_CVDF = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

# name -> [(address, SHA-256)]; MNIST-like sets: train images, train labels, test images, test labels
SOURCES = {
    "cifar10": [
        (_TORONTO + "cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
    ],
    "cifar100": [
        (_TORONTO + "cifar-100-binary.tar.gz", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec")
    ],
    "mnist": [
        (_CVDF + "train-images-idx3-ubyte.gz", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (_CVDF + "train-labels-idx1-ubyte.gz", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (_CVDF + "t10k-images-idx3-ubyte.gz", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (_CVDF + "t10k-labels-idx1-ubyte.gz", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ],
    "fashion_mnist": [
        (_ZALANDO + "train-images-idx3-ubyte.gz", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (_ZALANDO + "train-labels-idx1-ubyte.gz", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (_ZALANDO + "t10k-images-idx3-ubyte.gz", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (_ZALANDO + "t10k-labels-idx1-ubyte.gz", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ],
}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10, "fashion_mnist": 10}


def digest(name: str) -> str:
    """What the set is: a hash of its files' hashes."""
    return hashlib.sha256("".join(sha256 for _, sha256 in SOURCES[name]).encode()).hexdigest()


def _fetch(address: str, sha256: str, looked: str) -> bytes:
    """The whole file, checked."""
    _log.info("downloading %s", address)
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{looked}, and {address} cannot be downloaded ({error}). On a machine without network, copy a prepared "
            f"TFDS directory (or the array "
            "cache of another machine) there and give its place: data_dir (--data.data-dir) or cache_dir"
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(
            f"{address} gave a file ({len(content)} bytes) other than the published one; try again, or give a data_dir "
            f"that has it"
        )
    return content


def _cifar(archive: bytes, train: bool, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of label bytes (the last is the fine label) and 3072 pixel bytes, channels first."""
    wanted = ("data_batch_", "train.bin") if train else ("test_batch.bin", "test.bin")
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        members = sorted(
            (m for m in tar.getmembers() if m.name.split("/")[-1].startswith(wanted)), key=lambda m: m.name
        )
        raw = b"".join(tar.extractfile(m).read() for m in members)
    records = np.frombuffer(raw, np.uint8).reshape(-1, label_bytes + 3072)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, label_bytes - 1]


def _idx(compressed: bytes) -> np.ndarray:
    """An array in MNIST's IDX format."""
    raw = gzip.decompress(compressed)
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def download(name: str, looked: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield ("train", images uint8 [N, H, W, C], labels) and ("test", ...)."""
    files = [_fetch(address, sha256, looked) for address, sha256 in SOURCES[name]]
    for i, split in enumerate(("train", "test")):
        if name.startswith("cifar"):
            yield split, *_cifar(files[0], split == "train", 2 if name == "cifar100" else 1)
        else:
            yield split, _idx(files[2 * i])[..., None], _idx(files[2 * i + 1])
