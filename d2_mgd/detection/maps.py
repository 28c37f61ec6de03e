"""The maps of a model's features: taken from its own forward, laid over another's, with masks of real pixels.

Shape shorthand: N images, C channels, (H, W) a padded batch, (Hf, Wf) its map at a feature of stride H / Hf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2_mgd.detection.features import Feature, FeaturePair, backbone_of
from d2_mgd.distill import FeatureTaps
from d2_mgd.distill.map_shapes import resized
from d2_mgd.errors import UserError


class WatchedMaps:
    """Maps of a model's own forward, and the batch that went into its backbone.

    Hooks are registered before the first forward whose maps are wanted. Other forwards, as in an evaluation,
    first remove the hooks.

    Args:
        model: has a ``backbone``.
        features: of that model, by name.
        plain: the module whose other forwards remove the hooks; ``model`` by default.
        also: registers further hooks and returns their handles, which are removed with the others.
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
        masks[name] = (real_rows[:, None, :, None] & real_columns[:, None, None, :]).to(found.device, non_blocking=True)
    return masks


def laid_over(
    teacher_maps: Mapping[str, Tensor], student_maps: Mapping[str, Tensor], pairs: Mapping[str, FeaturePair]
) -> dict[str, Tensor]:
    """Teacher maps of the pixels that the student's maps are of: without other padding, at the student's stride."""
    maps = {}
    for name, found in teacher_maps.items():
        own, guide = pairs[name].student.stride, pairs[name].teacher.stride
        height, width = student_maps[name].shape[-2:]
        found = found[..., : math.ceil(height * own / guide), : math.ceil(width * own / guide)]
        maps[name] = found if own == guide else resized(found, height, width)
    return maps
