"""MobileNetV2 with names of its own, and the rules that lead a pretrained file's names to them.

The pretrained file numbers its layers (`features.3.conv.4.weight`); here they are named (`blocks.3.depthwise.norm.weight`).
"""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn

# Within one stage the first rule listed wins where two match at the same place: block 1, which has no expansion, comes
# before the rules for all blocks.
RENAMES = {
    r"features\.0\.0": "stem.conv",
    r"features\.0\.1": "stem.norm",
    r"features\.1\.conv\.0": "blocks.1.depthwise.conv",
    r"features\.1\.conv\.1": "blocks.1.depthwise.norm",
    r"features\.1\.conv\.3": "blocks.1.project.conv",
    r"features\.1\.conv\.4": "blocks.1.project.norm",
    r"features\.(\d+)\.conv\.0": r"blocks.\1.expand.conv",
    r"features\.(\d+)\.conv\.1": r"blocks.\1.expand.norm",
    r"features\.(\d+)\.conv\.3": r"blocks.\1.depthwise.conv",
    r"features\.(\d+)\.conv\.4": r"blocks.\1.depthwise.norm",
    r"features\.(\d+)\.conv\.6": r"blocks.\1.project.conv",
    r"features\.(\d+)\.conv\.7": r"blocks.\1.project.norm",
    r"features\.18\.0": "head.conv",
    r"features\.18\.1": "head.norm",
}

# expansion, output channels, blocks, stride of the first block
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class ConvNorm(nn.Module):
    """A convolution without bias, BatchNorm, and ReLU6 unless `linear`."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = nn.Identity() if linear else nn.ReLU6(inplace=True)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / (kernel * kernel * outputs)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return y


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project back; added to the input where both have the same shape."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvNorm(inputs, hidden) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        self.project = ConvNorm(hidden, outputs, linear=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Images `(batch, 3, height, width)` to features `(batch, 1280)`; height and width are multiples of 32."""

    features = 1280

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, kernel=3, stride=2)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        channels = 32
        for expansion, outputs, count, first_stride in STAGES:
            for i in range(count):
                stride = first_stride if i == 0 else 1
                blocks[str(len(blocks) + 1)] = InvertedResidual(channels, outputs, stride=stride, expansion=expansion)
                channels = outputs
        self.blocks = nn.Sequential(blocks)
        self.head = ConvNorm(channels, self.features)

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(images)))
        return y.mean(3).mean(2)
