"""Features of a Detectron2 model by name: FPN levels and backbone stages of any model with a `backbone`.

Shape shorthand: N images, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone import FPN
from torch import Tensor, nn

from d2_mgd.distill import Tap, batch_norm_margin
from d2_mgd.errors import UserError

__all__ = [
    "Feature",
    "FeaturePair",
    "backbone_of",
    "feature_names",
    "find_feature",
    "find_last_norm",
    "pair_features",
    "teacher_margin",
]


@dataclass(frozen=True)
class Feature:
    """Where a model has a feature.

    Args:
        name: ``p3``, ``res4``, ...
        tap: how to take its map, from the model's root.
        channels: C.
        stride: pixels of the image between neighbours in the map.
        last_block: path of a backbone stage's last block; None for an FPN level.
    """

    name: str
    tap: Tap
    channels: int
    stride: int
    last_block: str | None = None


@dataclass(frozen=True)
class FeaturePair:
    """A feature in student and teacher."""

    student: Feature
    teacher: Feature

    @property
    def channels(self) -> tuple[int, int]:
        """(S, T)."""
        return self.student.channels, self.teacher.channels


def feature_names(model: nn.Module) -> list[str]:
    """The features that a model has, shallow to deep, backbone stages first."""
    levels, stages = _levels(model), _stages(model)
    return [*stages, *(name for name in levels if name not in stages)]


def find_feature(model: nn.Module, name: str, before_activation: bool = True, who: str = "model") -> Feature:
    """Locate a feature in an unmodified Detectron2 model.

    Args:
        model: has a ``backbone`` with ``output_shape()``; a ResNet or its like, alone or under an FPN.
        name: a backbone stage (``res2`` ... ``res5``) or an FPN level (``p2`` ... ``p7``).
        before_activation: take a backbone stage before its last activation; FPN levels have none.
        who: what the message calls the model.

    Raises:
        UserError: the model has no such feature (the message lists all), or the feature has no activation.
    """
    stages = _stages(model)
    if name in stages:
        stage = stages[name]
        tap = Tap(stage.last_block, before_activation=True) if before_activation else Tap(stage.path)
        return Feature(name, tap, stage.channels, stage.stride, stage.last_block)
    levels = _levels(model)
    if name not in levels:
        raise UserError(f"the {who} has no feature {name!r}; it has: {', '.join(feature_names(model))}.")
    return Feature(name, _level_tap(backbone_of(model), name), levels[name].channels, levels[name].stride)


def pair_features(
    student: nn.Module, teacher: nn.Module, names: Sequence[str], before_activation: bool = True
) -> dict[str, FeaturePair]:
    """The same features in both networks.

    Raises:
        UserError: a feature that one of them does not have; strides of which neither is a multiple of the other; a
            stage frozen in the student.
    """
    here, there = feature_names(student), feature_names(teacher)
    if not set(here) & set(there):
        raise UserError(
            f"student and teacher have no feature in common: the student has {', '.join(here)}, and the teacher "
            f"{', '.join(there)}."
        )
    pairs = {}
    for name in names:
        own = find_feature(student, name, before_activation, who="student")
        guide = find_feature(teacher, name, before_activation, who="teacher")
        if max(own.stride, guide.stride) % min(own.stride, guide.stride):
            raise UserError(
                f"feature {name} has stride {own.stride} in the student and {guide.stride} in the teacher: one must be "
                "a multiple of the other, so leave it out of MGD.FEATURES."
            )
        if own.last_block is not None:
            block = student.get_submodule(own.last_block)
            if not any(parameter.requires_grad for parameter in block.parameters()):
                raise UserError(
                    f"feature {name} is frozen in the student, where nothing can learn: leave it out of MGD.FEATURES, "
                    "or lower MODEL.BACKBONE.FREEZE_AT (1 freezes the stem alone)."
                )
        pairs[name] = FeaturePair(own, guide)
    return pairs


def find_last_norm(model: nn.Module, feature: Feature) -> tuple[nn.Module, str] | None:
    """The last norm of a backbone stage's last block, as (parent module, attribute); None where there is none."""
    if feature.last_block is None:
        return None
    block = model.get_submodule(feature.last_block)
    for name in ("conv3", "conv2"):  # Detectron2's bottleneck and basic blocks
        convolution = getattr(block, name, None)
        if convolution is not None:
            return (convolution, "norm") if getattr(convolution, "norm", None) is not None else None
    for parent in block.modules():  # RegNet's blocks mark it
        for name, child in parent.named_children():
            if getattr(child, "final_bn", False):
                return parent, name
    return None


def teacher_margin(teacher: nn.Module, feature: Feature, statistics_needed: bool = True) -> Tensor:
    """(C,) margins of a teacher's pre-activations at a backbone stage, from the last batch-norm before it.

    Args:
        teacher: the teacher's model, its weights loaded.
        feature: one of its backbone stages.
        statistics_needed: refuse a norm whose statistics are folded into its scale: then scale and shift say nothing
            about what leaves it.

    Raises:
        ValueError: no batch-norm there, or one without statistics.
    """
    found = find_last_norm(teacher, feature)
    if found is None:
        raise UserError(
            f"feature {feature.name}: the teacher has no norm there to make margins from; use mse or pearson."
        )
    norm = getattr(*found)
    try:
        margin = batch_norm_margin(norm)
    except UserError as error:
        raise UserError(f"feature {feature.name}: {error}") from error
    if statistics_needed and _has_folded_statistics(norm):
        raise UserError(
            f"feature {feature.name}: the statistics of the teacher's batch-norm are folded into its scale, as in "
            "every model that began with Detectron2's MSRA weights, so there are no margins for partial_l2; use mse or "
            "pearson, or a teacher that began with torchvision's weights."
        )
    return margin


def _has_folded_statistics(norm: nn.Module) -> bool:
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    return bool((mean == 0).all()) and bool(((variance - 1).abs() < 1e-3).all())


# ---- where they are


@dataclass(frozen=True)
class _Stage:
    path: str
    last_block: str
    channels: int
    stride: int


def _stages(model: nn.Module) -> dict[str, _Stage]:
    """Backbone stages of a ResNet or its like: name -> place and shape."""
    path, bottom_up = "backbone", backbone_of(model)
    if hasattr(bottom_up, "bottom_up"):
        path, bottom_up = "backbone.bottom_up", bottom_up.bottom_up
    stages: dict[str, _Stage] = {}
    stem = getattr(bottom_up, "stem", None)
    if not isinstance(stem, CNNBlockBase):
        return stages
    stride = stem.stride
    for name, stage in bottom_up.named_children():
        blocks = [(index, block) for index, block in stage.named_children() if isinstance(block, CNNBlockBase)]
        if blocks:
            stride *= math.prod(block.stride for _, block in blocks)
            last, block = blocks[-1]
            stages[name] = _Stage(f"{path}.{name}", f"{path}.{name}.{last}", block.out_channels, stride)
    return stages


def _levels(model: nn.Module) -> dict[str, Any]:
    """What the backbone gives to the head: name -> ShapeSpec, of small stride to large."""
    shapes = backbone_of(model).output_shape()
    return dict(sorted(shapes.items(), key=lambda item: item[1].stride))


def _level_tap(backbone: Any, name: str) -> Tap:
    """In Detectron2's own FPN at the module that makes the level, so that a teacher stops there."""
    if type(backbone) is FPN:
        if hasattr(backbone, f"fpn_output{name[1:]}"):
            return Tap(f"backbone.fpn_output{name[1:]}")
        extra = [level for level in backbone.output_shape() if not hasattr(backbone, f"fpn_output{level[1:]}")]
        return Tap("backbone.top_block", key=extra.index(name))
    return Tap("backbone", key=name)


def backbone_of(model: nn.Module) -> Any:
    """A model's Detectron2 backbone.

    Raises:
        ValueError: it has none.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "output_shape"):
        raise UserError(f"{type(model).__name__} has no Detectron2 backbone to take features from.")
    return backbone
