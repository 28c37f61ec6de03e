"""Pictures of matchings, of the maps they pair, of trainings, and of what networks find, each as a figure.

Nothing here opens a window or keeps a figure: save one with ``figure.savefig(path)``, or make HTML of it with
:func:`d2_mgd.visualize.report.picture`. Colours are told apart by colour-blind eyes too (Okabe and Ito's palette;
cividis).
"""

from d2_mgd.visualize.detections import Detections, draw_detections
from d2_mgd.visualize.matchings import (
    draw_costs,
    draw_group,
    draw_matching,
    draw_rematches,
    load_history,
    matching_order,
)
from d2_mgd.visualize.predictions import Prediction, draw_predictions
from d2_mgd.visualize.style import PALETTE
from d2_mgd.visualize.trainings import draw_curves, read_metrics, smoothed

__all__ = [
    "PALETTE",
    "Detections",
    "Prediction",
    "draw_costs",
    "draw_curves",
    "draw_detections",
    "draw_group",
    "draw_matching",
    "draw_predictions",
    "draw_rematches",
    "load_history",
    "matching_order",
    "read_metrics",
    "smoothed",
]
