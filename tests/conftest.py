"""Before jax starts: eight CPU devices, a cache of compiled programs, strict dtypes and ranks, checked annotations."""

import functools
import gc
import importlib.metadata
import logging
import os
import pathlib
import signal

from . import compile_cache

flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # compiled a good half faster
    "--xla_cpu_parallel_codegen_split_count=1",  # and a tenth more: no parts for threads that the processes leave idle
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones abort at a flag that they no longer know
    flags.append("--xla_cpu_use_fusion_emitters=false")  # and that in half the time again
if "MSJAX_TEST_OPTIMIZED" in os.environ:  # programs as users have them; see CONTRIBUTING.md
    del flags[1:]
given = os.environ.get("XLA_FLAGS", "").split()  # by the user, or by the process that has started this one
os.environ["XLA_FLAGS"] = " ".join(given + [flag for flag in flags if flag not in given])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for the processes that tests start; see below
# Most of the suite's time is compilation, and many tests compile the same programs.
programs = compile_cache.open_copy()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"  # for GPUs, and their folder would be part of every key
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # to read even a small one takes half the time

import beartype
import jax
import jaxtyping
import pytest
import threadpoolctl

# NumPy, which plugins of pytest have imported: its threads wait for each other in a loop, on cores that are not theirs.
threadpoolctl.threadpool_limits(1, user_api="blas")

check = beartype.beartype(
    conf=beartype.BeartypeConf(is_pep484_tower=True)
)  # an int is a float, as for every type checker

# Where there are shapes to check. To check every call of every function takes a quarter of the suite's time.
package = pathlib.Path(__file__).parent.parent / "msjax"
shaped = [path.relative_to(package.parent) for path in package.rglob("*.py") if "jaxtyping" in path.read_text("utf-8")]
modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in shaped]
jaxtyping.install_import_hook(modules, f"{__name__}.check")

pytest.register_assert_rewrite(f"{__package__}.helpers", f"{__package__}.setups", f"{__package__}.network")
collect_ignore = ["fuzz_wire.py"]  # which is no test

STRICT_MODULES = (
    "test_bits",
    "test_claims",
    "test_codecs",
    "test_entropy_mask",
    "test_exact",
    "test_feature_memory",
    "test_random",
    "test_select",
    "test_straight_through",
    "test_wire",
    "test_wire_classes",
    "test_wire_damage",
    "test_wire_hostile",
)
"""Tests of `msjax.compress` and `msjax.wire`, which promote nothing implicitly. Flax and optax do, here and there, so
other tests stay out."""


SLOW = (
    "several_processes",
    "studies",
    "docs",
    "distributed",
    "stragglers",
    "conversations",
    "own_models",
    "parties",
    "processes",
    "step",
    "traffic",
    "codecs",
    "entropy_mask",
    "training",
    "records",
)


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that no process is alone with one at the end."""
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_unconfigure():
    compile_cache.keep(programs)


@pytest.fixture(autouse=True)
def strict(request):
    """Implicit dtype and rank promotion raise in the tests of `msjax.compress`."""
    if request.module.__name__.rpartition(".")[2] not in STRICT_MODULES:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def as_before():
    """What commands do to a process that is theirs alone is undone.

    They let `msjax`'s logger write to their standard error, which under pytest is closed with their test, and they
    handle signals.
    """
    logger = logging.getLogger("msjax")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """Each compiled program maps memory; of the many hundreds of all modules the system has not enough mappings.

    While it has, programs are kept from module to module: many run the same ones.
    """
    yield
    if _mappings() > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


MOST_MAPPINGS = 25_000
"""Of the 65,530 that Linux allows a process by default; a module makes up to 20,000."""


def _mappings():
    """How many parts of memory this process has mapped; as if too many where that is not told."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else MOST_MAPPINGS + 1


def pytest_collection_finish(session):
    """Tracing makes many objects of short life: looking through all that was imported for every few costs a tenth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def unchecked():
    """Switches the checking of annotations off, to see the errors that a user of the package sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def built_once(monkeypatch):
    """The parties of one run build the same: once is enough."""
    from msjax import build

    monkeypatch.setattr(build, "build", BUILT.setdefault("build", functools.cache(build.build)))


BUILT = {}
