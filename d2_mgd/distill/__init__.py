"""How it guides: taps -> matching -> reducer -> loss, for any two torch modules. Knows no Detectron2."""

from d2_mgd.distill.balance import BALANCES
from d2_mgd.distill.dense import box_distribution_kd, dense_box_kd, dense_class_kd, with_statistics_of
from d2_mgd.distill.distillation import Distillation
from d2_mgd.distill.distiller import MatchingGuidedDistiller
from d2_mgd.distill.feature import ALIGNMENTS, MATCHED_ALIGNMENTS
from d2_mgd.distill.logits import LOGIT_LOSSES, LogitLoss, kd_loss, standardize_logits
from d2_mgd.distill.losses import FEATURE_LOSSES, REDUCTIONS, published_weights, reduce_loss
from d2_mgd.distill.margins import batch_norm_margin
from d2_mgd.distill.norms import NORMS
from d2_mgd.distill.reducers import REDUCERS
from d2_mgd.distill.reports import RematchReport, load_reports, save_reports
from d2_mgd.distill.schedule import DECAYS, RematchSchedule, WeightSchedule
from d2_mgd.distill.spatial import SPATIAL_WEIGHTS
from d2_mgd.distill.taps import FeatureTaps, Tap

__all__ = [
    "ALIGNMENTS",
    "BALANCES",
    "DECAYS",
    "FEATURE_LOSSES",
    "LOGIT_LOSSES",
    "MATCHED_ALIGNMENTS",
    "NORMS",
    "REDUCERS",
    "REDUCTIONS",
    "SPATIAL_WEIGHTS",
    "Distillation",
    "FeatureTaps",
    "LogitLoss",
    "MatchingGuidedDistiller",
    "RematchReport",
    "RematchSchedule",
    "Tap",
    "WeightSchedule",
    "batch_norm_margin",
    "box_distribution_kd",
    "dense_box_kd",
    "dense_class_kd",
    "kd_loss",
    "load_reports",
    "published_weights",
    "reduce_loss",
    "save_reports",
    "standardize_logits",
    "with_statistics_of",
]
