"""The ten-line front end: finds the features of two networks, matches them during training, and returns one loss."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_mgd.distill.checks import check_state
from d2_mgd.distill.distiller import MatchingGuidedDistiller
from d2_mgd.distill.margins import tap_margins
from d2_mgd.distill.rematching import rematch
from d2_mgd.distill.reports import RematchReport
from d2_mgd.distill.schedule import RematchSchedule
from d2_mgd.distill.stages import (
    cannot_run,
    common_stages,
    describe,
    example_image,
    fitting_loss,
    fitting_metric,
    measure_maps,
)
from d2_mgd.distill.taps import FeatureTaps, Tap
from d2_mgd.distill.teacher_forward import TeacherForward
from d2_mgd.errors import UserError
from d2_mgd.training.processes import sum_over_ranks, together

logger = logging.getLogger(__name__)

Pairs = Mapping[str, tuple["str | Tap", "str | Tap"]]


class Distillation(nn.Module):
    """Distils a teacher into a student in any training loop.

    ::

        distillation = Distillation(student, teacher)
        optimizer = SGD([*student.parameters(), *distillation.parameters()], lr=0.1)
        for images, labels in loader:
            loss = F.cross_entropy(student(images), labels) + distillation(images)
            ...

    A call runs the teacher as far as the deepest feature and compares its maps with those of the student's last forward
    pass. In training mode it also counts a step, observes the maps and rematches by the schedule. After
    ``distillation.eval()``, or without gradients, it only returns the loss. Pass ``distillation`` the images as the
    teacher needs them, if its normalisation is not the student's.

    Set ``factor`` before a call to what all losses are multiplied by, such as that of a
    :class:`~d2_mgd.distill.WeightSchedule`; with 0 the teacher does not run and no step is counted.

    ``losses`` has the losses of the newest call, and ``reports`` a report per feature of the newest rematch. Both are
    empty before, also after ``load_state_dict()``, which restores the matchings.

    ``parameters()`` and ``state_dict()`` contain neither of the networks. With DDP, wrap the student before or after,
    and do not wrap the distillation: it averages its own gradients over ranks. ``remove()``, or the end of a ``with``
    block, removes the hooks from both networks; the distillation cannot be called afterwards.

    Args:
        student: on its device.
        teacher: on the same device; it is set to evaluation mode and gets no gradients.
        features: name -> (tap of the student, tap of the teacher), each a module's path or a :class:`Tap`. By default
            the deepest map of each stride that both networks have, of at most four strides.
        loss: name in ``FEATURE_LOSSES``. ``auto`` is ``partial_l2`` if all maps of the teacher are taken between a
            batch-norm and its activation, else ``pearson``.
        weight: factor of the losses, after the balance.
        balance: as in :class:`MatchingGuidedDistiller`.
        schedule: in calls; by default a rematch at the start, after 16 steps, and whenever their number has doubled.
        observed: number of steps before each rematch whose maps count.
        precision: of the teacher's forward, in ``TEACHER_PRECISIONS``; ``auto`` is bfloat16 where the device has
            instructions for it. All but ``student`` set the teacher to channels_last.
        images: (N, C, H, W), from which sizes and strides are measured; by default one empty image for each network, of
            the size that timm or torchvision made it for, else of 224 px.
        options: of :class:`MatchingGuidedDistiller`, such as ``reducer`` and ``align``.

    Raises:
        UserError: the networks have no common stride, a network cannot run on the images, or a feature does not exist.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        features: Pairs | None = None,
        *,
        loss: str = "auto",
        weight: float = 1.0,
        balance: str = "auto",
        schedule: RematchSchedule | None = None,
        observed: int = 100,
        precision: str = "student",
        images: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        student, teacher = _unwrapped(student), _unwrapped(teacher)
        if not (schedule is None or isinstance(schedule, RematchSchedule)):
            raise UserError(f"schedule says when to rematch: a RematchSchedule, not a {type(schedule).__name__}.")
        if student is teacher:
            raise UserError("student and teacher are the same network: give a copy of it as the teacher.")
        images_of = [example_image(network) if images is None else images for network in (student, teacher)]
        if features is None:
            features = common_stages(("the student", "the teacher"), (student, teacher), images_of)
        student_taps = {name: _tap(of_student) for name, (of_student, _) in features.items()}
        teacher_taps = {name: _tap(of_teacher) for name, (_, of_teacher) in features.items()}
        student_maps = measure_maps("the student", student, student_taps, images_of[0])
        teacher_maps = measure_maps("the teacher", teacher, teacher_taps, images_of[1])
        channels = {name: shape[0] for name, shape in teacher_maps.items()}
        self.loss = fitting_loss(teacher, teacher_taps, channels=channels) if loss == "auto" else loss
        settings: dict[str, Any] = {"weights": dict.fromkeys(features, weight), "metric": fitting_metric(self.loss)}
        if self.loss == "pearson":
            settings["norm"] = "none"  # the loss is independent of the scale and the offset of a channel
        if self.loss == "partial_l2":
            settings["margins"] = tap_margins(teacher, teacher_taps, channels=channels)
        widths = {name: (student_maps[name][0], channels[name]) for name in features}
        self.distiller = MatchingGuidedDistiller(widths, loss=self.loss, balance=balance, **(settings | options))
        self.distiller.to(next(student.parameters()).device)
        for parameter in self.distiller.parameters():
            parameter.data = _mean_over_ranks(parameter.data)  # a projection starts at random
            parameter.register_post_accumulate_grad_hook(_average_gradient)
        self.schedule = schedule or RematchSchedule(at=[2**power for power in range(4, 32)])
        self.observed = observed
        self.factor = 1.0
        self.steps = 0
        self.losses: dict[str, Tensor] = {}
        self.reports: dict[str, RematchReport] = {}
        self._student = FeatureTaps(student, student_taps)
        self._forward = TeacherForward(precision)
        self._forward.autocast(next(teacher.parameters()).device)  # an error before the training
        self._teacher = FeatureTaps(self._forward.prepare(teacher), teacher_taps)
        weakref.finalize(self, _remove, self._student, self._teacher).atexit = False
        for name in features:
            logger.info(
                "feature %s: student %s %s, teacher %s %s, loss %s",
                name, describe(student_taps[name]), student_maps[name], describe(teacher_taps[name]),
                teacher_maps[name], self.loss,
            )  # fmt: skip

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The weighted sum of the features' losses, a scalar; ``losses`` has each of them.

        Args:
            *inputs: of the teacher, for the batch of the student's last forward pass.
            **named: the same, by name.

        Raises:
            UserError: the student has not run since the last call, or ran without gradients; the teacher cannot run on
                the images; the first matching cannot be found; or the hooks are removed.
        """
        student_maps = self._student_maps()
        if self.factor:
            teacher_maps = self._teacher_maps(*inputs, **named)
            if self._trains():
                self._step(student_maps, teacher_maps)
            elif not self.distiller.matched:
                raise UserError("there is no matching yet: the first call in training mode makes one.")
            losses = self.distiller(student_maps, teacher_maps, factor=self.factor)
        else:
            losses = self.distiller.no_losses(next(iter(student_maps.values())).device)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack([*losses.values()]).sum()

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _student_maps(self) -> dict[str, Tensor]:
        if self._student.removed:
            raise UserError(
                "the hooks of this distillation are removed, by remove() or the end of its with block: make a new one, "
                "and load this one's state_dict() into it."
            )
        if not self._student.hold_maps:
            raise UserError(
                "the student has not run since the last call of the distillation: call student(images) before "
                "distillation(images)."
            )
        maps = self._student.collect()
        if self._trains() and not any(found.requires_grad for found in maps.values()):
            raise UserError(
                "the student's last forward pass was without gradients, so it cannot be trained: run it outside "
                "torch.no_grad(), or call distillation.eval() to measure the loss only."
            )
        return maps

    def _teacher_maps(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        try:
            device = next(self._teacher.model.parameters()).device
            return self._forward.run(device, self._teacher.run, *inputs, **named)
        except AssertionError as error:  # vision transformers of timm and torchvision check the image size so
            images = inputs[0] if inputs else None
            raise UserError(cannot_run("the teacher", self._teacher.model, images, error)) from error

    def _step(self, student_maps: dict[str, Tensor], teacher_maps: dict[str, Tensor]) -> None:
        """Count a step: balance with the losses of the one before, observe, and rematch if it is due."""
        if self.steps:
            self.distiller.update_balance()
        if any(self.schedule.due(self.steps + later) for later in range(self.observed)) or not self.distiller.matched:
            self.distiller.observe(student_maps, teacher_maps)
        if self.distiller.needs_matching and (self.schedule.due(self.steps) or not self.distiller.matched):
            self.reports = rematch(self.distiller, f"{self.steps} steps") or self.reports
        self.steps += 1

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As that of :class:`~d2_mgd.distill.MatchingGuidedDistiller`."""
        if strict:
            stored = [key.removeprefix("distiller.") for key in state_dict if key.startswith("distiller.")]
            check_state(stored, self.distiller.state_dict())
        return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> dict[str, Any]:
        """What resuming needs besides parameters and buffers: the steps, this rank's costs, and losses not used yet."""
        measured = self.distiller.balance.measured.clone()
        return {"steps": self.steps, "costs": self.distiller.cost_state_dict(), "measured": measured}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_extra_state` of rank 0. Only rank 0 takes its costs, which count once."""
        self.steps = state["steps"]
        if together() and dist.get_rank() != 0:
            return
        self.distiller.load_cost_state_dict(state["costs"])
        self.distiller.balance.measured.copy_(state["measured"])

    def remove(self) -> None:
        """Remove the hooks from both networks."""
        self._student.remove()
        self._teacher.remove()

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        lines = [
            f"  {name}: {describe(self._student.taps[name])} (S={widths[0]}) <- {describe(tap)} (T={widths[1]})"
            for (name, tap), widths in zip(self._teacher.taps.items(), self.distiller.channels.values())
        ]
        return "\n".join(["Distillation(", *lines, f"  loss={self.loss}", ")"])


def _tap(given: str | Tap) -> Tap:
    return given if isinstance(given, Tap) else Tap(given)


def _unwrapped(network: nn.Module) -> nn.Module:
    """The network in DDP or torch.compile."""
    if isinstance(network, nn.DataParallel):
        raise UserError("nn.DataParallel runs copies of the network: use DistributedDataParallel instead.")
    if isinstance(network, DistributedDataParallel):
        network = network.module
    compiled: nn.Module = getattr(network, "_orig_mod", network)
    return compiled


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.copy_(_mean_over_ranks(parameter.grad))


def _remove(*taps: FeatureTaps) -> None:
    for one in taps:
        one.remove()


@torch.no_grad()
def _mean_over_ranks(values: Tensor) -> Tensor:
    return sum_over_ranks(values.clone()) / dist.get_world_size() if together() else values
