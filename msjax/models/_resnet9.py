"""ResNet9, the small residual network of the DAWNBench CIFAR-10 entries (Page, "How to train your ResNet", 2018)."""

from flax import nnx

from msjax.models._layers import ConvBlock, ConvNorm, Head, activation
from msjax.models._model import Block

_HEAD = {"pool": "max", "scale": 0.125}  # Page's; the scale is as if the softmax had temperature 8


class PoolBlock(nnx.Module):
    """Convolution, max-pool, normalisation, activation: pooled before rather than after, it normalises a quarter."""

    def __init__(self, in_features, features, *, activation, activate=True, dtype, rngs):
        self.activation = activation if activate else "identity"
        self.conv = ConvNorm(in_features, features, pool=2, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        return activation(self.activation)(self.conv(x, train=train))


class Residual(nnx.Module):
    """Two 3×3 convolutions, each with normalisation and activation, beside a skip connection."""

    def __init__(self, features, *, activation, dtype, rngs):
        options = {"use_bias": False, "activation": activation, "dtype": dtype, "rngs": rngs}
        self.conv1 = ConvBlock(features, features, **options)
        self.conv2 = ConvBlock(features, features, **options)

    def __call__(self, x, *, train, key=None):
        return x + self.conv2(self.conv1(x, train=train), train=train)


def resnet9(input_shape, num_classes, *, scale, features=(64, 128, 256, 512), **options):
    """Convolutions 1, 2, 5, 6 (a max-pool after each but the first), residual pairs 3–4 and 7–8, and a dense layer.

    Stands for the paper's networks where a CPU must train: its maps at the cuts 2, 5 and 6 go through the same sizes
    as VGG19's, 16×16, 8×8 and 4×4 for 32×32 images. Deviation from Page: the dense layer has a bias.
    """
    f1, f2, f3, f4 = map(scale, features)
    blocks = (
        Block.of("conv1", 1, ConvBlock, in_features=input_shape[2], features=f1, use_bias=False, **options),
        Block.of("conv2", 2, PoolBlock, in_features=f1, features=f2, **options),
        Block.of("residual4", 4, Residual, features=f2, **options),
        Block.of("conv5", 5, PoolBlock, in_features=f2, features=f3, **options),
        Block.of("conv6", 6, PoolBlock, in_features=f3, features=f4, **options),
        Block.of("residual8", 8, Residual, features=f4, **options),
        Block.of("head", 9, Head, in_features=f4, num_classes=num_classes, **_HEAD, dtype=options["dtype"]),
    )
    return blocks, (("shallow", 2), ("medium", 5), ("deep", 6)), ""
