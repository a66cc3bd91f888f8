"""What each party keeps in memory, and how much it computes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.plan._run import Run
from msjax.split import programs
from msjax.split.state import PartState, client_keys
from msjax.split.trees import float_leaves, with_float_leaves


class Needs(NamedTuple):
    """What a party has in memory for a part of the network.

    Attributes:
      trained_values, frozen_values: parameters; and what gets no gradient: statistics, and weights beside adapters.
      weight_bytes: of both.
      gradient_bytes: of one step: one set, on the server, too, which differentiates the sum of its clients' losses.
      optimizer_bytes: of the optimizer's state.
      average_bytes: of what is remembered of compressed averages; see `split.averages`.
      activation_bytes: of what the forward pass of a step leaves for the backward pass; on the server for all clients
        of the step. As JAX's differentiation keeps it, before XLA fuses or recomputes any of it.
    """

    trained_values: int
    frozen_values: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int = 0
    activation_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(value for name, value in self._asdict().items() if name.endswith("_bytes"))


def values(tree: Any) -> int:
    """Returns how many values a tree of arrays, or of their shapes, has."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Returns the bytes of those."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_needs(part: PartState) -> Needs:
    """Returns what a part takes by itself, without activations."""
    return Needs(
        values(part.params),
        values(part.stats),
        nbytes(part.params) + nbytes(part.stats),
        nbytes(part.params),
        nbytes(part.opt_state),
    )


def needs(run: Run, name: str) -> Needs:
    """Returns what a party has in memory for its part in a step."""
    spec, part = run.spec, run.parts[name]
    found, clients, remembered = state_needs(part), 1, ()
    if name == "server":
        clients = run.clients
        remembered = jax.eval_shape(lambda: spec.mode.server_memory(spec)) if spec.compresses_updates else ()
        if spec.mode.hands_parts_on(spec.schedule):  # it holds the part that goes round
            remembered = (remembered, jax.ShapeDtypeStruct((spec.client_state_values,), jnp.float32))
    elif name == "client" and spec.compresses_updates:
        remembered = jax.eval_shape(functools.partial(spec.mode.client_memory, spec), run.client)
    return found._replace(
        average_bytes=nbytes(remembered),
        activation_bytes=run.batch_size * clients * sample_activation_bytes(run, name),
    )


def sample_activation_bytes(run: Run, name: str) -> int:
    """Returns how many bytes one sample more in a batch leaves for the backward pass.

    Weights, which the backward pass needs, too, do not grow with the batch and so are not in it.
    """
    two, three = (_residual_bytes(run, name, batch_size) for batch_size in (2, 3))
    return three - two


def _residual_bytes(run, name, batch_size):
    spec, part, key = run.spec, run.parts[name], jax.random.key(0)
    last = name == ("tail" if spec.u_shaped else "server")
    if name == "client":
        given = jax.eval_shape(spec.preprocess, run.inputs.batch(batch_size))
    else:
        given = (spec.outputs if name == "tail" else spec.features).batch(batch_size)

    def residuals(part, x, y):
        def forward(params, floats):
            h = x if name == "client" else with_float_leaves(x, floats)
            outputs, stats = getattr(spec, name)(params, part.stats, h, train=True, key=key)
            return (spec.task.losses(outputs, y, train=True).mean() if last else float_leaves(outputs)), stats

        floats = () if name == "client" else float_leaves(x)
        _, vjp, _ = jax.vjp(forward, part.params, floats, has_aux=True)
        return vjp

    return nbytes(jax.eval_shape(residuals, part, given, spec.labels.batch(batch_size)))


def operations(run: Run) -> dict[str, float]:
    """Returns each party's floating-point operations of a step, of the server for all its clients.

    As XLA counts them of the parties' own programs, codecs and optimizer with them, lowered from shapes.
    """
    found = _operations(run, 1)
    if run.clients > 1:  # each one more adds the same; the server's update is one for all
        found["server"] += (run.clients - 1) * (_operations(run, 2)["server"] - found["server"])
    return found


def _operations(run, clients):
    """The operations of a step by party, of one client and of the server for so many."""
    found = {"client": 0.0, "server": 0.0}
    for party, traced in traced_programs(run, clients):
        found[party] += float(traced.lower().cost_analysis().get("flops", 0.0))
    return found


def lowered_bytes(run: Run, platform: str) -> dict[str, int]:
    """Returns the size of each party's programs of a step, as lowered for a platform, which need not be at hand.

    What is lowered is what XLA gets to compile: text of StableHLO, in which weights are not.

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu"; no one kind of GPU.

    Raises:
      ValueError: there is no such platform.
      NotImplementedError: an operation cannot be lowered for it.
    """
    if platform not in (platforms := ("cpu", "cuda", "rocm", "tpu")):
        raise ValueError(f"platform must be one of {', '.join(platforms)}, got {platform!r}")
    found = {"client": 0, "server": 0}
    for party, traced in traced_programs(run):
        found[party] += len(traced.lower(lowering_platforms=(platform,)).as_text())
    return found


def traced_programs(run: Run, clients: int = 1) -> list[tuple[str, Any]]:
    """Returns what the parties compute in a step: a party's name and a `jax.stages.Traced` each.

    Args:
      clients: of the server's programs; of a client's there is one of each.
    """
    spec, batch_size = run.spec, run.batch_size
    client, server = run.client, run.parts["server"]
    size = {"batch_size": batch_size}
    x, y = jax.eval_shape(spec.preprocess, run.inputs.batch(batch_size)), spec.labels.batch(batch_size)
    keys = jax.eval_shape(lambda: client_keys(jax.random.key(0), jnp.int32(0), jnp.arange(clients)))
    key = jax.eval_shape(lambda keys: keys[0], keys)
    bits = () if spec.cut_bits is None else (jax.ShapeDtypeStruct((), np.float32),)
    grad_bits = () if spec.cut_seconds is None else (jax.ShapeDtypeStruct((clients,), np.float32),)
    found = []

    def trace(party, program, *args, **options):
        traced = program.trace(spec, *args, **options)
        found.append((party, traced))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), traced.out_info)

    payload, pending = trace("client", programs.client_forward, client, x, key, *bits)
    if spec.u_shaped:
        present = jax.ShapeDtypeStruct((clients,), bool)
        outputs, held = trace("server", programs.server_forward, server, _stacked(payload, clients), keys, **size)
        answer, tail, _ = trace("client", programs.client_tail, client, _first(outputs), y, key, **size)
        args = server, held, _stacked(answer, clients), keys, present, *grad_bits
        _, replies = trace("server", programs.server_backward, *args, **size)
        update = trace("client", programs.client_backward, pending, _first(replies), tail, **size)
    else:
        args = server, _stacked(payload, clients), _stacked(y, clients), keys, *grad_bits
        _, replies, _ = trace("server", programs.server_step, *args, **size)
        update = trace("client", programs.client_backward, pending, _first(replies), **size)
    trace("client", programs.update_part, client, update)
    return found


def _stacked(tree, clients):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((clients, *leaf.shape), leaf.dtype), tree)


def _first(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
