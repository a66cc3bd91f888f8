"""Paths that a user gives: expanded as a shell would, and checked; errors name the option, the path and what is wrong.

A shell expands `--out ~/runs` but leaves `--out=~/runs` as it is.
"""

import contextlib
import os
import pathlib
import re
import time
import zlib
from collections.abc import Iterator


def expand(name: str, path: str | os.PathLike) -> pathlib.Path:
    """Returns the path that is meant.

    Raises:
      ValueError: it is empty, a URL, or in the home folder of nobody; `name` is what the error calls it.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError(f"{name} must be a path, got ''")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):  # it would become a folder of that name here
        advice = "mount the bucket, and give the path of the mount"
        raise ValueError(f"{name} must be a path in a file system, got the URL {text!r}: {advice}")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} must be a path, got {text!r}: {error}") from None


def existing_file(name: str, path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a file that is there and can be read; raises ValueError where it is none."""
    file = expand(name, path)
    try:
        with file.open("rb"):
            return file
    except OSError as error:
        raise _no_file(name, path, error) from None


def existing_weights(name: str, path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a file that can be read, or of a folder with a config.json, as of a language model.

    Raises:
      ValueError: there is neither.
    """
    found = expand(name, path)
    return found if (found / "config.json").is_file() else existing_file(name, path)


def left_behind(folder: pathlib.Path, pattern: str) -> Iterator[pathlib.Path]:
    """Yields what processes that were killed have left of files that they were writing: what is older than a day."""
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # of one at work, which has ended meanwhile
            if path.stat().st_mtime < time.time() - 86400:
                yield path


def read_file(name: str, path: str | os.PathLike) -> bytes:
    """Returns what is in a file; raises ValueError where it cannot be read."""
    try:
        return expand(name, path).read_bytes()
    except OSError as error:
        raise _no_file(name, path, error) from None


def _no_file(name, path, error):
    return ValueError(f"{name} must be a file that can be read, got {os.fspath(path)!r}: {error.strerror}")


def folder_to_be(name: str, path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a folder that can be written to, or made; makes nothing.

    Raises:
      ValueError: a file is in the way, or nothing can be written there.
    """
    folder = at = expand(name, path)
    try:
        while not at.exists() and at != at.parent:  # the root of a drive may be missing
            at = at.parent
        if not at.is_dir():
            why = f"{at} is a file" if at.exists() else f"{at} does not exist"
        elif os.access(at, os.W_OK | os.X_OK):
            return folder
        else:
            read_only = hasattr(os, "statvfs") and os.statvfs(at).f_flag & os.ST_RDONLY
            why = f"{at} is on a read-only file system" if read_only else f"{at} may not be written to"
    except OSError as error:
        why = error.strerror
    raise cannot_write(name, path, why)


def cannot_write(name: str, path: str | os.PathLike, why: str | None) -> ValueError:
    """Returns the error for a folder in which nothing can be written."""
    return ValueError(f"{name} must be a folder that can be written to, got {os.fspath(path)!r}: {why}")


def check_folder_name(name: str, value: str) -> None:
    """Raises ValueError for what is not the name of a folder in another one."""
    if not value or value in (".", "..") or any(c in value for c in "/\\\0"):
        raise ValueError(f"{name} must be the name of a folder, without a path to it, got {value!r}")


def crc32_of(path: pathlib.Path) -> int:
    """Returns the CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc
