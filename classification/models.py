"""Architectures, and where to tap them: one table, a row a network, no code for a new one.

Shape shorthand: N images, C channels of a map, H, W.

A feature has a name (``stage1`` ... ``stage4``, shallow to deep), the module whose output is tapped, and the batch-norm
that makes a teacher's margins. Features of student and teacher are paired by name. Widths and strides are read off a
forward pass (:func:`measure_features`), not kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from classification.networks import MobileNetV1, PreActivationShuffleNetV2
from d2_mgd.distill import FeatureTaps, Tap
from d2_mgd.errors import UserError, located

TIMM = "timm:"  # prefix of timm's networks
# Their training output carries auxiliary classifiers, which neither the loss nor the checkpoints here know.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Feature:
    """Where a named map is taken.

    Args:
        tap: the module, and whether its last activation is undone.
        norm: dotted path of the batch-norm whose output the map is (or is the last addend of), for a teacher's margins.
    """

    tap: Tap
    norm: str


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        build: number of classes -> network with fresh weights.
        features: name -> where, shallow to deep.
        ignored: features that are not distilled where this is the student, as published.
        teacher: the teacher unless another is asked for.
        torchvision: torchvision's name, where it has published weights.
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
    # The first map is what the first unit reads, after ReLU and pooling; margins are those of the stem, as published.
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

# Published: the depthwise convolutions of blocks 4, 7, 11 and 17, in a network whose fourth and fifth stage have each
# other's stride. torchvision's halves the map in block 7 already, so the 192 channels at stride 8 are those that enter
# that depthwise convolution.
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
    """Names that :func:`build` knows, the table's first; timm's networks come on top as ``timm:NAME``."""
    others = torchvision.models.list_models(module=torchvision.models)
    return [
        *ARCHITECTURES,
        *(name for name in others if name not in ARCHITECTURES and name not in _WITH_AUXILIARY_HEADS),
    ]


def architecture(name: str) -> Architecture:
    """The row of a network; one without features for networks outside the table.

    Raises:
        UserError: an unknown network, with the list of those that there are.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name.startswith(TIMM):
        return Architecture(lambda num_classes: timm_model(name, num_classes), {}, teacher=None)
    if name in available():
        return Architecture(_from_torchvision(name), {}, teacher=None, torchvision=name)
    raise UserError(
        f"unknown architecture {name!r}; there are: {', '.join(available())}, and timm:NAME where timm is installed."
    )


def build(name: str, num_classes: int) -> nn.Module:
    """A network with fresh weights. Errors as in :func:`architecture`."""
    return architecture(name).build(num_classes)


def timm_model(name: str, num_classes: int | None, pretrained: bool = False) -> nn.Module:
    """A network of timm; ``num_classes`` None keeps the published head."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{name} needs timm, which is not installed: pip install timm.") from error
    bare = name[len(TIMM) :]
    if not timm.is_model(bare):
        near = ", ".join(timm.list_models(f"*{bare.split('_')[0]}*")[:20])
        raise UserError(f"timm has no model {bare!r}; near it there are: {near or 'none'}.")
    head: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(bare, pretrained=pretrained, **head)


@torch.no_grad()
def measure_features(
    name: str, model: nn.Module, taps: Mapping[str, Tap], image_size: int
) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of every tapped map for images of ``image_size`` px, from one forward pass in eval mode.

    Raises:
        UserError: a path that is not in the model, a map that is not (N, C, H, W), or too small an image.
    """
    training = model.training
    images = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
    model.eval()
    try:
        with located(f"{name}: "), FeatureTaps(model, taps) as feature_taps:
            maps: dict[str, Tensor] = feature_taps.run(images)
    except RuntimeError as error:
        raise UserError(f"{name} cannot be tapped with images of {image_size} px: {error}") from error
    finally:
        model.train(training)
    for feature, found in maps.items():
        if found.ndim != 4:
            raise UserError(
                f"{name}: the map of {feature} ({taps[feature].module}) has shape {tuple(found.shape)}, "
                "not (N, C, H, W)."
            )
    return {feature: (found.shape[1], found.shape[2], found.shape[3]) for feature, found in maps.items()}
