"""Trainable norms where a student is distilled, that load and save as the frozen ones of the plain student.

Shape shorthand: C channels.

Detectron2 freezes every batch-norm of a pre-trained backbone. Partial L2 wants the student's pre-activations to follow
the scale and shift of the teacher's, so the last norm of each distilled stage learns (MGD's detector README, "Norm
Layers"; there with fresh group-norms, which plain Detectron2 cannot load).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import Tensor, nn

from d2_mgd.distill.norms import MaskedBatchNorm


class _LoadsAsFrozen(nn.BatchNorm2d):
    """A batch-norm with the state of Detectron2's FrozenBatchNorm2d: weight, bias, running_mean, running_var."""

    def __init__(self, frozen: FrozenBatchNorm2d) -> None:
        super().__init__(frozen.num_features, eps=frozen.eps)
        self.register_buffer("num_batches_tracked", None)
        self.to(frozen.weight.device)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(self, name).copy_(getattr(frozen, name))
        self.train(frozen.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # As the frozen norm does: Caffe2's files have no statistics, others count batches.
        state_dict.pop(prefix + "num_batches_tracked", None)
        if prefix + "weight" in state_dict:
            state_dict.setdefault(prefix + "running_mean", torch.zeros(self.num_features))
            state_dict.setdefault(prefix + "running_var", torch.ones(self.num_features))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


class TrainableAffineNorm(_LoadsAsFrozen):
    """Frozen statistics, trainable scale and shift. In inference it computes what the frozen norm computes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class TrainableSyncNorm(_LoadsAsFrozen, NaiveSyncBatchNorm):
    """Batch statistics over all processes and trainable scale and shift, on CPU and GPU alike.

    What it learns is the state of a frozen norm. In half precisions the mean of squares less the square of the mean is
    rounding, so statistics and their use are in float32 whatever comes in.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


_TRAINABLE = {"affine": TrainableAffineNorm, "sync_bn": TrainableSyncNorm}


def make_trainable(parent: nn.Module, name: str, kind: str) -> bool:
    """Replace a frozen batch-norm by a trainable one with the same state.

    Args:
        parent: the module that has it.
        name: its attribute.
        kind: ``affine`` or ``sync_bn``.

    Returns:
        bool: whether it was replaced; any norm but Detectron2's frozen one trains already and is left alone.
    """
    norm = getattr(parent, name)
    if not isinstance(norm, FrozenBatchNorm2d):
        return False
    setattr(parent, name, _TRAINABLE[kind](norm))
    return True


def export_student_state(student: nn.Module) -> dict[str, Tensor]:
    """The state of a distilled student, as the plain student with frozen norms has it.

    The trainable norms have the names and meaning of the frozen ones, so this is the student's state as it is, of
    detached tensors that share its memory.
    """
    return {name: value.detach() for name, value in student.state_dict().items()}


class FailedElsewhere(FloatingPointError):
    """Predictions are not finite on another rank, whose message says what they are."""


def synchronises(module: nn.Module) -> bool:
    """Whether forward and backward passes wait for other ranks, in a norm with the statistics of all."""
    kinds = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    return any(isinstance(one, kinds) or (isinstance(one, MaskedBatchNorm) and one.sync) for one in module.modules())
