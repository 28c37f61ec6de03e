"""What modules carry from step to step beside tensors: training or evaluation mode, and plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

Numbers = dict[str, dict[str, "int | float"]]


@contextmanager
def preserved_modes(module: nn.Module) -> Iterator[None]:
    """Context that restores the training or evaluation mode of every submodule at its end."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def module_numbers(module: nn.Module) -> Numbers:
    """The plain python numbers of all submodules: submodule's path -> attribute -> number.

    Some modules train with such numbers, which no ``state_dict`` has: Detectron2's dense detectors keep the running
    mean of foreground anchors, by which they divide their losses, in ``loss_normalizer``.
    """
    numbers = {}
    for path, submodule in module.named_modules():
        own = {name: value for name, value in vars(submodule).items() if type(value) in (int, float)}
        if own:
            numbers[path] = own
    return numbers


def changed_numbers(now: Numbers, before: Numbers) -> Numbers:
    """Those of ``now`` that ``before`` lacks or has otherwise."""
    changed = {}
    for path, numbers in now.items():
        old = before.get(path, {})
        own = {name: value for name, value in numbers.items() if name not in old or old[name] != value}
        if own:
            changed[path] = own
    return changed


def set_module_numbers(module: nn.Module, numbers: Numbers) -> None:
    """Put numbers back where :func:`module_numbers` found them; unknown paths are left out."""
    modules = dict(module.named_modules())
    for path, own in numbers.items():
        for name, value in own.items():
            if path in modules:
                setattr(modules[path], name, value)
