"""The versions and the hardware that a result depends on."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

# Settings outside the config that change how fast a run is.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES", "LD_PRELOAD")
_COMPILERS = ("jax-cuda12-pjrt", "jax-cuda13-pjrt", "libtpu")  # where they are installed


def environment() -> dict[str, Any]:
    """Returns the versions and the hardware that a result depends on, JSON-ready."""
    packages = ("msjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    several = {"processes": jax.process_count()} if jax.process_count() > 1 else {}
    return several | {
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages} | {n: v for n in _COMPILERS if (v := _version(n))},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "devices": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
    }


@functools.cache
def commit() -> str | None:
    """Returns the Git commit of the sources when this was first called; None where they are in no Git repository.

    It ends in "-dirty" if tracked files of msjax or configs, or programs of experiments or benchmarks, were changed.
    """
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments):
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        sources = ("msjax", "experiments/*.py", "benchmarks/*.py", "configs")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    return None


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model():
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
