"""Detectron2's models from their configs, where Detectron2 states what is wrong with a config by assertions."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from torch import nn

from d2_mgd.errors import UserError, reason


def build_network(cfg: CfgNode) -> nn.Module:
    """The plain model that a config describes, on MODEL.DEVICE, with fresh weights.

    Raises:
        UserError: the architecture or backbone does not exist, or Detectron2 asserts that values do not go together.
    """
    for key, name, registry in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        if name not in registry:
            raise UserError(f"{key} is {name!r}; there are: {', '.join(sorted(known for known, _ in registry))}.")
    try:
        return build_model(cfg)
    except AssertionError as error:
        if not error.args:
            raise
        what = cfg.MODEL.META_ARCHITECTURE
        raise UserError(f"Detectron2 cannot build a {what} from this config: {reason(error)}.") from error
