"""A small convolutional network for the embedded digits (8×8×1)."""

import math

from msjax.models._layers import ConvBlock, DenseBlock, Head
from msjax.models._model import Block


def convnet(input_shape, num_classes, *, scale, **options):
    """Three convolutions (the second with a max-pool) and two dense layers; cuts after the convolutions 1, 2, 3."""
    h, w, c = input_shape
    f1, f2, f3, dense = (scale(f) for f in (32, 64, 64, 128))
    conv = {"use_bias": False, **options}
    blocks = (
        Block.of("conv1", 1, ConvBlock, in_features=c, features=f1, **conv),
        Block.of("conv2", 2, ConvBlock, in_features=f1, features=f2, pool=2, **conv),
        Block.of("conv3", 3, ConvBlock, in_features=f2, features=f3, **conv),
        Block.of("dense4", 4, DenseBlock, in_features=math.prod((h // 2, w // 2, f3)), features=dense, **options),
        Block.of("head", 5, Head, in_features=dense, num_classes=num_classes, dtype=options["dtype"]),
    )
    return blocks, (("shallow", 1), ("medium", 2), ("deep", 3)), ""
