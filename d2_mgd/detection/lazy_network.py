"""Python configs (LazyConfig): of teachers beside a yaml student, and of whole trainings. They are programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from d2_mgd.errors import UserError, reason


def load_lazy(path: str, overrides: Sequence[Any], what: str) -> Any:
    """Execute a python config and apply ``path.key=value`` overrides.

    Args:
        path: of the file.
        overrides: in the syntax of Detectron2's tools/lazyconfig_train_net.py.
        what: how errors begin.

    Raises:
        UserError: it cannot be executed, has no ``model``, or an override does not fit.
    """
    try:
        cfg = LazyConfig.load(path)
    except (OSError, SyntaxError, ImportError) as error:
        raise UserError(f"{what} {path} cannot be loaded: {reason(error)}.") from error
    if "model" not in cfg:
        raise UserError(f"{what} {path} has no 'model'; it has: {', '.join(map(str, cfg)) or 'nothing'}.")
    words = [str(word) for word in overrides]
    for word in words:
        if "=" not in word:
            raise UserError(f"{what} {path} takes overrides path.key=value, not {word!r}.")
        _check_key(cfg, word, f"{what} {path}")
    return LazyConfig.apply_overrides(cfg, words)


def _check_key(cfg: Any, override: str, where: str) -> None:
    """Refuse a node, or a key of ``train``, that the config lacks. Calls check their arguments themselves."""
    node, *keys = re.split(r"[.\[]", override.split("=")[0])
    name, known = (keys[0], cfg.train) if node == "train" and node in cfg and keys else (node, cfg)
    if name not in known and override[0] not in "+~":
        listed = ", ".join(map(str, known))
        raise UserError(f"{where} has no {name!r} for {override}; it has: {listed}. To add it, write +{override}.")


def lazy_network_config(path: str, overrides: Sequence[Any], trusted: bool) -> CfgNode:
    """A plain config whose model is that of a python config, for :func:`~d2_mgd.detection.networks.build_network`.

    Raises:
        UserError: the file is not trusted, so nothing of it was executed; or see :func:`load_lazy`.
    """
    what = "MGD.TEACHER.CONFIG_FILE"
    if not trusted:
        raise UserError(
            f"{what} {path} is a python config, which was not executed, because it may do anything: set "
            "MGD.TEACHER.TRUST_PYTHON to True if you know its author."
        )
    lazy = load_lazy(path, overrides, what)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "LazyNetwork"
    cfg.MODEL.LAZY_CONFIG, cfg.MODEL.LAZY_OVERRIDES = path, [str(word) for word in overrides]
    cfg.INPUT.FORMAT = lazy.model.get("input_format") or cfg.INPUT.FORMAT
    cfg.MODEL.WEIGHTS = lazy.get("train", {}).get("init_checkpoint", "")
    return cfg


@META_ARCH_REGISTRY.register()
def LazyNetwork(cfg: CfgNode) -> nn.Module:
    """The model of a python config that :func:`lazy_network_config` has found trusted."""
    lazy = load_lazy(cfg.MODEL.LAZY_CONFIG, cfg.MODEL.LAZY_OVERRIDES, "the python config")
    model: nn.Module = instantiate(lazy.model)
    return model.to(cfg.MODEL.DEVICE)
