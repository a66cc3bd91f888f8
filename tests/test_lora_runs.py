"""Adapters in runs: in every mode, resumed, none at the client; what is sent, saved and kept in memory of them."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import build, compress, config, data
from msjax.runs import RunFolder
from msjax.split import parties, programs, step
from msjax.split.metrics import zero_sums
from msjax.split.parties import ClientData
from msjax.split.state import TrainState, train_key
from msjax.training import devices, from_config, loaded, loop, program, saved

from . import language

LORA = config.LoraConfig(rank=2, targets=("q_proj", "up_proj"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MSJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loaded, "make_mesh", lambda clients: None)
    return language.make_folder(tmp_path / "model")


def config_of(folder, *, cut="1", **options):
    cfg = language.config_of(folder, **({"lora": LORA, "epochs": 1} | options))
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, cut=cut))


def by_parties(cfg):
    """A run and its parties at their end."""
    run = from_config.load_run(cfg)
    server = parties.Server(run.spec, run.state.server, cfg.seed)
    own = [ClientData(data.Arrays(*run.dataset.train.fetch(i)), run.dataset.test) for i in run.client_indices]
    clients = [parties.Client(n, run.spec, run.state.client, held, cfg.seed) for n, held in enumerate(own)]
    for _ in parties.run(server, clients):
        pass
    return run, server, clients


GATHERED = config.OptimConfig(
    kind="adamw", learning_rate=0.03, weight_decay=0.0, schedule="constant", clip_norm=0.5, accumulate_steps=3
)
"""Over three steps of an epoch of two, so that an epoch ends within an update."""
UPDATES = compress.Cast("bfloat16")


@pytest.mark.parametrize(
    "options",
    [
        {"cut": "0"},
        {"cut": "0", "mode": config.ModeConfig(kind="sequential", tail_cut="last"), "update_codec": UPDATES},
        {"mode": config.ModeConfig(kind="splitfed", average_steps=1), "optim": GATHERED, "epochs": 2},
        pytest.param({"cut": "0", "mode": config.ModeConfig(kind="splitfed")}, marks=pytest.mark.slow),
        pytest.param({"mode": config.ModeConfig(kind="sequential", turn_steps=1)}, marks=pytest.mark.slow),
        pytest.param(
            {"mode": config.ModeConfig(kind="splitfed", tail_cut="2"), "update_codec": UPDATES}, marks=pytest.mark.slow
        ),
        pytest.param({"update_codec": UPDATES}, marks=pytest.mark.slow),
        pytest.param(
            {"mode": config.ModeConfig(kind="sequential", turn_steps=1), "optim": GATHERED, "epochs": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_parties_train_adapters_as_one_program_does(options, folder):
    """Also with the embedding alone at the client, which has nothing to train and sends no average."""
    cfg = config_of(folder, **options)
    run, server, clients = by_parties(cfg)
    adapters = sum(leaf.size for leaf in jax.tree.leaves(run.state.client.params))
    assert (adapters == 0) == (cfg.model.cut == "0")
    assert run.spec.client_update_values == adapters and run.spec.client_statistic_values == 0
    before = jax.device_get(run.state)
    finished = loop.train(run, quiet=True)
    tolerance = 2e-2 if "update_codec" in options else 2e-4
    for start, ours, theirs in (
        (before.server, finished.state.server, server.state),
        (before.client, finished.state.client, clients[-1].state),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), ours.params, theirs.params)
        jax.tree.map(np.testing.assert_array_equal, ours.stats, start.stats)
        jax.tree.map(np.testing.assert_array_equal, theirs.stats, start.stats)


def train(cfg, folder_, **options):
    with contextlib.closing(folder_):
        from_config.train_config(cfg, folder_, quiet=True, **options)


def test_checkpoints_leave_out_what_is_frozen_and_find_it_again(folder, tmp_path):
    """Trained for two epochs and gone on with, as for three at once; with other weights it does not go on.

    Two epochs have four steps, of which the last has begun to gather the second update.
    """
    cfg = build.resolved(config_of(folder, epochs=3, optim=GATHERED, out=str(tmp_path / "runs")))
    train(cfg, RunFolder.create(cfg, "once"))
    short = dataclasses.replace(cfg, epochs=2)
    train(short, RunFolder.create(short, "twice"))
    twice, first = RunFolder.open(tmp_path / "runs" / "twice")
    run = from_config.load_run(short)
    kept = saved.to_save(run.spec, run.state)
    assert kept["client"].params and not kept["client"].stats and not kept["server"].stats
    more = from_config.with_more_epochs(first, twice, 3)
    twice.set_config(more)
    train(more, twice)
    parts = [(tmp_path / "runs" / name / "client.safetensors").read_bytes() for name in ("once", "twice")]
    assert parts[0][-1000:] == parts[1][-1000:]  # the arrays; the header names the run
    tensors = language.tensors(folder)
    language.write_tensors(folder, tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2})
    again, second = RunFolder.open(tmp_path / "runs" / "twice")
    second = from_config.with_more_epochs(second, again, 4)
    with pytest.raises(ValueError, match=r"model\.weights must be those that the run began with, .* digest sha256:"):
        train(second, again)


def compiled(cfg, clients, mesh):
    """The memory of a step's compiled program, and that of one client's frozen weights, in bytes."""
    cfg = dataclasses.replace(cfg, clients=clients)
    summary = build.DataSummary.of(build.load_data(build.resolved(cfg)))
    built = build.build(build.resolved(cfg), summary, samples=4, test_samples=4)
    mesh = devices.make_mesh(clients, jax.devices()[:2]) if mesh else None
    state = program.place(built.spec, TrainState(built.client, built.server, jnp.int32(0)), mesh)
    x, order = np.zeros((4, 12), np.int32), np.zeros((1, clients, 2), np.int32)
    args = (state, zero_sums(built.spec), x, x, order, np.arange(clients, dtype=np.int32), train_key(0))
    found = program.train_steps.lower(built.spec, mesh, *args).compile().memory_analysis()
    return found, sum(leaf.nbytes for leaf in jax.tree.leaves(built.client.stats))


@pytest.mark.parametrize("mesh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_clients_share_one_copy_of_what_is_frozen(mesh, folder):
    """On one device, and on each of several: what a step takes grows by a client's adapters alone."""
    cfg = config_of(folder, cut="3", mode=config.ModeConfig(kind="splitfed"))
    (few, frozen), (many, _) = (compiled(cfg, clients, mesh) for clients in (2, 8))
    assert many.argument_size_in_bytes - few.argument_size_in_bytes < 6 * frozen / 2
    assert many.output_size_in_bytes - few.output_size_in_bytes < 6 * frozen / 2


def test_a_u_shaped_server_keeps_nothing_frozen_for_each_client(folder):
    cfg = build.resolved(config_of(folder, cut="0", mode=config.ModeConfig(tail_cut="last")))
    summary = build.DataSummary.of(build.load_data(cfg))
    built = build.build(cfg, summary, samples=4, test_samples=4)
    keys = programs.keys(0, False, np.int32(0), np.arange(3, dtype=np.int32))

    def forward(client, server, x):
        payload, _ = step.client_forward(built.spec, client, x, keys[0])
        payloads = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (3, *leaf.shape)), payload)
        return step.server_forward(built.spec, server, payloads, keys, batch_size=1)[1]

    pending = jax.eval_shape(forward, built.client, built.server, np.zeros((1, 12), np.int32))
    assert not pending.stats and built.server.stats
    kernels = {(3, *leaf.shape) for leaf in jax.tree.leaves(built.server.stats) if leaf.ndim == 2}
    assert not kernels & {leaf.shape for leaf in jax.tree.leaves(pending)}
