"""Distillation of class logits, beside the features.

Shape shorthand: N images, K classes.

A loss of the registry takes ``student_logits`` and ``teacher_logits`` (N, K) in one dtype and ``targets`` (N,) int64 or
None, then ``temperature`` and options of its own by keyword. It returns a scalar. :class:`LogitLoss` checks a choice
when it is made and standardises the logits first where that is wanted, so every loss goes with or without.

A new one is a function with ``@LOGIT_LOSSES.register()``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.registry import Registry
from torch import Tensor

from d2_mgd.distill.registry import lookup
from d2_mgd.errors import UserError

__all__ = ["LOGIT_LOSSES", "LogitLoss", "dist", "dkd", "kd", "kd_loss", "standardize_logits"]

LOGIT_LOSSES = Registry("LOGIT_LOSSES")

_EPSILON = 1e-7  # of a standard deviation or a length that may be zero


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.5) -> Tensor:
    """Kullback-Leibler divergence of softened class distributions, times temperature squared, mean over images.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. 1.5 is the temperature in MGD's published code.

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K); no gradient flows into them.
        temperature: above 0.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    _check_shapes(student_logits, teacher_logits)
    _check_temperature(temperature)
    return kd(student_logits.float(), teacher_logits.detach().float(), None, temperature=temperature)


def standardize_logits(logits: Tensor) -> Tensor:
    """Z-score of each image's logits: mean zero and standard deviation one over the classes.

    A student then need not match its teacher's range of logits, only their relations (Sun et al., "Logit
    Standardization in Knowledge Distillation", CVPR 2024). The deviation divides by K; that of the published code by
    K - 1, half a percent less at 100 classes. Equal logits give zeros.

    Args:
        logits: (N, K).
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True).clamp(min=_EPSILON**2).sqrt() + _EPSILON)


@LOGIT_LOSSES.register()
def kd(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None, *, temperature: float = 4.0) -> Tensor:
    """Divergence of softened distributions, see :func:`kd_loss`."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@LOGIT_LOSSES.register()
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: the target class against the rest, and the other classes among themselves.

    ``alpha`` times the divergence of (target, not target) plus ``beta`` times the divergence of the distributions over
    the other classes, times temperature squared, mean over images (Zhao et al., "Decoupled Knowledge Distillation",
    CVPR 2022). KD is the same with alpha 1 and the teacher's probability of the other classes in place of beta. The
    published code has a beta of 8 for R32x4 -> R8x4, and of 2 for R56 -> R20, with temperature 4.

    Raises:
        ValueError: no targets.
    """
    if targets is None:
        raise ValueError("the logit loss 'dkd' needs the target classes of the images.")
    target = targets.view(-1, 1)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    among_others = _divergence(
        _others(student_logits / temperature, target), _others(teacher_logits / temperature, target)
    )
    against_rest = _divergence(_binary(student, target), _binary(teacher, target))
    return (alpha * against_rest + beta * among_others).mean() * temperature**2


@LOGIT_LOSSES.register()
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """One minus Pearson's correlation of predictions: of each image over classes, and of each class over images.

    ``beta`` times the first plus ``gamma`` times the second, times temperature squared as in the published code
    (Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022). The second is that of a batch, so it
    depends on its size.
    """
    student = F.softmax(student_logits / temperature, dim=1)
    teacher = F.softmax(teacher_logits / temperature, dim=1)
    within_images = 1.0 - _correlation(student, teacher).mean()
    within_classes = 1.0 - _correlation(student.T, teacher.T).mean()
    return (beta * within_images + gamma * within_classes) * temperature**2


class LogitLoss:
    """A loss of logits by name, checked when it is made.

    ::

        loss = LogitLoss("dkd", standardize=True, temperature=2.0, beta=6.0)
        total = task_loss + loss(student_logits, teacher_logits, targets)

    Computed in float32 whatever the dtype of the logits or the autocast state.

    Args:
        name: in ``LOGIT_LOSSES``: ``kd``, ``dkd``, ``dist``.
        weight: factor of the loss.
        standardize: whether to standardise both logits first, see :func:`standardize_logits`.
        options: the loss's own, by keyword: ``temperature`` for all; ``alpha``, ``beta`` for ``dkd``; ``beta``,
            ``gamma`` for ``dist``.

    Raises:
        ValueError: an unknown name or option (with the list), a weight or option that is negative or not finite, a
            temperature that is not positive.
    """

    def __init__(self, name: str = "kd", *, weight: float = 1.0, standardize: bool = False, **options: float) -> None:
        function: Callable[..., Tensor] = lookup(LOGIT_LOSSES, "logit loss", name)
        known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        unknown = [option for option in options if option not in known]
        if unknown:
            raise UserError(f"logit loss {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known)}.")
        for option, value in {"weight": weight, **options}.items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"logit loss {name!r}: {option} must be finite and not negative, got {value}.")
        if "temperature" in options:
            _check_temperature(options["temperature"])
        self.name = name
        self.weight = float(weight)
        self.standardize = bool(standardize)
        self.options: Mapping[str, float] = dict(options)
        self._function = function

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None) -> Tensor:
        """The weighted loss of a batch, a scalar.

        Args:
            student_logits: (N, K).
            teacher_logits: (N, K); no gradient flows into them.
            targets: (N,) class of each image; ``dkd`` needs it.

        Raises:
            ValueError: shapes that differ, or no targets where they are needed.
        """
        _check_shapes(student_logits, teacher_logits)
        with torch.autocast(student_logits.device.type, enabled=False):
            student, teacher = _in_float(student_logits), _in_float(teacher_logits.detach())
            if self.standardize:
                student, teacher = standardize_logits(student), standardize_logits(teacher)
            return self.weight * self._function(student, teacher, targets, **self.options)

    def __repr__(self) -> str:
        options: dict[str, Any] = {"weight": self.weight, "standardize": self.standardize, **self.options}
        return f"LogitLoss({self.name!r}, {', '.join(f'{key}={value}' for key, value in options.items())})"


def _in_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"student and teacher logits must have the same shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}: do both know the same classes?"
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"the temperature must be positive, got {temperature}.")


def _divergence(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """(N,) divergence of log-probabilities (N, K); classes of log-probability minus infinity in both count nothing."""
    teacher = teacher_log.exp()
    return torch.where(teacher > 0, teacher * (teacher_log - student_log), torch.zeros_like(teacher)).sum(dim=1)


def _others(logits: Tensor, target: Tensor) -> Tensor:
    """(N, K) log-probabilities among the other classes; at the target a number whose probability is zero."""
    lowest = torch.finfo(logits.dtype).min / 2
    return F.log_softmax(logits.scatter(1, target, lowest), dim=1)


def _binary(log_probability: Tensor, target: Tensor) -> Tensor:
    """(N, 2) log-probabilities of the target class and of all others together."""
    others = log_probability.scatter(1, target, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_probability.gather(1, target), others], dim=1)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's r of each pair of rows; 0 where one is constant."""
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    return F.cosine_similarity(first, second, dim=1, eps=1e-8)
