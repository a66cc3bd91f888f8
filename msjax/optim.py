"""The optimizers of the config: SGD as PyTorch has it, or AdamW, with a schedule of the learning rate."""

import functools

import optax

from msjax.config import OptimConfig


@functools.lru_cache(maxsize=64)  # one object for equal arguments, so that equal runs share compiled programs
def make_optimizer(optim: OptimConfig, *, epochs: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns AdamW, or SGD as PyTorch has it: L2 penalty added to the gradient, then momentum, then the rate."""
    total = epochs * steps_per_epoch
    warmup = min(round(optim.warmup_epochs * steps_per_epoch), total // 2)
    if optim.schedule == "cosine":
        rate = optax.cosine_decay_schedule(optim.learning_rate, total - warmup)
    elif optim.schedule == "steps":
        drops = {m * steps_per_epoch - warmup: optim.gamma for m in optim.milestones}
        rate = optax.piecewise_constant_schedule(optim.learning_rate, drops)
    else:
        rate = optax.constant_schedule(optim.learning_rate)
    if warmup:
        rate = optax.join_schedules([optax.linear_schedule(0.0, optim.learning_rate, warmup), rate], [warmup])
    if optim.kind == "adamw":
        return optax.adamw(rate, b1=optim.momentum, weight_decay=optim.weight_decay, nesterov=optim.nesterov)
    # Without momentum there is none to keep: it would take as much memory as the weights.
    sgd = optax.sgd(rate, momentum=optim.momentum or None, nesterov=optim.nesterov)
    return optax.chain(optax.add_decayed_weights(optim.weight_decay), sgd)
