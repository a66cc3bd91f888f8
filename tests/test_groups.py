"""A step's clients in groups: the same numbers as all at once, in memory that does not grow with the clients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msjax
from msjax import compress, config, data, models
from msjax.split.metrics import zero_sums
from msjax.split.state import TrainState, train_key
from msjax.training import loop, program

from .helpers import assert_close, assert_same_change
from .setups import MODES, SMOOTH, UNEVEN, built, even, load_program
from .test_budget import BUDGET

SP = compress.TopK(ratio=0.8)
CODED = compress.EntropyMask(bits=2.0, signed=True)
CASES = {
    "parallel": {},
    "parallel, averages coded": {"update_codec": CODED},
    "parallel, budget": BUDGET,
    "U-shaped": {"mode": MODES[1]},
    "SplitFed": {"mode": MODES[2]},
    "SplitFed, averages compressed": {"mode": MODES[2], "update_codec": SP},
}


FAST = "SplitFed, averages compressed"


@pytest.mark.parametrize("spread", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case", [FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != FAST)]
)
def test_groups_give_the_numbers_of_all_clients_at_once(case, spread, monkeypatch):
    """Up to the order of sums: every array to 1e-5 of its norm; see `tolerance` of `setups` for codecs with edges.

    Five clients in groups of two leave a smaller one at the end; six on two devices are three on each.
    """
    cfg = dataclasses.replace(SMOOTH, **{"clients": 6 if spread else 5, **CASES[case]})
    monkeypatch.setattr(jax, "devices", functools.partial(lambda of, *args: of(*args)[:2], jax.devices))
    counts = UNEVEN if case in (FAST, "parallel") else even(cfg.clients)
    run = load_program(cfg, monkeypatch, spread=spread, counts=counts)
    states = run.state, jax.tree.map(jnp.array, run.state)  # a run gives its state away
    before = jax.tree.map(np.asarray, run.state.server.params)
    whole, grouped = (
        loop.train(run._replace(state=state, clients_per_group=size), quiet=True)
        for state, size in zip(states, (None, 2), strict=True)
    )
    edges = {SP: 1e-3, CODED: 0.1}.get(cfg.update_codec, 1e-5)
    tolerance = 0.1 if case == "parallel, budget" else edges
    assert_close(grouped.state, whole.state, tolerance)
    assert_same_change(grouped.state.server.params, whole.state.server.params, before, max(tolerance, 1e-3))
    for mine, other in zip(grouped.history, whole.history, strict=True):
        assert mine["test"] == pytest.approx(other["test"], rel=tolerance)
        assert mine["train"] == pytest.approx(other["train"], rel=tolerance)
        assert mine["traffic"] == pytest.approx(other["traffic"], rel=tolerance)


def test_each_clients_own_results_are_those_of_all_at_once_to_the_bit():
    """The losses of a step do not depend on the group."""
    run = built(dataclasses.replace(SMOOTH, clients=4), samples=8)
    key, numbers = train_key(0), np.arange(4, dtype=np.int32)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (32, 8, 8, 1)).astype(np.uint8), rng.integers(0, 10, 32).astype(np.int32)
    order = rng.permutation(32).reshape(1, 4, 8).astype(np.int32)
    losses = []
    for step in (program.train_steps, functools.partial(program.train_in_groups, group=2)):
        state = jax.tree.map(jnp.array, TrainState(run.client, run.server, jnp.int32(0)))
        losses.append(step(run.spec, None, state, zero_sums(run.spec), x, y, order, numbers, key)[2])
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize("case", ["parallel", pytest.param("SplitFed", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_clients(case):
    """By shapes: what a group's program takes beside its arguments is the same for 10 and for 1,000 clients."""
    found = {clients: memory_of_group(CASES[case], clients) for clients in (10, 100, 1000)}
    needed = [memory.temp_size_in_bytes for memory in found.values()]
    few, many = found[10], found[1000]
    # What is there of a client is its row of the order, its number and four results; in SplitFed its part, too.
    own = (many.argument_size_in_bytes - few.argument_size_in_bytes) / 990
    # XLA's CPU copies some arrays of the clients' own parts before it changes a group's rows.
    copied = 0 if case == "parallel" else own
    for clients, memory in found.items():
        assert memory.temp_size_in_bytes <= 1.02 * min(needed) + copied * clients
    if case == "parallel":
        assert own <= 4 * (BATCH + 1 + 4)
        assert memory_at_once(100).temp_size_in_bytes > 5 * needed[1]
    # Parts and totals are changed in place.
    assert many.alias_size_in_bytes >= 0.99 * many.output_size_in_bytes


BATCH = 10


def shapes(options, clients):
    """(spec, state, inputs, labels, order, numbers, key) of a step, as shapes and dtypes."""
    run = built(dataclasses.replace(SMOOTH, **options, clients=clients), samples=BATCH)
    state = jax.eval_shape(lambda: run.spec.mode.spread(run.spec, TrainState(run.client, run.server, jnp.int32(0))))
    like = jax.ShapeDtypeStruct
    x, y = like((2000, 8, 8, 1), np.uint8), like((2000,), np.int32)
    order, numbers = like((clients, BATCH), np.int32), like((clients,), np.int32)
    return run.spec, state, x, y, order, numbers, jax.eval_shape(lambda: train_key(0))


def memory_of_group(options, clients):
    """The memory of the program that adds a group of five."""
    spec, state, x, y, order, numbers, key = shapes(options, clients)
    so_far = jax.eval_shape(lambda state, numbers: program._begin(spec, None, state, numbers), state, numbers)
    args = (state, so_far, x, y, order, numbers, key, jax.ShapeDtypeStruct((), np.int32))
    return program._add_group.lower(spec, None, 5, *args).compile().memory_analysis()


def memory_at_once(clients):
    """That of the program of a step of all clients at once."""
    spec, state, x, y, order, numbers, key = shapes({}, clients)
    order = jax.ShapeDtypeStruct((1, *order.shape), order.dtype)
    sums = jax.eval_shape(lambda: zero_sums(spec))
    lowered = program.train_steps.lower(spec, None, state, sums, x, y, order, numbers, key)
    return lowered.compile().memory_analysis()


def test_groups_from_python_and_as_an_option():
    """`msjax.train` and a config's run take the same option, and refuse what is no number of clients."""
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (60, 8, 8, 1)).astype(np.uint8), rng.integers(0, 10, 60).astype(np.int32)
    dataset = data.as_dataset(digits)
    model = models.split(models.build("convnet", input_shape=(8, 8, 1), num_classes=10, width=0.25), "medium", seed=0)
    options = {"clients": 3, "batch_size": 10, "epochs": 1, "codec": compress.RandK(ratio=0.5)}
    whole, grouped = (msjax.train(model, dataset, **options, clients_per_group=size) for size in (None, 1))
    assert_close([p[1:] for p in grouped.parts], [p[1:] for p in whole.parts], 1e-5)
    with jax.enable_x64(True):
        msjax.train(model, dataset, **options, clients_per_group=1)
    with pytest.raises(ValueError, match="clients_per_group must be an integer of at least 1, got 0"):
        msjax.train(model, dataset, **options, clients_per_group=0)
    with pytest.raises(ValueError, match="clients_per_group must be at least 1, got 0"):
        config.Config(clients_per_group=0)
