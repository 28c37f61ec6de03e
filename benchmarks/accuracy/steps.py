"""One optimiser step after another, launched kernel by kernel or replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Maps = dict[str, Tensor]

_WARM_UP = 3  # eager steps before the first capture: libraries initialise, torch.compile compiles


class Steps:
    """Training steps on indices of images.

    With ``graphs`` the first steps run eagerly; then a step is captured and replayed (PyTorch, "CUDA semantics",
    whole-network capture). :meth:`changed` must be called when anything but the contents of tensors has changed: the
    next step runs eagerly, and the one after it is captured anew.

    Args:
        loss: chosen indices (N,) and the distillation's factor () -> the loss () and both networks' maps.
        optimizer: of all trained parameters.
        generator: draws the augmentation; on the device.
        graphs: whether to capture. Needs a CUDA device.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], tuple[Tensor, Maps, Maps]],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        graphs: bool,
    ) -> None:
        self.loss, self.optimizer, self.generator, self.graphs = loss, optimizer, generator, graphs
        self.factor = torch.ones((), device=generator.device)
        self.total = torch.zeros((), device=generator.device)
        self._eager_steps = _WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None
        self._chosen = torch.empty(0)
        self._maps: tuple[Maps, Maps] = ({}, {})

    def changed(self) -> None:
        """Capture anew: a learning rate, a matching, or a network's mode has changed."""
        self._graph = None
        self._eager_steps = max(self._eager_steps, 1)

    def __call__(self, chosen: Tensor, factor: float) -> tuple[Maps, Maps]:
        """Make one step; adds the loss to ``total`` and returns the student's and the teacher's maps.

        Args:
            chosen: (N,) indices of the batch's images.
            factor: of the distillation losses.
        """
        self.factor.fill_(factor)
        if not self.graphs:
            return self._step(chosen)
        if self._eager_steps > 0:
            self._eager_steps -= 1
            return self._on_side_stream(chosen)
        if self._graph is None:
            self._capture(chosen)
        assert self._graph is not None
        self._chosen.copy_(chosen)
        self._graph.replay()
        return self._maps

    def _step(self, chosen: Tensor) -> tuple[Maps, Maps]:
        loss, student_maps, teacher_maps = self.loss(chosen, self.factor)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()
        return student_maps, teacher_maps

    def _on_side_stream(self, chosen: Tensor) -> tuple[Maps, Maps]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            maps = self._step(chosen)
        torch.cuda.current_stream().wait_stream(stream)
        return maps

    def _capture(self, chosen: Tensor) -> None:
        self._chosen = chosen.clone()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._maps = self._step(self._chosen)
        self._graph = graph
