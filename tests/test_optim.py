"""What the config's optimizers make of gradients: clipped, and gathered over steps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msjax import build, config, data
from msjax.optim import make_optimizer
from msjax.split.state import PartState, with_update_count

OPTIM = config.OptimConfig(learning_rate=0.5, momentum=0.9, weight_decay=0.0, schedule="cosine")
PARAMS = {"w": jnp.arange(4.0), "b": jnp.ones(2)}


def gradients(count):
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), PARAMS) for key in keys]


def run(optimizer, grads, params=PARAMS, state=None):
    state = optimizer.init(params) if state is None else state
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_gradient_is_cut_down_to_the_norm(kind):
    """Before there are weight decay and momentum: these see the gradient that is left."""
    optim = dataclasses.replace(OPTIM, kind=kind, schedule="constant", weight_decay=0.5)
    plain = make_optimizer(optim, epochs=1, steps_per_epoch=4)
    cut = make_optimizer(dataclasses.replace(optim, clip_norm=0.1), epochs=1, steps_per_epoch=4)
    large, other = gradients(2)
    norm = np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(large)))
    assert norm > 0.1
    left = jax.tree.map(lambda leaf: leaf * 0.1 / norm, large)
    small = jax.tree.map(lambda leaf: leaf * 0.01, other)
    assert_close(run(cut, [large, small])[0], run(plain, [left, small])[0])


@pytest.mark.parametrize("nesterov", [False, True])
def test_adamw_by_hand(nesterov):
    """Decoupled decay, momentum as β₁, Nesterov's as Dozat has it, and a rate that rises and then falls."""
    optim = config.OptimConfig(
        kind="adamw", learning_rate=0.1, momentum=0.8, weight_decay=0.5, warmup_epochs=0.2, nesterov=nesterov
    )
    grads = np.random.default_rng(0).normal(size=(6, 3))
    rates = [0.0, 0.05, *(0.05 * (1 + math.cos(math.pi * k / 8)) for k in range(4))]
    want, first, second = np.float64([2.0, -1.0, 0.5]), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        first, second = 0.8 * first + 0.2 * g, 0.999 * second + 0.001 * g**2
        mean = first / (1 - 0.8**t)
        if nesterov:
            mean = 0.8 * first / (1 - 0.8 ** (t + 1)) + 0.2 * g / (1 - 0.8**t)
        want = want - rate * (mean / (np.sqrt(second / (1 - 0.999**t)) + 1e-8) + 0.5 * want)
    optimizer, got = make_optimizer(optim, epochs=1, steps_per_epoch=10), jnp.array([2.0, -1.0, 0.5])
    state = optimizer.init(got)
    for g in grads:
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state, got)
        got = optax.apply_updates(got, updates)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_gathered_gradients_are_one_update_of_their_mean(kind):
    """Schedule and momenta count updates; between two of them nothing moves; a seventh step waits."""
    optim = dataclasses.replace(OPTIM, kind=kind, warmup_epochs=0.5, clip_norm=1.0)
    gathered = make_optimizer(dataclasses.replace(optim, accumulate_steps=3), epochs=2, steps_per_epoch=6)
    once = make_optimizer(optim, epochs=2, steps_per_epoch=2)
    grads = gradients(7)
    means = [jax.tree.map(lambda *leaves: sum(leaves) / 3, *grads[at : at + 3]) for at in (0, 3)]
    want, _ = run(once, means)
    got, state = run(gathered, grads[:6])
    assert_close(got, want)
    jax.tree.map(np.testing.assert_array_equal, run(gathered, grads[6:], got, state)[0], got)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "steps", "constant"])
def test_where_nothing_is_promoted(kind, schedule):
    optim = dataclasses.replace(OPTIM, kind=kind, schedule=schedule, milestones=(1,), warmup_epochs=0.5)
    optimizer = make_optimizer(optim, epochs=2, steps_per_epoch=4)
    expected = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_milestones_on_one_update_all_count():
    optim = config.OptimConfig(learning_rate=1.0, momentum=0.0, weight_decay=0.0, schedule="steps", gamma=0.5)
    optim = dataclasses.replace(optim, milestones=(1, 2, 3, 4), accumulate_steps=4)
    optimizer = make_optimizer(optim, epochs=6, steps_per_epoch=2)
    params, taken = jnp.zeros(()), []
    state = optimizer.init(params)
    for _ in range(12):
        updates, state = optimizer.update(jnp.ones(()), state, params)
        taken.append(-float(updates))
    assert [one for one in taken if one] == [0.5, 0.125, 0.0625]  # before them: milestone 1; 2 and 3; and 4


def test_updates_that_never_come_are_refused():
    optim = config.OptimConfig(accumulate_steps=21)
    with pytest.raises(ValueError, match=r"optim\.accumulate_steps must be at most the steps of the run, 20, got 21"):
        make_optimizer(optim, epochs=2, steps_per_epoch=10)
    make_optimizer(dataclasses.replace(optim, accumulate_steps=20), epochs=2, steps_per_epoch=10)


def test_a_part_that_is_handed_on_counts_on_from_its_step():
    """All floats and the number of steps are enough to go on from, in the middle of an update, too."""
    optim = dataclasses.replace(OPTIM, kind="adamw", accumulate_steps=2, learning_rate=0.1)
    optimizer = make_optimizer(optim, epochs=1, steps_per_epoch=8)
    grads = gradients(7)
    params, state = run(optimizer, grads[:5])
    forgot = jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.float32 else jnp.zeros_like(leaf), state)
    handed = with_update_count(PartState(params, {}, forgot), 5).opt_state
    assert_close(run(optimizer, grads[5:], params, handed)[0], run(optimizer, grads[5:], params, state)[0])


OWN = """
import optax
from msjax import config, data

def lion(learning_rate):
    return optax.lion(learning_rate, weight_decay=0.1)

def lookahead():
    return optax.MultiSteps(optax.sgd(0.1), 2)

def no_optimizer(learning_rate):
    return 0.1

def of_known_names(learning_rate):
    return optax.multi_transform({"a": optax.sgd(learning_rate)}, {"w": "a"})

def get_config():
    return config.Config(optim=config.OptimConfig(kind=":lion", learning_rate=0.5, clip_norm=1.0))
"""


def test_an_optimizer_of_ones_own_has_the_rate_and_the_clipping_of_the_config(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    cfg = config.load_preset(str(tmp_path / "own.py"))
    own = make_optimizer(cfg.optim, epochs=2, steps_per_epoch=5)
    rate = optax.cosine_decay_schedule(0.5, 10)
    like = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(rate, weight_decay=0.1))
    assert_close(run(own, gradients(8))[0], run(like, gradients(8))[0])
    file = cfg.optim.kind.removesuffix(":lion")
    twice = make_optimizer(dataclasses.replace(OPTIM, kind=f"{file}:lookahead"), epochs=2, steps_per_epoch=5)
    assert_close(run(twice, gradients(1))[0], PARAMS)  # it waits for another
    with pytest.raises(ValueError, match=r"optim\.kind must name a function that returns an Optax transf.*, got float"):
        make_optimizer(dataclasses.replace(OPTIM, kind=f"{file}:no_optimizer"), epochs=1, steps_per_epoch=5)
    summary = build.DataSummary.of(data.load())
    wrong = config.with_fields(cfg, {"optim.kind": f"{file}:of_known_names"})
    with pytest.raises(ValueError, match=r"optim\.kind must update each part's own parameters .* for the client it"):
        build.build(wrong, summary, samples=8, test_samples=4)
    # What is trained needs it no more.
    gone = config.with_fields(cfg, {"optim.kind": "gone.py:lion"})
    assert build.spec_of(gone, summary, test_samples=4).task.name == "classification"
    for name, value in (("momentum", 0.5), ("weight_decay", 0.0), ("nesterov", True)):
        unused = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, **{name: value}))
        with pytest.raises(ValueError, match=rf"optim\.{name} must be .*, its default, with optim\.kind="):
            config.check_used(unused)
    with pytest.raises(ValueError, match=r"optim\.kind must be one of 'sgd', 'adamw', got 'adam'"):
        config.Config(optim=config.OptimConfig(kind="adam"))


@pytest.mark.parametrize(("name", "value"), [("clip_norm", 0.0), ("accumulate_steps", 0)])
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=rf"optim\.{name} must be .*, got {value}"):
        config.Config(optim=config.OptimConfig(**{name: value}))
