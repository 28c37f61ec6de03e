"""Networks that torchvision lacks, or in which the maps that the paper taps do not exist.

Shape shorthand: N images, C channels, H, W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import shufflenetv2

# width and stride of MobileNet-V1's depthwise separable blocks (Howard et al., 2017, table 1)
_SEPARABLE_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class MobileNetV1(nn.Module):
    """MobileNet-V1 of width 1 (Howard et al., "MobileNets", 2017).

    Module names are those of the published checkpoints: ``model.0`` is the stem, ``model.1`` to ``model.13`` are the
    separable blocks, ``model.14`` pools, ``fc`` is the head. Images may have any size from 32 px.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Sequential(*_convolution(3, 32, 3, stride=2))]
        width = 32
        for outputs, stride in _SEPARABLE_BLOCKS:
            depthwise = _convolution(width, width, 3, stride, groups=width)
            blocks.append(nn.Sequential(*depthwise, *_convolution(width, outputs, 1)))
            width = outputs
        self.model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes) logits."""
        return self.fc(self.model(images).flatten(1))


class PreActivationUnit(shufflenetv2.InvertedResidual):
    """torchvision's ShuffleNet-V2 unit with its last ReLU moved to where the output is read.

    A ReLU commutes with concatenation and channel shuffle, so the network computes the same function. The output of a
    stage is now the pre-activation of all its channels, including those that a unit passes unchanged. In torchvision's
    order that map does not exist. Parameters and their names are torchvision's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) pre-activation -> (N, C', H', W') pre-activation."""
        if self.stride == 1:
            kept, branch = x.chunk(2, dim=1)
            out = torch.cat((kept, self.branch2[:-1](F.relu(branch))), dim=1)
        else:
            active = F.relu(x)
            out = torch.cat((self.branch1[:-1](active), self.branch2[:-1](active)), dim=1)
        return shufflenetv2.channel_shuffle(out, 2)


class PreActivationShuffleNetV2(shufflenetv2.ShuffleNetV2):
    """torchvision's ShuffleNet-V2 (Ma et al., ECCV 2018) whose stages end before their activation.

    Its function and ``state_dict`` are those of torchvision's network; see :class:`PreActivationUnit`.
    """

    def __init__(
        self, stages_repeats: list[int], stages_out_channels: list[int], num_classes: int = 1000, **kwargs: Any
    ) -> None:
        super().__init__(
            stages_repeats, stages_out_channels, num_classes, inverted_residual=PreActivationUnit, **kwargs
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, num_classes) logits."""
        x = self.maxpool(self.conv1(x))
        x = self.stage4(self.stage3(self.stage2(x)))
        x = self.conv5(F.relu(x))
        return self.fc(x.mean([2, 3]))
