"""The training loop: epochs, tests, bytes, checkpoints."""

import contextlib
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import msjax
from msjax import data
from msjax.build import check_tokenizer
from msjax.runs import RunFolder, plots
from msjax.runs.progress import Progress
from msjax.runs.signals import stop_on_signal
from msjax.split import shards
from msjax.split.finite import check_losses, check_part, check_test_loss
from msjax.split.metrics import MetricSums, zero_sums
from msjax.split.reads import RunReads
from msjax.split.spec import RunSpec
from msjax.split.state import TrainState, check_constants, digest, eval_key, train_key
from msjax.split.traffic import Traffic, epoch_traffic, run_traffic
from msjax.training import batching, processes, program
from msjax.training.batching import batches_on_device, client_groups, schedule_calls
from msjax.training.devices import make_mesh, replicate, share_of_process, whole_mesh

STEPS_PER_CALL = 10  # where a scan over steps pays, which on a CPU it does not


class Interrupted(Exception):
    """Training was stopped by a signal; the state is saved where there is a run folder."""


class LoadedRun(NamedTuple):
    """A run with its data, before its first step.

    Attributes:
      spec: its description.
      state: its parts, the clients' once.
      dataset: what it is trained and tested on.
      client_indices: of each client the training samples that it holds, int32.
      seed: of orders, augmentation and codecs.
      title: what a person calls it.
      allow_nonfinite: whether it goes on where a loss is not finite.
      workers: how many processes read data that are not in memory, see `data.Reader`.
      clients_per_group: how many clients each device computes at the same time; None for all of its own.
      shard_server: whether the server's part is sharded over all devices, see `shards`.
    """

    spec: RunSpec
    state: TrainState
    dataset: data.Dataset
    client_indices: list[np.ndarray]
    seed: int
    title: str
    allow_nonfinite: bool = False
    workers: int | None = None
    clients_per_group: int | None = None
    shard_server: bool = False


class Finished(NamedTuple):
    """What a run ends with.

    Attributes:
      state: the trained parts, the clients' once.
      history: the epochs' records.
      traffic: the bytes of all epochs.
      train_seconds: of the steps alone.
      wall_seconds: of all, with those of earlier processes of the run.
    """

    state: TrainState
    history: list[dict[str, Any]]
    traffic: Traffic
    train_seconds: float
    wall_seconds: float


class Evaluator:
    """Tests a state on a run's test set; keeps the set on the devices between epochs."""

    def __init__(self, run: LoadedRun, mesh: Mesh | None = None):
        self._run, self._mesh = run, mesh
        rounds, everyone = run.spec.schedule.test_rounds(), len(run.spec.schedule.test_clients)
        # Rounds of all clients are spread over them; what is left is tested on every device alike.
        spread = [samples for samples in rounds if mesh and (len(samples) == everyone or run.shard_server)]
        self._groups, number = [], 0
        for mesh_of_group, group in ((mesh, spread), (None, rounds[len(spread) :])):
            if not group:
                continue
            calls = []
            for samples in group:
                for which in client_groups(len(samples), mesh_of_group, run.clients_per_group):
                    calls.append((number, which, samples[None, which]))
                number += 1
            self._groups.append((mesh_of_group, self._resident(mesh_of_group, group), calls))

    def _resident(self, mesh, rounds):
        """The test samples of these rounds on the devices."""
        test = self._run.dataset.test
        if mesh is not None and not self._run.shard_server:
            return batching.spread_resident(test, mesh, np.concatenate(rounds, axis=1))
        every = None if self._mesh is None else np.concatenate([samples.ravel() for samples in rounds])
        return batching.make_resident(test, self._mesh, every)

    def __call__(self, state: TrainState, epoch: int | None = None) -> dict[str, float]:
        """Returns the mean loss and the metrics of a state as `program.place` gives it.

        Args:
          epoch: after which, counted from 0; by default the last.
        """
        spec, key = self._run.spec, eval_key(self._run.seed)
        testing = np.int32(spec.schedule.test_clients_after(spec.schedule.epochs - 1 if epoch is None else epoch))
        sums = replicate(zero_sums(spec), self._mesh)
        options = {"shard_server": self._run.shard_server}
        for mesh, resident, groups in self._groups:
            reading = {"mesh": mesh, "workers": self._run.workers}
            calls = [samples for _, _, samples in groups]
            batches = batches_on_device(self._run.dataset.test, resident, calls, **reading)
            for (number, which, _), batch in zip(groups, batches, strict=True):
                args = (*batch, testing[which], jax.random.fold_in(key, number))
                sums = program.eval_rounds(spec, mesh, state, sums, *args, **options)
        return jax.device_get(sums).means(spec.task)


def mesh_of(spec: RunSpec, *, shard_server: bool = False) -> Mesh | None:
    """Returns the mesh over which the clients of a run are spread, or its server's part is sharded.

    None is one device; where there are several processes, one of each, on which all compute the same: a step of one
    client is not spread, nor are those of clients that change from round to round: a device has its clients' data.

    Raises:
      ValueError: the clients do not divide over the processes, or a part is to be sharded over several.
    """
    if shard_server:
        if (count := jax.process_count()) > 1:
            raise ValueError(f"shard_server must be False with several processes, got True with {count}")
        return shards.mesh_of()
    if spec.mode.hands_parts_on(spec.schedule) or (spec.mode.one_at_a_time and jax.process_count() > 1):
        return None
    return make_mesh(spec.mode.clients_at_once(spec.schedule))


def placed(run: LoadedRun) -> tuple[TrainState, Mesh | None]:
    """Returns a run's first state on the devices, and their mesh; raises as `mesh_of`."""
    options = {"shard_server": run.shard_server}
    mesh = mesh_of(run.spec, **options)
    return program.place(run.spec, run.state, mesh, **options), mesh


def check_processes(run: LoadedRun, **more: Any) -> None:
    """Raises ValueError, in all processes, where they do not have the same run, or its clients do not divide over them.

    Args:
      more: what else must be the same, JSON-ready.
    """
    mesh_of(run.spec, shard_server=run.shard_server)
    if jax.process_count() == 1:
        return
    versions = {f"the version of {module.__name__}": module.__version__ for module in (jax, msjax)}
    counts = {"training samples": len(run.dataset.train), "test samples": len(run.dataset.test), "seed": run.seed}
    hashes = {
        "the division of the data (its hash)": digest(run.client_indices),
        "the first parameters (their hash)": digest(jax.device_get((run.state.client[:2], run.state.server[:2]))),
    }
    processes.check_same(versions | run.spec.describe() | counts | more | hashes)


def train(run: LoadedRun, folder: RunFolder | None = None, *, quiet: bool = False) -> Finished:
    """Trains, or goes on training where `folder` has a checkpoint.

    A run that was interrupted and resumed ends with the same numbers as one that was not, on the same machine.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the state was saved.
      NonFiniteError: a loss is NaN or infinite; the newest checkpoint is of before.
      ProcessLostError: another process has ended, where there are several.
    """
    try:
        return _Loop(run, folder, quiet or not processes.is_first()).run()
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise processes.lost(error) from error


def trained_state(run: LoadedRun, folder: RunFolder) -> TrainState | None:
    """Returns the parts that a finished run ended with, from its last checkpoint; None where that is not there."""
    if folder.checkpoints.latest() != run.spec.schedule.total_steps:
        return None
    state, mesh = placed(run)
    state, _, _ = restore(folder, run, state, mesh)
    return program.gather(run.spec, state, mesh)


class _Loop:
    """One process's part of a run: what changes from step to step."""

    def __init__(self, run, folder, quiet):
        self._run, self._folder, self._quiet = run, folder, quiet
        self._spec, self._schedule = run.spec, run.spec.schedule
        self._state, self._mesh = placed(run)
        self._sums = self._zero()
        self._constants = _digest_of_constants(run.spec, run.state)
        self._progress = {"history": [], "train_seconds": 0.0, "wall_seconds": 0.0}
        if folder is not None and (found := restore(folder, run, self._state, self._mesh)) is not None:
            self._state, self._sums, self._progress = found
            self._write_history()  # a process may have died between the state and this
        self._traffic = _traffic_until(self._spec, self._history)
        self._done = int(self._state.step)
        self._start, self._earlier = time.monotonic(), self._progress["wall_seconds"]
        self._asked_to_stop = False

    @property
    def _history(self):
        return self._progress["history"]

    def _zero(self):
        return replicate(zero_sums(self._spec), self._mesh)

    def _wall_seconds(self):
        return self._earlier + time.monotonic() - self._start

    def _stop(self):
        self._asked_to_stop = True

    def _agree(self, losses=None):
        """The losses of all clients, and whether to stop: in all processes where one was asked to."""
        if processes.count() == 1:
            return None if losses is None else np.asarray(losses), self._asked_to_stop
        return processes.agree(losses, self._asked_to_stop, whole_mesh(self._mesh))

    def _write_history(self):
        if self._folder is not None and processes.is_first():
            self._folder.write_history(self._history)

    def run(self):
        schedule = self._schedule
        train = self._run.dataset.train
        if self._run.shard_server:
            resident = batching.make_resident(train, self._mesh)
        else:
            resident = batching.resident_of_clients(train, self._mesh, self._run.client_indices)
        evaluate = Evaluator(self._run, self._mesh)
        bar = Progress(
            self._run.title,
            headline=self._spec.task.headline,
            total_steps=schedule.total_steps,
            done_steps=self._done,
            samples_per_step=schedule.mode.clients_at_once(schedule) * schedule.samples / schedule.client_steps,
            quiet=self._quiet,
        )
        with bar, stop_on_signal(self._stop), self._reader() as self._reads, self._events() as write_events:
            for epoch in range(len(self._history), schedule.epochs):
                self._train_epoch(epoch, resident, bar)
                record = self._end_epoch(epoch, evaluate)
                write_events(record)
                bar.epoch(record, schedule.epochs, self._traffic.uplink_bytes)
                if self._agree()[1]:
                    self._finish_saving()
                    raise Interrupted
            self._finish_saving()
            if self._folder is not None:
                bar.note(f"run folder: {self._folder.path}")
                if not plots.available():
                    bar.note("no curves or TensorBoard events: pip install 'msjax[plots]'")
        state = program.gather(self._spec, self._state, self._mesh)
        if not self._run.allow_nonfinite:
            for part in ("client", "server"):
                check_part(part, getattr(state, part)[:2], self._done)
        wall = self._wall_seconds()
        return Finished(state, self._history, self._traffic, self._progress["train_seconds"], wall)

    def _reader(self):
        """What reads training data that are not in memory, over all epochs."""
        run, split = self._run, self._run.dataset.train
        if split.in_memory:
            return contextlib.nullcontext()
        rows = share_of_process(run.spec.mode.clients_at_once(self._schedule), self._mesh)
        reads = RunReads(self._schedule, run.client_indices, run.seed, rows)
        return data.Reader({"train": split}, reads, workers=run.workers)

    def _events(self):
        if self._folder is None or not plots.available() or not processes.is_first():
            return contextlib.nullcontext(lambda record: None)
        return plots.tensorboard(self._folder.path / "tensorboard", first_epoch=len(self._history) + 1)

    def _train_epoch(self, epoch, resident, bar):
        schedule, seed = self._schedule, self._run.seed
        order = data.epoch_indices(self._run.client_indices, schedule.samples, seed=seed, epoch=epoch)
        here = program.clients_of_a_device(self._spec, self._mesh)
        in_groups = (group := self._run.clients_per_group) is not None and group < here
        train_steps = functools.partial(program.train_in_groups, group=group) if in_groups else program.train_steps
        train_steps = functools.partial(train_steps, shard_server=self._run.shard_server)
        one_by_one = jax.default_backend() == "cpu" or resident is None or in_groups
        steps_per_call = 1 if one_by_one else STEPS_PER_CALL
        calls = schedule_calls(schedule, order, epoch, steps_per_call)
        first = self._done - epoch * schedule.epoch_steps
        earlier, self._traffic = self._traffic.uplink_bytes, self._traffic + epoch_traffic(self._spec, epoch)
        began, key = time.monotonic(), train_key(seed)
        read = None if self._reads is None else lambda step: self._reads[epoch * schedule.epoch_steps + step]
        options = {"done": first, "mesh": self._mesh, "read": read}
        batches = batches_on_device(self._run.dataset.train, resident, calls, **options)
        for inputs, labels, index in batches:
            clients = np.asarray(schedule.position(self._done).clients, np.int32)
            args = (inputs, labels, index, clients, key)
            given = self._state, self._sums, *args
            self._state, self._sums, losses = train_steps(self._spec, self._mesh, *given)
            # The host may run ahead of the device, but by no more than a call, so that the display tells the truth.
            losses, stops = self._agree(losses)
            if not self._run.allow_nonfinite:
                check_losses(losses, clients.tolist(), self._done)
            steps = len(losses)
            self._done += steps
            share = (self._done - epoch * schedule.epoch_steps) / schedule.epoch_steps
            shape = tuple(np.shape(leaf) for leaf in jax.tree.leaves((inputs, index)))
            bar.step(steps, earlier + round(share * (self._traffic.uplink_bytes - earlier)), shape)
            if stops or (self._asked_to_stop and processes.count() == 1):  # since then, too
                self._progress["train_seconds"] += time.monotonic() - began
                self._save()
                self._finish_saving()
                raise Interrupted
            if self._folder is not None:
                self._folder.checkpoints.check()
        self._progress["train_seconds"] += time.monotonic() - began

    def _end_epoch(self, epoch, evaluate):
        sums = jax.device_get(self._sums)
        record = {"epoch": epoch + 1, "step": self._done, "train": sums.means(self._spec.task)}
        if self._schedule.tests_after(epoch):
            record["test"] = evaluate(self._state, epoch)
            if not self._run.allow_nonfinite:
                check_test_loss(record["test"]["loss"], epoch + 1)
        record |= {"traffic": self._traffic.to_json(), "seconds": round(self._wall_seconds(), 3)}
        record["traffic"] |= _coded_bytes(self._spec, sums, self._history)
        self._history.append(record)
        self._sums = self._zero()
        self._save()
        self._write_history()
        return record

    def _save(self):
        if self._folder is not None:
            progress = self._progress | {"wall_seconds": self._wall_seconds()}
            if self._run.dataset.tokenizer is not None:
                progress["tokenizer"] = self._run.dataset.tokenizer
            if self._constants is not None:
                progress[_CONSTANTS] = self._constants
            self._folder.checkpoints.save(self._done, (_to_save(self._spec, self._state), self._sums), progress)

    def _finish_saving(self):
        """Waits for the last checkpoint, which is written while training goes on."""
        if self._folder is not None:
            self._folder.checkpoints.wait()


def _traffic_until(spec, history):
    """The bytes so far. As recorded: a run that was given more epochs had a test after what had been its last."""
    if not history:
        return run_traffic(spec, 0)
    recorded = history[-1]["traffic"]  # runs of earlier versions did not count every kind
    return Traffic(**{field.name: recorded.get(field.name, 0) for field in dataclasses.fields(Traffic)})


def _coded_bytes(spec, sums, history):
    """About the bytes so far of the messages of entropy-coded codecs, headers and all: of the cut, and of averages."""
    earlier = history[-1]["traffic"] if history else {}
    up, down = (np.atleast_1d(sent) for sent in (sums.uplink_bytes, sums.downlink_bytes))
    found = {}
    if spec.codec.entropy_coded or spec.grad_codec.entropy_coded:
        found |= {"coded_uplink_bytes": up[0], "coded_downlink_bytes": down[0]}
    if spec.compresses_updates and spec.update_codec.entropy_coded:
        found |= {"coded_uplink_synchronization_bytes": up[1], "coded_downlink_synchronization_bytes": down[1]}
    return {name: round(earlier.get(name, 0) + float(value)) for name, value in found.items()}


_CONSTANTS = "constants"
"""In a checkpoint: the digest of what never changes, which the checkpoint leaves out."""


def _to_save(spec, state):
    """What is saved of a `TrainState`: without what this run does not have, and what never changes."""
    lacking = {"memory": not state.memory, "up_bits": state.up_bits is None}
    state = state._replace(
        client=state.client.without(spec.client_constants), server=state.server.without(spec.server_constants)
    )
    return {name: value for name, value in state._asdict().items() if not lacking.get(name)}


def _restored(spec, saved, state):
    """The `TrainState` of what was saved, with what never changes of `state`."""
    found = TrainState(**saved)
    return found._replace(
        client=found.client.with_constants_of(state.client, spec.client_constants),
        server=found.server.with_constants_of(state.server, spec.server_constants),
    )


def _digest_of_constants(spec, state):
    """The digest of what never changes in a state as `LoadedRun` has it; None where there is nothing of the kind."""
    names = (spec.client_constants, spec.server_constants)
    if not any(names):
        return None
    parts = zip((state.client, state.server), names, strict=True)
    return digest(*({name: part.stats[name] for name in sorted(of_part)} for part, of_part in parts))


class _SumsBefore(NamedTuple):
    """What was saved in place of `MetricSums` before there were tasks other than classification."""

    loss: Any
    top1: Any
    top5: Any
    samples: Any
    uplink_bytes: Any
    downlink_bytes: Any


def restore(
    folder: RunFolder, run: LoadedRun, state: TrainState, mesh: Mesh | None
) -> tuple[TrainState, MetricSums, dict[str, Any]] | None:
    """Returns the newest checkpoint's state, sums and progress, or None where there is none.

    Raises:
      ValueError: it does not fit the run, or was trained on texts that were split into words by another tokenizer, or
        beside other weights that never change.
    """
    step = folder.checkpoints.latest()
    if step is None:
        return None
    sums = replicate(zero_sums(run.spec), mesh)
    like = _to_save(run.spec, state)
    try:
        (saved, sums), progress = folder.checkpoints.restore(step, (like, sums))
    except ValueError:
        if run.spec.task.name != "classification":
            raise
    else:
        check_tokenizer(run.dataset.tokenizer, progress.get("tokenizer"))
        check_constants(_digest_of_constants(run.spec, run.state), progress.pop(_CONSTANTS, None))
        return _restored(run.spec, saved, state), sums, progress
    zero = lambda dtype: replicate(jnp.zeros((), dtype), mesh)  # noqa: E731
    kinds = (jnp.float32, jnp.int32, jnp.int32, jnp.int32, jnp.float32, jnp.float32)
    before = _SumsBefore(*map(zero, kinds))
    (saved, before), progress = folder.checkpoints.restore(step, (like, before))
    check_tokenizer(run.dataset.tokenizer, progress.get("tokenizer"))
    tops = {f"{n}_percent": jnp.stack([getattr(before, n), before.samples]) for n in ("top1", "top5")}
    sums = MetricSums(before.loss, before.samples, tops, before.uplink_bytes, before.downlink_bytes)
    return TrainState(**saved), replicate(sums, mesh), progress
