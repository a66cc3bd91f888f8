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

from msjax.data import _registry
from msjax.data._error import DataError

_log = logging.getLogger("msjax")


def digest(name: str) -> str:
    """What the set is: a hash of its files' hashes."""
    return hashlib.sha256("".join(sha256 for _, sha256 in _registry.find(name).sources).encode()).hexdigest()


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
            "cache of another machine) there and give its place: data_dir or cache_dir"
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
    entry = _registry.find(name)
    files = [_fetch(address, sha256, looked) for address, sha256 in entry.sources]
    for i, split in enumerate(("train", "test")):
        if entry.file_format == "cifar":
            yield split, *_cifar(files[0], split == "train", entry.label_bytes)
        else:
            yield split, _idx(files[2 * i])[..., None], _idx(files[2 * i + 1])
