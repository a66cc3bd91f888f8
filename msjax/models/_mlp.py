"""A multilayer perceptron, for tables."""

import math

from msjax.models._layers import DenseBlock, Head
from msjax.models._model import Block


def mlp(input_shape, num_classes, *, scale, **options):
    """Three dense layers of 128 and the last one; cuts after each of the three. Images are flattened."""
    in_features, blocks = math.prod(input_shape), []
    for layer in (1, 2, 3):
        shape = {"in_features": in_features, "features": scale(128)}
        blocks.append(Block.of(f"dense{layer}", layer, DenseBlock, **shape, **options))
        in_features = scale(128)
    head = {"in_features": in_features, "num_classes": num_classes, "dtype": options["dtype"]}
    blocks.append(Block.of("head", 4, Head, **head))
    return tuple(blocks), (("shallow", 1), ("medium", 2), ("deep", 3)), ""
