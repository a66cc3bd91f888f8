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

from msjax import compress, config, data, display, feed, metrics, models, runs, simulate, step

STREAMED = ("imagenet2012",)  # too large for memory
STEPS_PER_CALL = 10  # where a scan over steps pays, which on a CPU it does not
# Numbers of the keys that are drawn from the seed; the model's blocks take 0, 1, 2, …
_TRAIN_KEY, _EVAL_KEY = 1 << 31, (1 << 31) + 1


class Interrupted(Exception):
    """Training was stopped by a signal; the state is saved."""


class Job(NamedTuple):
    """Everything a run needs that follows from its config."""

    train: feed.Split
    test: feed.Split
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
    # An even share-out needs no labels, which for a stream take a pass over the set.
    labels = train.count if cfg.data.alpha is None else train.labels()
    pools = data.partition(labels, cfg.clients, alpha=cfg.data.alpha, seed=cfg.seed)
    samples = train.count // cfg.clients
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
    setup = step.Setup(client.apply, server.apply, cfg.codec, cfg.grad_codec, optimizer, cfg.optim.label_smoothing)
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
        if cfg.data.image_size is not None:
            options["image_size"] = cfg.data.image_size
        splits = [data.stream(cfg.data.name, split, **options) for split in ("train", "test")]
        first = splits[0]
        info = _SetInfo(first.image_shape, first.num_classes, first.mean, first.std)
        return *(feed.Split(s, len(s)) for s in splits), info
    ds = data.load(cfg.data.name, image_size=cfg.data.image_size, **options)
    info = _SetInfo(ds.train_images.shape[1:], ds.num_classes, ds.mean, ds.std)
    # Copied off the cache's memory map: on a CPU JAX would use that itself, and wait for the disk in every step.
    splits = ((np.array(ds.train_images), ds.train_labels), (np.array(ds.test_images), ds.test_labels))
    return *(feed.Split(simulate.replicate(arrays, mesh), len(arrays[1])) for arrays in splits), info


def make_optimizer(optim: config.OptimConfig, *, epochs: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns SGD as PyTorch has it: L2 penalty added to the gradient, then momentum, then the scheduled rate."""
    total = epochs * steps_per_epoch
    warmup = min(round(optim.warmup_epochs * steps_per_epoch), total // 2)
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


class Evaluator:
    """Test-set evaluation; keeps its compiled programs between epochs."""

    def __init__(self, cfg: config.Config, job: Job):
        self._job = job
        self._codec = cfg.codec.at_inference() if cfg.eval_compressed else None
        self._calls = feed.eval_calls(job.test.count, cfg.clients, cfg.batch_size)
        self._key = jax.random.fold_in(jax.random.key(cfg.seed), _EVAL_KEY)
        self._programs = {
            clients: simulate.make_eval(job.setup, job.preprocess, codec=self._codec, clients=clients, mesh=mesh)
            for clients, mesh in {1: None, cfg.clients: job.mesh}.items()
        }

    def __call__(self, state: step.TrainState) -> dict[str, float]:
        """Returns the mean loss in nats, and top-1 and top-5 accuracy in percent."""
        sums = simulate.zero_sums(self._job.mesh)
        for n, (images, labels, order) in enumerate(feed.feed(self._job.test, self._calls)):
            run = self._programs[self._calls[n].shape[1]]
            sums = run(state, sums, images, labels, order, jax.random.fold_in(self._key, n))
        return sums.means()

    def feature_bytes(self) -> int:
        """Uplink bytes of the test features, which the paper's accounting includes."""
        codec, like = self._codec or compress.Identity(), self._job.features
        return sum(
            call.shape[1] * codec.payload_bytes(jax.ShapeDtypeStruct((call.shape[2], *like.shape[1:]), like.dtype))
            for call in self._calls
        )


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


def train(cfg: config.Config, folder: runs.RunFolder, *, job: Job | None = None, quiet: bool = False) -> dict[str, Any]:
    """Trains, or goes on training, in `folder`; returns the summary, which is also in summary.json.

    `job` is `prepare(cfg)`, if it was called already.

    A run that was interrupted and resumed ends with the same numbers as one that was not, on the same machine.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the state was saved.
      ValueError, data.DataError: see `prepare`.
    """
    job = job or prepare(cfg)
    # Of the epoch under way: a run may stop in the middle of one.
    sums = simulate.zero_sums(job.mesh)
    progress = {"history": [], "train_seconds": 0.0, "wall_seconds": 0.0}
    state = job.state
    if (found := folder.restore((state, sums))) is not None:
        (state, sums), progress = found
    history = progress["history"]
    run = simulate.make_train(job.setup, job.preprocess, clients=cfg.clients, mesh=job.mesh)
    evaluate = Evaluator(cfg, job)
    key = jax.random.fold_in(jax.random.key(cfg.seed), _TRAIN_KEY)
    per_epoch = metrics.epoch_traffic(
        cfg.codec,
        cfg.grad_codec,
        job.features,
        job.state.client,
        clients=cfg.clients,
        samples_per_client=job.samples_per_client,
        batch_size=cfg.batch_size,
    ) + metrics.Traffic(paper_bytes=evaluate.feature_bytes())
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
    start, earlier = time.monotonic(), progress["wall_seconds"]

    def wall():
        return earlier + time.monotonic() - start

    def save():
        folder.save(done, (state, sums), progress | {"wall_seconds": wall()})

    events = display.tensorboard(folder.path / "tensorboard", first_epoch=len(history) + 1)
    with bar, _stop_on_signal() as stopped, events as write_events:
        for epoch in range(len(history), cfg.epochs):
            order = data.epoch_indices(job.pools, job.samples_per_client, seed=cfg.seed, epoch=epoch)
            calls = feed.epoch_calls(order, cfg.batch_size, steps_per_call)
            first = done - epoch * job.steps_per_epoch
            epoch_start = time.monotonic()
            for images, labels, index in feed.feed(job.train, calls, seed=cfg.seed, epoch=epoch, done=first):
                state, sums = run(state, sums, images, labels, index, key)
                steps = 1 if index is None else len(index)
                done += steps
                # The host may run ahead of the device, but by no more than a call, so that the display tells the truth.
                jax.block_until_ready(sums.samples)
                bar.step(steps, per_epoch.uplink_bytes * done // job.steps_per_epoch)
                if stopped():
                    progress["train_seconds"] += time.monotonic() - epoch_start
                    save()
                    raise Interrupted
            progress["train_seconds"] += time.monotonic() - epoch_start
            traffic = per_epoch * (epoch + 1)
            record = {"epoch": epoch + 1, "step": done, "train": sums.means(), "test": evaluate(state)}
            record |= {"traffic": traffic.to_json(), "seconds": round(wall(), 3)}
            history.append(record)
            sums = simulate.zero_sums(job.mesh)
            save()
            folder.write_history(history)
            write_events(record)
            bar.epoch(record, cfg.epochs, traffic.uplink_bytes)
            if stopped():
                raise Interrupted
        bar.note(f"run folder: {folder.path}")
    display.draw_curves(history, f"{title}: {cfg.codec}", folder.path / "curves.png")
    summary = {
        "test": history[-1]["test"],
        "train": history[-1]["train"],
        "traffic": history[-1]["traffic"],
        "uncompressed_feature_bytes": cfg.epochs
        * cfg.clients
        * job.samples_per_client
        * (compress.Identity().payload_bytes(job.features) // job.features.shape[0]),
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
