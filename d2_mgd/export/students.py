"""What a task provides, so that its student can be exported and checked.

Shape shorthand: N images, (H, W) of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Signature:
    """The input and the outputs of an exported file.

    Args:
        example: an input, float32 pixels in 0..255: (3, H, W), or (N, 3, H, W), whose N is then dynamic.
        outputs: name -> the dynamic axes of that output.
        dynamic_size: whether images may have another height and width than the example.
    """

    example: Tensor
    outputs: Mapping[str, Mapping[int, str]]
    dynamic_size: bool

    @property
    def input_axes(self) -> dict[int, str]:
        """The dynamic axes of the input."""
        axes = self.example.ndim
        size = {axes - 2: "height", axes - 1: "width"} if self.dynamic_size else {}
        return {**({0: "batch"} if axes == 4 else {}), **size}

    def examples(self) -> Iterator[Tensor]:
        """The example and, of a dynamic size, noise of twice its height and of twice its width."""
        yield self.example
        *others, height, width = self.example.shape
        for size in ((2 * height, width), (height, 2 * width)) if self.dynamic_size else ():
            yield 255 * torch.rand(*others, *size, generator=torch.Generator().manual_seed(0))


class Comparison(ABC):
    """Accumulates the answers of the PyTorch network and of the file on validation images."""

    @abstractmethod
    def add(self, target: Any, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """Add one input: its target, the network's outputs and the file's."""

    @abstractmethod
    def accuracy(self) -> dict[str, tuple[float, float]]:
        """Measure, such as ``box AP, %``, -> that of the network and of the file."""

    @abstractmethod
    def differences(self) -> dict[str, float]:
        """Description -> the largest difference, or the number of answers that differ."""


class Student(ABC):
    """A trained student with its images.

    Attributes:
        network: an input -> a tuple of tensors; in evaluation mode, on the CPU.
        signature: input and outputs.
        file: of the weights.
        facts: title -> text, for the model card.
        description: ``architecture``, ``library``, ``task``, ``channels`` and more, for ``config.json``.
    """

    network: nn.Module
    signature: Signature
    file: Path
    facts: dict[str, str]
    description: dict[str, Any]

    @abstractmethod
    def half_parts(self, network: nn.Module) -> list[nn.Module]:
        """The modules of a copy of ``network`` that compute in float16 with ``--half``."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The state dict that unmodified Detectron2, torchvision or timm loads."""

    @abstractmethod
    def training_images(self, count: int) -> Iterator[Tensor]:
        """Inputs of ``count`` training images (or all, if fewer), transformed as for an evaluation."""

    @abstractmethod
    def validation(self, count: int | None) -> Iterator[tuple[Tensor, Any]]:
        """Inputs and targets of ``count`` validation images, or of all."""

    @abstractmethod
    def comparison(self) -> Comparison:
        """A new, empty comparison."""


def size_of(network: nn.Module) -> str:
    """The number of parameters as text."""
    return f"{sum(one.numel() for one in network.parameters()) / 1e6:.2f} million parameters"
