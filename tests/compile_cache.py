"""Compiled programs that outlive the tests: each process reads and writes a folder of its own, which starts as a copy.

JAX reads what another process has half written, so processes share no folder. Nor is it given what one that was killed
left unfinished: whatever is new is looked at before it is kept. Copies are hard links, which take no room and no time.

MSJAX_TEST_CACHE says where; by default ~/.cache/msjax-tests. An empty one keeps nothing.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import tempfile
import time

MOST_BYTES = 1 << 30
DAY = 86400


def root() -> pathlib.Path | None:
    """Where programs are kept; None: nowhere."""
    chosen = os.environ.get("MSJAX_TEST_CACHE")
    if chosen is None:
        chosen = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msjax-tests"
    return pathlib.Path(chosen) if str(chosen) else None


def generation() -> str:
    """What a program can be read by: the same JAX on a processor of the same kind, which JAX's own keys leave out."""
    text = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    version = importlib.metadata.version("jaxlib")
    return f"jaxlib-{version}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def open_copy() -> pathlib.Path:
    """A new folder with all that is kept; give it to `keep` in the end."""
    kept = root() and root() / generation()
    try:
        if kept is None:
            raise OSError
        kept.mkdir(parents=True, exist_ok=True)
        copy = pathlib.Path(tempfile.mkdtemp(prefix="process-", dir=kept.parent))
    except OSError:  # a home that is not for writing
        return pathlib.Path(tempfile.mkdtemp(prefix="msjax-tests-"))
    for entry in kept.iterdir():
        _link(entry, copy / entry.name)
    return copy


def keep(copy: pathlib.Path) -> None:
    """Keeps what is new in `copy`, deletes it, and makes room where there is too much."""
    kept = root() and root() / generation()
    if kept is not None and copy.parent == kept.parent and kept.is_dir():
        known = {entry.name for entry in kept.iterdir()}
        for entry in copy.iterdir():
            if entry.name not in known and _is_whole(entry):
                _link(entry, kept / entry.name)
        _prune(kept)
    shutil.rmtree(copy, ignore_errors=True)


def _link(entry, to):
    with contextlib.suppress(OSError):  # another process was faster, or has just deleted it
        os.link(entry, to)


def _is_whole(entry):
    from jax._src import compilation_cache

    try:
        compilation_cache.decompress_executable(entry.read_bytes())
    except Exception:  # of zlib or of zstandard
        return False
    return True


def _prune(kept):
    """The oldest entries beyond `MOST_BYTES`; other versions, and folders of processes that were killed, by age."""
    entries = []
    for entry in kept.iterdir():
        with contextlib.suppress(OSError):
            entries.append((entry.stat().st_mtime, entry.stat().st_size, entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= MOST_BYTES:
            break
        entry.unlink(missing_ok=True)
        total -= size
    for folder in kept.parent.iterdir():
        with contextlib.suppress(OSError):
            age = time.time() - folder.stat().st_mtime
            if folder != kept and age > (DAY if folder.name.startswith("process-") else 30 * DAY):
                shutil.rmtree(folder, ignore_errors=True)
