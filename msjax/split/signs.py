"""Codecs for values of at least 0 make 0 of all below it: told where the features have many of these."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from msjax import data
from msjax.split.spec import RunSpec
from msjax.split.state import PartState
from msjax.split.step import client_test_features

log = logging.getLogger("msjax")

_MOST_LOST = 0.15
"""Of the features' energy. Behind GELU or SiLU, which reach a little below 0, it is a few hundredths."""
_SAMPLES = 8


def warn_of_lost_signs(spec: RunSpec, client: PartState, train: data.Split) -> None:
    """Logs a warning where codecs lose much of the features of some training samples, for what these lie below 0.

    Data that are read as they are needed are not looked at.

    Args:
      client: its part before the first step.
    """
    codecs = spec.codec.for_tree(spec.features)
    if all(getattr(codec, "signed", True) for codec in codecs) or not train.in_memory:
        return
    inputs, _ = train.fetch(np.arange(min(_SAMPLES, len(train))))
    shares = _negative_shares(spec, client, inputs)
    for name, codec, share in zip(spec.features.names, codecs, shares, strict=True):
        if not getattr(codec, "signed", True) and share > _MOST_LOST:
            log.warning(
                "%s sends features below 0 as 0, and these are %.0f %% of the energy of %s: give it signed=True",
                *(type(codec).__name__, 100 * share, f"the features {name!r}" if name else "the features"),
            )


@functools.partial(jax.jit, static_argnums=0)
def _negative_shares(spec, client, inputs):
    """Of each array of features, of its squares those of negative values."""
    shares = []
    for leaf in jax.tree.leaves(client_test_features(spec, client, spec.preprocess(inputs))):
        h = leaf.astype(jnp.float32)
        below = jnp.minimum(h, jnp.float32(0))
        shares.append(jnp.sum(below * below) / jnp.maximum(jnp.sum(h * h), jnp.float32(1e-30)))
    return shares
