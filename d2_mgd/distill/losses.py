"""Feature losses between a student's normalised map and the guided map of its teacher.

Shape shorthand: N images, S student channels, P real pixels of an image.

A loss takes ``student`` and ``guided`` (N, S, H, W) in the same dtype, ``margin`` (S,) or None, and ``valid``
(N, 1, H, W) boolean or None; the distiller has set both maps to zero where they are not real. It returns one value an
element, (N, S, H, W), with a gradient for the student; :func:`reduce_loss` makes the scalar. So any spatial weight
multiplies any loss.

A new one is a function with ``@FEATURE_LOSSES.register()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.common.registry import Registry
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2_mgd.errors import UserError

__all__ = [
    "FEATURE_LOSSES",
    "REDUCTIONS",
    "FeatureLoss",
    "channel_kl",
    "channel_statistics",
    "mse",
    "partial_l2",
    "pearson",
    "published_weights",
    "reduce_loss",
]

FeatureLoss = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]

FEATURE_LOSSES = Registry("FEATURE_LOSSES")
REDUCTIONS = ("mean", "image_sum")

_VARIANCE_EPSILON = 1e-6


@FEATURE_LOSSES.register()
def partial_l2(student: Tensor, guided: Tensor, margin: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Squared distance to the teacher's pre-activation, where the sign matters.

    The teacher's value is raised to its margin at least. No loss where both values are on the inactive side: where
    the teacher's is not positive and the student's is not above it (Heo et al., "A Comprehensive Overhaul of Feature
    Distillation", ICCV 2019; Yue et al., ECCV 2020).
    """
    return _Squares.apply(student, guided, margin, valid, True)


@FEATURE_LOSSES.register()
def mse(student: Tensor, guided: Tensor, margin: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Squared distance, everywhere."""
    return _Squares.apply(student, guided, None, valid, False)


class _Squares(torch.autograd.Function):
    """Squared residuals that keep one map for the backward pass, the residual.

    The same formula in plain operators keeps two maps and a mask. benchmarks/README.md has the times.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, guided: Tensor, margin: Tensor | None, valid: Tensor | None, partial: bool
    ) -> Tensor:
        if margin is None:
            other = guided.clone()
        else:
            other = torch.maximum(guided, margin.to(guided.dtype).view(1, -1, 1, 1))
        residual = student - other
        if partial:
            # (student > other) | (other > 0) keeps all residuals, or else the positive ones: a bound of -max or 0.
            # In numbers, not booleans: on a CPU torch.where takes a branch an element.
            bound = torch.gt(other, 0, out=other).mul_(torch.finfo(other.dtype).min)
            torch.maximum(residual, bound, out=residual)
        if valid is not None:
            residual.masked_fill_(~valid, 0.0)
        ctx.save_for_backward(residual)
        return torch.mul(residual, residual, out=other)  # two maps of memory in all

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (residual,) = ctx.saved_tensors
        return torch.addcmul(residual.new_zeros(()), residual, gradient, value=2.0), None, None, None, None


@FEATURE_LOSSES.register()
def pearson(student: Tensor, guided: Tensor, margin: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Half the squared distance of maps standardised for each channel over all images and pixels.

    Its mean is one minus Pearson's correlation, averaged over channels (Cao et al., "PKD", NeurIPS 2022).
    """
    return 0.5 * (_standardise(student, valid) - _standardise(guided, valid)).square()


@FEATURE_LOSSES.register()
def channel_kl(
    student: Tensor, guided: Tensor, margin: Tensor | None = None, valid: Tensor | None = None, temperature: float = 4.0
) -> Tensor:
    """Kullback-Leibler divergence of each channel's softmax over space, times temperature squared.

    Each element is multiplied by P, so that the mean over real elements is the mean divergence of a channel (Shu et
    al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021; 4 is the temperature of its published
    command for segmentation).
    """
    teacher_log = _spatial_log_softmax(guided / temperature, valid)
    student_log = _spatial_log_softmax(student / temperature, valid)
    divergence = teacher_log.exp() * (teacher_log - student_log)
    if valid is None:
        pixels: Tensor | int = student.shape[2] * student.shape[3]
    else:
        divergence = divergence.masked_fill(~valid, 0.0)
        pixels = valid.sum(dim=(1, 2, 3), keepdim=True)
    return divergence * pixels * temperature**2


MASKED_LOSSES = (partial_l2, mse, pearson, channel_kl)
"""These losses apply the mask themselves."""


def reduce_loss(
    elements: Tensor, valid: Tensor | None = None, reduction: str = "mean", spatial_weight: Tensor | None = None
) -> Tensor:
    """A scalar from (N, S, H, W) values.

    Args:
        elements: values as a loss returns them.
        valid: (N, 1, H, W) boolean, true at real pixels; others count for nothing.
        reduction: ``mean`` over real elements, so that a weight means the same at every size; or ``image_sum``, the
            sum over elements divided by the number of images, as published.
        spatial_weight: (N, 1, H, W) factors; they do not change what a mean divides by.
    """
    if spatial_weight is not None:
        elements = elements * spatial_weight
    if valid is not None:
        elements = elements.masked_fill(~valid, 0.0)
    if reduction == "image_sum":
        return elements.sum() / elements.shape[0]
    if valid is None:
        return elements.mean()
    return elements.sum() / (valid.sum() * elements.shape[1]).clamp(min=1)


_PUBLISHED_DETECTION = {
    "res2": 5e7, "res3": 5e7, "res4": 5e6, "res5": 5e6, "p3": 5e7, "p4": 5e7, "p5": 5e5,
}  # fmt: skip


def published_weights(task: str, features: Sequence[str]) -> dict[str, float]:
    """The published factor of each feature's summed loss, to be used with the reduction ``image_sum``.

    Args:
        task: ``classification`` (224 px: 1 / 1e4 / 2^(L - 1 - i) for feature i of the L in ``features``: list all of
            the network's features in order, also those that are not distilled), or ``detection`` (a table for
            ``res2`` ... ``res5``, ``p3`` ... ``p5``, divided by 5e7). The published detector divides the sum over a
            process's images by those of all processes, whose gradients are then averaged: with P processes, its factor
            is 1 / P of this.
        features: feature names, shallow to deep.

    Raises:
        ValueError: another task, or a feature without a published factor.
    """
    if task == "classification":
        last = len(features) - 1
        return {name: 1.0 / 1e4 / 2.0 ** (last - index) for index, name in enumerate(features)}
    if task != "detection":
        raise UserError(f"published weights exist for 'classification' and 'detection', not for {task!r}.")
    unknown = [name for name in features if name not in _PUBLISHED_DETECTION]
    if unknown:
        raise UserError(f"no published weight for {', '.join(unknown)}; there are: {', '.join(_PUBLISHED_DETECTION)}.")
    return {name: 1.0 / _PUBLISHED_DETECTION[name] for name in features}


def channel_statistics(maps: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over images and real pixels, (1, C, 1, 1) both; no deviation is zero.

    Args:
        maps: (N, C, H, W), zero where pixels are not real.
        valid: (N, 1, H, W) boolean, true at real pixels, or None.
    """
    dims = (0, 2, 3)
    if valid is None:
        mean = maps.mean(dim=dims, keepdim=True)
        variance = maps.var(dim=dims, keepdim=True, unbiased=False)
    else:
        count = valid.sum().clamp(min=1)
        mean = maps.sum(dim=dims, keepdim=True) / count
        variance = (maps - mean).square().masked_fill(~valid, 0.0).sum(dim=dims, keepdim=True) / count
    return mean, (variance + _VARIANCE_EPSILON).sqrt()


def _standardise(maps: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None:
        maps = maps.masked_fill(~valid, 0.0)  # not a product: the padding may hold NaN
    mean, deviation = channel_statistics(maps, valid)
    return (maps - mean) * deviation.reciprocal()


def _spatial_log_softmax(maps: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None:
        maps = maps.masked_fill(~valid, torch.finfo(maps.dtype).min / 2)
    return maps.flatten(2).log_softmax(dim=2).view_as(maps)
