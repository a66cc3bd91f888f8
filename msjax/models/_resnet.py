"""ResNets of basic blocks (He et al., arXiv 1512.03385), and the plain first block of the paper's program."""

import jax.numpy as jnp
from flax import nnx

from msjax.models._layers import ConvBlock, ConvNorm, Head, activation
from msjax.models._model import Block

_SMALL = 64  # the largest side that gets the 3×3 stem: CIFAR's 32 and Tiny ImageNet's 64


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions beside a skip connection; where the shape changes, it is as `shortcut` says."""

    def __init__(self, in_features, features, *, stride=1, shortcut, activation, activate=True, dtype, rngs):
        self.activation, self.last = activation, activation if activate else "identity"
        self.conv1 = ConvNorm(in_features, features, stride=stride, dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(features, features, dtype=dtype, rngs=rngs)
        self.features, self.stride = features, stride
        project = shortcut == "projection" and (stride != 1 or in_features != features)
        self.shortcut = (
            ConvNorm(in_features, features, kernel=1, stride=stride, dtype=dtype, rngs=rngs) if project else None
        )

    def __call__(self, x, *, train, key=None):
        h = self.conv2(activation(self.activation)(self.conv1(x, train=train)), train=train)
        if self.shortcut is None:
            skip = _pad_channels(x[:, :: self.stride, :: self.stride], self.features)
        else:
            skip = self.shortcut(x, train=train)
        return activation(self.last)(h + skip)


def _pad_channels(x, features):
    """Zero channels on both sides of those of x, half of what is missing on each."""
    missing = features - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))) if missing else x


class PlainBlock(nnx.Module):
    """The paper's first block at cut 2: conv-bn-conv-bn-activation, with no skip and no activation in between."""

    def __init__(self, in_features, features, *, activation, activate=True, dtype, rngs):
        self.activation = activation if activate else "identity"
        self.conv1 = ConvNorm(in_features, features, dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        return activation(self.activation)(self.conv2(self.conv1(x, train=train), train=train))


def resnet(input_shape, num_classes, *, stages, first_features=64, first_block, shortcut, scale, **options):
    """Stem, `stages` of basic blocks, mean and one dense layer; no bias but there.

    The first stage has `first_features`, each further one twice as many. The stem is layer 1 and each block adds 2.
    Sides up to 64 get a 3×3 stem, larger ones 7×7 in steps of 2 and a max-pool. "medium" and "deep" are the ends of the
    last stages but two and but one. See `build` for `first_block` and `shortcut`.
    """
    features = scale(first_features)
    stem = {"kernel": 3} if max(input_shape[:2]) <= _SMALL else {"kernel": 7, "stride": 2, "pool": 3}
    stem |= {"in_features": input_shape[2], "features": features}
    blocks = [Block.of("stem", 1, ConvBlock, **stem, use_bias=False, **options)]
    layer, ends = 1, []
    for stage, count in enumerate(stages, start=1):
        for i in range(count):
            layer += 2
            shape = {"in_features": features, "features": scale(first_features * 2 ** (stage - 1))}
            name = f"stage{stage}_block{i + 1}"
            if layer == 3 and first_block == "paper":
                # Numbered 2 as the paper does, though with the stem it is the third convolution.
                blocks.append(Block.of(name, 2, PlainBlock, **shape, **options))
            else:
                stride = 2 if i == 0 and stage > 1 else 1
                blocks.append(Block.of(name, layer, BasicBlock, **shape, stride=stride, shortcut=shortcut, **options))
            features = shape["features"]
        ends.append(layer)
    shape = {"in_features": features, "num_classes": num_classes}
    blocks.append(Block.of("head", layer + 1, Head, **shape, dtype=options["dtype"]))
    named = (("shallow", blocks[1].layer), ("medium", ends[-3]), ("deep", ends[-2]))
    note = "" if first_block == "paper" else '; cut 2 of the paper needs build(..., first_block="paper")'
    return tuple(blocks), named, note
