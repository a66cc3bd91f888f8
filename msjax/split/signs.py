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


def warn_of_lost_signs(spec: RunSpec, client: PartState, train: data.Split, *, server: PartState | None = None) -> None:
    """Logs a warning where codecs lose much of the features of some training samples, for what these lie below 0.

    Data that are read as they are needed are not looked at.

    Args:
      client: its part before the first step.
      server: its part, where it is here; then the features of a second cut are looked at, too.
    """
    cuts = [(spec.features, spec.codec.for_tree(spec.features), "")]
    if spec.u_shaped and server is not None:
        cuts.append((spec.outputs, spec.tail_codec.for_tree(spec.outputs), " at the second cut"))
    if all(getattr(codec, "signed", True) for _, codecs, _ in cuts for codec in codecs) or not train.in_memory:
        return
    inputs, _ = train.fetch(np.arange(min(_SAMPLES, len(train))))
    found = _negative_shares(spec, client, server if spec.u_shaped else None, inputs)
    for (features, codecs, where), shares in zip(cuts, found, strict=True):
        for name, codec, share in zip(features.names, codecs, shares, strict=True):
            if not getattr(codec, "signed", True) and share > _MOST_LOST:
                log.warning(
                    "%s sends features below 0 as 0, and these are %.0f %% of the energy of %s%s: give it signed=True",
                    *(type(codec).__name__, 100 * share, f"the features {name!r}" if name else "the features", where),
                )


@functools.partial(jax.jit, static_argnums=0)
def _negative_shares(spec, client, server, inputs):
    """Of each array of features at each cut, of its squares those of negative values."""
    features = client_test_features(spec, client, spec.preprocess(inputs))
    cuts = [_of_negative(features)]
    if server is not None:
        cuts.append(_of_negative(spec.server(server.params, server.stats, features, train=False, key=None)[0]))
    return cuts


def _of_negative(features):
    shares = []
    for leaf in jax.tree.leaves(features):
        h = leaf.astype(jnp.float32)
        below = jnp.minimum(h, jnp.float32(0))
        shares.append(jnp.sum(below * below) / jnp.maximum(jnp.sum(h * h), jnp.float32(1e-30)))
    return shares
