"""From a config to a trained split network, its bytes counted: the training loop and evaluation."""

import contextlib
import dataclasses
import signal
import sys
import time
import uuid
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax import assemble, compress, config, data, display, feed, halves, metrics, parties, runs, simulate, step
from msjax.protocol import Plan

STREAMED = ("imagenet2012",)  # too large for memory
STEPS_PER_CALL = 10  # where a scan over steps pays, which on a CPU it does not


class Interrupted(Exception):
    """Training was stopped by a signal; the state is saved."""


class Job(NamedTuple):
    """Everything a run needs that follows from its config."""

    train: feed.Split
    test: feed.Split
    info: assemble.SetInfo
    parts: assemble.Assembly
    shapes: parties.Shapes
    state: step.TrainState
    pools: list[np.ndarray]
    mesh: Any


def prepare(cfg: config.Config) -> Job:
    """Loads the data, builds the model, cuts it and shares the data out.

    Raises:
      ValueError: a field of the config has a value that does not fit.
      data.DataError: the data set cannot be had.
    """
    # In turns there is one client at a time.
    mesh = None if cfg.mode.kind == "sequential" else simulate.make_mesh(cfg.clients)
    train, test, info = _load(cfg, mesh)
    pools, samples = assemble.share_out(cfg, train.labels, train.count)
    parts = assemble.assemble(cfg, info, samples=samples, test_samples=test.count)
    state = step.TrainState(parts.client, parts.server, jnp.int32(0))
    own_halves = parts.plan.averages_halves
    state = simulate.own_halves(state, cfg.clients, mesh) if own_halves else simulate.replicate(state, mesh)
    return Job(train, test, info, parts, parts.shapes(), state, pools, mesh)


def _load(cfg, mesh):
    options = {"data_dir": cfg.data.data_dir, "cache_dir": cfg.data.cache_dir}
    if cfg.data.name in STREAMED:
        if cfg.data.image_size is not None:
            options["image_size"] = cfg.data.image_size
        splits = [data.stream(cfg.data.name, split, **options) for split in ("train", "test")]
        first = splits[0]
        info = assemble.SetInfo(first.input_shape, first.num_classes, first.mean, first.std)
        return *(feed.Split(s, len(s)) for s in splits), info.normalised_as(cfg.data)
    ds = data.load(cfg.data.name, **cfg.data.form, **options)
    info = assemble.SetInfo.of(ds).normalised_as(cfg.data)
    # Copied off the cache's memory map: on a CPU JAX would use that itself, and wait for the disk in every step.
    splits = ((np.array(ds.train_inputs), ds.train_labels), (np.array(ds.test_inputs), ds.test_labels))
    return *(feed.Split(simulate.replicate(arrays, mesh), len(arrays[1])) for arrays in splits), info


class Evaluator:
    """Test-set evaluation; keeps its compiled programs between epochs."""

    def __init__(self, cfg: config.Config, job: Job):
        self._job = job
        parts = job.parts
        self._clients, self._calls = parts.plan.test_clients(), parts.plan.test_calls()
        self._key = simulate.test_key(cfg.seed)
        self._programs = {
            clients: simulate.make_eval(
                parts.setup,
                parts.preprocess,
                codec=parts.test_codec,
                clients=clients,
                mesh=mesh,
                own_halves=parts.plan.averages_halves,
            )
            for clients, mesh in {1: None, len(self._clients): job.mesh}.items()
        }

    def __call__(self, state: step.TrainState) -> dict[str, float]:
        """Returns the mean loss in nats, and top-1 and top-5 accuracy in percent."""
        sums = simulate.zero_sums(self._job.mesh)
        for n, (images, labels, order) in enumerate(feed.feed(self._job.test, self._calls)):
            clients = self._calls[n].shape[1]
            key, numbers = jax.random.fold_in(self._key, n), np.int32(self._clients[:clients])
            sums = self._programs[clients](state, sums, images, labels, order, key, numbers)
        return sums.means()


def _calls(plan, order, epoch, steps_per_call):
    """An epoch's order (K, n) cut into calls of (S, K, B); in turns, of (S, 1, B) of the client whose turn it is."""
    if not plan.sequential:
        return feed.epoch_calls(order, plan.batch_size, steps_per_call)
    calls = []
    places = [plan.place(epoch * plan.epoch_steps + i) for i in range(plan.epoch_steps)]
    for place in places:
        if place.turn_starts:
            start = place.start
        if place.turn_ends:
            (client,) = place.clients
            calls += feed.epoch_calls(order[client : client + 1, start : place.stop], plan.batch_size, steps_per_call)
    return calls


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
        runs.write_history(folder.path, progress["history"])  # a process may have died between the state and this
    history = progress["history"]
    plan = job.parts.plan
    averages = simulate.Averages(cfg.mode.average_steps, plan.epoch_steps) if plan.averages_halves else None
    run = simulate.make_train(
        job.parts.setup, job.parts.preprocess, clients=len(plan.place(0).clients), mesh=job.mesh, averages=averages
    )
    evaluate = Evaluator(cfg, job)
    key = simulate.train_key(cfg.seed)
    traffic = metrics.run_traffic(job.shapes, len(history))
    done = int(state.step)
    steps_per_call = 1 if jax.default_backend() == "cpu" or cfg.data.name in STREAMED else STEPS_PER_CALL
    title = f"{cfg.model.name} {cfg.data.name} {cfg.model.cut} {type(cfg.codec).__name__}"
    bar = display.Progress(
        title,
        total_steps=cfg.epochs * plan.epoch_steps,
        done_steps=done,
        samples_per_step=cfg.clients * plan.samples / plan.epoch_steps,
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
            order = data.epoch_indices(job.pools, plan.samples, seed=cfg.seed, epoch=epoch)
            calls = _calls(plan, order, epoch, steps_per_call)
            first = done - epoch * plan.epoch_steps
            earlier_bytes, traffic = traffic.uplink_bytes, traffic + metrics.epoch_traffic(job.shapes, epoch)
            epoch_start = time.monotonic()
            for images, labels, index in feed.feed(job.train, calls, seed=cfg.seed, epoch=epoch, done=first):
                clients = np.asarray(plan.place(done).clients, np.int32)
                state, sums = run(state, sums, images, labels, index, key, clients)
                steps = 1 if index is None else len(index)
                done += steps
                # The host may run ahead of the device, but by no more than a call, so that the display tells the truth.
                jax.block_until_ready(sums.samples)
                part = (done - epoch * plan.epoch_steps) / plan.epoch_steps
                bar.step(steps, earlier_bytes + round(part * (traffic.uplink_bytes - earlier_bytes)))
                if stopped():
                    progress["train_seconds"] += time.monotonic() - epoch_start
                    save()
                    raise Interrupted
            progress["train_seconds"] += time.monotonic() - epoch_start
            record = {"epoch": epoch + 1, "step": done, "train": sums.means()}
            if plan.tests(epoch):
                record["test"] = evaluate(state)
            record |= {"traffic": traffic.to_json(), "seconds": round(wall(), 3)}
            if cfg.codec.entropy_coded or cfg.grad_codec.entropy_coded:
                record["traffic"] |= _coded(sums, history)
            history.append(record)
            sums = simulate.zero_sums(job.mesh)
            save()
            runs.write_history(folder.path, history)
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
        * plan.samples
        * compress.Identity().payload_bytes(job.shapes.features(1)),
        "wall_seconds": round(wall(), 1),
        "images_per_second": round(cfg.epochs * cfg.clients * plan.samples / progress["train_seconds"], 1),
        "command": " ".join(sys.argv),
        "config": config.to_json(cfg),
        "environment": runs.environment(),
    }
    run = uuid.uuid4().hex
    for part, half in (("client", one_half(state, plan)), ("server", state.server)):
        path = folder.path / f"{part}.safetensors"
        halves.save(path, part, half, cfg, job.info, run=run, step=done)
    runs.write_summary(folder.path, summary)
    return summary


def _coded(sums, history):
    """About the bytes of all features and gradients so far, as messages."""
    earlier = history[-1]["traffic"] if history else {}
    names = {"coded_uplink_bytes": sums.uplink_bytes, "coded_downlink_bytes": sums.downlink_bytes}
    return {name: round(earlier.get(name, 0) + float(value)) for name, value in names.items()}


def one_half(state: step.TrainState, plan: Plan) -> step.HalfState:
    """The clients' half at the end of an epoch, when all have the same weights."""
    return jax.tree.map(lambda leaf: leaf[0], state.client) if plan.averages_halves else state.client


def uncompressed(cfg: config.Config) -> config.Config:
    """Returns the same run without compression in either direction: what `compare` compares with."""
    return dataclasses.replace(cfg, codec=compress.Identity(), grad_codec=compress.Identity(), compare=False)
