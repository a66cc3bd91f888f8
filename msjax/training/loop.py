"""The training loop: epochs, tests, bytes, checkpoints."""

import contextlib
import dataclasses
import functools
import logging
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from msjax import data
from msjax.runs import RunFolder, plots
from msjax.runs.progress import Progress
from msjax.runs.signals import stop_on_signal
from msjax.split.budget import first_bytes_per_second, why_too_slow
from msjax.split.finite import check_losses, check_part, check_test_loss
from msjax.split.metrics import zero_sums
from msjax.split.reads import RunReads
from msjax.split.sent import total_bytes
from msjax.split.state import TrainState, train_key
from msjax.split.traffic import Traffic, epoch_traffic, run_traffic
from msjax.training import batching, processes, program
from msjax.training.batching import batches_on_device, schedule_calls
from msjax.training.devices import replicate, share_of_process, whole_mesh
from msjax.training.evaluator import Evaluator
from msjax.training.loaded import LoadedRun, placed
from msjax.training.saved import CONSTANTS, digest_of_constants, restore, to_save

_log = logging.getLogger("msjax")

STEPS_PER_CALL = 10  # where a scan over steps pays, which on a CPU it does not


class Interrupted(Exception):
    """Training was stopped by a signal; the state is saved where there is a run folder."""


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


_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""What JAX's errors begin with that are not for another process's end: out of memory, for one."""


def train(run: LoadedRun, folder: RunFolder | None = None, *, quiet: bool = False) -> Finished:
    """Trains, or goes on training where `folder` has a checkpoint.

    A run that was interrupted and resumed ends with the same numbers as one that was not, on the same machine.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the state was saved.
      NonFiniteError: a loss is NaN or infinite; the newest checkpoint is of before.
      ProcessLostError: another process has ended, where there are several.
    """
    if run.spec.cut_seconds is not None and processes.is_first():
        why = why_too_slow(run.spec, first_bytes_per_second(run.spec))
        if why is not None:
            _log.warning("%s", why)
    try:
        return _Loop(run, folder, quiet or not processes.is_first()).run()
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or str(error).startswith(_OWN_FAULTS):
            raise
        raise processes.lost(error) from error


class _Loop:
    """One process's part of a run: what changes from step to step."""

    def __init__(self, run, folder, quiet):
        self._run, self._folder, self._quiet = run, folder, quiet
        self._spec, self._schedule = run.spec, run.spec.schedule
        self._state, self._mesh = placed(run)
        self._sums = self._zero()
        self._constants = digest_of_constants(run.spec, run.state)
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

    def _interrupted(self):
        what = "it has no folder, so nothing is saved" if self._folder is None else "its state is saved"
        return Interrupted(f"training was stopped by a signal after step {self._done}; {what}")

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
            samples_per_step=schedule.mode.clients_per_step(schedule) * schedule.samples / schedule.client_steps,
            quiet=self._quiet,
        )
        with bar, stop_on_signal(self._stop), self._reader() as self._reads, self._events() as write_events:
            for epoch in range(len(self._history), schedule.epochs):
                self._train_epoch(epoch, resident, bar)
                record = self._end_epoch(epoch, evaluate)
                write_events(record)
                bar.epoch(record, schedule.epochs, total_bytes(record["traffic"]))
                if self._agree()[1]:
                    self._finish_saving()
                    raise self._interrupted()
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
        rows = share_of_process(run.spec.mode.clients_per_step(self._schedule), self._mesh)
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
        self._traffic += epoch_traffic(self._spec, epoch)
        # What messages take is counted at the end of each epoch, and taken to be the same in the next one.
        before = total_bytes(self._history[-1]["traffic"]) if self._history else None
        began, key = time.monotonic(), train_key(seed)
        read = None if self._reads is None else lambda step: self._reads[epoch * schedule.epoch_steps + step]
        options = {"done": first, "mesh": self._mesh, "read": read}
        batches = batches_on_device(self._run.dataset.train, resident, calls, **options)
        try:
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
                bar.step(steps, before and round(before * (1 + share / epoch)), shape)
                if stops or (self._asked_to_stop and processes.count() == 1):  # since then, too
                    self._progress["train_seconds"] += time.monotonic() - began
                    self._save()
                    self._finish_saving()
                    raise self._interrupted()
                if self._folder is not None:
                    self._folder.checkpoints.check()
        except data.DataError:
            self._progress["train_seconds"] += time.monotonic() - began
            self._save_what_is_done()
            raise
        self._progress["train_seconds"] += time.monotonic() - began

    def _end_epoch(self, epoch, evaluate):
        sums = jax.device_get(self._sums)
        record = {"epoch": epoch + 1, "step": self._done}
        try:
            record["train"] = sums.means(self._spec.task)
            if self._schedule.tests_after(epoch):
                record["test"] = evaluate(self._state, epoch)
        except BaseException:  # a damaged image, or no memory: the epoch's steps need not be lost for it
            self._save_what_is_done()
            raise
        if "test" in record and not self._run.allow_nonfinite:
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
                progress[CONSTANTS] = self._constants
            self._folder.checkpoints.save(self._done, (to_save(self._spec, self._state), self._sums), progress)

    def _save_what_is_done(self):
        """Where an error ends the run behind a whole step; several processes would wait for each other."""
        if not self._done or processes.count() > 1:
            return
        try:
            self._save()
            self._finish_saving()
        except OSError as error:  # that which ends the run is told
            _log.error("no checkpoint at step %d: %s", self._done, error)

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
    if spec.cut_is_coded:
        found |= {"coded_uplink_bytes": up[0], "coded_downlink_bytes": down[0]}
    if spec.compresses_updates and spec.update_codec.entropy_coded:
        found |= {"coded_uplink_synchronization_bytes": up[1], "coded_downlink_synchronization_bytes": down[1]}
    return {name: round(earlier.get(name, 0) + float(value)) for name, value in found.items()}
