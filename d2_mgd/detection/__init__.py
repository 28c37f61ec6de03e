"""Matching Guided Distillation for any Detectron2 detector. The only package here that imports Detectron2."""

from d2_mgd._install import DETECTRON2_INSTALL

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"d2_mgd.detection needs Detectron2, which is not installed: {DETECTRON2_INSTALL}") from error

from d2_mgd.detection.config import add_mgd_config
from d2_mgd.detection.hooks import distillation_hooks
from d2_mgd.detection.meta_arch import TeacherStudentDetector
from d2_mgd.detection.teacher import FrozenTeacher
from d2_mgd.detection.trainer import Trainer

__all__ = ["FrozenTeacher", "TeacherStudentDetector", "Trainer", "add_mgd_config", "distillation_hooks"]
