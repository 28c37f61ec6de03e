"""Margins: per-channel lower bounds of a teacher's pre-activation, from its batch-norm.

Shape shorthand: C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from d2_mgd.distill.taps import Tap
from d2_mgd.errors import UserError, located

__all__ = ["batch_norm_margin", "is_batch_norm", "tap_margins"]

_RARE = 1e-3  # below this probability of being negative the conditional mean is replaced by -3 sigma
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


@torch.no_grad()
def batch_norm_margin(norm: nn.Module) -> Tensor:
    """Expected value of a batch-norm's output where it is negative.

    A channel that leaves a batch-norm with scale ``g`` and shift ``b`` is taken as normal with mean ``b`` and standard
    deviation ``|g|``. Its margin is ``E[x | x < 0]``, which is ``b - |g| phi(b / |g|) / Phi(-b / |g|)``; where the
    channel is negative with a probability of 0.001 or less, the margin is ``-3 |g|`` (Heo et al., "A Comprehensive
    Overhaul of Feature Distillation", ICCV 2019; used by Yue et al., ECCV 2020).

    The quotient is computed from logarithms in float64, so tiny scales do not divide zero by zero; a scale of exactly
    zero gives the limit, ``min(b, 0)``.

    Args:
        norm: ``BatchNorm2d``, ``SyncBatchNorm``, or any module in their likeness (Detectron2's ``FrozenBatchNorm2d``):
            per-channel ``weight`` and ``bias`` (None is one and zero) and running statistics.

    Returns:
        Tensor: (C,) float32 margins on the device of the norm.

    Raises:
        TypeError: the module is no batch-norm.
        ValueError: its scale or shift is not finite.
    """
    running_var = getattr(norm, "running_var", None)
    if not hasattr(norm, "running_mean") or not hasattr(norm, "weight"):
        raise UserError(
            f"margins are made from a batch-norm, and this is a {type(norm).__name__}: tap a feature whose last norm "
            "is a batch-norm, or use a loss without margins."
        )
    weight: Tensor | None = getattr(norm, "weight", None)
    bias: Tensor | None = getattr(norm, "bias", None)
    reference = running_var if weight is None else weight
    if reference is None:
        raise UserError(f"this {type(norm).__name__} has neither scale nor running statistics to make margins from.")
    scale = torch.ones_like(reference) if weight is None else weight
    shift = torch.zeros_like(reference) if bias is None else bias
    scale, shift = scale.detach().double().abs(), shift.detach().double()
    if not (torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise UserError("margins cannot be made from a batch-norm whose scale or shift is not finite.")

    ratio = shift / scale.clamp(min=torch.finfo(torch.float64).tiny)
    log_negative = torch.special.log_ndtr(-ratio)  # log of the probability of being negative
    hazard = torch.exp(-0.5 * ratio.square() - _HALF_LOG_2PI - log_negative)
    margin = torch.where(log_negative > math.log(_RARE), shift - scale * hazard, -3.0 * scale)
    margin = torch.where(scale > 0, margin, shift.clamp(max=0.0))
    return margin.float()


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a batch-norm or any module in its likeness, see :func:`batch_norm_margin`."""
    return hasattr(module, "running_mean") and not isinstance(module, nn.modules.instancenorm._InstanceNorm)


def tap_margins(
    network: nn.Module,
    taps: Mapping[str, Tap],
    norms: Mapping[str, str | None] | None = None,
    channels: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Feature -> (C,) margins of the tapped map, from the last batch-norm inside the tapped module.

    Args:
        network: the teacher.
        taps: feature name -> tap before an activation, or of a module that is or ends in a batch-norm.
        norms: feature name -> path of the batch-norm to use instead, for any tap.
        channels: feature name -> C, to be checked.

    Raises:
        UserError: a map does not come from a batch-norm, or only a part of it; or a norm does not exist.
    """
    modules = dict(network.named_modules())
    found = {}
    for feature, tap in taps.items():
        with located(f"feature {feature}: "):
            found[feature] = batch_norm_margin(_norm(modules, tap, (norms or {}).get(feature)))
            width = len(found[feature])
            if channels is not None and width != channels[feature]:
                raise UserError(
                    f"{tap.module!r} has {channels[feature]} channels, but its last batch-norm has {width}, so there "
                    "are no margins for partial_l2: use the loss mse or pearson."
                )
    return found


def _norm(modules: Mapping[str, nn.Module], tap: Tap, path: str | None) -> nn.Module:
    if path is not None:
        if path not in modules:
            raise UserError(f"there is no module {path!r} to compute margins from.")
        return modules[path]
    tapped = modules[tap.module]
    end = tapped
    while isinstance(end, nn.Sequential) and len(end):
        end = end[-1]
    norms = [module for module in tapped.modules() if is_batch_norm(module)]
    ends_in_norm = bool(norms) and end is norms[-1] and not list(end.children())  # timm's norms contain activations
    if not norms or not (tap.before_activation or ends_in_norm):
        raise UserError(
            f"the output of {tap.module!r} does not come from a batch-norm, so there are no margins for partial_l2: "
            f"tap before an activation ({tap.module}@pre on the command line), name the norm, or use the loss mse or "
            "pearson."
        )
    return norms[-1]
