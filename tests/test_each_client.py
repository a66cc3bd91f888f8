"""A function of clients that have weights of their own: one by one where it convolves, as `vmap` would."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from msjax import compress, config
from msjax.split import each_client
from msjax.split.metrics import zero_sums
from msjax.split.state import TrainState, train_key
from msjax.training import program

from .helpers import assert_close
from .setups import SMALL, built

K, BATCH = 3, 10


def network(params, stats, x, key):
    """A convolution that draws random numbers, on a tree with an integer; with statistics of two kinds."""
    pixels = x["pixels"] + 0.1 * jax.random.normal(key, x["pixels"].shape)
    h = lax.conv_general_dilated(pixels, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return {"h": h * stats["scale"], "count": x["count"] + 1}, {"mean": h.mean((0, 1, 2)) + stats["mean"]}


def arguments():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"kernel": draw(K, 3, 3, 2, 4), "none": {}}
    stats = {"scale": draw(4), "mean": draw(K, 4)}
    x = {"pixels": draw(K, 2, 5, 5, 2), "count": jnp.arange(K * 2).reshape(K, 2)}
    axes = (0, {"scale": None, "mean": 0}, 0, 0)
    return axes, (params, stats, x, jax.random.split(jax.random.key(0), K))


def groups(call, *args):
    """Whether a program has convolutions in groups."""
    text = str(jax.make_jaxpr(call)(*args))
    assert "conv_general_dilated" in text
    return any(f"_group_count={K}" in line for line in text.splitlines())


def test_one_by_one_equals_vmap_with_gradients():
    axes, (params, *others) = arguments()

    def loss_of(call):
        def loss(params):
            outputs, stats = call(params, *others)
            return (outputs["h"] ** 2).sum() + (stats["mean"] ** 3).sum(), (outputs, stats)

        return jax.value_and_grad(loss, has_aux=True)

    own, plain = (loss_of(call) for call in (each_client.vmap(network, axes), jax.vmap(network, in_axes=axes)))
    assert not groups(own, params)
    assert groups(plain, params)
    assert_close(own(params), plain(params), 1e-5)


def test_many_clients_and_functions_that_do_not_convolve_are_mapped(monkeypatch):
    axes, args = arguments()
    dense = each_client.vmap(lambda w, x: x @ w, (0, 0))
    w, x = jnp.ones((K, 2, 4)), jnp.ones((K, 5, 2))
    assert str(jax.make_jaxpr(dense)(w, x)).count("dot_general") == 1
    monkeypatch.setattr(each_client, "MOST_UNROLLED", K - 1)
    assert groups(each_client.vmap(network, axes), *args)


@pytest.mark.parametrize(
    "options",
    [{"update_codec": compress.TopK(ratio=0.9)}, {"mode": config.ModeConfig("splitfed"), "codec": compress.Identity()}],
    ids=["compressed averages", "parts of their own"],
)
def test_no_step_has_convolutions_in_groups(options):
    """Neither where each client's gradient is encoded nor where each has a part of its own."""
    run = built(dataclasses.replace(SMALL, clients=K, **options), samples=BATCH)
    state = program.place(run.spec, TrainState(run.client, run.server, jnp.int32(0)), None)
    x, y = jnp.zeros((K, BATCH, 8, 8, 1), jnp.uint8), jnp.zeros((K, BATCH), jnp.int32)
    numbers = jnp.arange(K)
    sums = zero_sums(run.spec)
    step = functools.partial(program.train_steps, run.spec, None)
    assert not groups(step, state, sums, x, y, None, numbers, train_key(0))
