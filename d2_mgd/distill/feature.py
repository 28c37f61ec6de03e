"""One feature of a distiller: its matching or projection, its norm, its loss.

Shape shorthand: N images, S student channels, T teacher channels, G the size of the largest group.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2_mgd.distill.losses import MASKED_LOSSES, FeatureLoss, reduce_loss
from d2_mgd.distill.map_shapes import resized
from d2_mgd.distill.norms import build_norm
from d2_mgd.distill.reducers import Reducer
from d2_mgd.distill.spatial import Boxes, SpatialWeight
from d2_mgd.errors import UserError
from d2_mgd.matching import ChannelMatching, matched_weight
from d2_mgd.matching.channel_matching import PADDING

__all__ = ["ALIGNMENTS", "MATCHED_ALIGNMENTS", "FeatureDistiller"]

logger = logging.getLogger(__name__)

ALIGNMENTS = ("matching", "matched_projection", "conv1x1", "none")
MATCHED_ALIGNMENTS = ("matching", "matched_projection")
"""Alignments that need a matching."""


class FeatureDistiller(nn.Module):
    """Compares one feature's maps: aligns the channels, normalises the student's map, and takes the loss.

    Arguments as in :class:`~d2_mgd.distill.MatchingGuidedDistiller`, for one feature. A student's map is compared at S
    channels after ``matching`` and ``none``, at T channels after a projection; the norm follows the projection, so that
    only the directions of its rows matter, not their lengths.

    The projection of ``matched_projection`` is zero until the first matching is installed, which sets its weight;
    later matchings are recorded and leave it as it was trained.
    """

    def __init__(
        self,
        name: str,
        num_student: int,
        num_teacher: int,
        *,
        align: str,
        reducer: Reducer,
        mode: str | None,
        loss: FeatureLoss,
        norm: str,
        margin: Tensor | None,
        reduction: str,
        spatial: SpatialWeight,
        stride: float | None,
    ) -> None:
        super().__init__()
        if align == "none" and num_student != num_teacher:
            raise UserError(
                f"feature {name}: alignment 'none' needs equal widths, got {num_student} student and {num_teacher} "
                "teacher channels; 'matching' takes any."
            )
        if margin is not None and tuple(margin.shape) != (num_teacher,):
            raise UserError(f"feature {name}: margins must be ({num_teacher},), got {tuple(margin.shape)}.")
        self.name = name
        self.num_student = num_student
        self.num_teacher = num_teacher
        self.reducer = reducer if align == "matching" else None
        self.matches = align in MATCHED_ALIGNMENTS
        self.mode = mode
        self.loss = loss
        self.reduction = reduction
        self.spatial = spatial
        self.stride = stride
        self._warned_of_size = False
        self._has_matching = 0  # a number, so that undoing a step undoes it with the buffers
        projects = align in ("conv1x1", "matched_projection")
        self.project = nn.Conv2d(num_student, num_teacher, 1, bias=False) if projects else None
        if self.project is not None and self.matches:
            nn.init.zeros_(self.project.weight)
        self.norm = build_norm(norm, num_teacher if projects else num_student)
        self.register_buffer("margin", None if margin is None else margin.detach().float().clone(), persistent=False)
        self.margin: Tensor | None
        if self.matches:
            widest = 1 if mode == "one_to_one" else max(1, math.ceil(num_teacher / num_student))
            self.register_buffer("groups", torch.full((num_student, widest), PADDING, dtype=torch.int64))
            self.register_buffer("total_cost", torch.zeros((), dtype=torch.float64))
        self.groups: Tensor
        self.total_cost: Tensor

    @property
    def has_matching(self) -> bool:
        # remembered, so that a step does not wait for a GPU to look
        if not self._has_matching and self.matches:
            self._has_matching = int(self.groups[0, 0] != PADDING)
        return bool(self._has_matching)

    def matching(self) -> ChannelMatching | None:
        if not self.has_matching:
            return None
        return ChannelMatching(self.groups.cpu().numpy(), self.num_teacher, float(self.total_cost))

    @torch.no_grad()
    def install(self, matching: ChannelMatching) -> None:
        """Use a matching from now on; the first one is the start of a matched projection."""
        if self.project is not None and not self.has_matching:
            self.project.weight.copy_(matched_weight(matching)[:, :, None, None])
        groups = torch.from_numpy(matching.groups.copy())
        self.groups.fill_(PADDING)
        self.groups[:, : groups.shape[1]] = groups.to(self.groups.device)
        self.total_cost.fill_(matching.total_cost)
        self._has_matching = 1  # known without a look at the device, which would also break a compiled graph

    def resized(self, teacher: Tensor, student: Tensor) -> Tensor:
        if teacher.shape[2:] == student.shape[2:]:
            return teacher
        if not self._warned_of_size:
            self._warned_of_size = True
            logger.warning(
                "feature %s: the teacher's map of %s is resized to the student's %s.",
                self.name,
                tuple(teacher.shape[2:]),
                tuple(student.shape[2:]),
            )
        return resized(teacher, student.shape[2], student.shape[3])

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        boxes: Boxes | None = None,
        rescale: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar without its weight; the guided map and its margins are multiplied by ``rescale`` ()."""
        with torch.autocast(student.device.type, enabled=False):
            student = student.to(self._compared_dtype(student))
            with torch.no_grad():
                spatial_weight = self.spatial(teacher, boxes, self.stride, valid)

            def loss(student: Tensor) -> Tensor:
                return self._loss(student, teacher, valid, spatial_weight, rescale)

            if not (torch.is_grad_enabled() and student.requires_grad) or torch.compiler.is_compiling():
                return loss(student)
            return _DifferentiatedLoss.apply(student, loss, *_parameters(self))

    def _loss(
        self,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        spatial_weight: Tensor | None,
        rescale: Tensor | None,
    ) -> Tensor:
        if self.project is not None:
            student = self.project(_without_padding(student, valid))
        guided, margin = self._guided(teacher)  # before the norm's map is there: it takes memory for a moment
        return self._distance(self.norm(student, valid), guided, margin, valid, spatial_weight, rescale)

    def _distance(
        self,
        student: Tensor,
        guided: Tensor,
        margin: Tensor | None,
        valid: Tensor | None,
        spatial_weight: Tensor | None,
        rescale: Tensor | None,
    ) -> Tensor:
        guided = guided.to(student.dtype)
        if rescale is not None:
            guided, margin = guided * rescale, None if margin is None else margin * rescale
        if self.loss not in MASKED_LOSSES:
            student, guided = _without_padding(student, valid), _without_padding(guided, valid)
        elements = self.loss(student, guided, margin, valid)
        return reduce_loss(elements, valid, self.reduction, spatial_weight)

    @torch.no_grad()
    def loss_of_zeros(self, teacher: Tensor, valid: Tensor | None, rescale: Tensor | None) -> Tensor:
        """The loss () of a student's map that is zero when it is compared, with all pixels alike."""
        with torch.autocast(teacher.device.type, enabled=False):
            guided, margin = self._guided(teacher)
            zeros = torch.zeros_like(guided, dtype=self._compared_dtype(guided))
            return self._distance(zeros, guided, margin, valid, None, rescale)

    @torch.no_grad()
    def _guided(self, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.reducer is None:
            return teacher, self.margin
        return self.reducer(teacher, self.groups, self.margin, None)

    def _compared_dtype(self, student: Tensor) -> torch.dtype:
        """That of the parameters; without any, float32, or float64 where the maps are."""
        parameter = next(self.parameters(), student)
        return torch.promote_types(parameter.dtype, torch.float32)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        self._has_matching = 0  # a number, so that undoing a step undoes it with the buffers
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        groups = state_dict.get(f"{prefix}groups")
        if groups is not None and self.matches and groups.shape == self.groups.shape:
            error = self._matching_error(groups)
            if error:
                error_msgs.append(f"feature {self.name}: {error}")

    def _matching_error(self, groups: Tensor) -> str:
        """Why stored groups (S, G) are no matching of these channels; empty if they are, or if there is none yet."""
        if int(groups[0, 0]) == PADDING:
            return ""
        try:
            found = ChannelMatching(groups.cpu().numpy(), self.num_teacher)
        except UserError as error:
            return f"the stored matching is not one of these channels: {error}"
        guides = len(found.pairs[1])
        if self.mode == "balanced" and self.num_teacher >= self.num_student and guides != self.num_teacher:
            return f"the stored matching is of {guides} teacher channels, this one's teacher has {self.num_teacher}."
        return ""

    def extra_repr(self) -> str:
        return f"S={self.num_student}, T={self.num_teacher}, mode={self.mode}"


def _without_padding(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Set padded pixels to zero. Multiplying by zero would keep NaN."""
    return maps if valid is None else maps.masked_fill(~valid, 0.0)


class _DifferentiatedLoss(torch.autograd.Function):
    """A loss whose gradients are computed in the forward pass and kept in place of what its backward pass needs.

    One map is kept for any norm and loss. The student's map before its activation is not kept for the backward pass: an
    in-place activation of the student overwrites it anyway.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, loss: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            value = loss(leaf)
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            gradients = iter(torch.autograd.grad(value, [leaf, *trained], allow_unused=True))
        found = [next(gradients), *(next(gradients) if one.requires_grad else None for one in parameters)]
        ctx.save_for_backward(*found)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_student, *of_parameters = [None if saved is None else saved * gradient for saved in ctx.saved_tensors]
        return of_student, None, *of_parameters


def _parameters(module: nn.Module) -> list[Tensor]:
    """A module's parameters, and those of a copy that DataParallel made, which does not register them."""
    found = []
    for one in module.modules():
        found += [*one._parameters.values(), *getattr(one, "_former_parameters", {}).values()]
    return [parameter for parameter in found if parameter is not None]
