"""The frozen teacher: a Detectron2 model with its own config, weights, channel order and normalisation.

Shape shorthand: N images of 3 channels, (H, W) a padded batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from torch import Tensor, nn

from d2_mgd.detection.config import UNTRAINED, teacher_config
from d2_mgd.detection.features import Feature, backbone_of
from d2_mgd.detection.image_network import Classifier, ImageNetwork, is_image_network
from d2_mgd.detection.maps import WatchedMaps
from d2_mgd.detection.networks import build_network
from d2_mgd.detection.student_state import DISTILLER
from d2_mgd.detection.weights import file_digest, load_weights, local_weights_file
from d2_mgd.distill.teacher_forward import TeacherForward
from d2_mgd.errors import UserError
from d2_mgd.training.processes import from_main

__all__ = ["FrozenTeacher", "build_teacher", "load_teacher_weights"]

logger = logging.getLogger(__name__)

_SWAPPED = {("RGB", "BGR"), ("BGR", "RGB")}

# Keys that weights may lack or have on top: constants of the model that are made from its config.
_CONSTANTS = ("pixel_mean", "pixel_std", "cell_anchors", "num_batches_tracked")


class FrozenTeacher:
    """A detector that only gives maps: eval mode, no gradients, nothing of it saved with the student.

    It is no ``nn.Module``, so that a module that holds it neither counts, trains, moves, wraps nor saves its weights.

    Args:
        model: a Detectron2 model with a ``backbone``, or a plain backbone; frozen from now on.
        input_format: the channel order it was trained with, as INPUT.FORMAT says it.
        weights: where to load its weights from: a file, a URL, ``detectron2://...``; "untrained" takes rank 0's random
            ones, with a warning (then a collective); None leaves them as the caller set them.
        cfg: its config, for those who want to evaluate it.
        pixel_mean: per channel, of pixels from 0 to 255; by default the model's own buffer.
        pixel_std: the same of the standard deviation.
        precision: of its forward, see :class:`~d2_mgd.distill.teacher_forward.TeacherForward`.
        compile: compile its forward, once for each size of a padded batch.

    Attributes:
        model: the plain model, in eval mode.
        weights_path: the local file of its weights, "untrained", or "" where the caller set them.
        digest: SHA-256 of that file, or "".

    Raises:
        UserError: no such weights, or they cannot be fetched; weights whose names or shapes do not match the model; a
            model without ``pixel_mean`` or ``pixel_std`` where they are not given.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str = "BGR",
        weights: str | None = None,
        cfg: CfgNode | None = None,
        pixel_mean: Sequence[float] = (),
        pixel_std: Sequence[float] = (),
        precision: str = "student",
        compile: bool = False,
    ) -> None:
        if isinstance(model, Backbone):
            model = _BackboneOnly(model)
        self._backbone = backbone_of(model)
        for name, given in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if given:
                model.register_buffer(name, _on_device(given, model), persistent=False)
            elif not hasattr(model, name):
                raise UserError(
                    f"the teacher {type(model).__name__} has no {name}: give it as MGD.TEACHER.{name.upper()}, such as "
                    "[123.675, 116.28, 103.53] and [58.395, 57.12, 57.375] with MGD.TEACHER.FORMAT RGB."
                )
        self._forward = TeacherForward(precision, compile)
        self.model = self._forward.prepare(model.requires_grad_(False))
        self.cfg = cfg
        self.input_format = input_format
        self.weights_path, self.digest = "", ""
        if weights == UNTRAINED:
            self.weights_path = UNTRAINED
            random = {name: value.cpu() for name, value in model.state_dict().items()}
            model.load_state_dict(from_main(random))  # each rank has drawn others
            logger.warning("The teacher is untrained: what it teaches is noise. This is for controls and tests alone.")
        elif weights is not None:
            self.weights_path = load_teacher_weights(model, weights)
            self.digest = "" if is_image_network(self.weights_path) else file_digest(self.weights_path)
        self.watch({})

    def __deepcopy__(self, memo: Any) -> FrozenTeacher:
        """Copies of a distilled student, such as moving averages of its weights, share the teacher."""
        return self

    @property
    def record(self) -> dict[str, str]:
        """What checkpoints contain of the teacher."""
        return {
            "weights": self.weights_path,
            "digest": self.digest,
            "precision": self._forward.describe(self.device),
        }

    @property
    def device(self) -> torch.device:
        return self._normalisation[0].device

    @property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (3, 1, 1) each."""
        return self.model.get_buffer("pixel_mean"), self.model.get_buffer("pixel_std")

    def watch(self, features: Mapping[str, Feature]) -> None:
        """Say which of its features are wanted.

        Args:
            features: name -> :func:`~d2_mgd.detection.features.find_feature` of :attr:`model`.
        """
        self._forward.forget()
        self._watched = WatchedMaps(_BackboneOnly(self._backbone), features, plain=self.model)

    def check_format(self, input_format: str) -> None:
        """Whether images of this channel order can be turned into the teacher's.

        Raises:
            ValueError: they cannot.
        """
        if input_format != self.input_format and (input_format, self.input_format) not in _SWAPPED:
            raise UserError(
                f"INPUT.FORMAT is {input_format} for the student and {self.input_format} for the teacher: only RGB "
                "and BGR can be turned into each other."
            )

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Tensor],
        *,
        input_format: str | None = None,
        min_size: tuple[int, int] = (0, 0),
        normalised: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Maps of the features of :meth:`watch`. The model runs to the deepest of them.

        Args:
            images: N images (3, h, w), 0 to 255.
            input_format: their channel order; the teacher's own by default.
            min_size: pad them to (H, W) at least.
            normalised: (N, 3, H, W), the same images as another model with :meth:`same_pixels` has normalised and
                padded them; used as they are if the size suits the teacher too.

        Returns:
            dict: name -> (N, T, H / stride, W / stride), without gradients.
        """
        return self._forward(self._maps, self._pixels(images, input_format, min_size, normalised))

    @torch.no_grad()
    def with_outputs(self, images: Sequence[Tensor], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same maps, and all that the backbone gives to the head, by name. Arguments as in :meth:`__call__`."""
        found = self._forward(self._maps_and_outputs, self._pixels(images, **options))
        maps = {name: found.pop(f"map {name}") for name in self._watched.taps}
        return maps, found

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of its precision, for its head."""
        return self._forward.autocast(self.device)

    def _maps(self, batch: Tensor) -> dict[str, Tensor]:
        return self._watched.run(batch)[0]

    def _maps_and_outputs(self, batch: Tensor) -> dict[str, Tensor]:
        outputs, maps, _ = self._watched.forward(batch)
        return {**outputs, **{f"map {name}": found for name, found in maps.items()}}

    def padded_size(self, sizes: Sequence[tuple[int, int]], min_size: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """(H, W) that images of these (h, w) are padded to.

        Raises:
            ValueError: the teacher takes squares of one size, and an image is larger.
        """
        height, width = (max(size[axis] for size in [*sizes, min_size]) for axis in (0, 1))
        constraints = self._backbone.padding_constraints
        square = constraints.get("square_size", 0)
        if square > 0:
            if max(height, width) > square:
                raise UserError(
                    f"the teacher takes images of {square} x {square} pixels and the batch has {height} x {width}: "
                    "lower INPUT.MAX_SIZE_TRAIN."
                )
            height = width = square
        divisor = max(constraints.get("size_divisibility", self._backbone.size_divisibility), 1)
        return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor

    def same_pixels(self, model: nn.Module, input_format: str) -> bool:
        """Whether another model normalises images of this channel order as the teacher does."""
        mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
        if input_format != self.input_format or mean is None or std is None:
            return False
        own_mean, own_std = self._normalisation
        return _same(mean, own_mean) and _same(std, own_std)

    def _pixels(
        self,
        images: Sequence[Tensor],
        input_format: str | None = None,
        min_size: tuple[int, int] = (0, 0),
        normalised: Tensor | None = None,
    ) -> Tensor:
        """(N, 3, H, W), what the backbone gets."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = self.padded_size(sizes, min_size)
        if normalised is not None and tuple(normalised.shape[-2:]) == (height, width):
            return normalised
        return self._normalise(images, input_format or self.input_format, height, width)

    def _normalise(self, images: Sequence[Tensor], input_format: str, height: int, width: int) -> Tensor:
        """(N, 3, H, W): less the mean, by the deviation, then padded with zeros, as Detectron2 does."""
        self.check_format(input_format)
        mean, std = self._normalisation
        batch = mean.new_zeros((len(images), mean.shape[0], height, width))
        for index, image in enumerate(images):
            pixels = image.to(mean.device, non_blocking=True)
            if input_format != self.input_format:
                pixels = pixels.flip(0)
            batch[index, :, : image.shape[-2], : image.shape[-1]] = (pixels - mean) / std
        return batch

    def __repr__(self) -> str:
        weights = self.weights_path or "as given"
        return f"FrozenTeacher({type(self.model).__name__}, {self.input_format}, weights={weights})"


class _BackboneOnly(nn.Module):
    """A model's backbone under the name that it has in the model, so that features have the same paths."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.eval()

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return self.backbone(batch)


def _on_device(values: Sequence[float], model: nn.Module) -> Tensor:
    """(3, 1, 1)."""
    if len(values) != 3:
        raise UserError(f"a pixel mean and deviation are three numbers, got {list(values)}.")
    return torch.tensor([float(value) for value in values], device=next(model.parameters()).device).view(-1, 1, 1)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one.cpu(), other.cpu()))


def load_teacher_weights(model: nn.Module, location: str) -> str:
    """Load all weights of a model; a teacher with random parts is refused.

    Args:
        model: a Detectron2 model.
        location: a file, a URL, ``detectron2://...``.

    Returns:
        str: the local file.

    Raises:
        UserError: there is none; weights are missing, left over, or have another shape, beyond constants such as
            ``pixel_mean``.
    """
    if isinstance(model, ImageNetwork) and is_image_network(location):
        model.load_published(location)
        return location
    try:
        path = local_weights_file(location)
    except UserError as error:
        raise UserError(f"the teacher's weights cannot be loaded: {error}") from error
    if isinstance(model, ImageNetwork) and isinstance(model.backbone, Classifier):
        model.load_published(path)
        return path
    left = load_weights(model, location)
    missing = _beyond_constants(left.missing_keys)
    # a student of an earlier distillation may teach
    left_over = [name for name in _beyond_constants(left.unexpected_keys) if not name.startswith(DISTILLER)]
    problems = []
    if left.incorrect_shapes:
        name, there, here = left.incorrect_shapes[0]
        problems.append(f"{name} is {tuple(there)} there and {tuple(here)} in the model")
    if missing:
        problems.append(f"{len(missing)} of the model are missing there, {missing[0]} for one")
    if left_over:
        problems.append(f"{len(left_over)} there are not in the model, {left_over[0]} for one")
    if problems:
        raise UserError(
            f"the teacher's weights {location} do not fit its config: {'; '.join(problems)}; give weights of a trained "
            "detector of that config, or adapt it with MGD.TEACHER.OPTS."
        )
    return path


def _beyond_constants(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(constant in name for constant in _CONSTANTS)]


def build_teacher(cfg: CfgNode) -> FrozenTeacher:
    """The teacher that a student's config names, on its device, with its weights.

    Raises:
        UserError: as :func:`~d2_mgd.detection.config.teacher_config` and :class:`FrozenTeacher`.
    """
    own = teacher_config(cfg)
    return frozen_teacher(build_network(own), own, cfg)


def frozen_teacher(model: nn.Module, own: CfgNode, cfg: CfgNode) -> FrozenTeacher:
    """A built teacher with the weights of its ``own`` config and the input format of MGD.TEACHER in ``cfg``."""
    given = cfg.MGD.TEACHER
    return FrozenTeacher(
        model,
        input_format=own.INPUT.FORMAT,
        weights=own.MODEL.WEIGHTS,
        cfg=own,
        pixel_mean=given.PIXEL_MEAN,
        pixel_std=given.PIXEL_STD,
        precision=given.PRECISION,
        compile=given.COMPILE,
    )
