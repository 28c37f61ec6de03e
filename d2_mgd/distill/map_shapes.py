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


def map_of_tokens(tokens: Tensor, ratio: float = 1.0) -> Tensor:
    """(N, 1 + L, C) or (N, L, C) tokens of a vision transformer -> (N, C, H, W); a class token is left out.

    Args:
        tokens: of the patches, row by row, after the class token if there is one.
        ratio: H / W of the grid.

    Raises:
        UserError: the tokens are no grid of that ratio.
    """
    number = tokens.shape[1]
    for first in (1, 0):
        height = round(math.sqrt((number - first) * ratio))
        width = (number - first) // max(height, 1)
        if height * width == number - first > 0 and abs(height - ratio * width) < max(1.0, ratio):
            return tokens[:, first:].transpose(1, 2).unflatten(2, (height, width))
    raise UserError(
        f"{number} tokens are no grid of height / width {ratio:.2f}, with or without a class token: give maps "
        "(N, C, H, W), or tokens (N, 1 + H W, C) without registers."
    )
