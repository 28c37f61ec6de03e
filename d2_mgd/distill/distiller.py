"""The distiller: two dicts of maps in, named losses out; and the matchings between them.

Shape shorthand: N images, S student channels, T teacher channels, G the size of the largest group.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2_mgd.distill.balance import BALANCES, Balance, mean_square
from d2_mgd.distill.checks import check_names, check_state, check_weights, checked_mode, checked_ties
from d2_mgd.distill.feature import ALIGNMENTS, MATCHED_ALIGNMENTS, FeatureDistiller
from d2_mgd.distill.losses import FEATURE_LOSSES, REDUCTIONS
from d2_mgd.distill.map_shapes import as_maps
from d2_mgd.distill.reducers import REDUCERS
from d2_mgd.distill.registry import lookup
from d2_mgd.distill.reports import RematchReport
from d2_mgd.distill.spatial import SPATIAL_WEIGHTS, Boxes
from d2_mgd.errors import UserError
from d2_mgd.matching import ChannelCost, ChannelMatching, SolverError, projection_agreement, solve_matching

__all__ = ["MatchingGuidedDistiller"]

Masks = Mapping[str, "Tensor | None"]


class MatchingGuidedDistiller(nn.Module):
    """Compares a student's maps with its teacher's, whatever their widths (Yue, Deng, Zhou, ECCV 2020).

    ::

        distiller = MatchingGuidedDistiller({"stage4": (512, 2048)}, loss="mse")
        distiller.observe(student_maps, teacher_maps)  # over some images
        distiller.rematch()                            # solve, and use the matching from now on
        losses = distiller(student_maps, teacher_maps)  # {"loss_distill/stage4": scalar}

    Maps are compared in float32 whatever their dtype, or in float64 after ``distiller.double()``. A teacher map of
    another height and width is resized to the student's, with one warning a feature. Tokens (N, 1 + H W, C) of a vision
    transformer and maps (N, H, W, C) are taken as maps (N, C, H, W).

    Args:
        channels: feature name -> (S, T).
        reducer: name in ``REDUCERS``: ``amp``, ``max`` (also ``sp``), ``mean``, ``rd``, ``sm``.
        loss: name in ``FEATURE_LOSSES``, for all features or a dict of feature name -> name: ``partial_l2``, ``mse``,
            ``pearson``, ``channel_kl``.
        metric: of the matching cost, see :class:`~d2_mgd.matching.ChannelCost`.
        mode: see :func:`~d2_mgd.matching.solve_matching`; by default ``balanced``, and for the reducer ``sm``
            ``one_to_one`` where T >= S.
        align: ``matching`` reduces the teacher to S channels; ``matched_projection`` projects the student to T channels
            by a learned 1x1 convolution whose weight starts as the first matching; ``conv1x1`` does the same from a
            random start (FitNets, Romero et al., ICLR 2015; Heo et al., ICCV 2019); ``none`` compares channel by
            channel and needs equal widths.
        norm: of the student's map before it is compared: ``bn``, ``sync_bn``, ``gn``, ``none``.
        weights: feature name -> factor of its loss, after the balance; 1 by default.
        balance: ``fixed`` leaves the losses to their weights. ``auto`` multiplies each by a constant so that, before
            ``weights``, they sum to 24 at the start, each in proportion to the square root of T, for any losses and
            scale of the teacher's maps; then call :meth:`update_balance` once after each optimiser step.
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
        balance: str = "fixed",
    ) -> None:
        super().__init__()
        if not channels:
            raise UserError("a distiller needs at least one feature.")
        if align not in ALIGNMENTS:
            raise UserError(f"unknown alignment {align!r}; there are: {', '.join(ALIGNMENTS)}.")
        if reduction not in REDUCTIONS:
            raise UserError(f"unknown reduction {reduction!r}; there are: {', '.join(REDUCTIONS)}.")
        if balance not in BALANCES:
            raise UserError(f"unknown balance {balance!r}; there are: {', '.join(BALANCES)}.")
        losses = dict.fromkeys(channels, loss) if isinstance(loss, str) else dict(loss)
        weights = dict(weights or {})
        margins = dict(margins or {})
        strides = dict(strides or {})
        for what, names in (("loss", losses), ("weight", weights), ("margin", margins), ("stride", strides)):
            check_names(what, names, channels)
        check_weights(weights)
        self.channels = {name: (int(student), int(teacher)) for name, (student, teacher) in channels.items()}
        self.align = align
        self.weights = {name: float(weights.get(name, 1.0)) for name in self.channels}
        self.balance = Balance(balance == "auto", self.weights, [teacher for _, teacher in self.channels.values()])
        self._indices = {name: index for index, name in enumerate(self.channels)}
        self.ties = checked_ties(tie, self.channels, align)
        self.features = nn.ModuleDict()
        self.costs: dict[str, ChannelCost] = {}
        for name, (student, teacher) in self.channels.items():
            if name not in losses:
                raise UserError(f"no loss was given for feature {name}.")
            if spatial == "boxes" and not strides.get(name, 0) > 0:
                raise UserError(f"feature {name}: the spatial weight 'boxes' needs the stride of its map.")
            if hasattr(self.features, _key(name)):
                raise UserError(f"a feature cannot have the name {name!r}, which PyTorch uses itself.")
            self.features[_key(name)] = FeatureDistiller(
                name,
                student,
                teacher,
                align=align,
                reducer=lookup(REDUCERS, "reducer", reducer),
                mode=checked_mode(mode, reducer, name, student, teacher, align)
                if align in MATCHED_ALIGNMENTS
                else None,
                loss=lookup(FEATURE_LOSSES, "loss", losses[name]),
                norm=norm,
                margin=margins.get(name),
                reduction=reduction,
                spatial=lookup(SPATIAL_WEIGHTS, "spatial weight", spatial),
                stride=strides.get(name),
            )
            if align in MATCHED_ALIGNMENTS:
                self.costs[name] = ChannelCost(student, teacher, metric=metric)

    @property
    def matchings(self) -> dict[str, ChannelMatching | None]:
        """The matching in force for each feature; None before the first rematch."""
        return {name: self._feature(name).matching() for name in self.channels}

    @property
    def projections(self) -> dict[str, Tensor]:
        """The learned projection (T, S) of each feature; empty where the alignment is another.

        They share memory with the parameters.
        """
        learned = {name: self._feature(name).project for name in self.channels}
        return {name: conv.weight.detach()[:, :, 0, 0] for name, conv in learned.items() if conv is not None}

    @property
    def matched(self) -> bool:
        """Whether every feature that needs a matching has one."""
        return all(self._feature(name).has_matching for name in self.costs)

    @property
    def needs_matching(self) -> bool:
        """Whether the alignment starts from a matching, so that :meth:`observe` and :meth:`rematch` do something."""
        return self.align in MATCHED_ALIGNMENTS

    def forward(
        self,
        student_maps: Mapping[str, Tensor],
        teacher_maps: Mapping[str, Tensor],
        valid: Masks | None = None,
        boxes: Boxes | None = None,
        factor: float | Tensor = 1.0,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            student_maps: feature name -> (N, S, H, W), with gradients.
            teacher_maps: feature name -> (N, T, H', W'); no gradient flows into them.
            valid: feature name -> (N, 1, H, W) boolean mask of real pixels at the student's map, or None.
            boxes: for each image (B, 4) ground-truth boxes x1, y1, x2, y2 in pixels of the input; the spatial weight
                ``boxes`` needs them.
            factor: of all losses in this step, such as that of a :class:`~d2_mgd.distill.WeightSchedule`.

        Returns:
            dict: ``loss_distill/<feature>`` -> scalar, its weight included.

        Raises:
            ValueError: a map is missing, has other channels than announced or is of other images, or there are no
                boxes.
            RuntimeError: no :meth:`rematch` yet.
        """
        return {
            f"loss_distill/{name}": self._compare(
                name, student_maps.get(name), *self._maps(name, student_maps, teacher_maps, valid), boxes, factor
            )
            for name in self.channels
        }

    def compare(
        self,
        name: str,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None = None,
        boxes: Boxes | None = None,
        factor: float | Tensor = 1.0,
    ) -> Tensor:
        """The loss of one feature, a scalar with its weight included: for maps that are compared as they come.

        Arguments, of this feature alone, and errors as in :meth:`forward`.
        """
        maps = self._maps(name, {name: student}, {name: teacher}, {name: valid})
        return self._compare(name, student, *maps, boxes, factor)

    def _compare(
        self,
        name: str,
        given: Tensor | None,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        boxes: Boxes | None,
        factor: float | Tensor,
    ) -> Tensor:
        if self.needs_matching and not self._feature(name).has_matching:
            raise RuntimeError(f"feature {name} has no matching yet: observe some images and rematch first.")
        index, rescale = self._indices[name], None
        student = self.balance.watch(index, student, given)
        if self.balance.active:
            rescale = self.balance.rescale_teacher(index, mean_square(teacher, valid))
        loss: Tensor = self._feature(name)(student, teacher, valid, boxes, rescale)
        of_zeros = self._feature(name).loss_of_zeros(teacher, valid, rescale) if self.balance.starting else None
        return self.balance.balanced(index, loss, of_zeros) * (self.weights[name] * factor)

    @property
    def measured(self) -> Tensor | None:
        """What the balance has measured since its last update, to be averaged over processes; None without one."""
        return self.balance.measured if self.balance.active else None

    def update_balance(self, group: Any = None, reduced: bool = False) -> None:
        """Make the next step's factors from what this one has measured.

        Call it once after each step of the optimiser. Under a balance, a collective in ``torch.distributed``, unless
        :attr:`measured` has been averaged already (``reduced``), such as by another collective of the step.
        """
        self.balance.update(group, reduced)

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
        for name, (groups, total_cost, seconds, agreement) in solved.items():
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
                agreement=agreement,
            )
        for name, report in reports.items():
            self._feature(name).install(report.matching)
            self.costs[name].reset()
        return reports

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's. A ValueError names other features or another balance, unless ``strict`` is False."""
        if strict:
            check_state(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict, assign)

    def cost_state_dict(self) -> dict[str, Any]:
        """This process's running costs, to resume in the middle of a collection."""
        return {name: cost.state_dict() for name, cost in self.costs.items()}

    def load_cost_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`cost_state_dict`.

        Raises:
            ValueError: the state is of other features or widths.
        """
        if set(state) != set(self.costs):
            raise UserError(f"the stored costs are of {sorted(state)}, this distiller's of {sorted(self.costs)}.")
        for name, cost in self.costs.items():
            cost.load_state_dict(state[name])

    def _solve(self) -> dict[str, tuple[list[list[int]], float, float, float | None]]:
        solved = {}
        for names in self.ties:
            start = time.perf_counter()
            costs = []
            for name in names:
                try:
                    costs.append(self.costs[name].mean())
                except UserError as error:
                    raise UserError(f"feature {name}: {error}") from error
            matching = solve_matching(torch.stack(costs).sum(dim=0), self._feature(names[0]).mode or "balanced")
            seconds = time.perf_counter() - start
            for name, cost in zip(names, costs):
                total_cost = float(cost[matching.pairs].sum())
                solved[name] = (matching.groups.tolist(), total_cost, seconds, self._agreement(name, matching))
        return {name: solved[name] for name in self.costs}

    def _agreement(self, name: str, matching: ChannelMatching) -> float | None:
        """How far a trained projection agrees with a new matching; None for the first, which it starts from."""
        feature = self._feature(name)
        if feature.project is None or not feature.has_matching:
            return None
        return projection_agreement(feature.project.weight, matching).agreement

    def _feature(self, name: str) -> FeatureDistiller:
        feature = self.features[_key(name)]
        assert isinstance(feature, FeatureDistiller)
        return feature

    def _maps(
        self, name: str, student_maps: Mapping[str, Tensor], teacher_maps: Mapping[str, Tensor], valid: Masks | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        for who, maps in (("student", student_maps), ("teacher", teacher_maps)):
            if name not in maps:
                raise ValueError(f"the {who} gave no map of feature {name}; it gave: {', '.join(maps) or 'none'}.")
        wanted = self.channels[name]
        student, teacher = as_maps(student_maps[name], teacher_maps[name].detach(), wanted)
        same_images = student.shape[:1] == teacher.shape[:1]
        if student.ndim != 4 or teacher.ndim != 4 or (student.shape[1], teacher.shape[1]) != wanted or not same_images:
            raise ValueError(
                f"feature {name}: expected (N, {wanted[0]}, H, W) from the student and (N, {wanted[1]}, H, W) from the "
                f"teacher, got {tuple(student.shape)} and {tuple(teacher.shape)}."
            )
        return student, self._feature(name).resized(teacher, student), None if valid is None else valid.get(name)


_ERRORS_OF_A_SOLVE = {error.__name__: error for error in (UserError, SolverError)}


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


def _key(name: str) -> str:
    """A feature's name as a module's name, which may hold no dot."""
    return name.replace(".", "/")
