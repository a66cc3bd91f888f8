"""From a config to a trained split network, its bytes counted: the training loop and evaluation."""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msjax import compress, config, data, display, metrics, models, runs, simulate, step

STREAMED = ("imagenet2012",)  # too large for memory
STEPS_PER_CALL = 10  # where a scan over steps pays, which on a CPU it does not


class Interrupted(Exception):
    """Training was stopped by a signal; the state is saved."""


class Split(NamedTuple):
    """One split of a data set, in memory or streamed."""

    source: Any  # (images, labels) on the device, or a data.ImageStream
    labels: np.ndarray


class Job(NamedTuple):
    """Everything a run needs that follows from its config."""

    train: Split
    test: Split
    setup: step.Setup
    preprocess: simulate.Preprocess
    state: step.TrainState
    features: jax.ShapeDtypeStruct
    pools: list[np.ndarray]
    samples_per_client: int
    steps_per_epoch: int
    mesh: Any


def prepare(cfg: config.Config) -> Job:
    """Loads the data, builds the model, cuts it and shares the data out.

    Raises:
      ValueError: a field of the config has a value that does not fit.
      data.DataError: the data set cannot be had.
    """
    mesh = simulate.make_mesh(cfg.clients)
    train, test, info = _load(cfg, mesh)
    pools = data.partition(train.labels, cfg.clients, alpha=cfg.data.alpha, seed=cfg.seed)
    samples = len(train.labels) // cfg.clients
    steps_per_epoch = math.ceil(samples / cfg.batch_size)
    model = models.build(
        cfg.model.name,
        input_shape=info.image_shape,
        num_classes=info.num_classes,
        width=cfg.model.width,
        activation=cfg.model.activation,
        first_block=cfg.model.first_block,
        dtype=jnp.dtype(cfg.dtype),
    )
    client, server = models.split(model, cfg.cut, seed=cfg.seed)
    optimizer = make_optimizer(cfg.optim, epochs=cfg.epochs, steps_per_epoch=steps_per_epoch)
    setup = step.Setup(client.apply, server.apply, cfg.codec, cfg.grad_codec, optimizer)
    augment = cfg.data.augment or data.default_augmentation(cfg.data.name)
    preprocess = simulate.Preprocess(augment, tuple(map(float, info.mean)), tuple(map(float, info.std)), cfg.dtype)
    state = simulate.replicate(step.init_state(setup, client, server), mesh)
    batch = jax.ShapeDtypeStruct((min(cfg.batch_size, samples), *info.image_shape), jnp.dtype(cfg.dtype))
    features = step.features_like(setup, state.client, batch)
    return Job(train, test, setup, preprocess, state, features, pools, samples, steps_per_epoch, mesh)


class _SetInfo(NamedTuple):
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: np.ndarray
    std: np.ndarray


def _load(cfg, mesh):
    options = {"data_dir": cfg.data.data_dir, "cache_dir": cfg.data.cache_dir}
    if cfg.data.name in STREAMED:
        options["image_size"] = cfg.data.image_size or 224
        splits = [data.stream(cfg.data.name, split, **options) for split in ("train", "test")]
        first = splits[0]
        info = _SetInfo(first.image_shape, first.num_classes, first.mean, first.std)
        return *(Split(s, s.labels()) for s in splits), info
    ds = data.load(cfg.data.name, image_size=cfg.data.image_size, **options)
    info = _SetInfo(ds.train_images.shape[1:], ds.num_classes, ds.mean, ds.std)
    splits = ((ds.train_images, ds.train_labels), (ds.test_images, ds.test_labels))
    return *(Split(simulate.replicate(arrays, mesh), arrays[1]) for arrays in splits), info


def make_optimizer(optim: config.OptimConfig, *, epochs: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns SGD as PyTorch has it: L2 penalty added to the gradient, then momentum, then the scheduled rate."""
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    total = epochs * steps_per_epoch
    if optim.schedule == "cosine":
        rate = optax.cosine_decay_schedule(optim.learning_rate, total - warmup)
    elif optim.schedule == "steps":
        drops = {m * steps_per_epoch - warmup: optim.gamma for m in optim.milestones}
        rate = optax.piecewise_constant_schedule(optim.learning_rate, drops)
    else:
        rate = optax.constant_schedule(optim.learning_rate)
    if warmup:
        rate = optax.join_schedules([optax.linear_schedule(0.0, optim.learning_rate, warmup), rate], [warmup])
    sgd = optax.sgd(rate, momentum=optim.momentum, nesterov=optim.nesterov)
    return optax.chain(optax.add_decayed_weights(optim.weight_decay), sgd)


def batches_of(order: np.ndarray, batch_size: int, steps_per_call: int) -> list[np.ndarray]:
    """Cuts an epoch's order (K, n) into calls of int32 (S, K, B); the last step is smaller where B does not divide n.

    S is the same in all full calls, so that at most two programs are compiled.
    """
    clients, n = order.shape
    full = n // batch_size
    per_call = max(s for s in range(1, max(1, min(steps_per_call, full)) + 1) if full % s == 0)
    body = order[:, : full * batch_size].reshape(clients, full, batch_size).transpose(1, 0, 2)
    calls = [body[i : i + per_call] for i in range(0, full, per_call)]
    if full * batch_size < n:
        calls.append(order[None, :, full * batch_size :])
    return calls


def test_batches(count: int, clients: int, batch_size: int) -> list[np.ndarray]:
    """Cuts 0 … count − 1 into calls of int32 (1, K, B): rounds of all clients, then single batches, then the rest."""
    order = np.arange(count, dtype=np.int32)
    calls, at = [], 0
    for k, b in ((clients, batch_size), (1, batch_size)):
        while at + k * b <= count:
            calls.append(order[at : at + k * b].reshape(1, k, b))
            at += k * b
    if at < count:
        calls.append(order[at:].reshape(1, 1, -1))
    return calls


class Evaluator:
    """Test-set evaluation; keeps its compiled programs between epochs."""

    def __init__(self, cfg: config.Config, job: Job):
        self._job = job
        self._codec = cfg.codec.at_inference() if cfg.eval_compressed else None
        self._calls = test_batches(len(job.test.labels), cfg.clients, cfg.batch_size)
        self._key = jax.random.fold_in(jax.random.key(cfg.seed), 2)
        make = lambda k, mesh: simulate.make_eval(  # noqa: E731
            job.setup, job.preprocess, codec=self._codec, clients=k, mesh=mesh
        )
        self._programs = {1: make(1, None)} | {cfg.clients: make(cfg.clients, job.mesh)}

    def __call__(self, state: step.TrainState) -> dict[str, float]:
        """Returns the mean loss in nats, and top-1 and top-5 accuracy in percent."""
        sums = simulate.zero_sums(self._job.mesh)
        for call, (images, labels, order) in zip(self._calls, feed(self._job.test, self._calls), strict=True):
            sums = self._programs[call.shape[1]](state, sums, images, labels, order, self._key)
        return sums.means()

    def feature_bytes(self) -> int:
        """Uplink bytes of the test features, which the paper's accounting includes."""
        if self._codec is None:
            return 0
        like = self._job.features
        return sum(
            call.shape[1]
            * self._codec.payload_bytes(jax.ShapeDtypeStruct((call.shape[2], *like.shape[1:]), like.dtype))
            for call in self._calls
        )


def feed(split: Split, calls: list[np.ndarray], *, seed: int = 0, epoch: int = 0, start: int = 0):
    """Yields (images, labels, order) for each call from `start` on, as the programs of `simulate` take them."""
    if isinstance(split.source, tuple):
        for call in calls[start:]:
            yield *split.source, call
        return
    # Streams come a step at a time; consecutive calls of one shape are read ahead together.
    while start < len(calls):
        same = [c for c in calls[start:] if c.shape == calls[start].shape]
        for images, labels in data.batches(split.source, np.concatenate(same), seed=seed, epoch=epoch):
            yield images, labels, None
        start += len(same)


@contextlib.contextmanager
def _stop_on_signal():
    """Yields a function that tells whether SIGINT or SIGTERM came; a second one acts as usual."""
    came = []

    def handler(number, frame):
        came.append(number)
        signal.signal(number, old[number])

    old = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # Only the main thread may set handlers; elsewhere signals act as usual.
        with contextlib.suppress(ValueError):
            old[number] = signal.signal(number, handler)
    try:
        yield lambda: bool(came)
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def train(cfg: config.Config, folder: runs.RunFolder, *, quiet: bool = False) -> dict[str, Any]:
    """Trains, or goes on training, in `folder`; returns the summary, which is also in summary.json.

    A run that was interrupted and resumed ends with the same numbers as one that was not, on the same machine.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the state was saved.
      ValueError, data.DataError: see `prepare`.
    """
    job = prepare(cfg)
    # Of the epoch under way: a run may stop in the middle of one.
    sums = simulate.zero_sums(job.mesh)
    progress = {"history": [], "train_seconds": 0.0, "wall_seconds": 0.0}
    state = job.state
    if (found := folder.restore((state, sums))) is not None:
        (state, sums), progress = found
    history = progress["history"]
    run = simulate.make_train(job.setup, job.preprocess, clients=cfg.clients, mesh=job.mesh)
    evaluate = Evaluator(cfg, job)
    key = jax.random.fold_in(jax.random.key(cfg.seed), 1)
    per_epoch = epoch_traffic(cfg, job, evaluate)
    done = int(state.step)
    steps_per_call = 1 if jax.default_backend() == "cpu" or cfg.data.name in STREAMED else STEPS_PER_CALL
    title = f"{cfg.model.name} {cfg.data.name} {cfg.model.cut} {type(cfg.codec).__name__}"
    bar = display.Progress(
        title,
        total_steps=cfg.epochs * job.steps_per_epoch,
        done_steps=done,
        images_per_step=cfg.clients * job.samples_per_client / job.steps_per_epoch,
        quiet=quiet,
    )
    start = time.monotonic()
    earlier = progress["wall_seconds"]
    wall = lambda: earlier + time.monotonic() - start  # noqa: E731
    events = display.tensorboard(folder.path / "tensorboard", first_epoch=len(history) + 1)
    with bar, _stop_on_signal() as stopped, events as write_events:
        for epoch in range(len(history), cfg.epochs):
            order = data.epoch_indices(job.pools, job.samples_per_client, seed=cfg.seed, epoch=epoch)
            calls = batches_of(order, cfg.batch_size, steps_per_call)
            first = _calls_done(calls, done - epoch * job.steps_per_epoch)
            epoch_start = time.monotonic()
            for call, (images, labels, index) in zip(
                calls[first:], feed(job.train, calls, seed=cfg.seed, epoch=epoch, start=first), strict=True
            ):
                state, sums = run(state, sums, images, labels, index, key)
                done += len(call)
                # The host may run ahead of the device, but by no more than a call, so that the display tells the truth.
                jax.block_until_ready(sums.samples)
                bar.step(len(call), per_epoch.uplink_bytes * done // job.steps_per_epoch)
                if stopped():
                    progress["train_seconds"] += time.monotonic() - epoch_start
                    folder.save(done, (state, sums), progress | {"wall_seconds": wall()})
                    bar.note(f"interrupted after step {done}; continue with: msjax train --resume {folder.path}")
                    raise Interrupted
            progress["train_seconds"] += time.monotonic() - epoch_start
            traffic = per_epoch * (epoch + 1)
            record = {"epoch": epoch + 1, "step": done, "train": sums.means(), "test": evaluate(state)}
            record |= {"traffic": traffic.to_json(), "seconds": round(wall(), 3)}
            history.append(record)
            sums = simulate.zero_sums(job.mesh)
            folder.save(done, (state, sums), progress | {"wall_seconds": wall()})
            folder.write_history(history)
            write_events(record)
            bar.epoch(record, cfg.epochs, traffic.uplink_bytes)
        bar.note(f"run folder: {folder.path}")
    display.draw_curves(history, f"{title}: {cfg.codec}", folder.path / "curves.png")
    summary = {
        "test": history[-1]["test"],
        "train": history[-1]["train"],
        "traffic": history[-1]["traffic"],
        "uncompressed_feature_bytes": epoch_traffic(uncompressed(cfg), job, evaluate).uplink_feature_bytes * cfg.epochs,
        "wall_seconds": round(wall(), 1),
        "images_per_second": round(cfg.epochs * cfg.clients * job.samples_per_client / progress["train_seconds"], 1),
        "command": " ".join(sys.argv),
        "config": config.to_json(cfg),
        "environment": runs.environment(),
    }
    folder.write_summary(summary)
    return summary


def uncompressed(cfg: config.Config) -> config.Config:
    """Returns the same run without compression in either direction: what `compare` compares with."""
    return dataclasses.replace(cfg, codec=compress.Identity(), grad_codec=compress.Identity(), compare=False)


def _calls_done(calls, steps):
    """How many calls make up the first `steps` steps of an epoch."""
    for n, _ in enumerate(calls):
        if steps <= 0:
            return n
        steps -= len(calls[n])
    return len(calls)


def epoch_traffic(cfg, job, evaluate) -> metrics.Traffic:
    """Bytes of one epoch over all clients, test features in the paper's accounting included."""

    def steps(batch, count):
        like = jax.ShapeDtypeStruct((batch, *job.features.shape[1:]), job.features.dtype)
        one = metrics.step_traffic(cfg.codec, cfg.grad_codec, like, job.state.client, clients=cfg.clients)
        return one * count

    full, rest = divmod(job.samples_per_client, cfg.batch_size)
    total = steps(cfg.batch_size, full) + metrics.Traffic(paper_bytes=evaluate.feature_bytes())
    return total + steps(rest, 1) if rest else total
