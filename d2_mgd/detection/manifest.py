"""``checkpoints.json`` of OUTPUT_DIR: which checkpoints a training wrote, and in what state they must be found."""

from __future__ import annotations

from d2_mgd import training
from d2_mgd.detection.weights import read_tensors
from d2_mgd.training import write_atomically

__all__ = ["CheckpointManifest", "write_atomically"]


class CheckpointManifest(training.CheckpointManifest):
    """The checkpoints of one folder.

    Args:
        folder: OUTPUT_DIR.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, read_tensors, r"model_(\d+|final)\.pth")
