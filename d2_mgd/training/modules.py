"""State of modules that is not in their state dict: training or evaluation mode, and plain Python numbers."""

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
    """The plain Python numbers of all submodules: submodule's path -> attribute -> number.

    Some of them change during training and are not in the ``state_dict``: Detectron2's dense detectors divide their
    losses by ``loss_normalizer``, the running mean of foreground anchors.
    """
    numbers = {}
    for path, submodule in module.named_modules():
        own = {name: value for name, value in vars(submodule).items() if type(value) in (int, float)}
        if own:
            numbers[path] = own
    return numbers


def changed_numbers(now: Numbers, before: Numbers) -> Numbers:
    """The numbers in ``now`` that are missing in ``before`` or have another value there."""
    changed = {}
    for path, numbers in now.items():
        old = before.get(path, {})
        own = {name: value for name, value in numbers.items() if name not in old or old[name] != value}
        if own:
            changed[path] = own
    return changed


def set_module_numbers(module: nn.Module, numbers: Numbers) -> None:
    """Restore numbers of :func:`module_numbers`; submodules that do not exist are skipped."""
    modules = dict(module.named_modules())
    for path, own in numbers.items():
        for name, value in own.items():
            if path in modules:
                setattr(modules[path], name, value)
