"""ResNet-18 as it is used for CIFAR: a 3x3 stem without pooling (He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, figure 2 and table 1; the 3x3 stem as in its section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["BasicBlock", "CifarResNet", "resnet18_channels"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a skip connection, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + skip)


class CifarResNet(nn.Module):
    """Four stages of basic blocks on 32x32 images, average pooling and a linear classifier.

    Takes images ``[n, 3, height, width]`` with values 0..255, uint8 or floating point, and standardises them
    itself: ``mean`` and ``deviation`` (of pixels / 255) are buffers, so a checkpoint holds them. Activations
    are channels-last throughout. Gives logits ``[n, classes]``.

    Args:
        channels: of the stages; the first is the stem's too.
        blocks: basic blocks per stage; every stage but the first halves height and width.
        dropout: before the classifier. It does not change the initial weights.
        zero_init_residual: the last batch norm of every block starts at zero, so that the block starts as the
            identity (Goyal et al. 2017).

    Raises:
        ValueError: no stage, or not as many numbers of blocks as of channels.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        classes: int = 10,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        deviation: Sequence[float] = (0.25, 0.25, 0.25),
        dropout: float = 0.0,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if not channels or len(channels) != len(blocks):
            raise ValueError(f"expected one number of blocks per stage, got {blocks} for {channels}")
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1))
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        stages, inputs = [], channels[0]
        for number, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
            first_stride = 1 if number == 0 else 2
            strides = [first_stride] + [1] * (count - 1)
            stage = [
                BasicBlock(inputs if i == 0 else outputs, outputs, stride) for i, stride in enumerate(strides)
            ]
            stages.append(nn.Sequential(*stage))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.classifier = nn.Linear(inputs, classes)
        self._initialise(zero_init_residual)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.mean.dtype, memory_format=torch.channels_last)
        x = (x * (1 / 255) - self.mean) / self.deviation
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        x = self.pool(x).flatten(1)
        return self.classifier(x if self.dropout is None else self.dropout(x))


def resnet18_channels(width: float) -> tuple[int, ...]:
    """Channels of ResNet-18's four stages times ``width``, rounded to multiples of 8.

    Raises:
        ValueError: a width that is not above 0, or below one eighth (8 channels in the first stage).
    """
    if not math.isfinite(width) or width < 0.125:
        raise ValueError(f"width must be at least 0.125 (8 channels in the first stage), got {width}")
    return tuple(8 * round(channels * width / 8) for channels in (64, 128, 256, 512))
