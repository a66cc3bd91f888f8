"""From a config and the shape of the data to what the parties of a run need; nothing here reads data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msjax import config, data, models, parties, simulate, step
from msjax.protocol import Plan


class SetInfo(NamedTuple):
    """What the network has to know of a data set."""

    input_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, ds: data.Dataset) -> "SetInfo":
        """That of a set in arrays."""
        return cls(ds.train_inputs.shape[1:], ds.num_classes, ds.mean, ds.std)

    def normalised_as(self, cfg: config.DataConfig) -> "SetInfo":
        """With the config's `mean` and `std` where it has them.

        Raises:
          ValueError: they are not as many as the inputs have channels.
        """
        if cfg.mean is None:
            return self
        for name, values in (("mean", cfg.mean), ("std", cfg.std)):
            if len(values) != self.input_shape[-1]:
                raise ValueError(f"data.{name} must have {self.input_shape[-1]} numbers, got {values}")
        return self._replace(mean=cfg.mean, std=cfg.std)


class Assembly(NamedTuple):
    """The parts of a run, before its first step."""

    plan: Plan
    setup: step.Setup
    preprocess: simulate.Preprocess
    client: step.HalfState
    server: step.HalfState
    test_codec: object
    sample: jax.ShapeDtypeStruct
    """Of one sample, where it enters the network."""

    def shapes(self) -> parties.Shapes:
        return parties.Shapes(self.plan, self.setup, self.test_codec, self.client, self.server, self.sample)

    def programs(self, seed: int, **options) -> parties.Programs:
        """`options` are those of `parties.Programs`."""
        return parties.Programs(self.setup, self.preprocess, self.test_codec, seed, **options)


def assemble(cfg: config.Config, info: SetInfo, *, samples: int, test_samples: int) -> Assembly:
    """Builds the model, cuts it, and makes the plan for clients with `samples` training samples each.

    Raises:
      ValueError: a field of the config has a value that does not fit.
    """
    plan = Plan.of(cfg, samples=samples, test_samples=test_samples)
    model = make_model(cfg, info)
    weights = None if cfg.model.weights is None else models.load_weights(cfg.model.weights, model)
    client, server, *head = _halves(cfg, model, weights)
    optimizer = make_optimizer(cfg.optim, epochs=cfg.epochs, steps_per_epoch=plan.epoch_steps)
    setup = step.Setup(
        client.apply,
        server.apply,
        cfg.codec,
        cfg.grad_codec,
        optimizer,
        cfg.optim.label_smoothing,
        head[0].apply if head else None,
    )
    augment = cfg.data.augment or data.default_augmentation(cfg.data.name)
    mean, std = (tuple(map(float, values)) for values in (info.mean, info.std))
    preprocess = simulate.Preprocess(augment, mean, std, str(model.input_dtype), cfg.data.crop_padding)
    return Assembly(
        plan,
        setup,
        preprocess,
        step.init_half(setup, client, *head),
        step.init_half(setup, server),
        cfg.codec.at_inference() if cfg.eval_compressed else None,
        jax.ShapeDtypeStruct(info.input_shape, model.input_dtype),
    )


def make_halves(cfg: config.Config, info: SetInfo) -> tuple[models.Half, ...]:
    """Builds the model and cuts it: into client and server, and where the run is U-shaped a head.

    The weights are drawn from the seed; the file `cfg.model.weights`, which may be on another machine, is not read.

    Raises:
      ValueError: a field of the config has a value that does not fit.
    """
    return _halves(cfg, make_model(cfg, info))


def _halves(cfg, model, weights=None):
    before = cfg.model.cut_before_activation
    return models.split(
        model, cfg.cut, head_cut=cfg.head_cut, cut_before_activation=before, seed=cfg.seed, weights=weights
    )


def make_model(cfg: config.Config, info: SetInfo) -> models.Model:
    """Builds the model, whole; raises ValueError as `make_halves` does."""
    return models.build(
        cfg.model.name,
        input_shape=info.input_shape,
        num_classes=info.num_classes,
        width=cfg.model.width,
        activation=cfg.model.activation,
        first_block=cfg.model.first_block,
        shortcut=cfg.model.shortcut,
        conv_init=cfg.model.conv_init,
        dtype=jnp.dtype(cfg.dtype),
        vocabulary=cfg.data.vocabulary,
    )


def share_out(cfg: config.Config, labels: Callable[[], np.ndarray], count: int) -> tuple[list[np.ndarray], int]:
    """Returns who holds which of `count` training samples, and how many each client draws in an epoch."""
    # An even share-out needs no labels, which for a stream take a pass over the set.
    of = count if cfg.data.alpha is None else labels()
    return data.partition(of, cfg.clients, alpha=cfg.data.alpha, seed=cfg.seed), count // cfg.clients


def make_optimizer(optim: config.OptimConfig, *, epochs: int, steps_per_epoch: int) -> optax.GradientTransformation:
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
    sgd = optax.sgd(rate, momentum=optim.momentum, nesterov=optim.nesterov)
    return optax.chain(optax.add_decayed_weights(optim.weight_decay), sgd)
