"""What `experiments.accelerator` does, row by row: codecs, training steps, and whole trainings."""

import contextlib
import dataclasses
import gc
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import CODECS, OPERATIONS, prepared, steps, timing
from experiments import packed_images, study
from msjax import compress, config
from msjax.runs import RunFolder
from msjax.training import loop
from msjax.training.from_config import load_run, train_config

Row = dict[str, Any]


class Scale(NamedTuple):
    """How large everything is.

    Attributes:
      features: shape of the tensor that goes through codecs.
      repeats: rounds of measurements, of which the median counts.
      calls: of a codec in one measurement; more than one, so that launching the first is not what is measured.
      steps: training steps in one measurement, one program of msjax as its training loop calls it.
      batches: samples of a step by the number of clients that share them.
      width: of the networks.
      training: the config that is trained, but for codec and data.
    """

    features: tuple[int, ...]
    repeats: int
    calls: int
    steps: int
    batches: dict[int, int]
    width: float
    training: config.Config


def full() -> Scale:
    """The paper's sizes: one client of 256 samples as its program has, and ten as the paper says."""
    return Scale((256, 32, 32, 64), 7, 10, loop.STEPS_PER_CALL, {1: 256, 10: 2560}, 1.0, study.preset("vgg19_cifar10"))


def small() -> Scale:
    """Seconds on a CPU, to see that everything works; its numbers mean nothing."""
    model = config.ModelConfig("convnet", width=0.25)
    training = config.Config(model, clients=2, batch_size=8, epochs=2)
    return Scale((4, 8, 8, 16), 1, 2, 1, {2: 4}, 1 / 16, training)


NONE, MS, ENTROPY_MASK = compress.Identity(), compress.MaskEncoded(), compress.EntropyMask()
NAMES = {NONE: "none", MS: "MS", ENTROPY_MASK: "EntropyMask"}
NAMES |= {compress.TopK(): "SP", compress.Uniform(): "QU", compress.RandTopK(): "RT"}
"""The paper's codecs at its settings, and EntropyMask, as the tables call them."""


def name_of(codec: compress.Codec) -> str:
    """Returns what the tables call a codec."""
    return NAMES.get(codec, str(codec))


# -- Codecs. ----------------------------------------------------------------------------------------------------------


def codecs(scale: Scale, torch: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yields the name of each row and the call that measures it."""
    first = [codec for codec in NAMES if codec != NONE]
    for group in (first, [codec for codec in CODECS if codec not in first]):
        for dtype in ("float32", "bfloat16"):
            for codec in group:
                with_torch = torch and codec == MS
                yield f"{name_of(codec)}, {dtype}", lambda c=codec, d=dtype, t=with_torch: measure_codec(c, d, scale, t)


def measure_codec(codec: compress.Codec, dtype: str, scale: Scale, torch: bool) -> Row:
    """Returns the seconds of a codec's operations, of a copy and, with `torch`, of MS in PyTorch on the same values."""
    h = jnp.maximum(jax.random.normal(jax.random.key(0), scale.features, jnp.float32), 0).astype(dtype)
    copy = jax.jit(jnp.copy)
    calls, compile_seconds, extra = {"copy": lambda: copy(h)}, 0.0, []
    for operation in OPERATIONS:
        calls[operation], (seconds, more) = prepared(codec, operation, h)
        compile_seconds, extra = compile_seconds + seconds, [*extra, more]
    contenders = {name: _times(scale.calls, call) for name, call in calls.items()}
    if torch:
        contenders |= _torch_ms(h, scale.calls)
    seconds = timing.interleaved(contenders, repeats=scale.repeats)
    found = {f"{name.replace(' ', '_')}_seconds": value / scale.calls for name, value in seconds.items()}
    sizes = {"features": list(h.shape), "bytes": h.nbytes, "extra_bytes": None if None in extra else max(extra)}
    return {
        "codec": name_of(codec),
        "exactly": str(codec),
        "dtype": dtype,
        **sizes,
        **found,
        "compile_seconds": round(compile_seconds, 1),
    }


def _times(count, call):
    """`call`, so many times one after another; the device gets them all before the last is waited for."""

    def run():
        for _ in range(count):
            out = call()
        return out

    return run


def _torch_ms(h, count):
    import torch

    from benchmarks import torch_ms

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    values = torch.from_numpy(np.array(h.astype(jnp.float32))).to(device, getattr(torch, h.dtype.name))
    encoded = torch_ms.encode(values)

    def waited(call):
        def run():
            _times(count, call)()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    calls = {"encode": lambda: torch_ms.encode(values), "decode": lambda: torch_ms.decode(*encoded)}
    calls["roundtrip"] = lambda: torch_ms.decode(*torch_ms.encode(values))
    return {f"torch {name}": waited(call) for name, call in calls.items()}


# -- Training steps. --------------------------------------------------------------------------------------------------

NETWORKS = ("resnet18", "vgg19")
PRECISIONS = {"tf32": ("float32", None), "bfloat16": ("bfloat16", None), "float32": ("float32", "highest")}
"""By the name that PyTorch's have: msjax's dtype, and JAX's precision of products; by default a GPU's are TF32."""
CLASSES = 10


def training_steps(scale: Scale, torch: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yields the name of each row and the call that measures it; those of one network share PyTorch's programs."""
    made: dict[Any, dict[str, Any]] = {}
    for clients, batch in scale.batches.items():
        for precisions in (("tf32", "bfloat16"), ("float32",)):
            for group in ((NONE, MS), (ENTROPY_MASK,)):
                for precision in precisions:
                    for network in NETWORKS:
                        for codec in group:
                            args = (network, clients, batch, precision, codec)
                            name = f"{network}, {clients} × {batch // clients}, {precision}, {name_of(codec)}"
                            yield name, lambda args=args: measure_steps(*args, scale, made if torch else None)


def measure_steps(network, clients, batch, precision, codec, scale: Scale, made) -> Row:
    """Returns the seconds of a step at the medium cut, in msjax and, unless `made` is None, in PyTorch beside it."""
    dtype, products = PRECISIONS[precision]
    row = {"network": network, "clients": clients, "batch": batch, "precision": precision, "codec": name_of(codec)}
    with jax.default_matmul_precision(products) if products else contextlib.nullcontext():
        options = SimpleNamespace(batch=batch, clients=clients)
        sizes, named = (CLASSES, 32, "medium", scale.width, options), {"codec": codec, "dtype": dtype}
        call, row["first_call_seconds"] = steps.make_step(network, *sizes, steps=scale.steps, **named)
        contenders = {"msjax": call}
        if made is not None:
            wanted = _torch_steps(network, batch, precision, scale, isinstance(codec, compress.MaskEncoded), made)
            contenders |= {name: call for name, call in wanted.items() if callable(call)}
            row["torch_errors"] = {name: said for name, said in wanted.items() if not callable(said)}
        seconds = timing.interleaved(contenders, repeats=scale.repeats, warmup=1)
    row["seconds"] = {name: value / scale.steps for name, value in seconds.items()}
    jax.clear_caches()
    gc.collect()
    return row


def _torch_steps(network, batch, precision, scale, with_ms, made):
    """PyTorch's contenders by name, each called once; in place of one that fails, what it said."""
    from benchmarks import torch_steps

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    ways = {name: (way, False) for name, way in torch_steps.WAYS.items()}
    if device == "cpu":  # where compilation takes a C++ compiler
        ways.pop("channels last, torch.compile")
    if with_ms:
        ways["channels last, with MS"] = (torch_steps.WAYS["channels last"], True)
    found = made.setdefault((network, batch, precision), {})
    for name, (way, ms) in ways.items():
        if name in found:
            continue
        try:
            sizes = {"classes": CLASSES, "width": scale.width, "batch": batch}
            take = torch_steps.make_steps(network, **sizes, precision=precision, way=way, ms=ms, device=device)
            take(1)
            found[name] = lambda take=take: take(scale.steps)
        except Exception as error:
            found[name] = _said(error)
    return {f"PyTorch, {name}": found[name] for name in ways}


def _said(error):
    return f"{type(error).__name__}: {error}"[:300]


# -- Training. --------------------------------------------------------------------------------------------------------

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the paper's


def unpacked(parts: list[pathlib.Path], work: pathlib.Path) -> pathlib.Path:
    """Returns an .npz file of the images of these files, as `msjax train` takes it; made once."""
    names = "-".join(part.stem for part in parts)
    file = work / "unpacked" / f"{names}.npz"  # a folder of its own: the parts may lie in `work`
    if not file.exists():
        found = packed_images.load(parts)
        arrays = {f"{x}_{split}": value for split, pair in found.items() for x, value in zip("xy", pair, strict=True)}
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.parent / f"draft-{os.getpid()}.npz"
        np.savez(draft, **arrays)
        draft.replace(file)
    return file


def trainings(
    scale: Scale, file: pathlib.Path, work: pathlib.Path, epochs: int | None
) -> Iterator[tuple[str, Callable[[float, Callable[[Row], None]], Row]]]:
    """Yields the name of each training and a call that goes on with it for so many seconds, and tells of each epoch."""
    data = config.DataConfig(str(file), mean=MEAN, std=STD, augment="crop_flip")
    whole = dataclasses.replace(scale.training, data=data, out=str(work / "runs"))
    if epochs is not None:
        whole = dataclasses.replace(whole, epochs=epochs)
    for codec in (NONE, MS):
        cfg = dataclasses.replace(whole, codec=codec)
        name = f"{cfg.model.name}, {cfg.epochs} epochs of {file.stem}, {name_of(codec)}"
        yield name, lambda seconds, told, cfg=cfg: train(cfg, seconds, told)


class _Told(RunFolder):
    """A run folder that says so when an epoch has ended."""

    told: Callable[[list[Row]], None]

    def write_history(self, history):
        super().write_history(history)
        if history:  # a run that goes on writes what it has, which may be no epoch yet
            self.told(history)


def train(cfg: config.Config, seconds: float, told: Callable[[Row], None]) -> Row:
    """Trains with msjax's loop for about so many seconds, or goes on; `told` of the row as it is after each epoch."""
    row = {"codec": name_of(cfg.codec), "config": config.to_json(config.without_paths(cfg)), "finished": False}
    folder = None
    try:
        with stop_after(seconds):
            run = load_run(cfg)
            counts = {"train_samples": len(run.dataset.train), "test_samples": len(run.dataset.test)}
            row |= counts | {"samples_per_epoch": cfg.clients * run.spec.schedule.samples, "history": []}
            name = f"{cfg.model.name}-{cfg.epochs}-{pathlib.Path(cfg.data.name).stem}-{type(cfg.codec).__name__}"
            folder, _ = _Told.open_or_create(cfg, name)
            folder.told = lambda history: (row.update(history=list(history)), told(dict(row)))
            train_config(cfg, folder, run=run, quiet=True)
            row["finished"] = True
    except (loop.Interrupted, KeyboardInterrupt):
        pass  # the time was up
    finally:
        if folder is not None:
            folder.close()
    return row


@contextlib.contextmanager
def stop_after(seconds: float) -> Iterator[None]:
    """Sends this process SIGINT, as Ctrl-C does, when so many seconds are over: msjax's loop then saves and ends."""
    timer = threading.Timer(max(0.0, seconds), os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
