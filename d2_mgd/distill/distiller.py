"""The distiller: two dicts of maps in, named losses out; and the matchings between them.

Shape shorthand: N images, S student channels, T teacher channels, G the size of the largest group.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from d2_mgd.distill.checks import check_names, check_weights, checked_mode, checked_ties
from d2_mgd.distill.fused import Comparison, can_fuse, fused_norm, sum_of_squares
from d2_mgd.distill.losses import (
    BLIND_TO_PADDING,
    FEATURE_LOSSES,
    REDUCTIONS,
    FeatureLoss,
    loss_divisor,
    reduce_loss,
)
from d2_mgd.distill.norms import build_norm
from d2_mgd.distill.reducers import REDUCERS, Reducer
from d2_mgd.distill.registry import lookup
from d2_mgd.distill.reports import RematchReport
from d2_mgd.distill.spatial import SPATIAL_WEIGHTS, Boxes, SpatialWeight
from d2_mgd.matching import ChannelCost, ChannelMatching, SolverError, solve_matching
from d2_mgd.matching.channel_matching import PADDING

__all__ = ["ALIGNMENTS", "MatchingGuidedDistiller"]

logger = logging.getLogger(__name__)

ALIGNMENTS = ("matching", "conv1x1", "none")

Masks = Mapping[str, "Tensor | None"]


class MatchingGuidedDistiller(nn.Module):
    """Compares a student's maps with its teacher's, whatever their widths (Yue, Deng, Zhou, ECCV 2020).

    ::

        distiller = MatchingGuidedDistiller({"stage4": (512, 2048)}, loss="mse")
        distiller.observe(student_maps, teacher_maps)  # over some images
        distiller.rematch()                            # solve, and use the matching from now on
        losses = distiller(student_maps, teacher_maps)  # {"loss_distill/stage4": scalar}

    Maps are compared in float32 whatever their dtype, or in float64 after ``distiller.double()``. A teacher map of
    another height and width is resized to the student's, with one warning a feature.

    Args:
        channels: feature name -> (S, T).
        reducer: name in ``REDUCERS``: ``amp``, ``max`` (also ``sp``), ``mean``, ``rd``, ``sm``.
        loss: name in ``FEATURE_LOSSES``, for all features or a dict of feature name -> name: ``partial_l2``, ``mse``,
            ``pearson``, ``channel_kl``.
        metric: of the matching cost, see :class:`~d2_mgd.matching.ChannelCost`.
        mode: see :func:`~d2_mgd.matching.solve_matching`; by default ``balanced``, and for the reducer ``sm``
            ``one_to_one`` where T >= S.
        align: ``matching``; ``conv1x1``, a learned projection of the student to T channels (FitNets, Romero et al.,
            ICLR 2015; Heo et al., ICCV 2019) in place of a matching; ``none`` for equal widths, channel by channel.
        norm: of the student's map before it is compared: ``bn``, ``sync_bn``, ``gn``, ``none``.
        weights: feature name -> factor of its loss; 1 by default.
        margins: feature name -> (T,) lower bounds of the teacher's pre-activations for ``partial_l2``, from
            :func:`~d2_mgd.distill.batch_norm_margin`. Without them the teacher's map is not bounded.
        reduction: ``mean`` over real elements, or ``image_sum`` as published (see ``published_weights``).
        spatial: name in ``SPATIAL_WEIGHTS``, which pixels count how much in the losses: ``all`` alike, ground-truth
            ``boxes`` and their background in balance, the teacher's ``attention``.
        strides: feature name -> pixels of the input in one of the map; ``boxes`` needs it for every feature.
        tie: lists of features of equal widths that share one matching, as the levels of a pyramid under one head do:
            their costs are added and solved once.

    Raises:
        ValueError: unknown names (with the list), names that PyTorch uses itself (``keys``), widths that the alignment
            cannot take, weights that are negative or not finite, margins of another length, ties that do not fit. When
            it is made, before any map is seen.
    """

    def __init__(
        self,
        channels: Mapping[str, tuple[int, int]],
        *,
        reducer: str = "amp",
        loss: str | Mapping[str, str] = "partial_l2",
        metric: str = "cosine",
        mode: str | None = None,
        align: str = "matching",
        norm: str = "bn",
        weights: Mapping[str, float] | None = None,
        margins: Mapping[str, Tensor] | None = None,
        reduction: str = "mean",
        spatial: str = "all",
        strides: Mapping[str, float] | None = None,
        tie: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("a distiller needs at least one feature.")
        if align not in ALIGNMENTS:
            raise ValueError(f"unknown alignment {align!r}; there are: {', '.join(ALIGNMENTS)}.")
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}; there are: {', '.join(REDUCTIONS)}.")
        losses = dict.fromkeys(channels, loss) if isinstance(loss, str) else dict(loss)
        weights = dict(weights or {})
        margins = dict(margins or {})
        strides = dict(strides or {})
        for what, names in (("loss", losses), ("weight", weights), ("margin", margins), ("stride", strides)):
            check_names(what, names, channels)
        check_weights(weights)
        self.channels = {name: (int(student), int(teacher)) for name, (student, teacher) in channels.items()}
        self.align = align
        self.ties = checked_ties(tie, self.channels, align)
        self.features = nn.ModuleDict()
        self.costs: dict[str, ChannelCost] = {}
        for name, (student, teacher) in self.channels.items():
            if name not in losses:
                raise ValueError(f"no loss was given for feature {name}.")
            if spatial == "boxes" and not strides.get(name, 0) > 0:
                raise ValueError(f"feature {name}: the spatial weight 'boxes' needs the stride of its map.")
            if hasattr(self.features, _key(name)):
                raise ValueError(f"a feature cannot have the name {name!r}, which PyTorch uses itself.")
            self.features[_key(name)] = _FeatureDistiller(
                name,
                student,
                teacher,
                align=align,
                reducer=lookup(REDUCERS, "reducer", reducer),
                mode=checked_mode(mode, reducer, name, student, teacher) if align == "matching" else None,
                loss=lookup(FEATURE_LOSSES, "loss", losses[name]),
                norm=norm,
                weight=weights.get(name, 1.0),
                margin=margins.get(name),
                reduction=reduction,
                spatial=lookup(SPATIAL_WEIGHTS, "spatial weight", spatial),
                stride=strides.get(name),
            )
            if align == "matching":
                self.costs[name] = ChannelCost(student, teacher, metric=metric)

    @property
    def matchings(self) -> dict[str, ChannelMatching | None]:
        """The matching in force for each feature; None before the first rematch."""
        return {name: self._feature(name).matching() for name in self.channels}

    @property
    def projections(self) -> dict[str, Tensor]:
        """The learned projection (T, S) of each feature; empty where the alignment is another."""
        learned = {name: self._feature(name).project for name in self.channels}
        return {name: conv.weight.detach()[:, :, 0, 0] for name, conv in learned.items() if conv is not None}

    @property
    def matched(self) -> bool:
        """Whether every feature that needs a matching has one."""
        return self.align != "matching" or all(self._feature(name).has_matching for name in self.costs)

    def forward(
        self,
        student_maps: Mapping[str, Tensor],
        teacher_maps: Mapping[str, Tensor],
        valid: Masks | None = None,
        boxes: Boxes | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            student_maps: feature name -> (N, S, H, W), with gradients.
            teacher_maps: feature name -> (N, T, H', W'); no gradient flows into them.
            valid: feature name -> (N, 1, H, W) boolean mask of real pixels at the student's map, or None.
            boxes: for each image (B, 4) ground-truth boxes x1, y1, x2, y2 in pixels of the input; the spatial weight
                ``boxes`` needs them.

        Returns:
            dict: ``loss_distill/<feature>`` -> scalar, its weight included.

        Raises:
            ValueError: a map is missing, has other channels than announced or is of other images, or there are no
                boxes.
            RuntimeError: no :meth:`rematch` yet.
        """
        return {
            f"loss_distill/{name}": self._compare(name, *self._maps(name, student_maps, teacher_maps, valid), boxes)
            for name in self.channels
        }

    def compare(
        self, name: str, student: Tensor, teacher: Tensor, valid: Tensor | None = None, boxes: Boxes | None = None
    ) -> Tensor:
        """The loss of one feature, a scalar with its weight included: for maps that are compared as they come.

        Arguments, of this feature alone, and errors as in :meth:`forward`.
        """
        return self._compare(name, *self._maps(name, {name: student}, {name: teacher}, {name: valid}), boxes)

    def _compare(
        self, name: str, student: Tensor, teacher: Tensor, valid: Tensor | None, boxes: Boxes | None
    ) -> Tensor:
        if self.align == "matching" and not self._feature(name).has_matching:
            raise RuntimeError(f"feature {name} has no matching yet: observe some images and rematch first.")
        return self._feature(name)(student, teacher, valid, boxes)

    def no_losses(self, device: torch.device) -> dict[str, Tensor]:
        """Zeros on ``device``, for a step in which nothing is compared.

        Every parameter takes part in them, as distributed training wants it.
        """
        zero = torch.zeros((), device=device)
        for parameter in self.parameters():
            zero = zero + 0.0 * parameter.sum()
        return {f"loss_distill/{name}": zero for name in self.channels}

    @torch.no_grad()
    def observe(
        self, student_maps: Mapping[str, Tensor], teacher_maps: Mapping[str, Tensor], valid: Masks | None = None
    ) -> None:
        """Add the images of a batch to the running costs of all features. Arguments as in :meth:`forward`."""
        for name, cost in self.costs.items():
            cost.update(*self._maps(name, student_maps, teacher_maps, valid))

    def rematch(self, group: Any = None) -> dict[str, RematchReport]:
        """Solve every feature's observed cost and use the new matchings; the costs start anew.

        A collective under ``torch.distributed``: costs are summed over the processes of ``group``, the first of them
        solves, all get the same matchings. If solving fails there, all raise the same error and keep the old ones.

        Returns:
            dict: feature name -> :class:`RematchReport`; empty where there is nothing to match.

        Raises:
            ValueError: no image was observed, or a cost is not finite; the message names the feature.
            SolverError: the solver failed.
        """
        if not self.costs:
            return {}
        for cost in self.costs.values():
            cost.all_reduce(group)
        solved = _solve_once(self._solve, group)
        reports = {}
        for name, (groups, total_cost, seconds) in solved.items():
            feature = self._feature(name)
            matching = ChannelMatching(groups, feature.num_teacher, total_cost)
            old = feature.matching()
            cost = self.costs[name]
            reports[name] = RematchReport(
                feature=name,
                matching=matching,
                cost=cost.mean().numpy(),
                changed=1.0 if old is None else matching.changed(old),
                seconds=seconds,
                num_images=cost.num_images,
            )
        for name, report in reports.items():
            self._feature(name).install(report.matching)
            self.costs[name].reset()
        return reports

    def cost_state_dict(self) -> dict[str, Any]:
        """This process's running costs, to resume in the middle of a collection."""
        return {name: cost.state_dict() for name, cost in self.costs.items()}

    def load_cost_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`cost_state_dict`.

        Raises:
            ValueError: the state is of other features or widths.
        """
        if set(state) != set(self.costs):
            raise ValueError(f"the stored costs are of {sorted(state)}, this distiller's of {sorted(self.costs)}.")
        for name, cost in self.costs.items():
            cost.load_state_dict(state[name])

    def _solve(self) -> dict[str, tuple[list[list[int]], float, float]]:
        solved = {}
        for names in self.ties:
            start = time.perf_counter()
            costs = []
            for name in names:
                try:
                    costs.append(self.costs[name].mean())
                except ValueError as error:
                    raise ValueError(f"feature {name}: {error}") from error
            matching = solve_matching(torch.stack(costs).sum(dim=0), self._feature(names[0]).mode or "balanced")
            seconds = time.perf_counter() - start
            for name, cost in zip(names, costs):
                solved[name] = (matching.groups.tolist(), float(cost[matching.pairs].sum()), seconds)
        return {name: solved[name] for name in self.costs}

    def _feature(self, name: str) -> _FeatureDistiller:
        feature = self.features[_key(name)]
        assert isinstance(feature, _FeatureDistiller)
        return feature

    def _maps(
        self, name: str, student_maps: Mapping[str, Tensor], teacher_maps: Mapping[str, Tensor], valid: Masks | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        for who, maps in (("student", student_maps), ("teacher", teacher_maps)):
            if name not in maps:
                raise ValueError(f"the {who} gave no map of feature {name}; it gave: {', '.join(maps) or 'none'}.")
        student, teacher = student_maps[name], teacher_maps[name].detach()
        wanted = self.channels[name]
        same_images = student.shape[:1] == teacher.shape[:1]
        if student.ndim != 4 or teacher.ndim != 4 or (student.shape[1], teacher.shape[1]) != wanted or not same_images:
            raise ValueError(
                f"feature {name}: expected (N, {wanted[0]}, H, W) from the student and (N, {wanted[1]}, H, W) from the "
                f"teacher, got {tuple(student.shape)} and {tuple(teacher.shape)}."
            )
        return student, self._feature(name).resized(teacher, student), None if valid is None else valid.get(name)


class _FeatureDistiller(nn.Module):
    """One feature: its matching (or projection), its norm, its loss."""

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
        weight: float,
        margin: Tensor | None,
        reduction: str,
        spatial: SpatialWeight,
        stride: float | None,
    ) -> None:
        super().__init__()
        if align == "none" and num_student != num_teacher:
            raise ValueError(
                f"feature {name}: alignment 'none' needs equal widths, got {num_student} student and {num_teacher} "
                "teacher channels; 'matching' takes any."
            )
        if margin is not None and tuple(margin.shape) != (num_teacher,):
            raise ValueError(f"feature {name}: margins must be ({num_teacher},), got {tuple(margin.shape)}.")
        self.name = name
        self.num_student = num_student
        self.num_teacher = num_teacher
        self.reducer = reducer if align == "matching" else None
        self.mode = mode
        self.loss = loss
        self.weight = weight
        self.reduction = reduction
        self.spatial = spatial
        self.stride = stride
        self._warned_of_size = False
        self._has_matching = False
        compared = num_teacher if align == "conv1x1" else num_student
        self.project = nn.Conv2d(num_student, num_teacher, 1, bias=False) if align == "conv1x1" else None
        self.norm = build_norm(norm, compared)
        self.register_buffer("margin", None if margin is None else margin.detach().float().clone(), persistent=False)
        self.margin: Tensor | None
        if align == "matching":
            widest = 1 if mode == "one_to_one" else max(1, math.ceil(num_teacher / num_student))
            self.register_buffer("groups", torch.full((num_student, widest), PADDING, dtype=torch.int64))
            self.register_buffer("total_cost", torch.zeros((), dtype=torch.float64))
        self.groups: Tensor
        self.total_cost: Tensor

    @property
    def has_matching(self) -> bool:
        # remembered, so that a step does not wait for a GPU to look
        if not self._has_matching and self.reducer is not None:
            self._has_matching = int(self.groups[0, 0]) != PADDING
        return self._has_matching

    def matching(self) -> ChannelMatching | None:
        if not self.has_matching:
            return None
        return ChannelMatching(self.groups.cpu().numpy(), self.num_teacher, float(self.total_cost))

    def install(self, matching: ChannelMatching) -> None:
        groups = torch.from_numpy(matching.groups.copy())
        self.groups.fill_(PADDING)
        self.groups[:, : groups.shape[1]] = groups.to(self.groups.device)
        self.total_cost.fill_(matching.total_cost)
        self._has_matching = True  # known without a look at the device, which would also break a compiled graph

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
        return F.interpolate(teacher.float(), size=student.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None, boxes: Boxes | None = None) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            student = student.to(self._compared_dtype(student))
            if self.project is not None:
                student = self.project(_without_padding(student, valid))
            with torch.no_grad():
                spatial_weight = self.spatial(teacher, boxes, self.stride, valid)
            if can_fuse(self.loss, self.reducer):
                return self._fused(student, teacher, valid, spatial_weight)
            student = self.norm(student, valid)
            guided, margin = self._guided(teacher)
            guided = guided.to(student.dtype)
            if self.loss not in BLIND_TO_PADDING:
                student, guided = _without_padding(student, valid), _without_padding(guided, valid)
            elements = self.loss(student, guided, margin, valid)
            return self.weight * reduce_loss(elements, valid, self.reduction, spatial_weight)

    def _fused(self, student: Tensor, teacher: Tensor, valid: Tensor | None, spatial_weight: Tensor | None) -> Tensor:
        groups = None if self.reducer is None else self.groups
        comparison = Comparison(teacher, self.reducer, groups, self.margin, self.loss, valid, spatial_weight)
        norm = fused_norm(self.norm, student, valid)
        if norm is None:
            student = self.norm(student, valid)
        total = sum_of_squares(student, comparison, norm)
        return total * (self.weight / loss_divisor(student, valid, self.reduction))

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
        self._has_matching = False
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        groups = state_dict.get(f"{prefix}groups")
        if groups is not None and self.reducer is not None and groups.shape == self.groups.shape:
            error = self._matching_error(groups)
            if error:
                error_msgs.append(f"feature {self.name}: {error}")

    def _matching_error(self, groups: Tensor) -> str:
        """Why stored groups (S, G) are no matching of these channels; empty if they are, or if there is none yet."""
        if int(groups[0, 0]) == PADDING:
            return ""
        try:
            found = ChannelMatching(groups.cpu().numpy(), self.num_teacher)
        except ValueError as error:
            return f"the stored matching is not one of these channels: {error}"
        guides = len(found.pairs[1])
        if self.mode == "balanced" and self.num_teacher >= self.num_student and guides != self.num_teacher:
            return f"the stored matching is of {guides} teacher channels, this one's teacher has {self.num_teacher}."
        return ""

    def extra_repr(self) -> str:
        return f"S={self.num_student}, T={self.num_teacher}, mode={self.mode}, weight={self.weight:g}"


_ERRORS_OF_A_SOLVE = {error.__name__: error for error in (ValueError, SolverError)}


def _solve_once(solve: Any, group: Any) -> Any:
    """Run ``solve`` in the first process of ``group`` and give its result, or its error, to all."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return solve()
    payload: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            payload = [("solved", solve())]
        except Exception as error:  # whatever it is: the other processes wait for an answer
            payload = [(type(error).__name__, str(error))]
    source = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(payload, src=source, group=group)
    status, content = payload[0]
    if status != "solved":
        raise _ERRORS_OF_A_SOLVE.get(status, RuntimeError)(content)
    return content


def _without_padding(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Zero where pixels are not real: multiplied by zero, what the padding holds could still be NaN."""
    return maps if valid is None else maps.masked_fill(~valid, 0.0)


def _key(name: str) -> str:
    """A feature's name as a module's name, which may hold no dot."""
    return name.replace(".", "/")
