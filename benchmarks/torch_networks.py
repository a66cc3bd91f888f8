"""torchvision's VGG19-BN and ResNets as far as they are needed here: the same modules under the same names, any width.

And ResNet9, for small images, with the names that msjax has.
"""

import torch
from torch import nn


def vgg19_bn(classes, width, grid):
    """`width` channels where torchvision has 64, for maps of `grid` at the end; an `nn.Module`."""
    layers, channels = [], 3
    for factor, convolutions in ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.BatchNorm2d(factor * width), nn.ReLU()]
            channels = factor * width
        layers.append(nn.MaxPool2d(2))
    network, hidden = nn.Sequential(), 64 * width
    network.add_module("features", nn.Sequential(*layers))
    network.add_module("flatten", nn.Flatten())
    dense = [nn.Linear(channels * grid[0] * grid[1], hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden)]
    network.add_module("classifier", nn.Sequential(*dense, nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes)))
    return network


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a skip connection, which is projected where the shape changes."""

    def __init__(self, channels, features, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False), nn.BatchNorm2d(features)
        self.conv2, self.bn2 = nn.Conv2d(features, features, 3, 1, 1, bias=False), nn.BatchNorm2d(features)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x):
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(h + self.downsample(x))


class ResNet(nn.Module):
    """resnet18, with the stem of 3×3 pixels that small images get, or resnet34 with that of 7×7."""

    def __init__(self, name, classes, width):
        super().__init__()
        stem = (3, 1, 1) if name == "resnet18" else (7, 2, 3)
        self.conv1, self.bn1 = nn.Conv2d(3, width, *stem, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.Identity() if name == "resnet18" else nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, blocks in enumerate((2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3)):
            layer = []
            for i in range(blocks):
                layer.append(BasicBlock(channels, width * 2**stage, 2 if i == 0 and stage > 0 else 1))
                channels = width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        h = self.pool(torch.relu(self.bn1(self.conv1(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(h.mean((2, 3)))


class ConvNorm(nn.Module):
    """A 3×3 convolution, a max-pool where `pool`, batch normalisation, and ReLU."""

    def __init__(self, channels, features, pool=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, features, 3, 1, 1, bias=False), nn.BatchNorm2d(features)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x):
        return torch.relu(self.norm(self.pool(self.conv(x))))


class Residual(nn.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, features):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(features, features), ConvNorm(features, features)

    def forward(self, x):
        return x + self.conv2(self.conv1(x))


class ResNet9(nn.Module):
    """As `msjax.models` has it: `width` channels at first, where Page's network has 64."""

    def __init__(self, classes, width):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(3, width), ConvNorm(width, 2 * width, pool=True)
        self.residual4, self.conv5 = Residual(2 * width), ConvNorm(2 * width, 4 * width, pool=True)
        self.conv6, self.residual8 = ConvNorm(4 * width, 8 * width, pool=True), Residual(8 * width)
        self.head = nn.Linear(8 * width, classes)

    def client(self, x):
        """Up to the medium cut."""
        return self.conv5(self.residual4(self.conv2(self.conv1(x))))

    def server(self, h):
        """From there on."""
        return self.head(self.residual8(self.conv6(h)).amax((2, 3))) / 8

    def forward(self, x):
        return self.server(self.client(x))
