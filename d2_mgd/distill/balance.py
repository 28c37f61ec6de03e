"""Balance: a factor per feature that follows from the gradients at the student's map, instead of a weight set by hand.

Shape shorthand: K features, N images, S student channels, H, W.

In a backward pass two gradients meet at a student's map: that of its distillation loss, and that of all other losses,
called the task's here. A rule of ``BALANCES`` turns running statistics of both into the factor of the next step, so
that nothing is computed twice and no step is repeated. A new rule is a function with ``@BALANCES.register()``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fvcore.common.registry import Registry
from torch import Tensor, nn

from d2_mgd.distill.map_shapes import as_map
from d2_mgd.distill.registry import names

__all__ = ["AUTO", "BALANCES", "BALANCE_CHOICES", "Balance", "Statistics", "mean_square"]

BALANCES = Registry("BALANCES")
AUTO = "norm"
"""The rule that ``balance="auto"`` stands for."""

_MEMORY = 0.01  # weight of the newest step in a running mean, once 100 steps are known
_FIRST = 50  # steps whose mean loss is the loss at the start
_HEAVY, _HEAVY_STEPS = 10.0, 100  # a ratio of gradients, over so many steps, that deserves a warning
_EVERY = 4  # gradients are measured on one image in four, to reduce the cost
_UNMEASURED = 1e-3  # what a feature's loss is scaled to in its first two steps, which only measure


class Statistics(NamedTuple):
    """Running means over steps, (K,) each.

    Args:
        log_ratio: log of the squared norms' quotient, task to distillation.
        task_signal, own_signal: of the task and the distillation, how much of the squared gradient is common to both
            halves of a batch: the scalar product of their channel sums over the squared norm. Noise gives 0.
        loss: distillation loss.
        first_loss: its mean over the first steps.
    """

    log_ratio: Tensor
    task_signal: Tensor
    own_signal: Tensor
    loss: Tensor
    first_loss: Tensor


@BALANCES.register()
def norm(statistics: Statistics) -> Tensor:
    """The distillation's gradient has 0.3 of the norm of the task's (as in GAM, RT-DETRv4; GradNorm, ICML 2018)."""
    return 0.3 * torch.exp(0.5 * statistics.log_ratio)


@BALANCES.register()
def signal(statistics: Statistics) -> Tensor:
    """The same of the parts of both gradients that are not noise; at most 4 times ``norm``."""
    return _with_signal(statistics, 1e-4, 16.0)


@BALANCES.register()
def blend(statistics: Statistics) -> Tensor:
    """As ``norm``, and down to a tenth of it where the task's gradient is noisier than the distillation's."""
    return _with_signal(statistics, 0.01, 1.0)


@BALANCES.register()
def loss(statistics: Statistics) -> Tensor:
    """The distillation loss starts at 1; its factor is constant after the first steps."""
    return statistics.first_loss.reciprocal()


@BALANCES.register()
def relative(statistics: Statistics) -> Tensor:
    """The distillation loss is always about 1: its relative decrease counts."""
    return statistics.loss.reciprocal()


def _with_signal(statistics: Statistics, low: float, high: float) -> Tensor:
    share = statistics.task_signal.clamp(min=0.0) / statistics.own_signal.clamp(min=1e-6)
    return norm(statistics) * share.clamp(low, high).sqrt()


BALANCE_CHOICES = ("fixed", "auto", *names(BALANCES))


class _Column:
    """Columns of what a step measures, sums over its backward passes."""

    TASK, OWN, APPLIED, TASK_SIGNAL, OWN_SIGNAL, LOSS, TEACHER, PASSES = range(8)
    NUMBER = 8


class _Row:
    """Rows of the running means."""

    LOG_RATIO, TASK_SIGNAL, OWN_SIGNAL, LOSS, TEACHER, APPLIED, FIRST_LOSS = range(7)
    NUMBER = 7


class Watch:
    """What the hooks of one map store in one forward and backward pass.

    Without the map: the garbage collector does not see a cycle through hooks of the autograd graph.
    """

    def __init__(self) -> None:
        self.scale: Tensor | float = 1.0
        self.gradient: Tensor | None = None

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient[::_EVERY].clone()  # a reference would keep autograd from adding in place


class Balance(nn.Module):
    """Measures the gradients at the maps of K features and keeps their factors.

    The first step measures the teacher's mean square, the second the gradients, and the third is balanced.
    Everything stays on the device, without a branch on a value. A step in which a gradient is zero or not finite
    changes nothing, and evaluation mode measures nothing. Loss scaling and gradient accumulation multiply both
    gradients alike, so only their quotients are kept. ``torch.compile`` of a student and its distiller as one function
    hides the task's gradient; compile the student alone.

    Args:
        rule: name in ``BALANCES``; None measures only, and all factors are 1.
        weights: name of each of the K features -> what its loss is multiplied by after the balance.
    """

    def __init__(self, rule: str | None, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        number = len(self.weights)
        self._warned: set[str] = set()
        self.rule = None if rule is None else BALANCES.get(AUTO if rule == "auto" else rule)
        stored = rule is not None  # measured ratios alone are not worth a change of every checkpoint
        self.register_buffer("running", torch.zeros(_Row.NUMBER, number), persistent=stored)
        self.register_buffer("steps", torch.zeros(number), persistent=stored)
        self.register_buffer("factors", torch.ones(number), persistent=stored)
        self.register_buffer("measured", torch.zeros(_Column.NUMBER, number), persistent=False)
        self.running: Tensor
        self.steps: Tensor
        self.factors: Tensor
        self.measured: Tensor

    def watch(self, index: int, student: Tensor, given: Tensor | None = None) -> tuple[Tensor, Watch]:
        """The map (N, S, H, W) of feature ``index`` to be compared in place of ``student``, and what measures it.

        Set the ``scale`` of the latter to what the loss is multiplied by, before the backward pass. ``given`` is what
        the network returned, if ``student`` is a view of it: tokens, or a map (N, H, W, S).
        """
        if self.rule is None and torch.compiler.is_compiling():
            return student, Watch()  # a ratio in the log is not worth a broken graph
        return self._watched(index, student, student if given is None else given)

    @torch.compiler.disable
    def _watched(self, index: int, student: Tensor, given: Tensor) -> tuple[Tensor, Watch]:
        if not (torch.is_grad_enabled() and student.requires_grad):
            return student, Watch()
        watch, compared = Watch(), student.view_as(student)
        compared.register_hook(watch.keep)
        shape = functools.partial(as_map, channels=student.shape[1], ratio=student.shape[2] / student.shape[3])
        _on_gradient(given, lambda gradient: self._measure(index, watch, shape(gradient)))
        return compared, watch

    def rescale_teacher(self, index: int, square: Tensor) -> Tensor:
        """What a teacher's map is multiplied by, for a mean square of about 1; () from this batch's ``square``."""
        if self.training:
            self.measured[_Column.TEACHER, index] += square
        known = torch.where(self.steps[index] > 0, self.running[_Row.TEACHER, index], square)
        return known.clamp(min=torch.finfo(known.dtype).tiny).rsqrt()

    def factor(self, index: int, loss: Tensor) -> Tensor | float:
        """What this step's loss () of feature ``index`` is to be multiplied by."""
        if self.rule is None:
            return 1.0
        value = loss.detach()
        if self.training:
            self.measured[_Column.LOSS, index] += value
            self.measured[_Column.PASSES, index] += 1.0
        first = _UNMEASURED / value.clamp(min=torch.finfo(value.dtype).tiny)
        return torch.where(self.steps[index] > 1, self.factors[index], first)

    @torch.no_grad()
    def update(self, group: Any = None, reduced: bool = False) -> None:
        """Take what was measured since the last call into the running means, and make the next step's factors.

        Once an optimiser step, after its backward passes. With a rule, a collective under ``torch.distributed``, unless
        ``measured`` is the mean over the processes already (``reduced``).
        """
        if self.rule is not None and not reduced and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.measured, group=group)
            self.measured /= dist.get_world_size(group)
        task, own, applied, task_signal, own_signal, loss, teacher, passes = self.measured.unbind()
        passes = passes.clamp(min=1.0)
        found = torch.stack(
            [
                torch.log(task / own),
                task_signal / task,
                own_signal / own,
                loss / passes,
                teacher / passes,
                torch.log(applied / task),
                loss / passes,
            ]
        )
        valid = torch.isfinite(found).all(dim=0)
        share = torch.reciprocal(self.steps.clamp(min=1.0)).clamp(min=_MEMORY) * (self.steps > 0)
        share = share.repeat(_Row.NUMBER, 1)
        share[_Row.FIRST_LOSS] *= self.steps <= _FIRST
        share[_Row.TEACHER] = torch.reciprocal(self.steps + 1.0).clamp(min=_MEMORY)
        self.running.copy_(torch.where(valid, torch.lerp(self.running, found, share), self.running))
        self.steps += valid
        self.measured.zero_()
        if self.rule is not None:
            rows = self.running
            known = Statistics(
                rows[_Row.LOG_RATIO], rows[_Row.TASK_SIGNAL], rows[_Row.OWN_SIGNAL], rows[_Row.LOSS],
                rows[_Row.FIRST_LOSS],
            )  # fmt: skip
            factors = self.rule(known)
            self.factors.copy_(torch.where(valid & torch.isfinite(factors), factors, self.factors))

    @property
    def ratios(self) -> Tensor:
        """(K,) norms of the distillation's gradients at the maps, as they are applied, to those of the task."""
        return torch.exp(0.5 * self.running[_Row.APPLIED])

    def step_ratios(self) -> dict[str, Tensor]:
        """``ratio/<feature>`` of the backward passes since the last update, () on the device; 0 if there were none."""
        ratios = (self.measured[_Column.APPLIED] / self.measured[_Column.TASK]).sqrt()
        return {f"ratio/{name}": ratio for name, ratio in zip(self.weights, ratios.nan_to_num(0.0, 0.0, 0.0))}

    def report(self) -> dict[str, float]:
        """``ratio/<feature>`` and, with a rule, the factors ``balance/<feature>``. Waits for the device."""
        report = {f"ratio/{name}": ratio for name, ratio in zip(self.weights, self.ratios.tolist())}
        if self.rule is not None:
            factors = self.factors.tolist()
            report.update({f"balance/{name}": factor for name, factor in zip(self.weights, factors)})
        return report

    def warnings(self) -> list[str]:
        """One sentence, once, for each fixed weight that drowns the task's gradient. Waits for the device."""
        if self.rule is not None:
            return []
        found = []
        for (name, weight), ratio, steps in zip(self.weights.items(), self.ratios.tolist(), self.steps.tolist()):
            if ratio > _HEAVY and steps > _HEAVY_STEPS and name not in self._warned:
                self._warned.add(name)
                found.append(
                    f"feature {name}: at the student's map, the gradient of the distillation is {ratio:.3g} times that "
                    f"of the task in the last {_HEAVY_STEPS} steps. Try the weight {0.3 * weight / ratio:.2g} in place "
                    f"of {weight:.2g}, or the balance 'auto'."
                )
        return found

    @torch.no_grad()
    def _measure(self, index: int, watch: Watch, gradient: Tensor) -> None:
        own, watch.gradient = watch.gradient, None
        if own is None:  # the distillation took no part in this backward pass
            return
        task = gradient[::_EVERY] - own
        unscaled = self.measured.new_ones(()) / (watch.scale * watch.scale)
        task_square, applied = _square(task), _square(own)
        task_signal, own_signal = _common_square(task), _common_square(own)
        column = self.measured[:, index]
        column[: _Column.LOSS] += torch.stack(
            [task_square, applied * unscaled, applied, task_signal, own_signal * unscaled]
        ).to(column.dtype)


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
    """() over the real elements of the measured images of (N, C, H, W) maps with a mask (N, 1, H, W) or None."""
    maps = maps[::_EVERY]
    if valid is None:
        return _square(maps) / maps.numel()
    valid = valid[::_EVERY]
    return _square(maps.masked_fill(~valid, 0.0)) / (valid.sum() * maps.shape[1]).clamp(min=1)


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)).square()


def _common_square(gradient: Tensor) -> Tensor:
    """What the two halves of a batch have in common: the scalar product of their channel sums."""
    sums = gradient.sum(dim=(2, 3), dtype=torch.promote_types(gradient.dtype, torch.float32))  # (N, S)
    half = sums.shape[0] // 2
    return (sums[:half].sum(dim=0) * sums[half : 2 * half].sum(dim=0)).sum()
