"""The state of a training: all that it goes on from, gathered from its processes and given back to them.

Saving changes no result of the run, so a run can be interrupted after any step and end with the same bits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from classification.checkpoint import FORMAT
from classification.options import as_values
from d2_mgd.distill.rematching import gather_costs
from d2_mgd.errors import UserError, reason
from d2_mgd.training.processes import averaged_buffers, gather
from d2_mgd.training.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from classification.engine import Trainer

logger = logging.getLogger(__name__)


def training_state(trainer: Trainer, random: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of all processes, in the first one (collective); the others' is not complete.

    The student's running statistics are the mean over processes. Within an epoch, each process's own are beside them.
    """
    student = trainer.student
    data = trainer.options.data
    own: dict[str, Any] = {
        "random": random or random_state(),
        "sums": trainer.sums.state_dict(),
        "broken": sorted(os.path.relpath(path, data) for path in trainer.intake.broken),
    }
    if trainer.process.world > 1 and trainer.progress.step:
        own["buffers"] = {name: buffer.cpu() for name, buffer in student.named_buffers() if _differs(buffer)}
    if student.distiller is not None and trainer.options.mgd_update_source == "online":
        gather_costs(student.distiller)
    mean = averaged_buffers(student)
    return {
        "format": FORMAT,
        "arch": trainer.options.arch,
        "classes": list(trainer.data["train"].folder.classes),
        "options": as_values(trainer.options),
        "world": trainer.process.world,
        "together": trainer.together,
        "teacher": trainer.teacher,
        "progress": dict(vars(trainer.progress)),
        "nonfinite": trainer.nonfinite.state_dict(),
        "student": _with_means(student.network, "network.", mean),
        "distiller": None if student.distiller is None else _with_means(student.distiller, "distiller.", mean),
        "costs": None if student.distiller is None else student.distiller.cost_state_dict(),
        "optimizer": trainer.stepper.optimizer.state_dict(),
        "scaler": trainer.student.precision.scaler.state_dict(),
        "processes": gather(own),
    }


def _differs(buffer: Tensor) -> bool:
    """Whether processes may hold different values: running statistics may."""
    return buffer.dtype in (torch.float32, torch.float64)


def _with_means(module: nn.Module, prefix: str, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state with other running statistics, which ``mean`` names by prefix and name."""
    state = module.state_dict()
    state.update({name: mean[prefix + name] for name in state if prefix + name in mean})
    return state  # with its metadata, by which some networks know the version of their weights


def restore_training(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Go on from :func:`training_state`, in every process.

    Raises:
        UserError: the state is of another distiller.
    """
    _load_modules(trainer, state)
    if state["costs"] and trainer.process.is_main:
        trainer.distiller.load_cost_state_dict(state["costs"])
    processes = state["processes"]
    broken = [path for own in processes for path in own.get("broken", ())]
    trainer.intake.broken.update(os.path.join(trainer.options.data, path) for path in broken)
    step = state["progress"]["step"]
    if state["together"] != trainer.together:  # as many images are done, rounded to whole steps
        step = min(trainer.order.steps, step * state["together"] // trainer.together)
    trainer.progress = type(trainer.progress)(**{**state["progress"], "step": step})
    trainer.nonfinite.load_state_dict(state["nonfinite"])
    trainer.summed = [name for name in processes[0]["sums"] if name != "images"]
    if len(processes) == trainer.process.world:
        own = processes[trainer.process.rank]
        trainer.sums.load_state_dict(own["sums"])
        buffers = dict(trainer.student.named_buffers())
        for name, buffer in own.get("buffers", {}).items():
            buffers[name].copy_(buffer)
        set_random_state(own["random"])
        return
    logger.warning(
        "the checkpoint is of %d processes and these are %d: the run goes on, but not exactly the same.",
        len(processes),
        trainer.process.world,
    )
    for other in processes[trainer.process.rank :: trainer.process.world]:
        trainer.sums.add_state(other["sums"])


def _load_modules(trainer: Trainer, state: Mapping[str, Any]) -> None:
    student = trainer.student
    if (state["distiller"] is None) != (student.distiller is None):
        raise UserError("one of the two has a feature distiller, and the other has not.")
    try:
        student.network.load_state_dict(state["student"])
        if student.distiller is not None:
            student.distiller.load_state_dict(state["distiller"])
    except RuntimeError as error:
        raise UserError(reason(error)) from error
    _load_momenta(trainer.stepper.optimizer, state["optimizer"])
    if state["scaler"] and trainer.student.precision.scaler.is_enabled():
        trainer.student.precision.scaler.load_state_dict(state["scaler"])


def _load_momenta(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What the optimiser has gathered; its settings (weight decay, momentum, ...) stay those of this run's options."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
