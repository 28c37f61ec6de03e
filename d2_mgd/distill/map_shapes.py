"""Maps of one shape: tokens as maps, and maps of one height and width.

Shape shorthand: N images, C channels, H, W of a map, L = H W.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from d2_mgd.errors import UserError


def resized(found: Tensor, height: int, width: int) -> Tensor:
    """(N, C, height, width): means over areas where the map shrinks, bilinear interpolation where it grows."""
    if found.shape[2:] == (height, width):
        return found
    found = found.float() if found.dtype.itemsize < 4 else found
    if found.shape[2] >= height and found.shape[3] >= width:
        return F.interpolate(found, size=(height, width), mode="area")
    return F.interpolate(found, size=(height, width), mode="bilinear", align_corners=False)


def as_maps(student: Tensor, teacher: Tensor, channels: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both maps as (N, C, H, W); ``channels`` are (S, T). Tokens take the other map's ratio of height to width."""
    ratio = 1.0
    if student.ndim == 4:
        student = as_map(student, channels[0])
        ratio = student.shape[2] / student.shape[3]
    teacher = as_map(teacher, channels[1], ratio)
    if student.ndim == 3:
        student = as_map(student, channels[0], teacher.shape[2] / teacher.shape[3] if teacher.ndim == 4 else 1.0)
    return student, teacher


def as_map(found: Tensor, channels: int, ratio: float = 1.0) -> Tensor:
    """(N, C, H, W) from tokens (see :func:`map_of_tokens`) or from (N, H, W, C); other maps are returned unchanged."""
    if found.ndim == 3:
        return map_of_tokens(found, ratio)
    if found.ndim == 4 and found.shape[3] == channels != found.shape[1]:
        return found.permute(0, 3, 1, 2)
    return found


def map_of_tokens(tokens: Tensor, ratio: float = 1.0) -> Tensor:
    """(N, P + L, C) tokens of a vision transformer -> (N, C, H, W); P class, distillation and register tokens are cut.

    Args:
        tokens: of the patches, row by row, after P = 0, 1, 2, 4 or 5 others.
        ratio: H / W of the grid.

    Raises:
        UserError: the tokens are no grid of that ratio.
    """
    number = tokens.shape[1]
    for first in (1, 0, 2, 4, 5):
        height = round(math.sqrt((number - first) * ratio))
        width = (number - first) // max(height, 1)
        if height * width == number - first > 0 and abs(height - ratio * width) < max(1.0, ratio):
            return tokens[:, first:].transpose(1, 2).unflatten(2, (height, width))
    raise UserError(
        f"{number} tokens are no grid of height / width {ratio:.2f} after 0, 1, 2, 4 or 5 other tokens: give maps "
        "(N, C, H, W)."
    )
