"""Networks that are no detectors as teachers: plain Detectron2 backbones, and classifiers of torchvision and timm.

Shape shorthand: N images, C channels, (H, W) a batch, L = h w tokens of a map.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from d2_mgd.detection.weights import cached_download
from d2_mgd.distill import FeatureTaps
from d2_mgd.distill.map_shapes import as_map
from d2_mgd.distill.stages import find_stages
from d2_mgd.errors import UserError, reason
from d2_mgd.training.timm_networks import TIMM, timm_network
from d2_mgd.training.weights_files import read_safetensors, read_tensors

TORCHVISION = "torchvision:"
_MEASURED = 224  # pixels of the image that strides are measured with, which every classifier takes
_LEVELS = (2, 3, 4, 5, 6)
_IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def is_image_network(name: str) -> bool:
    """Whether MGD.TEACHER.CONFIG_FILE names a classifier of torchvision or timm."""
    return name.startswith((TIMM, TORCHVISION))


def image_network_config(name: str) -> CfgNode:
    """The config of ``timm:NAME`` or ``torchvision:NAME`` with its published weights, RGB and ImageNet's statistics."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ImageNetwork"
    cfg.MODEL.IMAGE_NETWORK = name
    cfg.MODEL.WEIGHTS = name
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = _IMAGENET
    return cfg


@META_ARCH_REGISTRY.register()
class ImageNetwork(nn.Module):
    """A backbone with an input format and without a head: it teaches, and infers nothing.

    Args:
        cfg: MODEL.IMAGE_NETWORK names a classifier; without it MODEL.BACKBONE.NAME is a backbone of Detectron2.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        name = cfg.MODEL.get("IMAGE_NETWORK", "")
        self.backbone = Classifier(name, _fresh(name)) if name else build_backbone(cfg)
        for key in ("mean", "std"):
            value = torch.tensor(cfg.MODEL[f"PIXEL_{key.upper()}"]).view(-1, 1, 1)
            self.register_buffer(f"pixel_{key}", value, persistent=False)

    def load_published(self, location: str) -> None:
        """Load a classifier's weights: ``timm:NAME`` and ``torchvision:NAME`` are those that the library publishes.

        Raises:
            UserError: they are not all of this network, or cannot be loaded.
        """
        assert isinstance(self.backbone, Classifier)
        state: Any
        if is_image_network(location):
            state = _published(location)
        else:
            state = read_safetensors(location)[0] if location.endswith(".safetensors") else read_tensors(location)
            state = state.get("model", state)
        try:
            self.backbone.network.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"the teacher's weights {location} are not of {self.backbone.name}: {reason(error)}."
            ) from error


class Classifier(Backbone):
    """The deepest map of each stride of a classifier, as FPN levels: ``p2`` of stride 4 to ``p5`` of 32.

    Where they are is measured with one image. Tokens of a vision transformer are maps of its patches.

    Args:
        name: for messages.
        network: takes (N, 3, H, W).
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.network = network
        stages = find_stages(name, network, torch.zeros(1, 3, _MEASURED, _MEASURED))
        found = {f"p{level}": stages[2**level] for level in _LEVELS if 2**level in stages}
        if not found:
            raise UserError(f"{name} gives no map of stride 4, 8, 16, 32 or 64 at any of its stages.")
        self._out_features = list(found)
        self._out_feature_strides = {level: 2 ** int(level[1:]) for level in found}
        self._out_feature_channels = {level: stage.channels for level, stage in found.items()}
        self._taps = FeatureTaps(network, {level: stage.module for level, stage in found.items()})

    @property
    def size_divisibility(self) -> int:
        """Multiple to which images are padded: the largest stride."""
        return max(self._out_feature_strides.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        ratio = images.shape[-2] / images.shape[-1]
        maps = self._taps.run(images)
        return {name: as_map(found, self._out_feature_channels[name], ratio) for name, found in maps.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }


def _fresh(name: str) -> nn.Module:
    """The classifier with fresh weights."""
    if name.startswith(TORCHVISION):
        from torchvision import models

        bare = name.removeprefix(TORCHVISION)
        known = models.list_models(module=models)
        if bare not in known:
            near = ", ".join(difflib.get_close_matches(bare, known, 5) or known)
            raise UserError(f"torchvision has no classifier {bare!r}. Nearest: {near}.")
        return models.get_model(bare)
    try:
        return timm_network(name, dynamic_img_size=True)  # of vision transformers, for images of any size
    except TypeError:
        return timm_network(name)


def _published(name: str) -> dict[str, Any]:
    try:
        if name.startswith(TORCHVISION):
            from torchvision import models

            weights: Any = models.get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT
            return read_tensors(cached_download(weights.url, name))
        return timm_network(name, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name}'s published weights cannot be loaded ({reason(error)}); give their file as MGD.TEACHER.WEIGHTS."
        ) from error
