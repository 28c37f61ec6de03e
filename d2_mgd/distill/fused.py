"""Reduce, normalise and compare in one pass over the maps, for losses that are squared residuals.

Shape shorthand: N images, S student channels, T teacher channels, H, W.

The plain path makes the guided map, the normalised map, the loss of every element and some masks, each of full size,
and keeps several for the backward pass. Here a CPU works through slices that stay in its cache, and one map is kept:
the gradient, known but for a factor as soon as the residual is. Results equal the plain path's to rounding. Losses and
reducers that are not known here take the plain path; a new one needs nothing of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2_mgd.distill import losses, reducers
from d2_mgd.distill.norms import MaskedBatchNorm
from d2_mgd.distill.reducers import Reducer

__all__ = ["Comparison", "can_fuse", "fused_norm", "sum_of_squares"]

_SLICE = 131072  # elements of a student's slice: a few such float32 slices fit a core's second-level cache

Index = tuple[slice, slice, slice]  # images, channels, rows of pixels


def _partial_l2_residual(difference: Tensor, guided: Tensor, out: Tensor) -> None:
    # (student > guided) | (guided > 0) keeps all differences, or else the positive ones: a lower bound of -max or 0.
    # In numbers, not booleans: on a CPU torch.where takes a branch an element.
    bound = torch.gt(guided, 0, out=torch.empty_like(guided)).mul_(torch.finfo(guided.dtype).min)
    torch.maximum(difference, bound, out=out)


def _mse_residual(difference: Tensor, guided: Tensor, out: Tensor) -> None:
    out.copy_(difference)


_RESIDUALS: dict[Any, Callable[[Tensor, Tensor, Tensor], None]] = {  # of a difference and the guided map
    losses.partial_l2: _partial_l2_residual,
    losses.mse: _mse_residual,
}
_SLICEABLE = (None, reducers.amp, reducers.max, reducers.sp, reducers.mean, reducers.sm)  # each pixel by itself


class Comparison(NamedTuple):
    """What a student's map is compared with, and how.

    Args:
        teacher: (N, T, H, W).
        reducer: of the teacher's map; None compares channel by channel.
        groups: (S, G) for the reducer.
        margin: (T,) or None.
        loss: a loss of this module's list.
        valid: (N, 1, H, W) boolean or None.
        spatial_weight: (N, 1, H, W) factors or None.
    """

    teacher: Tensor
    reducer: Reducer | None
    groups: Tensor | None
    margin: Tensor | None
    loss: Callable[..., Tensor]
    valid: Tensor | None = None
    spatial_weight: Tensor | None = None


def can_fuse(loss: Callable[..., Tensor], reducer: Reducer | None) -> bool:
    """Whether :func:`sum_of_squares` knows this loss and this reducer."""
    return loss in _RESIDUALS and reducer in _SLICEABLE


def fused_norm(norm: torch.nn.Module, student: Tensor, valid: Tensor | None) -> MaskedBatchNorm | None:
    """The norm, if :func:`sum_of_squares` can take it over: on a CPU, a training batch-norm over plain batches."""
    if student.device.type != "cpu" or type(norm) is not MaskedBatchNorm:
        return None
    return norm if norm.training and norm.is_plain(student, valid) else None


def sum_of_squares(student: Tensor, comparison: Comparison, norm: MaskedBatchNorm | None = None) -> Tensor:
    """Sum over all real elements of the loss between the student's and the guided map.

    Args:
        student: (N, S, H, W) float32 or float64, normalised unless ``norm`` is given.
        comparison: the other side.
        norm: a batch-norm from :func:`fused_norm`; its running statistics are updated.

    Returns:
        Tensor: scalar, differentiable once in the student's map and the norm's parameters.
    """
    if norm is None:
        return _SumOfSquares.apply(student, None, None, None, 0.0, torch.is_grad_enabled(), comparison)
    with torch.no_grad():
        mean, variance = torch.batch_norm_update_stats(student, None, None, 0.0)
        norm.update_running(mean, variance, mean.new_tensor(student.numel() // student.shape[1]))
        statistics = (mean, torch.rsqrt(variance + norm.eps))
    return _SumOfSquares.apply(
        student, norm.weight, norm.bias, statistics, norm.eps, torch.is_grad_enabled(), comparison
    )


class _SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None,
        epsilon: float,
        differentiated: bool,
        comparison: Comparison,
    ) -> Tensor:
        scale = shift = None
        if weight is not None and bias is not None and statistics is not None:
            scale = weight * statistics[1]
            shift = bias - statistics[0] * scale
        residual = torch.empty_like(student)
        total = torch.zeros((), dtype=student.dtype, device=student.device)
        margin = _reduced_margin(comparison, student.dtype)
        for index in _slices(student):
            total += _compare(student[index], comparison, index, scale, shift, margin, residual[index])
        if differentiated:
            # now, not in the backward pass: the student's map need not be kept for it
            gradients = _gradients(residual, student, weight, statistics, epsilon, ctx.needs_input_grad[:3])
            ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if saved is None else saved * gradient for saved in ctx.saved_tensors]
        return *found, None, None, None, None


def _gradients(
    residual: Tensor,
    student: Tensor,
    weight: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    epsilon: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the sum in the student's map and the norm's weight and bias; takes the residual's memory."""
    if weight is None or statistics is None:
        return residual.mul_(2.0) if needed[0] else None, None, None
    return torch.ops.aten.native_batch_norm_backward(
        residual.mul_(2.0), student, weight, None, None, *statistics, True, epsilon, list(needed)
    )


def _compare(
    student: Tensor,
    comparison: Comparison,
    index: Index,
    scale: Tensor | None,
    shift: Tensor | None,
    margin: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """The sum over one slice of the maps; writes that of the residual, each element times its spatial weight."""
    images, channels, rows = index
    guided = comparison.teacher[images, :, rows]
    if comparison.reducer is None:
        guided = guided[:, channels]
    else:
        assert comparison.groups is not None
        guided, _ = comparison.reducer(guided, comparison.groups[channels], None, None)
    guided = guided.to(student.dtype)
    if margin is not None:
        guided = torch.maximum(guided, margin[:, channels])
    if scale is not None and shift is not None:
        difference = torch.addcmul(_per_channel(shift[channels]), student, _per_channel(scale[channels])).sub_(guided)
    else:
        difference = student - guided
    _RESIDUALS[comparison.loss](difference, guided, residual)
    if comparison.valid is not None:
        residual.masked_fill_(~comparison.valid[images, :, rows], 0.0)
    if comparison.spatial_weight is None:
        return torch.linalg.vector_norm(residual).square()
    unweighted = residual.clone()
    return residual.mul_(comparison.spatial_weight[images, :, rows]).mul(unweighted).sum()


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _reduced_margin(comparison: Comparison, dtype: torch.dtype) -> Tensor | None:
    """(1, S, 1, 1) margins of the guided map, for a loss that looks at them."""
    if comparison.margin is None or comparison.loss is not losses.partial_l2:
        return None
    if comparison.reducer is None:
        return _per_channel(comparison.margin.to(dtype))
    assert comparison.groups is not None
    _, margin = comparison.reducer(comparison.teacher[:0], comparison.groups, comparison.margin, None)
    return None if margin is None else _per_channel(margin.to(dtype))


def _slices(maps: Tensor) -> Iterator[Index]:
    """Slices that lie together in memory; one of everything on a GPU, which has no such cache but many cores."""
    images, channels, height, width = maps.shape
    everything = slice(None)
    if maps.device.type != "cpu" or maps.numel() <= _SLICE:
        yield everything, everything, everything
        return
    size = channels * height * width
    if size <= _SLICE:
        step = max(1, _SLICE // max(size, 1))
        for first in range(0, images, step):
            yield slice(first, first + step), everything, everything
        return
    by_rows = not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last)
    length = height if by_rows else channels
    step = max(1, _SLICE * length // size)
    for image in range(images):
        for first in range(0, length, step):
            part = slice(first, first + step)
            yield slice(image, image + 1), everything if by_rows else part, part if by_rows else everything
