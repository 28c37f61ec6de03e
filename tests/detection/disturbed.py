"""Run tools/train_net.py with a teacher or predictions that break for some iterations, in one process of several:

python tests/detection/disturbed.py {teacher,predictions} RANK FIRST LAST ARGUMENTS ...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


class _Break(HookBase):
    """From iteration ``first`` to ``last`` a bias is NaN."""

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.whole: torch.Tensor | None = None

    def bias(self) -> torch.Tensor:
        raise NotImplementedError

    def before_step(self) -> None:
        bias = self.bias()
        if self.whole is None:
            self.whole = bias.detach().clone()
        with torch.no_grad():
            bias.copy_(self.whole)
            if self.first <= self.trainer.iter <= self.last:
                bias[0] = float("nan")


class BreakTeacher(_Break):
    """The teacher's p4 is NaN."""

    def bias(self) -> torch.Tensor:
        return self.trainer.detector.teacher.model.backbone.fpn_output4.bias


class BreakPredictions(_Break):
    """The student's objectness is NaN, which Detectron2 refuses."""

    def bias(self) -> torch.Tensor:
        return self.trainer.student.proposal_generator.rpn_head.objectness_logits.bias


WHAT = {"teacher": BreakTeacher, "predictions": BreakPredictions}


def main(what: str, rank: int, first: int, last: int, arguments: list[str]) -> None:
    import train_net

    class Disturbed(train_net.Trainer):
        def build_hooks(self) -> list[Any]:
            own = [WHAT[what](first, last)] if int(os.environ["RANK"]) == rank else []
            return [*own, *super().build_hooks()]

    train_net.Trainer = Disturbed
    train_net.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5:])
