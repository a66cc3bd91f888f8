"""Training steps of ResNet18 and VGG19 in plain PyTorch, in several ways, for what sets them beside msjax's."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import torch_ms, torch_networks

PRECISIONS = ("float32", "tf32", "bfloat16")
"""float32 in full; float32 whose products may be TF32; weights in float32 and bfloat16 by `torch.autocast`."""


class Way(NamedTuple):
    """How PyTorch is told to run the network."""

    channels_last: bool = False
    compiled: bool = False


WAYS = {
    "plain": Way(),
    "channels last": Way(channels_last=True),
    "channels last, torch.compile": Way(channels_last=True, compiled=True),
}


def make_steps(
    name: str, *, classes: int, width: float, batch: int, precision: str, way: Way, ms: bool = False, device: str
) -> Callable[[int], None]:
    """Returns a call that takes so many steps on one batch of random 32×32 images and waits for them.

    Args:
      name: resnet18 or vgg19, with `width` as msjax has it.
      precision: of `PRECISIONS`; a call sets it for all of PyTorch in this process.
      ms: whether the features at the medium cut go through MS; backward it is not there.
      device: where; "cuda" or "cpu".
    """
    f = round(64 * width)
    if name == "resnet18":
        network = torch_networks.ResNet(name, classes, f)
        cut = network.layer2
    else:
        network = torch_networks.vgg19_bn(classes, f, (1, 1))
        cut = [layer for layer in network.features if isinstance(layer, nn.MaxPool2d)][2]
    if ms:
        cut.register_forward_hook(lambda module, given, h: h + (_decoded(h.detach()) - h).detach())
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(classes, (batch,), device=device)
    network = network.to(device)
    if way.channels_last:
        network, x = (it.to(memory_format=torch.channels_last) for it in (network, x))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    run = torch.compile(network) if way.compiled else network

    def context():
        return torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()

    def call(steps):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = True  # as is usual where shapes stay the same
        for _ in range(steps):
            optimizer.zero_grad()
            with context():
                loss = nn.functional.cross_entropy(run(x), y)
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _decoded(h):
    return torch_ms.decode(*torch_ms.encode(h))
