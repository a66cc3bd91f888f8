"""From a name and options to a model."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp

from msjax.data import VOCABULARY
from msjax.models._convnet import convnet
from msjax.models._layers import ACTIVATIONS
from msjax.models._mlp import mlp
from msjax.models._model import Model, compute_dtype
from msjax.models._resnet import resnet
from msjax.models._resnet9 import resnet9
from msjax.models._transformer import transformer
from msjax.models._vgg import vgg19

# Each with the smallest side that leaves at least one pixel; those of 0 take no images.
_MODELS = {
    "convnet": (convnet, 2),
    "resnet9": (resnet9, 8),
    # Its second half 1.5 times as wide: on a CPU channels cost least where maps are small.
    "resnet9t": (functools.partial(resnet9, features=(64, 128, 384, 768)), 8),
    "resnet18": (resnet, 1),
    "resnet34": (resnet, 1),
    "resnet20": (resnet, 1),
    "resnet32": (resnet, 1),
    "resnet56": (resnet, 1),
    "resnet110": (resnet, 1),
    "vgg19": (vgg19, 32),
    "mlp": (mlp, 0),
    "transformer": (transformer, 0),
}
TOKEN_MODELS = ("transformer",)
_STAGES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
# The networks that He et al. made for CIFAR, 6n + 2 layers.
_STAGES |= {f"resnet{6 * n + 2}": (n, n, n) for n in (3, 5, 9, 18)}
NAMES = tuple(_MODELS)
RESNETS = tuple(_STAGES)
"""Those that have a `first_block` and a `shortcut`."""


def build(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    width: float = 1.0,
    activation: str = "relu",
    dtype: Any = jnp.float32,
    first_block: str = "residual",
    shortcut: str = "projection",
    conv_init: str = "he_normal",
    running_variance: str = "biased",
    vocabulary: int = VOCABULARY,
) -> Model:
    """The model `name` for inputs (n, *input_shape), as a description without arrays.

    Images are (n, h, w, c), channels last; `mlp` takes columns of a table (n, f), or inputs of any shape as such;
    `transformer` tokens, int32 (n, length), of which there are `vocabulary`.

    - `width` multiplies every channel count and hidden dense width, rounded half up and at least 1: 0.25 gives
      ResNet18 stages of 16, 32, 64, 128.
    - `activation` replaces every ReLU (one of `ACTIVATIONS`).
    - `dtype`, float32 or bfloat16, is that of convolutions, dense layers and features; parameters, batch statistics and
      logits are float32.
    - `first_block` (ResNets): "residual" is the published network. The paper's shallow cut, 2, falls inside its first
      block, so "shallow" is the boundary after it, layer 3. "paper" follows the reference program at that cut: the
      first block is conv-bn-conv-bn-relu, without its skip and without the ReLU in between, all of it on the client,
      and the server starts at the second block. "shallow" is then cut 2, as the paper numbers it. The program does so
      at that cut only; its cuts 9 and 13, 15 and 27 are in the residual network.
    - `shortcut` (ResNets): what the skip connection does where the shape changes (arXiv 1512.03385, section 3.3).
      "projection", option B, is a 1×1 convolution with normalisation, as in torchvision's networks. "zero_padding",
      option A, takes every second pixel and puts zero channels around the others, half of what is missing on each
      side, without parameters: He et al.'s choice for CIFAR-10, so that published weights of resnet20 to resnet110
      mostly need it. The default is "projection" for all of them.
    - `conv_init`: "he_normal", or "dirac", where 3×3 convolutions behind the first block start as identities, as far as
      their channels go: short schedules gain by it.
    - `running_variance`: of batch normalisation, "biased", as flax keeps it, or "unbiased", as PyTorch does, to go on
      training from its weights. Training normalises by the batch's own variance in both.

    VGG19 needs sides of 32 or more: its dense layers follow 512×h/32×w/32 flattened values. ResNets take a 3×3 stem
    for sides up to 64, else 7×7 with max-pool. Convolutions start as in torchvision (He normal, fan-out), dense layers
    as in PyTorch (uniform ±1/√fan-in), biases at 0; the program leaves all of them at PyTorch's default, U(±1/√fan-in).

    Raises ValueError, or TypeError for `dtype`. Source: arXiv 2408.13787, section 4, and its reference program.
    """
    if name not in _MODELS:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    network, smallest = _MODELS[name]
    input_shape = tuple(input_shape)
    _check_shape(name, input_shape, smallest)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be above 0 and finite, got {width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if first_block not in ("residual", "paper"):
        raise ValueError(f'first_block must be "residual" or "paper", got {first_block!r}')
    if shortcut not in ("projection", "zero_padding"):
        raise ValueError(f'shortcut must be "projection" or "zero_padding", got {shortcut!r}')
    if conv_init not in ("he_normal", "dirac"):
        raise ValueError(f'conv_init must be "he_normal" or "dirac", got {conv_init!r}')
    if running_variance not in ("biased", "unbiased"):
        raise ValueError(f'running_variance must be "biased" or "unbiased", got {running_variance!r}')
    if running_variance != "biased" and not smallest:
        raise ValueError(f'running_variance must be "biased" for {name}, which has none, got {running_variance!r}')
    if conv_init != "he_normal" and not smallest:
        raise ValueError(f'conv_init must be "he_normal" for {name}, which has no convolutions, got {conv_init!r}')
    if name in _STAGES:
        stages = _STAGES[name]
        features = 64 if len(stages) == 4 else 16
        shape = {"stages": stages, "first_features": features}
        network = functools.partial(network, **shape, first_block=first_block, shortcut=shortcut)
    elif shortcut != "projection":
        raise ValueError(f'shortcut must be "projection" for {name}, not one of {", ".join(RESNETS)}, got {shortcut!r}')
    elif first_block != "residual":
        raise ValueError(f'first_block must be "residual" for {name}, which has no skips, got {first_block!r}')
    dtype = compute_dtype(dtype)
    scale = functools.partial(_scale, width)
    if name in TOKEN_MODELS:
        if not isinstance(vocabulary, int) or vocabulary < 1:
            raise ValueError(f"vocabulary must be a positive integer, got {vocabulary!r}")
        network = functools.partial(network, vocabulary=vocabulary)
    blocks, named_cuts, note = network(input_shape, num_classes, scale=scale, activation=activation, dtype=dtype)
    if conv_init == "dirac":
        blocks = (blocks[0], *(dataclasses.replace(block, dirac=True) for block in blocks[1:]))
    if running_variance == "unbiased":
        blocks = tuple(dataclasses.replace(block, unbiased=True) for block in blocks)
    return Model(name, input_shape, num_classes, dtype, blocks, named_cuts, note, takes_tokens=name in TOKEN_MODELS)


def _check_shape(name, shape, smallest):
    """Texts have one axis, images three and sides that leave a pixel, tables any."""
    if name in TOKEN_MODELS:
        fits, rule = len(shape) == 1, "one positive integer (tokens of a text)"
    elif smallest:
        fits, rule = len(shape) == 3, "three positive integers (height, width, channels)"
    else:
        fits, rule = len(shape) > 0, "positive integers"
    if not fits or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_shape must be {rule} for {name}, got {shape}")
    if smallest and min(shape[:2]) < smallest:
        raise ValueError(f"input_shape must have sides of at least {smallest} for {name}, got {shape}")


def _scale(width, features):
    """`features` times `width`, rounded half up, at least 1."""
    return max(1, math.floor(features * width + 0.5))
