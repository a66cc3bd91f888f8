"""Small files: JSON that any reader takes, written atomically."""

import contextlib
import json
import math
import os
import pathlib
from typing import Any


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
    path = pathlib.Path(path)
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None:  # one that comes from writing names no file, and that of opening the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
