"""The optimizers of the config: SGD as PyTorch has it, AdamW, or one's own, with a schedule of the learning rate."""

import collections
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from msjax.checks import quoted
from msjax.config import OptimConfig, call_reference, is_reference
from msjax.models import PARTS, ModelPart, shapes_of


@functools.lru_cache(maxsize=64)  # one object for equal arguments, so that equal runs share compiled programs
def make_optimizer(optim: OptimConfig, *, epochs: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns AdamW, or SGD as PyTorch has it: L2 penalty added to the gradient, then momentum, then the rate.

    Or it is what a function of the preset makes of the rate. The gradient's norm is clipped before, and it is the mean
    of some steps, where the config says so. It is one part's: each party updates its own.

    Raises:
      ValueError: the run is too short for one update, or the function makes no optimizer.
    """
    every = optim.accumulate_steps
    total = epochs * steps_per_epoch // every  # updates, as are all counts below
    if not total:
        raise ValueError(
            f"optim.accumulate_steps must be at most the steps of the run, {epochs * steps_per_epoch}, got {every}"
        )
    warmup = min(round(optim.warmup_epochs * steps_per_epoch / every), total // 2)
    if optim.schedule == "cosine":
        rate = optax.cosine_decay_schedule(optim.learning_rate, total - warmup)
    elif optim.schedule == "steps":
        drops = collections.Counter(m * steps_per_epoch // every - warmup for m in optim.milestones)
        drops = {at: optim.gamma**times for at, times in drops.items()}  # those that fall on one update
        rate = optax.piecewise_constant_schedule(optim.learning_rate, drops)
    else:
        rate = optax.constant_schedule(optim.learning_rate)
    if warmup:
        rate = optax.join_schedules([optax.linear_schedule(0.0, optim.learning_rate, warmup), rate], [warmup])
    if is_reference(optim.kind):
        found = as_transformation(call_reference("optim.kind", optim.kind, rate))
        if not isinstance(found, optax.GradientTransformation):
            raise ValueError(
                f"optim.kind must name a function that returns an Optax transformation, got {type(found).__name__}"
            )
    elif optim.kind == "adamw":
        found = optax.adamw(rate, b1=optim.momentum, weight_decay=optim.weight_decay, nesterov=optim.nesterov)
    else:
        # Without momentum there is none to keep: it would take as much memory as the weights.
        sgd = optax.sgd(rate, momentum=optim.momentum or None, nesterov=optim.nesterov)
        found = optax.chain(optax.add_decayed_weights(optim.weight_decay), sgd)
    if optim.clip_norm is not None:
        found = optax.chain(optax.clip_by_global_norm(optim.clip_norm), found)
    found = _with_usual_promotion(found)
    return found if every == 1 else accumulate(found, every)


def as_transformation(optimizer: Any) -> Any:
    """Returns Optax's transformation of what has one, as `optax.MultiSteps`; anything else as it is."""
    return optimizer.gradient_transformation() if hasattr(optimizer, "gradient_transformation") else optimizer


def check_optimizer(name: str, optimizer: optax.GradientTransformation, parts: tuple[ModelPart, ...]) -> None:
    """Raises ValueError for what cannot update each part by its own gradients; `name` is what the error calls it."""
    for of_part, part in zip(PARTS, parts, strict=False):
        params, _ = shapes_of((part.params, ()))
        try:
            state = jax.eval_shape(optimizer.init, params)
            jax.eval_shape(optimizer.update, params, state, params)
        except Exception as error:
            raise ValueError(
                f"{name} must update each part's own parameters by their gradients alone, with masks and labels that "
                f"are functions of the parameters, but for the {of_part} it raised {quoted(error)}"
            ) from error


def _with_usual_promotion(optimizer):
    """The optimizer for programs that have JAX refuse dtypes that differ, too: Optax counts steps in integers."""

    def update(grads, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


class Accumulated(NamedTuple):
    """The state of `accumulate`.

    Attributes:
      count: steps so far, int32.
      gradient: the sum since the last update, divided by the steps of an update.
      inner: of the optimizer.
    """

    count: jax.Array
    gradient: PyTree
    inner: PyTree


def accumulate(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """Returns an optimizer that takes the mean gradient of `steps` steps in the last of them, and waits in the others.

    What `optax.MultiSteps` does, but with one count from which all others follow: a client that goes on with another's
    part is told how many steps there were, and integers are not among what it is handed; see
    `state.with_update_count`.
    """

    def init(params):
        return Accumulated(jnp.int32(0), jax.tree.map(jnp.zeros_like, params), optimizer.init(params))

    def update(grads, state, params=None):
        count = state.count + 1
        gradient = jax.tree.map(lambda total, g: total + g / steps, state.gradient, grads)

        def take(gradient, inner):
            done = (count // steps - 1).astype(jnp.int32)
            inner = jax.tree.map(
                lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.full_like(leaf, done), inner
            )
            updates, inner = optimizer.update(gradient, inner, params)
            return updates, jax.tree.map(jnp.zeros_like, gradient), inner

        def wait(gradient, inner):
            return jax.tree.map(jnp.zeros_like, gradient), gradient, inner

        updates, gradient, inner = jax.lax.cond(count % steps == 0, take, wait, gradient, state.inner)
        return updates, Accumulated(count, gradient, inner)

    return optax.GradientTransformation(init, update)
