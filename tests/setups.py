"""Small runs that several test files share, so that their programs are compiled once a process."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from msjax import build, compress, config, data
from msjax.split import parties, schedule
from msjax.training import from_config, loaded

SMALL = config.Config(
    model=config.ModelConfig(name="convnet", width=0.25),
    optim=config.OptimConfig(learning_rate=0.05, warmup_epochs=0.5),
    codec=compress.MaskEncoded(ratio=0.9),
    clients=4,
    batch_size=10,
    epochs=2,
)
SMOOTH = dataclasses.replace(SMALL, codec=compress.RandK(ratio=0.5), grad_codec=compress.RandK(ratio=0.5))
"""Random, and without edges between codes, on which machines differ (`tolerance`)."""
COUNT, TEST_COUNT = 120, 40  # of a client 30: three batches of 10; and 10
UNEVEN = (100, 42)  # of a client 25: batches of 10, 10 and 5; and 10 or 11, so that each program is compiled twice
MODES = [
    config.ModeConfig(),
    config.ModeConfig(tail_cut="last"),
    config.ModeConfig(kind="splitfed", average_steps=2),
    config.ModeConfig(kind="sequential"),
    config.ModeConfig(kind="sequential", turn_steps=2, tail_cut="4"),
]
SLOW_BUT_FIRST = [MODES[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])]
"""The modes for `pytest.mark.parametrize`, of which the quick run takes the first."""


def dataset(count=COUNT, test_count=TEST_COUNT):
    """Random images of the digits' shape, of ten classes."""
    rng = np.random.default_rng(0)

    def draw(n):
        return data.Arrays(rng.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8), rng.integers(0, 10, n).astype(np.int32))

    return data.Dataset("random", draw(count), draw(test_count), 10, np.float32([0.5]), np.float32([0.25]))


def built(cfg, samples, test_samples=TEST_COUNT):
    """The run of a config on such data."""
    return build.build(cfg, build.DataSummary.of(dataset()), samples=samples, test_samples=test_samples)


def make_parties(cfg, counts=(COUNT, TEST_COUNT), **options):
    """A server and all clients, each with its share of the data alone."""
    ds = dataset(*counts)
    indices, samples = build.divide(ds, cfg.clients, alpha=cfg.data.alpha, seed=cfg.seed)
    run = built(cfg, samples, len(ds.test))
    clients = [
        parties.Client(
            client_id,
            run.spec,
            run.client,
            parties.ClientData(data.Arrays(*ds.train.fetch(own)), ds.test),
            cfg.seed,
            **options,
        )
        for client_id, own in enumerate(indices)
    ]
    return parties.Server(run.spec, run.server, cfg.seed), clients


def even(clients):
    """Counts with two batches of ten for each client, and test rounds that are alike: of each program one is made."""
    return 20 * clients, 10 * clients


def load_program(cfg, monkeypatch, *, spread, counts=UNEVEN):
    """The run in one program, by default on uneven data: over several devices where `spread`, else on one."""
    monkeypatch.setattr(data, "load", lambda *args, **options: dataset(*counts))
    if not spread:
        monkeypatch.setattr(loaded, "make_mesh", lambda clients: None)
    run = from_config.load_run(cfg)
    assert (loaded.mesh_of(run.spec) is not None) == spread
    return run


class Finished(NamedTuple):
    """The parties of `SMOOTH` in a mode, with uneven counts, at the end of the run."""

    server: parties.Server
    clients: list[parties.Client]
    exchanges: list[schedule.Exchange]
    first_epoch: tuple
    """What the server had counted after it, in training and in test."""
    before: tuple
    """The parameters of the server and of the first client before the run."""


@functools.cache
def finished(mode):
    """Runs the parties of `SMOOTH` in a mode, once a process."""
    server, clients = make_parties(dataclasses.replace(SMOOTH, mode=mode), UNEVEN)
    before = jax.tree.map(np.asarray, (server.state.params, clients[0].state.params))
    exchanges = []
    for exchange in parties.run(server, clients):
        exchanges.append(exchange)
        if exchange.step == server.spec.schedule.epoch_steps - 1:
            first_epoch = server.train, server.test
    return Finished(server, clients, exchanges, first_epoch, before)


def tolerance(*codecs):
    """How far apart two sums of different order may lead.

    A value that lies on the edge between two codes may get either; which values do, differs from machine to machine,
    and one alone moves a small gradient by some percent. Only codecs without such edges show small mistakes.
    """
    return 1e-5 if all(isinstance(codec, compress.Identity | compress.RandK) for codec in codecs) else 0.1
