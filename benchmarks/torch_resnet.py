"""ResNet18 in plain PyTorch, channels last: the network that `benchmarks.steps` compares its step with."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, in_features, features, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_features, features, 3, stride, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, 1, 1, bias=False),
            nn.BatchNorm2d(features),
        )
        self.skip = nn.Identity()
        if stride != 1 or in_features != features:
            self.skip = nn.Sequential(nn.Conv2d(in_features, features, 1, stride, bias=False), nn.BatchNorm2d(features))

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


def resnet18(num_classes: int, *, width: float) -> nn.Module:
    """For small images: a 3×3 convolution first, no max-pool, as `msjax.models` has it."""
    f = round(64 * width)
    layers = [nn.Conv2d(3, f, 3, 1, 1, bias=False), nn.BatchNorm2d(f), nn.ReLU()]
    for stage in range(4):
        for i in range(2):
            layers.append(Block(f * 2 ** max(stage - (i == 0), 0), f * 2**stage, 2 if stage and i == 0 else 1))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * f, num_classes)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def make_step(network: nn.Module, x: torch.Tensor, y: torch.Tensor):
    """Returns a call that trains the network on one batch, NHWC images as NCHW channels last, by SGD."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    x = x.permute(0, 3, 1, 2)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    return step
