"""The forward pass of a frozen teacher, as fast as its device computes it.

Shape shorthand: N images of (H, W).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from d2_mgd.errors import UserError

__all__ = ["TEACHER_PRECISIONS", "TeacherForward"]

logger = logging.getLogger(__name__)

TEACHER_PRECISIONS = ("auto", "student", "float32", "bfloat16", "float16")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86-64 and AArch64, as Linux names them
_MOST_GRAPHS = 8  # compiled graphs are of one size of images each

Forward = Callable[[Tensor], dict[str, Tensor]]


class TeacherForward:
    """Runs a frozen network, in a precision and memory format that may cost less than those of training.

    The memory format is channels_last, but for ``student``. It is no choice by a timing, because a resumed run has to
    choose the same.

    Args:
        precision: ``student`` follows the autocast of the caller and keeps the memory format, so that its maps are
            those of the plain network to the bit; ``float32``, ``bfloat16`` and ``float16`` do not; ``auto`` is
            bfloat16 where the device has instructions for it, else the autocast of the caller.
        compile: compile the forward with ``torch.compile``, once for each size of images. On a CPU the weights are
            constants of the graph: later changes of them have no effect. Without a compiler, or for a network that
            cannot be compiled, it runs eagerly, and a warning says so.

    Raises:
        UserError: an unknown precision.
    """

    def __init__(self, precision: str = "student", compile: bool = False) -> None:
        if precision not in TEACHER_PRECISIONS:
            raise UserError(f"unknown teacher precision {precision!r}; there are: {', '.join(TEACHER_PRECISIONS)}.")
        self.precision = precision
        self.compile = compile
        self._graphs: dict[tuple[Any, ...], Forward] = {}
        self._fails = False  # whether the compiler has failed; it is not tried again

    def describe(self, device: torch.device) -> str:
        """Name what decides how the maps are rounded, for checkpoints."""
        dtype = self.dtype(device)
        name = "as the student" if dtype is None else str(dtype).removeprefix("torch.")
        return f"{name}, compiled" if self.compile else name

    def prepare(self, network: nn.Module) -> nn.Module:
        """Set a network to eval mode and, if its convolutions are of two dimensions, to channels_last; return it."""
        network.eval()
        if self.precision != "student" and all(parameter.ndim < 5 for parameter in network.parameters()):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def forget(self) -> None:
        """Drop the compiled graphs, because the features have changed."""
        self._graphs.clear()

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Context of the teacher's precision.

        Raises:
            UserError: the device cannot compute in it.
        """
        dtype = self.dtype(device)
        if dtype is None:
            return nullcontext()
        if dtype == torch.float16 and device.type == "cpu":
            raise UserError("the teacher precision float16 needs a GPU: use bfloat16 or auto.")
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def dtype(self, device: torch.device) -> torch.dtype | None:
        """Return the precision on a device; None is that of the student."""
        if self.precision == "auto":
            return torch.bfloat16 if has_bfloat16(device) else None
        return _DTYPES.get(self.precision)

    def __call__(self, forward: Forward, images: Tensor) -> dict[str, Tensor]:
        """Maps of a batch.

        Args:
            forward: (N, 3, H, W) -> feature name -> map. The same object in all calls: graphs are stored by it.
            images: (N, 3, H, W) for the network.
        """
        return self.run(images.device, forward, images)

    @torch.no_grad()
    def run(
        self, device: torch.device, forward: Callable[..., dict[str, Tensor]], *inputs: Any, **named: Any
    ) -> dict[str, Tensor]:
        """Maps of a batch, for a network of any inputs; only a forward of images alone is compiled.

        Args:
            device: of the network.
            forward: inputs -> feature name -> map. The same object in all calls: graphs are stored by it.
            *inputs: of the network.
            **named: the same, by name.
        """
        if self.precision != "student":
            inputs, named = tree_map_only(Tensor, _channels_last, (inputs, named))
        with self.autocast(device):
            graph = self._graph(forward, *inputs) if self.compile and len(inputs) == 1 and not named else None
            return (graph or forward)(*inputs, **named)

    def _graph(self, forward: Forward, images: Tensor) -> Forward | None:
        """The compiled forward for images of this size; None where it runs eagerly."""
        key = (forward, images.shape, images.device, torch.is_autocast_enabled(images.device.type))
        if key not in self._graphs:
            if self._fails or len(self._graphs) == _MOST_GRAPHS:
                return None
            graph = _compiled(forward, images)
            if graph is None:
                self._fails = True
                return None
            self._graphs[key] = graph
            if len(self._graphs) == _MOST_GRAPHS:
                logger.warning(
                    "The teacher is compiled for %d sizes of images now. It runs eagerly for all others.", _MOST_GRAPHS
                )
        return self._graphs[key]


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def _compiled(forward: Forward, images: Tensor) -> Forward | None:
    """A forward as one graph for images of this size; None, with a warning, where there is none.

    Its operators are recorded in an eager run. Hooks, in-place activations and an early end need no support by the
    compiler then, and there are no graph breaks. On a CPU, constant weights let the compiler fold norms into
    convolutions and activations into their kernels. On a GPU each size of images would need its own copy of them.
    """
    names = list(forward(images))  # an error of the network is no error of the compiler
    start = time.perf_counter()
    try:
        graph = torch.compile(make_fx(lambda images: list(forward(images).values()))(images))
        with torch._inductor.config.patch(freezing=images.device.type == "cpu"):
            graph(images)
    except RuntimeError as error:
        logger.warning("The teacher cannot be compiled, so it runs eagerly: %s", str(error).strip().split("\n")[0])
        return None
    logger.info("Compiled the teacher for images %s in %.0f s.", tuple(images.shape), time.perf_counter() - start)
    return lambda images: dict(zip(names, graph(images)))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not _BFLOAT16_FLAGS.isdisjoint(_cpu_flags())


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Instruction sets of the processor; empty where the system does not list them."""
    file = Path("/proc/cpuinfo")
    return frozenset(file.read_text().split()) if file.exists() else frozenset()
