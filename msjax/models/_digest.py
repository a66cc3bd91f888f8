"""A hash of published weights, by which parties that each have a copy know that it is the same."""

import functools
import hashlib
import os
import pathlib

import numpy as np

from msjax.models._huggingface import open_files


def weights_digest(path: str | os.PathLike) -> str:
    """Returns a hash of the tensors of a safetensors file or of a folder of Hugging Face's.

    It is of names, dtypes, shapes and values, in the order of names: not of how tensors are spread over files. Reading
    takes a pass over the files, once a process as long as they do not change.

    Returns:
      "sha256:" and 16 hexadecimal digits.

    Raises:
      ValueError: there is no such file or folder, or one of its files cannot be read.
    """
    path = pathlib.Path(path).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return _digest(path, tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()))


@functools.lru_cache(maxsize=8)
def _digest(path, files):
    del files  # for the cache alone: what has changed is read again
    readers = open_files(path)
    found = hashlib.sha256()
    for name in sorted(readers):
        tensor = readers[name].read(name)
        found.update(f"{name} {tensor.dtype} {tensor.shape};".encode())
        found.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return f"sha256:{found.hexdigest()[:16]}"
