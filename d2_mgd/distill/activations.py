"""Recording the map before the last activation of a block, in-place activations included."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _out_of_place_functions() -> dict[Any, Callable[..., Tensor]]:
    """Every activation function, in place or not -> the out-of-place function."""
    table: dict[Any, Callable[..., Tensor]] = {}
    for name in (
        "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "rrelu",
        "silu", "mish", "hardswish", "hardsigmoid", "gelu", "softplus", "threshold",
    ):  # fmt: skip
        function = getattr(F, name)
        table[function] = _without_inplace(function)
        for owner in (torch, torch.Tensor, F):
            for spelling in (name, f"{name}_"):
                other = getattr(owner, spelling, None)
                if other is not None and other not in table:
                    table[other] = table[function]
    for name in ("sigmoid", "tanh"):
        for owner in (torch, torch.Tensor, F):
            for spelling in (name, f"{name}_"):
                other = getattr(owner, spelling, None)
                if other is not None:
                    table[other] = getattr(torch, name)
    return table


def _without_inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without the argument inplace
        return function
    if "inplace" not in signature.parameters:
        return function

    def out_of_place(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["inplace"] = False
        return function(*bound.args, **bound.kwargs)

    return out_of_place


_OUT_OF_PLACE = _out_of_place_functions()


class ActivationWatch(TorchFunctionMode):
    """Mode that records the input and the output of the last activation of a block.

    In-place activations would overwrite the pre-activation, so they run out of place. This is the one extra map that
    keeping both needs anyway.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self.rectified = False  # whether the last activation was a ReLU

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _OUT_OF_PLACE.get(func)
        if replacement is None:
            return func(*args, **kwargs)
        result = replacement(*args, **kwargs)
        self.before = args[0] if args else kwargs["input"]
        self.after = result
        self.rectified = replacement is _OUT_OF_PLACE[F.relu]
        return result
