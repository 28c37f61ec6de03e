"""Spatial weights: which pixels of a feature count how much in its loss.

Shape shorthand: N images, T teacher channels, H, W of the map that is compared, B boxes of an image.

A spatial weight takes the teacher's map (N, T, H, W), the ground-truth boxes of each image in pixels of the network's
input or None, the stride of the map in those pixels or None, and ``valid`` (N, 1, H, W) boolean or None. It returns
(N, 1, H, W) factors, or None where all pixels count alike. Factors of an image are 1 on average over its real pixels,
so a loss keeps its scale and its weight keeps its meaning. They multiply the elements of any feature loss.

A new one is a function with ``@SPATIAL_WEIGHTS.register()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from fvcore.common.registry import Registry
from torch import Tensor

from d2_mgd.errors import UserError

__all__ = ["SPATIAL_WEIGHTS", "Boxes", "SpatialWeight", "all", "attention", "boxes"]

Boxes = Sequence[Tensor]
SpatialWeight = Callable[[Tensor, "Boxes | None", "float | None", "Tensor | None"], "Tensor | None"]


SPATIAL_WEIGHTS = Registry("SPATIAL_WEIGHTS")


@SPATIAL_WEIGHTS.register()
def all(
    teacher: Tensor, boxes: Boxes | None = None, stride: float | None = None, valid: Tensor | None = None
) -> Tensor | None:
    """All pixels alike."""
    return None


@SPATIAL_WEIGHTS.register()
def boxes(
    teacher: Tensor,
    boxes: Boxes | None = None,
    stride: float | None = None,
    valid: Tensor | None = None,
    background: float = 0.5,
) -> Tensor | None:
    """Foreground by ground-truth boxes, each box with the same share, and the background in balance with them.

    A pixel inside a box counts one over the pixels of that box, of the smallest one where boxes overlap; a pixel
    outside counts ``background`` over the pixels outside (Yang et al., "Focal and Global Knowledge Distillation for
    Detectors", CVPR 2022; 0.5 is the ratio of background to foreground in its published code). Here each image is then
    scaled to 1 on average, so that images with many boxes do not weigh more.

    Args:
        teacher: (N, T, H, W), for its size and device.
        boxes: for each image (B, 4) x1, y1, x2, y2 in pixels of the input; B may be 0, then all pixels count alike.
        stride: pixels of the input in one of the map.
        valid: (N, 1, H, W) boolean, true at real pixels; others count in no average.
        background: share of the background over that of one box.

    Raises:
        ValueError: no boxes, not one tensor (B, 4) for each image, or no stride.
    """
    images, _, height, width = teacher.shape
    boxes = _checked_boxes(boxes, images)
    if stride is None or not stride > 0:
        raise UserError(f"the spatial weight 'boxes' needs the stride of the map in input pixels, got {stride}.")
    rows = torch.arange(height, device=teacher.device).view(1, -1, 1)
    columns = torch.arange(width, device=teacher.device).view(1, 1, -1)
    weights = torch.empty((images, 1, height, width), device=teacher.device)
    for index, found in enumerate(boxes):
        left, top, right, bottom = _on_the_map(found.to(teacher.device, non_blocking=True), stride, height, width)
        inside = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)  # (B, H, W)
        real = None if valid is None else valid[index]
        if real is not None:
            inside = inside & real
        area = inside.flatten(1).sum(dim=1).clamp(min=1).view(-1, 1, 1)
        foreground = (inside / area).sum(dim=0) if len(found) == 0 else (inside / area).amax(dim=0)
        outside = foreground == 0 if real is None else (foreground == 0) & real[0]
        weights[index, 0] = foreground + outside * (background / outside.sum().clamp(min=1))
    return _one_on_average(weights, valid)


@SPATIAL_WEIGHTS.register()
def attention(
    teacher: Tensor,
    boxes: Boxes | None = None,
    stride: float | None = None,
    valid: Tensor | None = None,
    temperature: float = 0.5,
) -> Tensor | None:
    """Where the teacher's map is large: the softmax over pixels of its mean magnitude, times their number.

    Yang et al., CVPR 2022, with their temperature of 0.5; the mean over channels of magnitudes is the attention map of
    Zagoruyko and Komodakis, ICLR 2017, to the first power. No gradient flows into it.

    Args:
        teacher: (N, T, H, W).
        boxes, stride: not looked at.
        valid: (N, 1, H, W) boolean, true at real pixels; the softmax is over these.
        temperature: above 0; smaller is more pointed.
    """
    magnitude = teacher.detach().float().abs().mean(dim=1, keepdim=True) / temperature
    if valid is None:
        pixels: Tensor | int = teacher.shape[2] * teacher.shape[3]
    else:
        magnitude = magnitude.masked_fill(~valid, torch.finfo(magnitude.dtype).min / 2)
        pixels = valid.sum(dim=(1, 2, 3), keepdim=True)
    return magnitude.flatten(1).softmax(dim=1).view_as(magnitude) * pixels


def _checked_boxes(boxes: Boxes | None, images: int) -> Boxes:
    if boxes is None:
        raise UserError("the spatial weight 'boxes' needs the ground-truth boxes of each image.")
    if len(boxes) != images or any(found.ndim != 2 or found.shape[1] != 4 for found in boxes):
        raise UserError(
            f"boxes must be one tensor (B, 4) for each of the {images} images, got "
            f"{', '.join(str(tuple(found.shape)) for found in boxes) or 'none'}."
        )
    return boxes


def _on_the_map(boxes: Tensor, stride: float, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left, top (first pixel inside) and right, bottom (first one beyond), each (B, 1, 1); at least one pixel."""
    left, top, right, bottom = (boxes.detach().float() / stride).view(-1, 4, 1, 1).unbind(dim=1)
    left = left.floor().clamp(0, width - 1)
    top = top.floor().clamp(0, height - 1)
    right = torch.maximum(right.ceil().clamp(max=width), left + 1)
    bottom = torch.maximum(bottom.ceil().clamp(max=height), top + 1)
    return left, top, right, bottom


def _one_on_average(weights: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return weights / weights.mean(dim=(1, 2, 3), keepdim=True)
    weights = weights.masked_fill(~valid, 0.0)
    total = weights.sum(dim=(1, 2, 3), keepdim=True)
    pixels = valid.sum(dim=(1, 2, 3), keepdim=True)
    return torch.where(total > 0, weights * pixels / total.clamp(min=torch.finfo(weights.dtype).tiny), weights)
