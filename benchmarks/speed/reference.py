"""The published implementation, from a checkout of it, on the same inputs. Nothing of it is in this repository."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ortools.graph.python import linear_sum_assignment

from benchmarks.speed.pair import Pair


class _LinearSumAssignment:
    """The old names of a class of OR-Tools, over its present ones."""

    OPTIMAL = linear_sum_assignment.SimpleLinearSumAssignment.OPTIMAL

    def __init__(self) -> None:
        self._solver = linear_sum_assignment.SimpleLinearSumAssignment()
        self.AddArcWithCost = self._solver.add_arc_with_cost
        self.Solve = self._solver.solve
        self.RightMate = self._solver.right_mate
        self.AssignmentCost = self._solver.assignment_cost
        self.NumNodes = self._solver.num_nodes


class Published:
    """A checkout of the published code.

    Args:
        checkout: its folder.

    Raises:
        FileNotFoundError: the folder is no such checkout.
    """

    def __init__(self, checkout: Path) -> None:
        for part in ("mgd/builder.py", "cls/models/resnet.py"):
            if not (checkout / part).is_file():
                raise FileNotFoundError(f"{checkout} is no checkout of the published implementation: no {part} in it.")
        shim = types.ModuleType("ortools.graph.pywrapgraph")
        shim.LinearSumAssignment = _LinearSumAssignment  # type: ignore[attr-defined]
        sys.modules["ortools.graph.pywrapgraph"] = shim
        import ortools.graph

        ortools.graph.pywrapgraph = shim
        sys.path[:0] = [str(checkout), str(checkout / "cls")]
        self._builder = importlib.import_module("mgd.builder")
        self._resnet = importlib.import_module("models.resnet")
        self._mobilenet = importlib.import_module("models.mobilenetv1")

    def solve(self, cost: np.ndarray) -> None:
        """Build and solve one feature, as its distiller does after a pass."""
        state = types.SimpleNamespace(adj_matrix=[cost], num_tracked_imgs=1, shave=False, distributed=False)
        with redirect_stdout(StringIO()):
            self._builder.MGDistiller.update_flow(state)

    def steps(self, pair: Pair) -> dict[str, Callable[[], None]]:
        """Its training step and its rematch pass, on the images of ``pair``."""
        with _without_cuda(), redirect_stdout(StringIO()):
            teacher, student = self._resnet.resnet50(), self._mobilenet.mobilenet_v1()
            model: Any = self._builder.MGDistiller(teacher, student)
        model.guided_inds = [
            torch.arange(teachers) for teachers in model.t_channels
        ]  # which assignment it is changes no time
        parameters = [*student.parameters(), *model.BNs.parameters()]
        optimizer = torch.optim.SGD(parameters, 1e-4, momentum=0.9, weight_decay=4e-5)
        images = pair.images.contiguous()

        def step() -> None:
            model.train()
            teacher.eval()
            logits, distillation = model(images)
            loss = F.cross_entropy(logits, pair.targets) + distillation.sum() / images.shape[0] / 1e4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def rematch_pass() -> None:
            model.eval()
            with torch.no_grad():
                model.extract_feature(images)

        return {"published step": step, "published pass": rematch_pass}


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Its constructor moves margins to a GPU; here they stay."""
    before = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.cuda = before  # type: ignore[method-assign]
