"""Distillers for a pair of networks: from options as plain values, and those options from a config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from d2_mgd.detection.config import UNTRAINED
from d2_mgd.detection.config_checks import MARGIN_LOSSES, Recipe, feature_losses, feature_weights
from d2_mgd.detection.features import FeaturePair, teacher_margin
from d2_mgd.detection.heads import HeadDistiller
from d2_mgd.detection.teacher import FrozenTeacher
from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.errors import UserError

logger = logging.getLogger(__name__)


def distiller_options(cfg: CfgNode) -> dict[str, Any]:
    """The options of :class:`~d2_mgd.distill.MatchingGuidedDistiller` that the `MGD` node contains."""
    recipe = Recipe.of(cfg)
    return {
        "reducer": cfg.MGD.REDUCER,
        "loss": feature_losses(cfg),
        "metric": recipe.metric,
        "mode": cfg.MGD.MODE or None,
        "align": cfg.MGD.ALIGN,
        "norm": recipe.norm,
        "weights": feature_weights(cfg),
        "reduction": cfg.MGD.REDUCTION,
        "spatial": cfg.MGD.SPATIAL,
        "balance": recipe.balance,
        "tie": cfg.MGD.TIE,
    }


def log_recipe(cfg: CfgNode) -> None:
    """Log the recipe, with what follows from empty keys."""
    recipe, options = Recipe.of(cfg), distiller_options(cfg)
    if cfg.MGD.FEATURES:
        logger.info(
            "Distilling %s: align %s, loss %s, matching cost %s, norm %s, balance %s, decay %s, warm-up %d",
            ", ".join(cfg.MGD.FEATURES),
            options["align"],
            ", ".join(dict.fromkeys(options["loss"].values())),
            recipe.metric,
            recipe.norm,
            recipe.balance,
            recipe.decay,
            recipe.warmup,
        )
    if cfg.MGD.WEIGHTS and recipe.balance == "auto":
        logger.warning("MGD.WEIGHTS %s are not used: MGD.BALANCE is auto, not fixed", list(cfg.MGD.WEIGHTS))
    if recipe.balance == "auto" and not cfg.TEST.EVAL_PERIOD:
        logger.info(
            "Without TEST.EVAL_PERIOD, the distillation does not stop when the student is better than its teacher"
        )
    stop, last = cfg.MGD.SCHEDULE.STOP, cfg.SOLVER.MAX_ITER
    if recipe.warmup > last:
        logger.warning(
            "MGD.SCHEDULE.WARMUP %d is more than SOLVER.MAX_ITER %d: the weight stays low", recipe.warmup, last
        )
    if stop > last:
        logger.warning("MGD.SCHEDULE.STOP %d is after SOLVER.MAX_ITER %d: the weight does not reach zero", stop, last)


def make_distiller(
    distiller: MatchingGuidedDistiller | Mapping[str, Any] | None,
    pairs: Mapping[str, FeaturePair],
    teacher: FrozenTeacher,
) -> MatchingGuidedDistiller | None:
    """A distiller of the widths of ``pairs``; one that is given is checked, from options one is made.

    Args:
        distiller: or its options, without what follows from the networks: channels, margins and strides.
        pairs: features of both networks; none need no distiller.
        teacher: whose batch-norms the margins are from.

    Raises:
        UserError: a distiller for other widths; options that it does not have or that do not fit.
    """
    channels = {name: pair.channels for name, pair in pairs.items()}
    if isinstance(distiller, (Mapping, DictConfig)):
        if not channels:
            return None
        options = plain(distiller)
        loss = options.get("loss", "partial_l2")
        losses = dict.fromkeys(channels, loss) if isinstance(loss, str) else loss
        known = teacher.weights_path != UNTRAINED
        margins = {
            name: teacher_margin(teacher.model, pairs[name].teacher, statistics_needed=known)
            for name, loss in losses.items()
            if loss in MARGIN_LOSSES and name in pairs
        }
        strides = {name: pair.student.stride for name, pair in pairs.items()}
        try:
            return MatchingGuidedDistiller(channels, margins=margins, strides=strides, **options)
        except TypeError as error:
            raise UserError(f"the options of the distiller do not fit: {error}.") from error
    made_for = {} if distiller is None else distiller.channels
    if channels != made_for:
        raise UserError(f"the networks have the widths (S, T) {channels}, and the distiller was made for {made_for}.")
    return distiller


def make_heads(heads: HeadDistiller | Mapping[str, Any] | None, student: Any, teacher: Any) -> HeadDistiller | None:
    """A distiller of dense heads, from its options ``dense`` and ``cross`` or as it is given."""
    if heads is None or isinstance(heads, HeadDistiller):
        return heads
    return HeadDistiller(student, teacher, **heads)


def plain(options: Any) -> dict[str, Any]:
    """Options as python's own containers; those of a lazy config are OmegaConf's."""
    found: Any = OmegaConf.to_container(options, resolve=True) if isinstance(options, DictConfig) else options
    return dict(found)
