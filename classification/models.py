"""The table of architectures: how to build each, and which of its features to tap. A new one is a new row.

Shape shorthand: N images, C channels of a map, H, W.

A feature has a name (``stage1`` ... ``stage4``, shallow to deep), the module whose output is tapped, and the batch-norm
for a teacher's margins. Features of student and teacher are paired by name. Widths and strides are measured.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torchvision
from torch import nn

from classification.networks import MobileNetV1, PreActivationShuffleNetV2
from d2_mgd.distill import Tap
from d2_mgd.errors import UserError
from d2_mgd.training.timm_networks import TIMM, timm_network, timm_network_for

# In training mode these return the logits of auxiliary classifiers too, which this pipeline does not support.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Feature:
    """The tap of a named map, and the batch-norm for its margins.

    Args:
        tap: the module, and whether the map is taken before its last activation.
        norm: dotted path of the batch-norm whose output is the map, or the last summand of the map; None: the last one
            inside the tapped module.
    """

    tap: Tap
    norm: str | None


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        build: number of classes -> network with new weights.
        features: name -> feature, shallow to deep.
        ignored: features that are not distilled if this is the student, as published.
        teacher: architecture of the default teacher.
        torchvision: torchvision's name of the network, if it publishes weights.
    """

    build: Callable[[int], nn.Module]
    features: Mapping[str, Feature]
    ignored: tuple[str, ...] = ()
    teacher: str | None = "resnet50"
    torchvision: str | None = None


def _stages(*features: Feature) -> dict[str, Feature]:
    return {f"stage{number}": feature for number, feature in enumerate(features, start=1)}


def _before(module: str, norm: str) -> Feature:
    return Feature(Tap(module, before_activation=True), f"{module}.{norm}")


def _from_torchvision(name: str) -> Callable[[int], nn.Module]:
    return lambda num_classes: torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def _resnet(name: str, blocks: tuple[int, int, int, int], last_norm: str, teacher: str | None) -> Architecture:
    last = [_before(f"layer{stage}.{count - 1}", last_norm) for stage, count in enumerate(blocks, start=1)]
    return Architecture(_from_torchvision(name), _stages(*last), teacher=teacher, torchvision=name)


def _shufflenet(name: str, widths: list[int]) -> Architecture:
    # As published, the first map is the input of the first unit, after ReLU and pooling, with the stem's margins.
    features = _stages(
        Feature(Tap("maxpool"), "conv1.1"),
        Feature(Tap("stage2"), "stage2.3.branch2.6"),
        Feature(Tap("stage3"), "stage3.7.branch2.6"),
        Feature(Tap("stage4"), "stage4.3.branch2.6"),
    )
    return Architecture(
        lambda num_classes: PreActivationShuffleNetV2([4, 8, 4], widths, num_classes),
        features,
        ignored=("stage1",),
        torchvision=name,
    )


_MOBILENET_V1 = Architecture(
    MobileNetV1,
    _stages(_before("model.3", "4"), _before("model.5", "4"), _before("model.11", "4"), _before("model.13", "4")),
)

# The published code taps the depthwise convolutions of blocks 4, 7, 11 and 17, in a network whose fourth and fifth
# stages have swapped strides. torchvision's block 7 has stride 2, so there the map with 192 channels at stride 8 is the
# input of the depthwise convolution.
_MOBILENET_V2 = Architecture(
    _from_torchvision("mobilenet_v2"),
    _stages(
        _before("features.4.conv.1", "1"),
        _before("features.7.conv.0", "1"),
        _before("features.11.conv.1", "1"),
        _before("features.17.conv.1", "1"),
    ),
    ignored=("stage1",),
    torchvision="mobilenet_v2",
)

ARCHITECTURES: dict[str, Architecture] = {
    "mobilenet_v1": _MOBILENET_V1,
    "mobilenet_v2": _MOBILENET_V2,
    "shufflenet_v2": _shufflenet("shufflenet_v2_x1_0", [24, 116, 232, 464, 1024]),
    "shufflenet_v2_x0_5": _shufflenet("shufflenet_v2_x0_5", [24, 48, 96, 192, 1024]),
    "shufflenet_v2_x1_0": _shufflenet("shufflenet_v2_x1_0", [24, 116, 232, 464, 1024]),
    "shufflenet_v2_x1_5": _shufflenet("shufflenet_v2_x1_5", [24, 176, 352, 704, 1024]),
    "shufflenet_v2_x2_0": _shufflenet("shufflenet_v2_x2_0", [24, 244, 488, 976, 2048]),
    "resnet18": _resnet("resnet18", (2, 2, 2, 2), "bn2", "resnet50"),
    "resnet34": _resnet("resnet34", (3, 4, 6, 3), "bn2", "resnet50"),
    "resnet50": _resnet("resnet50", (3, 4, 6, 3), "bn3", "resnet152"),
    "resnet101": _resnet("resnet101", (3, 4, 23, 3), "bn3", "resnet152"),
    "resnet152": _resnet("resnet152", (3, 8, 36, 3), "bn3", None),
    "resnext50_32x4d": _resnet("resnext50_32x4d", (3, 4, 6, 3), "bn3", "resnet152"),
    "resnext101_32x8d": _resnet("resnext101_32x8d", (3, 4, 23, 3), "bn3", None),
    "resnext101_64x4d": _resnet("resnext101_64x4d", (3, 4, 23, 3), "bn3", None),
    "wide_resnet50_2": _resnet("wide_resnet50_2", (3, 4, 6, 3), "bn3", "resnet152"),
    "wide_resnet101_2": _resnet("wide_resnet101_2", (3, 4, 23, 3), "bn3", None),
}


def available() -> list[str]:
    """Names for :func:`build`, those of the table first, without timm's (``timm:NAME``)."""
    others = torchvision.models.list_models(module=torchvision.models)
    return [
        *ARCHITECTURES,
        *(name for name in others if name not in ARCHITECTURES and name not in _WITH_AUXILIARY_HEADS),
    ]


def architecture(name: str) -> Architecture:
    """The row of a network; for a network outside the table, a row without features.

    Raises:
        UserError: the network is unknown; the message lists the nearest names.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name.startswith(TIMM):
        return Architecture(lambda num_classes: timm_network(name, num_classes=num_classes), {}, teacher=None)
    if name in available():
        return Architecture(_from_torchvision(name), {}, teacher=None, torchvision=name)
    near = difflib.get_close_matches(name, available(), 5)
    known = f"Nearest: {', '.join(near)}" if near else f"Available: {', '.join(available())}"
    raise UserError(f"unknown architecture {name!r}. {known}, and timm:NAME if timm is installed.")


def build(name: str, num_classes: int, image_size: int = 224) -> nn.Module:
    """Build a network with new weights, for images of ``image_size`` px. Errors as in :func:`architecture`."""
    if name.startswith(TIMM):
        return timm_network_for(image_size, name, num_classes=num_classes)
    return architecture(name).build(num_classes)
