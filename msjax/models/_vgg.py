"""VGG19 with batch normalisation, as the paper uses it for CIFAR-10 (arXiv 2408.13787, section 4)."""

from msjax.models._layers import ConvBlock, DenseBlock, Head
from msjax.models._model import Block

_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # (features, convolutions), a max-pool after each


def vgg19(input_shape, num_classes, *, scale, **options):
    """Sixteen convolutions with bias, five max-pools, dense layers 17 and 18 of 4096 with dropout 0.5, and 19.

    A max-pool belongs to the block of the convolution before it: the cuts 2 and 8 come after it, as in the paper.
    """
    h, w, in_features = input_shape
    blocks = []
    for features, convolutions in _STAGES:
        for i in range(convolutions):
            layer = len(blocks) + 1
            shape = {"in_features": in_features, "features": scale(features), "pool": 2 * (i == convolutions - 1)}
            blocks.append(Block.of(f"conv{layer}", layer, ConvBlock, **shape, use_bias=True, **options))
            in_features = scale(features)
    in_features *= (h // 32) * (w // 32)
    for layer in (17, 18):
        shape = {"in_features": in_features, "features": scale(4096)}
        blocks.append(Block.of(f"dense{layer}", layer, DenseBlock, **shape, dropout_rate=0.5, **options))
        in_features = scale(4096)
    shape = {"in_features": in_features, "num_classes": num_classes}
    blocks.append(Block.of("head", 19, Head, **shape, dtype=options["dtype"]))
    return tuple(blocks), (("shallow", 2), ("medium", 8), ("deep", 15)), ""
