"""Features of a Detectron2 model by name: FPN levels and backbone stages of any model with a `backbone`.

Shape shorthand: N images, C channels, (H, W) a padded batch, (Hf, Wf) its map at a feature of stride H / Hf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone import FPN
from torch import Tensor, nn

from d2_mgd.detection.norms import export_student_state
from d2_mgd.distill import FeatureTaps, Tap, batch_norm_margin
from d2_mgd.errors import UserError

__all__ = [
    "Feature",
    "FeaturePair",
    "WatchedMaps",
    "backbone_of",
    "crop_to",
    "export_student_state",
    "feature_names",
    "find_feature",
    "find_last_norm",
    "pair_features",
    "teacher_margin",
    "valid_masks",
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
        ValueError: a feature that one of them does not have; strides that differ; a stage frozen in the student.
    """
    pairs = {}
    for name in names:
        own = find_feature(student, name, before_activation, who="student")
        guide = find_feature(teacher, name, before_activation, who="teacher")
        if own.stride != guide.stride:
            raise UserError(
                f"feature {name} has stride {own.stride} in the student and {guide.stride} in the teacher: distil "
                "features of the same stride."
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


# ---- their maps


class WatchedMaps:
    """Maps of a model's own forward, and the batch that went into its backbone.

    Hooks come with the first forward whose maps are wanted. A forward that was not asked for through this class, as in
    evaluation, takes them off again, so the plain model runs as if nobody had ever looked.

    Args:
        model: has a ``backbone``.
        features: of that model, by name.
        plain: the module whose other forwards take the hooks off; ``model`` by default.
        also: puts hooks of its own on the model and returns their handles; they come and go with the others.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Mapping[str, Feature],
        plain: nn.Module | None = None,
        also: Callable[[], list[Any]] | None = None,
    ) -> None:
        self.model = model
        self.plain = model if plain is None else plain
        self.taps = {name: feature.tap for name, feature in features.items()}
        self.also = also
        self._attached: FeatureTaps | None = None
        self._handles: list[Any] = []
        self._wanted = False
        self._batch: Any = None

    def forward(self, *args: Any) -> tuple[Any, dict[str, Tensor], Tensor]:
        """The model's output; its maps (N, C, Hf, Wf) by name; and the batch (N, 3, H, W)."""
        taps = self._attach()
        with self._asking():
            output = self.model(*args)
        return output, {} if taps is None else taps.collect(), self._take_batch()

    def run(self, *args: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Maps and batch; the model runs as far as its deepest feature and no further.

        Raises:
            ValueError: there are no features.
        """
        taps = self._attach()
        if taps is None:
            raise UserError("there is no feature to take the maps of.")
        with self._asking():
            return taps.run(*args), self._take_batch()

    def detach(self) -> None:
        """Take all hooks off the model."""
        if self._attached is not None:
            self._attached.remove()
        for handle in self._handles:
            handle.remove()
        self._attached, self._handles, self._batch = None, [], None

    def _attach(self) -> FeatureTaps | None:
        if not self._handles:
            self._handles = [
                self.plain.register_forward_pre_hook(self._begin),
                backbone_of(self.model).register_forward_pre_hook(self._keep_batch),
                *(self.also() if self.also is not None else []),
            ]
            self._attached = FeatureTaps(self.model, self.taps) if self.taps else None
        return self._attached

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self._wanted = True
        try:
            yield
        finally:
            self._wanted = False

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not self._wanted:
            self.detach()

    def _keep_batch(self, module: nn.Module, args: Any) -> None:
        self._batch = args[0]

    def _take_batch(self) -> Tensor:
        batch, self._batch = self._batch, None
        if not isinstance(batch, Tensor):
            raise TypeError(f"the backbone of {type(self.model).__name__} got a {type(batch).__name__}, not a tensor.")
        return batch


def valid_masks(
    image_sizes: Sequence[tuple[int, int]], maps: Mapping[str, Tensor], features: Mapping[str, Feature]
) -> dict[str, Tensor | None]:
    """Which cells of each map are of real pixels.

    A cell is real if it begins inside its image: the first ceil(h / stride) rows and ceil(w / stride) columns.

    Args:
        image_sizes: (h, w) of each of the N images before padding.
        maps: (N, C, Hf, Wf) by name.
        features: of the network that the maps are from.

    Returns:
        dict: name -> (N, 1, Hf, Wf) boolean, or None where no image is padded.
    """
    masks: dict[str, Tensor | None] = {}
    for name, found in maps.items():
        stride, (height, width) = features[name].stride, found.shape[-2:]
        rows = [min(math.ceil(h / stride), height) for h, _ in image_sizes]
        columns = [min(math.ceil(w / stride), width) for _, w in image_sizes]
        if min(rows) == height and min(columns) == width:
            masks[name] = None
            continue
        real_rows = torch.arange(height) < torch.tensor(rows).view(-1, 1)
        real_columns = torch.arange(width) < torch.tensor(columns).view(-1, 1)
        masks[name] = (real_rows[:, None, :, None] & real_columns[:, None, None, :]).to(found.device)
    return masks


def crop_to(maps: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps without the rows and columns at the bottom and right that ``like`` does not have."""
    return {name: found[..., : like[name].shape[-2], : like[name].shape[-1]] for name, found in maps.items()}
