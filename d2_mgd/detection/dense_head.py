"""The dense head of a RetinaNet or FCOS: its predictions at every location, as a whole and in two parts.

Shape shorthand: N images, A anchors of a location, K classes, (Hl, Wl) the map of a level, Rl = Hl Wl A its anchors, C
channels inside a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import Tensor, nn

from d2_mgd.detection.features import backbone_of
from d2_mgd.errors import UserError

__all__ = ["DenseHead", "HeadOutput", "by_anchor", "cropped", "in_float32"]

_HEADS = (RetinaNetHead.forward, FCOSHead.forward)  # what a head computes is known where its forward is one of these


class HeadOutput(NamedTuple):
    """What a head gives at each level, of small stride to large.

    Args:
        logits: (N, A K, Hl, Wl) of classes.
        deltas: (N, A 4, Hl, Wl) of boxes.
        inner: pairs of (N, C, Hl, Wl), what lies between the two parts of a head, of classes and of boxes.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    inner: list[tuple[Tensor, Tensor]]


class DenseHead:
    """A model's dense head, as a whole and in two parts.

    Args:
        model: a RetinaNet or FCOS.
        convs: convolutions of the first part, which ends before the activation of the last; None: there is no first.
        who: what messages call the model.

    Raises:
        ValueError: a model without such a head, or a head with fewer convolutions.
    """

    def __init__(self, model: nn.Module, convs: int | None, who: str) -> None:
        if not isinstance(model, (RetinaNet, FCOS)) or type(model.head).forward not in _HEADS:
            raise UserError(
                f"the {who} is a {type(model).__name__} without the dense head of a RetinaNet or FCOS, so there are no "
                "predictions at every location to distil: turn MGD.DENSE_KD and MGD.CROSS_HEAD off."
            )
        self.model: Any = model
        self.head: Any = model.head
        self.levels = list(model.head_in_features)
        self.starts = [0, 0] if convs is None else [self._activation(subnet, convs, who) for subnet in self._subnets]
        self._seen: list[list[Tensor]] = [[], []]
        self._output: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def _subnets(self) -> tuple[Any, Any]:
        """Of classes and of boxes."""
        return self.head.cls_subnet, self.head.bbox_subnet

    def _activation(self, subnet: Any, convs: int, who: str) -> int:
        """Index of the layer that the second part begins with: the activation of the last convolution of the first."""
        activations = [index for index, layer in enumerate(subnet) if isinstance(layer, nn.ReLU)]
        if convs > len(activations):
            raise UserError(
                f"MGD.CROSS_HEAD.CONVS is {convs}, and the {who}'s head has {len(activations)} convolutions before its "
                "predictions."
            )
        return activations[convs - 1] if convs else 0

    @property
    def inner_widths(self) -> list[int]:
        """Channels of the features between the parts, of classes and of boxes."""
        widths = []
        for subnet, start in zip(self._subnets, self.starts):
            before = [layer.out_channels for layer in subnet[:start] if isinstance(layer, nn.Conv2d)]
            widths.append(before[-1] if before else backbone_of(self.model).output_shape()[self.levels[0]].channels)
        return widths

    @property
    def strides(self) -> list[int]:
        """Of the levels."""
        return [backbone_of(self.model).output_shape()[name].stride for name in self.levels]

    def anchors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(Rl, 4) anchors of maps of these sizes."""
        return [boxes.tensor for boxes in self.model.anchor_generator(maps)]

    def boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """(N, Rl, 4) boxes that (N, Rl, 4) deltas from (Rl, 4) anchors mean."""
        every = anchors.unsqueeze(0).expand_as(deltas).reshape(-1, 4)
        decoded: Tensor = self.model.box2box_transform.apply_deltas(deltas.reshape(-1, 4).float(), every)
        return decoded.view(deltas.shape)

    def predict(self, maps: Sequence[Tensor]) -> HeadOutput:
        """Run both parts on the (N, C, Hl, Wl) maps of all levels."""
        classes, boxes = (subnet[:start] for subnet, start in zip(self._subnets, self.starts))
        inner = [(classes(found), boxes(found)) for found in maps]
        return self.finish(inner)

    def finish(self, inner: Sequence[tuple[Tensor, Tensor]]) -> HeadOutput:
        """Run the second part on what the first gave, or on something else in its place."""
        classes, boxes = (subnet[start:] for subnet, start in zip(self._subnets, self.starts))
        logits = [self.head.cls_score(classes(found)) for found, _ in inner]
        deltas = [self.head.bbox_pred(boxes(found)) for _, found in inner]
        return HeadOutput(logits, deltas, list(inner))

    # ---- what the model's own forward gives

    def watch(self) -> list[Any]:
        """Hooks that keep what the model's next forward gives, for :meth:`take`; returns their handles."""
        handles = [self.head.register_forward_pre_hook(self._begin), self.head.register_forward_hook(self._end)]
        for subnet, start, seen in zip(self._subnets, self.starts, range(2)):
            handles.append(subnet[start].register_forward_pre_hook(self._keeper(seen)))
        return handles

    def take(self) -> HeadOutput:
        """What the newest forward gave; it is forgotten here."""
        assert self._output is not None, "the head did not run"
        (logits, deltas), (classes, boxes) = self._output, self._seen
        self._output, self._seen = None, [[], []]
        return HeadOutput(list(logits), list(deltas), list(zip(classes, boxes)))

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._seen = [[], []]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = (output[0], output[1])

    def _keeper(self, which: int) -> Any:
        def keep(module: nn.Module, args: Any) -> None:
            self._seen[which].append(args[0])

        return keep


def by_anchor(predictions: Tensor, size: int) -> Tensor:
    """(N, A size, Hl, Wl) -> (N, Rl, size), in the order of the anchors."""
    images, _, height, width = predictions.shape
    return predictions.view(images, -1, size, height, width).permute(0, 3, 4, 1, 2).reshape(images, -1, size)


def in_float32(output: HeadOutput) -> HeadOutput:
    """The same predictions, of a head that ran in mixed precision."""
    return HeadOutput(
        [logits.float() for logits in output.logits],
        [deltas.float() for deltas in output.deltas],
        [(classes.float(), boxes.float()) for classes, boxes in output.inner],
    )


def cropped(output: HeadOutput, like: HeadOutput) -> HeadOutput:
    """Without the rows and columns at the bottom and right that ``like`` does not have."""
    places = [(..., slice(logits.shape[-2]), slice(logits.shape[-1])) for logits in like.logits]
    return HeadOutput(
        [logits[place] for logits, place in zip(output.logits, places)],
        [deltas[place] for deltas, place in zip(output.deltas, places)],
        [(classes[place], boxes[place]) for (classes, boxes), place in zip(output.inner, places)],
    )
