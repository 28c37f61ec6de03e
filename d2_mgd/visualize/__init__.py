"""Figures of matchings, of the maps they pair, of trainings, and of detections and predictions.

Each function returns a figure that is not registered with pyplot: save it with ``figure.savefig(path)``, or collect
several in a :class:`d2_mgd.visualize.report.Report`. The palettes (Okabe and Ito's; cividis) suit colour-blind readers.
"""

from d2_mgd.visualize.detections import Detections, draw_detections
from d2_mgd.visualize.matchings import (
    draw_group,
    draw_matching,
    draw_rematches,
    load_history,
    matching_images,
    matching_order,
)
from d2_mgd.visualize.predictions import Prediction, draw_predictions
from d2_mgd.visualize.style import PALETTE
from d2_mgd.visualize.trainings import draw_curves, read_metrics, smoothed

__all__ = [
    "PALETTE",
    "Detections",
    "Prediction",
    "draw_curves",
    "draw_detections",
    "draw_group",
    "draw_matching",
    "draw_predictions",
    "draw_rematches",
    "load_history",
    "matching_images",
    "matching_order",
    "read_metrics",
    "smoothed",
]
