"""The matching cost between channels, and the exact assignment of teacher to student channels.

Works on tensors and arrays, without any network. See Yue, Deng, Zhou, "Matching Guided Distillation", ECCV 2020.
"""

from d2_mgd.matching.channel_matching import ChannelMatching
from d2_mgd.matching.cost import METRICS, ChannelCost
from d2_mgd.matching.projection import ProjectionAgreement, matched_weight, projection_agreement
from d2_mgd.matching.solver import MODES, SolverError, solve_matching

__all__ = [
    "METRICS",
    "MODES",
    "ChannelCost",
    "ChannelMatching",
    "ProjectionAgreement",
    "SolverError",
    "matched_weight",
    "projection_agreement",
    "solve_matching",
]
