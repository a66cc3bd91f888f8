"""Rotary position embeddings (Su et al., arXiv 2104.09864), with the frequencies of Llama 3."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches the rotations for a longer context than it was first trained on.

    Wavelengths above `original_max_position_embeddings / low_freq_factor` become `factor` times as long, those below
    `original_max_position_embeddings / high_freq_factor` stay, and those in between are interpolated.
    Source: "The Llama 3 Herd of Models", arXiv 2407.21783; `rope_type` "llama3" in Hugging Face's config.json.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"rope_scaling.{field.name} must be a number above 0, got {value!r}")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor must be below high_freq_factor, {self.high_freq_factor}, got "
                f"{self.low_freq_factor}"
            )


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """float32 (head_dim / 2,): by how many radians each pair of values is turned from one position to the next."""
    found = float(theta) ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        # Turns in the first context: below `low` the frequency is divided, above `high` it stays.
        turns = scaling.original_max_position_embeddings * found / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        found = (1 - kept) * found / scaling.factor + kept * found
    return found.astype(np.float32)


def rotate(
    x: Float[Array, "n length heads d"], positions: Int[Array, "*rows length"], turns: Float[Array, " pairs"]
) -> Float[Array, "n length heads d"]:
    """Turns the pairs (x[i], x[i + d/2]) of every head by position times `turns`, the frequencies; in float32.

    Positions are those of all rows, (length,), or of each, (n, length).
    These are the halves that Hugging Face's weights are laid out for; Meta's own files turn neighbours.
    """
    angles = positions[..., None, None].astype(jnp.float32) * turns
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
