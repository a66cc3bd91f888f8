"""Small files: JSON that any reader takes, written atomically."""

import contextlib
import errno
import glob
import json
import math
import os
import pathlib
import uuid
from typing import Any

from msjax.paths import left_behind


def to_json(record: Any, **options: Any) -> str:
    """Returns `record` as JSON; NaN and infinity, of a run that diverged, as null, since JSON has neither."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(record), allow_nan=False, **options)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes or rewrites a file; whoever reads it, and whatever happens, finds the old content or the new.

    Raises:
      OSError: it cannot be written; it names the file.
    """
    with _written(pathlib.Path(path), content) as temporary:
        temporary.replace(path)


def write_new(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file that is not there yet; of several who do so at once, one does.

    Raises:
      FileExistsError: it is there.
      OSError: it cannot be written; it names the file.
    """
    path = pathlib.Path(path)
    with _written(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with path.open("xb") as file:
                file.write(temporary.read_bytes())


def _sync(file):
    """Waits until it is on the disk, where the file system can say so."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


@contextlib.contextmanager
def _written(path, content):
    """A file beside `path` that has the content, on the disk; gone at the end."""
    name = path.name[:40]
    temporary = path.with_name(f"{name}.{uuid.uuid4().hex[:8]}.tmp")  # of nobody else
    try:
        for left in left_behind(path.parent, f"{glob.escape(name)}.????????.tmp"):
            left.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            _sync(file)
        yield temporary
    except OSError as error:
        if error.errno is not None:  # one that comes from writing names no file, and others the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
