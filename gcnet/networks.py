"""The networks of the studies at any width, for small images; and torchvision's zoo by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gcnet.errors import unknown

Builder = Callable[[int, int, float], nn.Module]


def channels_at(width: float) -> Callable[[int], int]:
    """Channel counts scaled by `width`. Raises ValueError where none would be left."""

    def scaled(count: int) -> int:
        if not 0 < width < math.inf:
            raise ValueError(f"width {width} is no positive number")
        result = round(count * width)
        if result < 1:
            raise ValueError(f"width {width} leaves no channel of {count}; the smallest for this layer is {1 / count}")
        return result

    return scaled


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def initialize(model: nn.Module) -> nn.Module:
    """He initialisation (arXiv 1502.01852) for convolutions, torch's own for Linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class ConvNet(nn.Module):
    """Features, global average, classifier."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(images)), 1))


def vgg16_bn(classes: int, channels: int, width: float) -> nn.Module:
    """VGG-16 with BatchNorm (arXiv 1409.1556) and one Linear layer, as is usual for 32 px images (choice)."""
    scaled = channels_at(width)
    layers: list[nn.Module] = []
    inputs = channels
    for item in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if item == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            outputs = scaled(int(item))
            layers += [*conv_bn(inputs, outputs), nn.ReLU(inplace=True)]
            inputs = outputs
    return ConvNet(nn.Sequential(*layers), nn.Linear(inputs, classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes (option B of arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet(classes: int, channels: int, stages: Sequence[tuple[int, int]]) -> nn.Module:
    """A residual network with a 3x3 stem; stages: (channels, blocks), each but the first halving the resolution."""
    stem = stages[0][0]
    layers: list[nn.Module] = [*conv_bn(channels, stem), nn.ReLU(inplace=True)]
    inputs = stem
    for number, (outputs, blocks) in enumerate(stages):
        for block in range(blocks):
            layers.append(BasicBlock(inputs, outputs, 2 if number and not block else 1))
            inputs = outputs
    return ConvNet(nn.Sequential(*layers), nn.Linear(inputs, classes))


def resnet18(classes: int, channels: int, width: float) -> nn.Module:
    """ResNet-18 (arXiv 1512.03385) with a 3x3 stem for small images (choice)."""
    scaled = channels_at(width)
    return resnet(classes, channels, [(scaled(c), 2) for c in (64, 128, 256, 512)])


def resnet20(classes: int, channels: int, width: float) -> nn.Module:
    """The CIFAR ResNet of 20 layers (arXiv 1512.03385, section 4.2), projection shortcuts (choice)."""
    scaled = channels_at(width)
    return resnet(classes, channels, [(scaled(c), 3) for c in (16, 32, 64)])


def resnet56(classes: int, channels: int, width: float) -> nn.Module:
    """The CIFAR ResNet of 56 layers (arXiv 1512.03385, section 4.2), projection shortcuts (choice)."""
    scaled = channels_at(width)
    return resnet(classes, channels, [(scaled(c), 9) for c in (16, 32, 64)])


class AlexNet(nn.Module):
    """Five convolutions and three Linear layers in the manner of AlexNet, for images from 32 px (choice)."""

    def __init__(self, classes: int, channels: int, width: float) -> None:
        super().__init__()
        c = channels_at(width)
        self.features = nn.Sequential(
            nn.Conv2d(channels, c(64), 5, 1, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(c(64), c(192), 5, 1, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(c(192), c(384), 3, 1, 1), nn.ReLU(inplace=True),
            nn.Conv2d(c(384), c(256), 3, 1, 1), nn.ReLU(inplace=True),
            nn.Conv2d(c(256), c(256), 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(c(256) * 4, c(1024)), nn.ReLU(inplace=True),
            nn.Dropout(0.5), nn.Linear(c(1024), c(1024)), nn.ReLU(inplace=True),
            nn.Linear(c(1024), classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(images)), 1))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; added to the input where the shape stays (arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*conv_bn(inputs, hidden, 1), nn.ReLU6(inplace=True)] if expansion != 1 else []
        depthwise = [*conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True)]
        self.branch = nn.Sequential(*expand, *depthwise, *conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


def mobilenet_v2(classes: int, channels: int, width: float) -> nn.Module:
    """MobileNetV2 (arXiv 1801.04381) with the first two strides removed for small images (choice)."""
    c = channels_at(width)
    layers: list[nn.Module] = [*conv_bn(channels, c(32)), nn.ReLU6(inplace=True)]
    inputs = c(32)
    stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, blocks, stride in stages:
        for block in range(blocks):
            layers.append(InvertedResidual(inputs, c(outputs), 1 if block else stride, expansion))
            inputs = c(outputs)
    layers += [*conv_bn(inputs, c(1280), 1), nn.ReLU6(inplace=True)]
    return ConvNet(nn.Sequential(*layers), nn.Linear(c(1280), classes))


NETWORKS: dict[str, Builder] = {
    "vgg16_bn": vgg16_bn,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "alexnet": AlexNet,
    "mobilenet_v2": mobilenet_v2,
}


def build(name: str, classes: int, *, channels: int = 3, width: float = 1.0, seed: int | None = None) -> nn.Module:
    """A network by its registry name, or `torchvision:NAME`, with weights drawn from `seed`.

    classes >= 2, channels 1 or 3 (torchvision: 3), input from 32 px. The global random state is left as it was.
    Raises ValueError for an unknown name, a width that leaves a layer without channels, too few classes.
    """
    if classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {classes}")
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        if name.startswith("torchvision:"):
            return _torchvision(name.removeprefix("torchvision:"), classes, channels, width)
        if name not in NETWORKS:
            raise unknown("network", name, [*NETWORKS, "torchvision:NAME"])
        return initialize(NETWORKS[name](classes, channels, width))


def _torchvision(name: str, classes: int, channels: int, width: float) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise unknown("torchvision network", name, models.list_models(module=models))
    if channels != 3 or width != 1.0:
        raise ValueError(f"torchvision:{name} takes 3 channels at width 1, got {channels} channels, width {width}")
    return models.get_model(name, weights=None, num_classes=classes)
