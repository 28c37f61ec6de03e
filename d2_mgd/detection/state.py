"""What a process carries from step to step beside weights: random state, modes of modules, plain numbers in modules.

Saved and restored as plain data, or kept as it was around something that would change it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

__all__ = [
    "changed_numbers",
    "module_numbers",
    "preserved_modes",
    "preserved_randomness",
    "random_state",
    "run_seed",
    "seeded_randomness",
    "set_module_numbers",
    "set_random_state",
    "shared_randomness",
]

Numbers = dict[str, dict[str, "int | float"]]


def run_seed(cfg: CfgNode) -> int:
    """SEED, or where it is -1 a drawn one, the same in all processes; then a collective."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def random_state() -> dict[str, Any]:
    """This process's random state, as tensors and plain containers."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from :func:`random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Whatever is drawn inside, the random state afterwards is the one before."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def shared_randomness() -> Iterator[None]:
    """Inside, all processes draw what the first one draws; the others go on as if they had not. A collective."""
    first = comm.all_gather(random_state())[0]
    if comm.is_main_process():
        yield
        return
    with preserved_randomness():
        set_random_state(first)
        yield


@contextmanager
def seeded_randomness(*seed: int) -> Iterator[None]:
    """Inside, python, numpy and torch's CPU generator draw what follows from ``seed``; afterwards all is as before.

    Args:
        seed: non-negative integers that say together what is drawn, such as a run's seed and a position in its stream.
    """
    words = np.random.SeedSequence(seed).generate_state(6)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])
    # not torch.manual_seed, which would seed the GPUs as well
    torch.default_generator.manual_seed(int(words[4]) << 32 | int(words[5]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


@contextmanager
def preserved_modes(module: nn.Module) -> Iterator[None]:
    """Every submodule is in training or evaluation mode afterwards as it was before, one by one."""
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
