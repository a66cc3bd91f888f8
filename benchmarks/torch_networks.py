"""torchvision's VGG19-BN and ResNets as far as tests need them: the same modules under the same names, any width."""

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
