"""One function of K clients at once, each with weights of its own: `vmap`, or client by client where that is faster."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from msjax.split.trees import is_float

MOST_UNROLLED = 64
"""Clients that are computed one by one in a program; one of more would take long to compile."""


def vmap(function: Callable, axes: tuple[Any, ...]) -> Callable:
    """Returns the `vmap` of a function whose weights have an axis of clients.

    Of a convolution with such weights `vmap` makes one in groups, which XLA's CPU computes three to eight times slower
    than a convolution for each client. So there the function is called for one client after another; in a loop of XLA's
    (`lax.map`) its CPU would compute convolutions slower still. Other devices have not been measured and get the
    `vmap`, as functions without convolutions do.

    Args:
      axes: as `in_axes` of `jax.vmap`; that of the last argument is 0.
    """

    def run(*args):
        clients = jax.tree.leaves(args[-1])[0].shape[0]
        if jax.default_backend() == "cpu" and clients <= MOST_UNROLLED:
            of_clients = _of_clients(axes, args, clients)
            one = jax.jit(function)  # traced once
            if _convolves(one, *of_clients[0]):
                found = [one(*args) for args in of_clients]
                return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
        return jax.vmap(function, in_axes=axes)(*args)

    return run


def _of_clients(axes, args, clients):
    """The arguments of each client."""
    flat_axes, structure = jax.tree.flatten(axes, is_leaf=lambda axis: axis is None)
    trees = structure.flatten_up_to(args)
    columns = [_rows(tree, clients, axis) for tree, axis in zip(trees, flat_axes, strict=True)]
    return [jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True)]


def _rows(tree, clients, axis):
    """For each client its own of a tree of arrays, or the same tree where there is no axis of clients."""
    leaves, structure = jax.tree.flatten(tree)
    if axis is None or not leaves:
        return [tree] * clients
    return [jax.tree.unflatten(structure, row) for row in zip(*(_split(leaf, clients) for leaf in leaves), strict=True)]


def _split(leaf, clients):
    if not is_float(leaf):
        return [leaf[n] for n in range(clients)]
    # The transpose of a split is one concatenation; that of indexing adds up an array of zeros for each client.
    return [jax.lax.squeeze(part, (0,)) for part in jax.lax.split(leaf, (1,) * clients)]


def _convolves(function, *args):
    """Whether a function, or one that it calls, convolves."""
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))
