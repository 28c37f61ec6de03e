"""A network's forward pass as compiled graphs, one for each size of images.

Shape shorthand: N images of (H, W).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

logger = logging.getLogger(__name__)

_MOST_GRAPHS = 8

Forward = Callable[[Tensor], dict[str, Tensor]]


class CompiledForwards:
    """Compiled graphs of forward passes, by the size of the images.

    Operators are recorded in an eager run. Hooks, in-place activations and an early end need no support by the compiler
    then, and there are no graph breaks. Without a compiler, for a network that cannot be compiled, and for images of
    more than eight sizes, the forward runs eagerly, and one warning says so.

    Args:
        role: of the network, for the log: ``teacher`` or ``student``.
        constant_weights: on a CPU the weights are constants of the graphs, so that the compiler folds norms into
            convolutions and activations into their kernels. Later changes of the weights have no effect. On a GPU each
            size of images would need its own copy of them.
    """

    def __init__(self, role: str, constant_weights: bool) -> None:
        self.role = role
        self.constant_weights = constant_weights
        self._graphs: dict[tuple[Any, ...], Forward | None] = {}

    def forget(self) -> None:
        """Drop the graphs, because the features have changed."""
        self._graphs.clear()

    def get(self, forward: Forward, images: Tensor, network: nn.Module | None = None) -> Forward:
        """The compiled forward for images of this size, or ``forward`` itself.

        Args:
            forward: (N, 3, H, W) -> feature name -> map. The same object in all calls: graphs are stored by it.
            images: (N, 3, H, W) for the network.
            network: is trained, so recording must not change its buffers; None if its forward changes nothing.
        """
        autocast = torch.is_autocast_enabled(images.device.type)
        key = (forward, images.shape, images.device, autocast, torch.is_grad_enabled())
        if key not in self._graphs:
            if len(self._graphs) == _MOST_GRAPHS:
                return forward
            self._graphs[key] = self._compile(forward, images, network or nn.Module())
            if len(self._graphs) == _MOST_GRAPHS:
                logger.warning(
                    "The %s is compiled for %d sizes of images now. It runs eagerly for all others.",
                    self.role,
                    _MOST_GRAPHS,
                )
        return self._graphs[key] or forward

    def _compile(self, forward: Forward, images: Tensor, network: nn.Module) -> Forward | None:
        constant = self.constant_weights and images.device.type == "cpu"
        with _unchanged(network, images.device):
            names = list(forward(images))  # an error of the network is no error of the compiler
            start = time.perf_counter()
            try:
                graph = torch.compile(make_fx(lambda images: list(forward(images).values()))(images), dynamic=False)
                with torch._inductor.config.patch(freezing=constant):
                    _run_both_ways(graph(images), list(network.parameters()))
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0]
                logger.warning("The %s cannot be compiled, so it runs eagerly: %s", self.role, reason)
                return None
        seconds = time.perf_counter() - start
        logger.info("Compiled the %s for images %s in %.0f s.", self.role, tuple(images.shape), seconds)
        return lambda images: dict(zip(names, graph(images)))


@contextmanager
def _unchanged(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore a network's buffers and the global RNG on leaving."""
    buffers = {buffer: buffer.clone() for buffer in network.buffers()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in buffers.items():
            buffer.copy_(before)


def _run_both_ways(outputs: list[Tensor], parameters: list[nn.Parameter]) -> None:
    """Compile the backward pass too, so that its errors are raised here."""
    needed = [parameter for parameter in parameters if parameter.requires_grad]
    if needed and torch.is_grad_enabled():
        torch.autograd.grad([output.float().sum() for output in outputs], needed, allow_unused=True)
