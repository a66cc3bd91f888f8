"""Runs whose data are not in memory: the same order and samples as in memory, also after an interruption or a kill."""

import collections
import dataclasses
import functools
import os
import signal

import jax
import numpy as np
import pytest

from msjax import build, data
from msjax.runs import RunFolder
from msjax.split import parties
from msjax.split.modes import Parallel, Sequential, SplitFed
from msjax.split.reads import ClientBatches, ClientReads, RunReads
from msjax.split.schedule import Phase, Schedule
from msjax.training import from_config, loop
from msjax.training.batching import schedule_calls

from .network import Net
from .setups import SMALL, SMOOTH, dataset

MODES = [Parallel(), Sequential(), Sequential(turn_steps=2), SplitFed(average_steps=2, client_fraction=0.67)]


def streamed(split):
    """A split whose samples are read when they are asked for."""
    items = list(zip(split.inputs, split.targets.tolist(), strict=True))
    return data.from_sequence(items, streamed=True, num_classes=10).train


def streamed_dataset():
    ds = dataset()
    return dataclasses.replace(ds, train=streamed(ds.train), test=streamed(ds.test))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_and_its_clients_read_what_the_calls_have(mode):
    """Batches of 5, 5 and 3 of each of three clients; a client's own samples have numbers of their own."""
    schedule, held = Schedule(mode, 3, 13, 0, 5, 3), data.partition(41, 3)
    reads = RunReads(schedule, held, seed=7)
    assert len(reads) == schedule.total_steps
    own = [ClientReads(schedule, client, 13, seed=7) for client in range(3)]
    for epoch in range(3):
        order = data.epoch_indices(held, 13, seed=7, epoch=epoch)
        steps = [step for call in schedule_calls(schedule, order, epoch, 10) for step in call]
        assert len(steps) == schedule.epoch_steps
        for number, step in enumerate(steps):
            read = reads[epoch * schedule.epoch_steps + number]
            np.testing.assert_array_equal(read.indices, step)
            for row, client in enumerate(schedule.position(epoch * schedule.epoch_steps + number).clients):
                of_client = own[client].of_step(epoch * schedule.epoch_steps + number)
                np.testing.assert_array_equal(held[client][of_client.indices], step[row])
                assert of_client.entropy == read.entropy
    own_rows = RunReads(schedule, held, 7, slice(1, 2))  # of one of several processes
    np.testing.assert_array_equal(own_rows[0].indices, reads[0].indices[1:2])


def test_clients_in_one_program_make_each_order_once(monkeypatch):
    """However many there are, and whichever comes first in a step."""
    made, make = collections.Counter(), data.epoch_order

    def order(own, samples, **options):
        made[options["client"], options["epoch"]] += 1
        return make(own, samples, **options)

    monkeypatch.setattr(data, "epoch_order", order)
    schedule = Schedule(Parallel(), 5, 13, 0, 5, 3)
    own = [ClientReads(schedule, client, 13, seed=7) for client in range(5)]
    for step in range(schedule.total_steps):
        for reads in own:
            reads.of_step(step)
    assert made == dict.fromkeys([(client, epoch) for client in range(5) for epoch in range(3)], 1)
    assert all(len(reads._orders._found) == 2 for reads in own)


def noted(opened, open_, n):
    opened.append(n)
    open_(n)


@pytest.mark.parametrize("mode", MODES)
def test_a_clients_exchanges_find_their_batches_in_order(mode, monkeypatch):
    """So that they are read ahead: each asks for the next, or for one that is kept."""
    ds, schedule = dataset(), Schedule(mode, 3, 13, 40, 5, 3, test_every=2)
    for client in range(3):
        share = ds.train.only(np.arange(client, 39, 3))
        in_memory = ClientBatches(schedule, client, share, ds.test, 7)
        batches = ClientBatches(schedule, client, streamed(share), streamed(ds.test), 7, workers=0)
        opened = []
        for reader in (batches._train_reader, batches._test_reader):
            monkeypatch.setattr(reader, "_open", functools.partial(noted, opened, reader._open))
        asked = [e for e in schedule.exchanges() if e.phase in (Phase.FEATURES, Phase.TEST) and client in e.clients]
        for exchange in asked:
            jax.tree.map(np.testing.assert_array_equal, batches[exchange], in_memory[exchange])
        assert opened == [0] * len({exchange.phase for exchange in asked})
        numbers = [len(reader) for reader in (batches._train_reader, batches._test_reader)]
        assert numbers == [sum(e.phase == phase for e in asked) for phase in (Phase.FEATURES, Phase.TEST)]
        batches.close()


def load(monkeypatch, cfg, ds):
    monkeypatch.setattr(data, "load", lambda *args, **options: ds)
    return from_config.load_run(cfg)


@pytest.mark.slow
def test_a_streamed_run_is_that_in_memory_and_goes_on_where_it_was_interrupted(monkeypatch, tmp_path):
    whole = [loop.train(load(monkeypatch, SMOOTH, ds), quiet=True) for ds in (dataset(), streamed_dataset())]
    for ours, theirs in zip(*map(jax.tree.leaves, (whole[0].state, whole[1].state)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert whole[0].traffic == whole[1].traffic
    run = load(monkeypatch, SMOOTH, streamed_dataset())
    train_steps, steps = loop.program.train_steps, []

    def interrupted(*args, **options):
        steps.append(len(steps))
        if len(steps) == 5:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return train_steps(*args, **options)

    monkeypatch.setattr(loop.program, "train_steps", interrupted)
    folder = RunFolder.create(dataclasses.replace(SMOOTH, out=str(tmp_path)))
    with pytest.raises(loop.Interrupted):
        loop.train(run, folder, quiet=True)
    run = load(monkeypatch, SMOOTH, streamed_dataset())  # the first has given its state away
    finished = loop.train(run, folder, quiet=True)
    folder.close()
    assert len(steps) == run.spec.schedule.total_steps
    jax.tree.map(np.testing.assert_array_equal, finished.state, whole[1].state)


@pytest.mark.slow
def test_an_epochs_steps_are_not_lost_where_its_test_fails(monkeypatch, tmp_path):
    whole = loop.train(load(monkeypatch, SMOOTH, dataset()), quiet=True)
    test, failures = loop.Evaluator.__call__, iter([data.DataError("image 7 is damaged")])

    def fails_first(self, *args):
        for error in failures:
            raise error
        return test(self, *args)

    monkeypatch.setattr(loop.Evaluator, "__call__", fails_first)
    folder = RunFolder.create(dataclasses.replace(SMOOTH, out=str(tmp_path)))
    with pytest.raises(data.DataError, match="image 7 is damaged"):
        loop.train(load(monkeypatch, SMOOTH, dataset()), folder, quiet=True)
    run = load(monkeypatch, SMOOTH, dataset())
    assert folder.checkpoints.latest() == run.spec.schedule.epoch_steps
    finished = loop.train(run, folder, quiet=True)
    folder.close()
    assert [record["test"] for record in finished.history] == [record["test"] for record in whole.history]
    jax.tree.map(np.testing.assert_array_equal, finished.state, whole.state)


class StreamedNet(Net):
    """A network whose clients have their samples not in memory."""

    def own_data(self, client, cfg):
        ds = streamed_dataset()
        indices, samples = build.divide(ds, cfg.clients, alpha=cfg.data.alpha, seed=cfg.seed)
        return ds.train.only(indices[client]), samples

    def party(self, client, cfg, samples, test_samples):
        own, _ = self.own_data(client, cfg)
        run = self.built(samples, test_samples, build.DataSummary.of(dataset()))
        data_of_client = parties.ClientData(own, streamed(dataset().test))
        return parties.Client(client, run.spec, run.client, data_of_client, cfg.seed, workers=0)


def test_clients_stream_their_samples_through_kills_to_the_same_bits(tmp_path, built_once):
    net = StreamedNet(tmp_path, SMALL, checkpoint_steps=2).start_clients()
    net.run_to(1)
    net.restart(1)
    net.run_to(4)
    net.kill_server()
    net.start_server()
    net.run()
    net.assert_equal_to_program()
    net.close()
