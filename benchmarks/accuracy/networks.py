"""The CIFAR networks of the CRD protocol (Tian et al., "Contrastive Representation Distillation", ICLR 2020).

Shape shorthand: N images, C channels, K classes, H, W.

Each is a stem, stages and a head. A stage's map is the one before its last activation; :meth:`Staged.maps_and_logits`
returns all of them with the logits, without hooks, so that a network compiles as one graph. Tests compare the numbers
of parameters with the protocol's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]  # a map before its activation, and the input of the next block


class Staged(nn.Module):
    """A network of named stages.

    Args:
        stem: images (N, 3, H, W) -> (N, C, H, W).
        stages: each a stage of blocks, shallow to deep; they are named ``stage1``, ``stage2`` ...
        widths: channels of each stage's map.
        neck: between the last stage and the pooling.
        head: (N, C) -> (N, K) logits.
    """

    def __init__(
        self, stem: nn.Module, stages: Sequence[_Stage], widths: Sequence[int], neck: nn.Module, head: nn.Linear
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleDict({f"stage{number}": stage for number, stage in enumerate(stages, start=1)})
        self.widths = dict(zip(self.stages, widths))
        self.neck = neck
        self.head = head

    def maps_and_logits(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return stage name -> map (N, C, H, W) before the activation, and logits (N, K)."""
        maps = {}
        x = self.stem(images)
        for name, stage in self.stages.items():
            maps[name], x = stage(x)
        return maps, self.head(self.neck(x).mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.maps_and_logits(images)[1]

    def last_norm(self, stage: str) -> nn.BatchNorm2d:
        """Return the batch-norm whose output is a stage's map, for margins.

        Raises:
            ValueError: the map comes from several (ShuffleNet-V2), so that there are no margins.
        """
        found = self.stages[stage]
        assert isinstance(found, _Stage)
        norm = getattr(found.blocks[-1], "last_norm", None)
        if norm is None:
            raise ValueError(f"{stage}'s map comes from no single batch-norm: use a loss without margins, such as mse.")
        return norm


class _Stage(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Pair:
        before = x
        for block in self.blocks:
            before, x = block(x)
        return before, x


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias and its batch-norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _initialised(network: Staged) -> Staged:
    """Set the protocol's initial weights of convolutions. ShuffleNet-V2 keeps torch's, as in the protocol."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


# ---- residual networks (He et al., CVPR 2016)


class _Residual(nn.Module):
    """A residual block: 3x3, 3x3 (basic), or 1x1, 3x3, 1x1 to four times the width (bottleneck)."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        layers: list[nn.Module] = []
        for shape in shapes if bottleneck else [(inputs, width, 3, stride), (width, width, 3, 1)]:
            layers += [*_convolution(*shape), nn.ReLU(inplace=True)]
        self.residual = nn.Sequential(*layers[:-1])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    @property
    def last_norm(self) -> nn.Module:
        return self.residual[-1]

    def forward(self, x: Tensor) -> Pair:
        before = self.residual(x) + self.shortcut(x)
        return before, F.relu(before)


def _resnet(stem: int, widths: Sequence[int], blocks: Sequence[int], bottleneck: bool, classes: int) -> Staged:
    stages, inputs, outputs = [], stem, [4 * width if bottleneck else width for width in widths]
    for index, (width, count) in enumerate(zip(widths, blocks)):
        built = []
        for number in range(count):
            built.append(_Residual(inputs, width, 2 if index > 0 and number == 0 else 1, bottleneck))
            inputs = outputs[index]
        stages.append(_Stage(built))
    first = nn.Sequential(*_convolution(3, stem, 3), nn.ReLU(inplace=True))
    return _initialised(Staged(first, stages, outputs, nn.Identity(), nn.Linear(inputs, classes)))


# ---- MobileNet-V2 (Sandler et al., CVPR 2018)


class _Inverted(nn.Module):
    """Expand, depthwise, project; the last is linear, so the map before and after the activation is the same."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = nn.Sequential(
            *_convolution(inputs, inner, 1),
            nn.ReLU(inplace=True),
            *_convolution(inner, inner, 3, stride, groups=inner),
            nn.ReLU(inplace=True),
            *_convolution(inner, outputs, 1),
        )
        self.skips = stride == 1 and inputs == outputs

    @property
    def last_norm(self) -> nn.Module:
        return self.residual[-1]

    def forward(self, x: Tensor) -> Pair:
        before = self.residual(x) + x if self.skips else self.residual(x)
        return before, before


Setting = tuple[int, int, int, int]  # expansion, channels, blocks, stride; a list of them lies between two maps


def _mobilenet_v2(stem: int, stride: int, stages: Sequence[Sequence[Setting]], neck: int, classes: int) -> Staged:
    inputs = stem
    built, widths = [], []
    for settings in stages:
        blocks = []
        for expansion, channels, count, first_stride in settings:
            for number in range(count):
                blocks.append(_Inverted(inputs, channels, first_stride if number == 0 else 1, expansion))
                inputs = channels
        built.append(_Stage(blocks))
        widths.append(inputs)
    first = nn.Sequential(*_convolution(3, stem, 3, stride), nn.ReLU(inplace=True))
    last = nn.Sequential(*_convolution(inputs, neck, 1), nn.ReLU(inplace=True))
    network = _initialised(Staged(first, built, widths, last, nn.Linear(neck, classes)))
    nn.init.normal_(network.head.weight, std=0.01)
    nn.init.zeros_(network.head.bias)
    return network


# the protocol's, at half the width
_MOBILE_HALF = (
    [(1, 8, 1, 1), (6, 12, 2, 1)],
    [(6, 16, 3, 2)],
    [(6, 32, 4, 2), (6, 48, 3, 1)],
    [(6, 80, 3, 2), (6, 160, 1, 1)],
)
# for images of 16 px: three stages at the sides that the residual networks have
_MOBILE_SMALL = ([(1, 12, 1, 1), (3, 16, 1, 1)], [(3, 24, 2, 2)], [(3, 48, 2, 2)])


# ---- ShuffleNet-V2 (Ma et al., ECCV 2018)


class _Shuffle(nn.Module):
    """Half of the channels pass through three convolutions; halves are joined and interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            *_convolution(half, half, 1),
            nn.ReLU(inplace=True),
            *_convolution(half, half, 3, groups=half),
            *_convolution(half, half, 1),
        )

    def forward(self, x: Tensor) -> Pair:
        kept, changed = x.chunk(2, dim=1)
        changed = self.branch(changed)
        return torch.cat([kept, changed], dim=1), _interleave(torch.cat([kept, F.relu(changed)], dim=1))


class _ShuffleDown(nn.Module):
    """Two branches, each of half of the channels, at half the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(*_convolution(inputs, inputs, 3, 2, groups=inputs), *_convolution(inputs, half, 1))
        self.right = nn.Sequential(
            *_convolution(inputs, half, 1),
            nn.ReLU(inplace=True),
            *_convolution(half, half, 3, 2, groups=half),
            *_convolution(half, half, 1),
        )

    def forward(self, x: Tensor) -> Pair:
        before = torch.cat([self.left(x), self.right(x)], dim=1)
        return before, _interleave(F.relu(before))


def _interleave(x: Tensor) -> Tensor:
    images, channels, height, width = x.shape
    return x.view(images, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


def _shufflenet_v2(classes: int) -> Staged:
    widths, inputs, stages = (116, 232, 464), 24, []
    for width, count in zip(widths, (3, 7, 3)):
        stages.append(_Stage([_ShuffleDown(inputs, width), *(_Shuffle(width) for _ in range(count))]))
        inputs = width
    stem = nn.Sequential(*_convolution(3, 24, 1), nn.ReLU(inplace=True))
    neck = nn.Sequential(*_convolution(inputs, 1024, 1), nn.ReLU(inplace=True))
    return Staged(stem, stages, widths, neck, nn.Linear(1024, classes))


# ---- by name

_FIXED: dict[str, Callable[[int], Staged]] = {
    "resnet50_bottleneck": lambda classes: _resnet(64, (64, 128, 256, 512), (3, 4, 6, 3), True, classes),
    "resnet14_bottleneck": lambda classes: _resnet(32, (32, 64, 128), (1, 2, 1), True, classes),
    "mobilenet_v2_half": lambda classes: _mobilenet_v2(16, 2, _MOBILE_HALF, 1280, classes),
    "mobilenet_v2_small": lambda classes: _mobilenet_v2(16, 1, _MOBILE_SMALL, 256, classes),
    "shufflenet_v2": _shufflenet_v2,
}


def known_networks() -> str:
    """Return the accepted names, for messages."""
    return f"resnetD and resnetDxK (D = 6n + 2 layers, K times the width; K even), {', '.join(_FIXED)}"


def build_network(name: str, classes: int) -> Staged:
    """Build a network with initial weights from the global RNG.

    ``resnet20``, ``resnet56`` have 16, 32, 64 channels; ``resnet8x4``, ``resnet32x4`` four times as many, and twice as
    many in the stem. ``resnet50_bottleneck`` is the ImageNet network with a 3x3 stem and no pooling before its stages.

    Raises:
        ValueError: an unknown name.
    """
    if name in _FIXED:
        return _FIXED[name](classes)
    found = re.fullmatch(r"resnet(\d+)(?:x(\d+))?", name)
    depth, factor = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
    if depth < 8 or (depth - 2) % 6 or factor % 2:
        raise ValueError(f"unknown network {name!r}; there are: {known_networks()}.")
    count, wider = (depth - 2) // 6, factor or 1
    stem = 8 * factor if factor else 16
    return _resnet(stem, [16 * wider, 32 * wider, 64 * wider], [count] * 3, False, classes)
