"""Reducers: each group of teacher maps becomes one guided map (Yue, Deng, Zhou, ECCV 2020).

Shape shorthand: N images, S student channels, T teacher channels, G the size of the largest group.

A reducer takes ``teacher`` (N, T, H, W), ``groups`` (S, G) int64 padded with -1, ``margin`` (T,) or None, and a random
generator or None. It returns the guided map (N, S, H, W) and its margin (S,) or None. One teacher channel of each group
is read at a time, so that beside the teacher's map only maps of S channels exist.

A new one is a function with ``@REDUCERS.register()``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fvcore.common.registry import Registry
from torch import Tensor

from d2_mgd.errors import UserError
from d2_mgd.matching.channel_matching import PADDING

__all__ = ["REDUCERS", "Reducer", "amp", "max", "mean", "rd", "sm", "sp"]

Reducer = Callable[[Tensor, Tensor, "Tensor | None", "torch.Generator | None"], "tuple[Tensor, Tensor | None]"]

REDUCERS = Registry("REDUCERS")


def _take(teacher: Tensor, column: Tensor) -> Tensor:
    """(N, S, H, W) maps of the channels in ``column`` (S,), in the teacher's memory format."""
    images, channels, height, width = teacher.shape
    by_pixel = teacher.permute(0, 2, 3, 1)
    if teacher.is_contiguous() or not by_pixel.is_contiguous():
        return teacher.index_select(1, column)
    # index_select takes 4 to 10 times as long on a CPU, and forgets the memory format
    rows = by_pixel.reshape(-1, channels)
    taken = rows.gather(1, column.expand(rows.shape[0], -1))
    return taken.view(images, height, width, column.numel()).permute(0, 3, 1, 2)


def _without_padding(groups: Tensor) -> Tensor:
    """(S, G) with each row's padding replaced by its first member, which no maximum notices."""
    return torch.where(groups == PADDING, groups[:, :1], groups)


def _members(margin: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(S, G) margins of each group's members, zero at the padding; and which of them are members."""
    member = groups != PADDING
    return torch.where(member, margin[groups.clamp(min=0)], torch.zeros_like(margin[:1])), member


def _keep_larger(guided: Tensor, candidate: Tensor) -> None:
    """Replace, in place, what has a smaller magnitude than the candidate."""
    # in numbers, not booleans: on a CPU torch.where takes a branch an element, several times the time of all this
    larger = candidate.abs()
    torch.gt(larger, guided.abs(), out=larger)
    # exactly one or the other at 0 and 1, as long as their difference is within the dtype
    guided.lerp_(candidate, larger)


def _mean_margin(margin: Tensor | None, groups: Tensor) -> Tensor | None:
    if margin is None:
        return None
    values, member = _members(margin, groups)
    return values.sum(dim=1) / member.sum(dim=1)


@REDUCERS.register()
def amp(
    teacher: Tensor, groups: Tensor, margin: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Absolute max pooling: at each location the member of largest magnitude, sign kept. Mean of the margins."""
    columns = _without_padding(groups).unbind(dim=1)
    guided = _take(teacher, columns[0])
    for column in columns[1:]:
        _keep_larger(guided, _take(teacher, column))
    return guided, _mean_margin(margin, groups)


@REDUCERS.register()
def max(
    teacher: Tensor, groups: Tensor, margin: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Max pooling of each group and its margins: published as simple pooling, and what ``amp`` did until 2021."""
    filled = _without_padding(groups)
    columns = filled.unbind(dim=1)
    guided = _take(teacher, columns[0])
    for column in columns[1:]:
        guided = torch.maximum(guided, _take(teacher, column))
    return guided, None if margin is None else margin[filled].amax(dim=1)


@REDUCERS.register()
def sp(
    teacher: Tensor, groups: Tensor, margin: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Simple pooling, the published name of :func:`max`."""
    return max(teacher, groups, margin, generator)


@REDUCERS.register()
def mean(
    teacher: Tensor, groups: Tensor, margin: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Average pooling of each group, and of its margins. In float32 at least: sums in 16 bits lose what others keep."""
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    share = 1.0 / (groups != PADDING).sum(dim=1)  # (S,)
    guided = torch.zeros((), dtype=dtype, device=teacher.device)
    for column in groups.unbind(dim=1):
        weight = torch.where(column == PADDING, torch.zeros_like(share), share).to(dtype)
        guided = guided + _take(teacher, column.clamp(min=0)) * weight.view(1, -1, 1, 1)
    return guided, _mean_margin(margin, groups)


@REDUCERS.register()
def rd(
    teacher: Tensor, groups: Tensor, margin: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Random drop: at each location of each image one member at random; one random member's margin for each channel.

    The same generator state gives the same choice.
    """
    sizes = (groups != PADDING).sum(dim=1)  # (S,)
    images, _, height, width = teacher.shape
    shape = (images, groups.shape[0], height, width)
    uniform = torch.rand(shape, device=teacher.device, generator=generator)
    choice = (uniform * sizes.view(1, -1, 1, 1)).long().clamp_(max=groups.shape[1] - 1)
    columns = _without_padding(groups).unbind(dim=1)
    guided = _take(teacher, columns[0])
    for index, column in enumerate(columns[1:], start=1):
        guided = torch.where(choice == index, _take(teacher, column), guided)
    if margin is None:
        return guided, None
    pick = (torch.rand(sizes.shape, device=teacher.device, generator=generator) * sizes).long()
    return guided, margin[groups.gather(1, pick.clamp_(max=groups.shape[1] - 1).unsqueeze(1)).squeeze(1)]


@REDUCERS.register()
def sm(
    teacher: Tensor, groups: Tensor, margin: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sparse matching: the one teacher channel of each group, as it is. Needs groups of one (``one_to_one``).

    Raises:
        ValueError: a group has several members.
    """
    if groups.shape[1] != 1:
        raise UserError(
            f"reducer 'sm' needs groups of one teacher channel, got up to {groups.shape[1]}: "
            "use it with the matching mode 'one_to_one'."
        )
    only = groups[:, 0]
    return _take(teacher, only), None if margin is None else margin[only]
