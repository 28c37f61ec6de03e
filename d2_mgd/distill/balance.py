"""Balance: a factor per feature that needs no tuning, in place of a weight set by hand; and the ratio of gradients.

Shape shorthand: K features, N images, S student channels, H, W.

The factors are chosen so that the features' losses sum to 24 at the start, each in proportion to the square root of
the teacher's channels, for any losses, number of features and scale of the teacher's maps. So deeper stages weigh more,
and levels of one width alike. 24 and the root were chosen by experiment: docs/weight.md has the figures.

In a backward pass two gradients meet at a student's map: that of its distillation loss, and that of all other losses,
called the task's here. The ratio of their norms is measured with any weights, for logs, figures and warnings.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2_mgd.distill.map_shapes import as_map

__all__ = ["BALANCES", "Balance", "mean_square"]

BALANCES = ("fixed", "auto")

_MEMORY = 0.01  # weight of the newest step in a running mean, once 100 steps are known
_HEAVY, _HEAVY_STEPS = 10.0, 100  # a ratio of gradients, over so many steps, that deserves a warning
_USUAL = 0.3  # ratio that a warning aims at
_EVERY = 4  # gradients are measured on one image in four, to reduce the cost
_UNMEASURED = 1e-3  # a feature's loss in its first two steps
_INITIAL = 24.0  # sum of the initial losses: docs/weight.md
_LEAST = 0.05  # of the loss of a map of zeros: the smallest loss at the start, for a student that copies its teacher
_PIXELS = 2  # the teacher's mean square on every second row and column, equally on any number of ranks


class _Column:
    """Columns of what a step measures, sums over its backward passes: squared norms of gradients, losses, maps."""

    TASK, APPLIED, LOSS, TEACHER, PASSES = range(5)
    NUMBER = 5


class _Row:
    """Rows of what is kept: the loss at the start, and running means."""

    LOSS, TEACHER, LOG_RATIO = range(3)
    NUMBER = 3


class Watch:
    """What the hooks of one map store in one forward and backward pass.

    Without the map: the garbage collector does not see a cycle through hooks of the autograd graph.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient[::_EVERY].clone()  # a reference would keep autograd from adding in place


class Balance(nn.Module):
    """Measures the losses of K features and the gradients at their maps, and keeps their factors.

    The first step measures the teacher's mean square, the second the loss, and the third is balanced. Everything stays
    on the device, without a branch on a value. A step without a loss or with one that is not finite changes no factor,
    and evaluation mode measures nothing. Loss scaling and gradient accumulation multiply both gradients alike, so their
    ratio is kept. ``torch.compile`` of a student and its distiller as one function hides the task's gradient.

    Args:
        active: False measures only, and all factors are 1.
        weights: name of each of the K features -> what its loss is multiplied by after the balance.
        teacher_channels: T of each feature.
    """

    def __init__(self, active: bool, weights: Mapping[str, float], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        self.weights = dict(weights)
        number = len(self.weights)
        self._warned: set[str] = set()
        self.active = active
        self._steps_left = 2 if active else 0  # of those that only measure: a number, so no step waits for the device
        self._measures = False
        stored = active  # measured ratios alone are not worth a change of every checkpoint
        self.register_buffer("running", torch.zeros(_Row.NUMBER, number), persistent=stored)
        self.register_buffer("steps", torch.zeros(number), persistent=stored)
        self.register_buffer("factors", torch.ones(number), persistent=stored)
        shares = torch.tensor(teacher_channels, dtype=torch.float32).sqrt()
        # not divided by their sum: three features keep the bits of the measured trainings
        self.register_buffer("initial_losses", _INITIAL / number * shares / shares.mean(), persistent=False)
        self.register_buffer("measured", torch.zeros(_Column.NUMBER, number), persistent=False)
        self.running: Tensor
        self.steps: Tensor
        self.factors: Tensor
        self.initial_losses: Tensor
        self.measured: Tensor

    def watch(self, index: int, student: Tensor, given: Tensor | None = None) -> Tensor:
        """The map (N, S, H, W) of feature ``index`` to be compared in place of ``student``.

        ``given`` is what the network returned, if ``student`` is a view of it: tokens, or a map (N, H, W, S).
        """
        if not self.active and torch.compiler.is_compiling():
            return student  # a ratio in the log is not worth a broken graph
        return self._watched(index, student, student if given is None else given)

    @torch.compiler.disable
    def _watched(self, index: int, student: Tensor, given: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and student.requires_grad):
            return student
        watch, compared = Watch(), student.view_as(student)
        compared.register_hook(watch.keep)
        shape = functools.partial(as_map, channels=student.shape[1], ratio=student.shape[2] / student.shape[3])
        _on_gradient(given, lambda gradient: self._measure(index, watch, shape(gradient)))
        return compared

    def rescale_teacher(self, index: int, square: Tensor) -> Tensor:
        """What a teacher's map is multiplied by, for a mean square of about 1; () from this batch's ``square``."""
        if self.training and torch.is_grad_enabled():
            self.measured[_Column.TEACHER, index] += square
        known = torch.where(self.steps[index] > 0, self.running[_Row.TEACHER, index], square)
        return known.clamp(min=torch.finfo(known.dtype).tiny).rsqrt()

    def balanced(self, index: int, loss: Tensor, of_zeros: Tensor | None = None) -> Tensor:
        """This step's loss () of feature ``index``, multiplied by its factor.

        The first two steps only measure and have no gradient: their factor would differ between processes. They need
        the loss () of a student's map of zeros too.
        """
        if not self.active:
            return loss
        value = loss.detach()
        if self.training and torch.is_grad_enabled():
            self._measures = True
            self.measured[_Column.LOSS, index] += value if of_zeros is None else torch.maximum(value, _LEAST * of_zeros)
            self.measured[_Column.PASSES, index] += 1.0
        first = _UNMEASURED / value.clamp(min=torch.finfo(value.dtype).tiny)
        return torch.where(self.steps[index] > 1, self.factors[index] * loss, first * value)

    @torch.no_grad()
    def update(self, group: Any = None, reduced: bool = False) -> None:
        """Keep what was measured since the last call, and make the next step's factors.

        Once an optimiser step, after its backward passes. If active, a collective under ``torch.distributed``, unless
        ``measured`` is the mean over the processes already (``reduced``).
        """
        if self.active and not reduced and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.measured, group=group)
            self.measured /= dist.get_world_size(group)
        task, applied, loss, teacher, passes = self.measured.unbind()
        found = torch.stack([loss / passes, teacher / passes, torch.log(applied / task)])
        finite = torch.isfinite(found)
        share = torch.empty_like(found)
        share[_Row.LOSS] = self.steps == 1  # the first step rescales the teacher by its own maps
        share[_Row.TEACHER] = torch.reciprocal(self.steps + 1.0).clamp(min=_MEMORY)
        ratios = self.steps - float(self.active)  # the first of a training is left out; under auto two steps have none
        share[_Row.LOG_RATIO] = torch.reciprocal(ratios.clamp(min=1.0)).clamp(min=_MEMORY) * (ratios > 0)
        self.running.copy_(torch.where(finite, torch.lerp(self.running, found, share), self.running))
        self._steps_left -= bool(self._measures and self._steps_left)
        self._measures = False
        if self.active:
            factors = self.initial_losses / self.running[_Row.LOSS]
            begun = (self.steps == 1) & finite[_Row.LOSS] & torch.isfinite(factors)
            self.factors.copy_(torch.where(begun, factors, self.factors))
        self.steps += finite[_Row.LOSS if self.active else _Row.LOG_RATIO]
        self.measured.zero_()

    @property
    def starting(self) -> bool:
        """Whether this step, one of the first two, needs the losses of zeros."""
        return self._steps_left > 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps_left = max(0, 2 - int(self.steps.min())) if self.active else 0

    @property
    def ratios(self) -> Tensor:
        """(K,) norms of the distillation's gradients at the maps, as they are applied, to those of the task."""
        return torch.exp(0.5 * self.running[_Row.LOG_RATIO])

    def step_ratios(self) -> dict[str, Tensor]:
        """``ratio/<feature>`` of the backward passes since the last update, () on the device; 0 if there were none."""
        ratios = (self.measured[_Column.APPLIED] / self.measured[_Column.TASK]).sqrt()
        return {f"ratio/{name}": ratio for name, ratio in zip(self.weights, ratios.nan_to_num(0.0, 0.0, 0.0))}

    def report(self) -> dict[str, float]:
        """``ratio/<feature>``, once measured, and, if active, ``balance/<feature>``. Waits for the device."""
        ratios = zip(self.weights, self.running[_Row.LOG_RATIO].tolist(), self.ratios.tolist())
        report = {f"ratio/{name}": ratio for name, logarithm, ratio in ratios if logarithm}  # 0 until the first
        if self.active:
            factors = self.factors.tolist()
            report.update({f"balance/{name}": factor for name, factor in zip(self.weights, factors)})
        return report

    def warnings(self) -> list[str]:
        """One sentence, once, for each weight that drowns the task's gradient. Waits for the device."""
        found = []
        scales = [weight * factor for weight, factor in zip(self.weights.values(), self.factors.tolist())]
        for name, scale, ratio, steps in zip(self.weights, scales, self.ratios.tolist(), self.steps.tolist()):
            if ratio > _HEAVY and steps > _HEAVY_STEPS and name not in self._warned:
                self._warned.add(name)
                weight = f"{_USUAL * scale / ratio:.2g} in place of {scale:.2g}"
                instead = (
                    "a schedule that stops earlier"
                    if self.active
                    else f"the fixed weight {weight}, or the balance 'auto'"
                )
                found.append(
                    f"feature {name}: at the student's map, the gradient of the distillation is {ratio:.3g} times that "
                    f"of the task in the last {_HEAVY_STEPS} steps. Try {instead}."
                )
        return found

    @torch.no_grad()
    def _measure(self, index: int, watch: Watch, gradient: Tensor) -> None:
        own, watch.gradient = watch.gradient, None
        if own is None:  # the distillation took no part in this backward pass
            return
        column = self.measured[:, index]
        squares = torch.stack([_square(gradient[::_EVERY] - own), _square(own)])
        column[: _Column.LOSS] += squares.to(column.dtype)


def _on_gradient(maps: Tensor, use: Any) -> None:
    """Call ``use`` with the whole gradient of a map. That of a copy which taps made is its original's."""
    node = maps.grad_fn
    if node is None or node.name() != "CloneBackward0":
        maps.register_hook(use)
        return
    original, number = node.next_functions[0]
    assert original is not None
    original.register_prehook(lambda gradients: use(gradients[number]))


def mean_square(maps: Tensor, valid: Tensor | None) -> Tensor:
    """() over the real measured pixels of (N, C, H, W) maps with a mask (N, 1, H, W) or None."""
    maps = maps[..., ::_PIXELS, ::_PIXELS]
    if valid is None:
        return _square(maps) / maps.numel()
    valid = valid[..., ::_PIXELS, ::_PIXELS]
    return _square(maps.masked_fill(~valid, 0.0)) / (valid.sum() * maps.shape[1]).clamp(min=1)


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)).square()
