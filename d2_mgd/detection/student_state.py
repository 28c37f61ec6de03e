"""The state dict of a distilled student: the student's own keys, and beside them the distiller's under one prefix.

So any checkpointer saves a file that plain Detectron2 loads, and plain weights load into the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2_mgd.training.processes import rank

DISTILLER = "distiller."  # prefix of the keys that are not the student's
_STUDENT = "student."
_PROGRESS, _COSTS, _MEASURED = f"{DISTILLER}progress", f"{DISTILLER}costs.", f"{DISTILLER}measured"


def save_as_student(module: nn.Module) -> None:
    """From now on ``module.state_dict()`` has the keys of ``module.student``, and ``load_state_dict`` takes them.

    Keys with the prefix ``student.`` are taken too. A state without any key of the distiller leaves the distiller as it
    was, and is complete without.

    Args:
        module: a :class:`~d2_mgd.detection.TeacherStudentDetector`, whose parts are ``student``, ``distiller`` and
            ``rematcher``.
    """
    state = _StudentState()
    module._register_state_dict_hook(state.saved)
    module._register_load_state_dict_pre_hook(state.before_loading, with_module=True)
    module.register_load_state_dict_post_hook(state.loaded)


class _StudentState:
    """The hooks of one module."""

    def __init__(self) -> None:
        self.prefix = ""
        self.plain = False  # the state that is being loaded has no distiller

    def saved(self, module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            state[prefix + name[len(prefix) :].removeprefix(_STUDENT)] = state.pop(name)
        versions = getattr(state, "_metadata", {})
        for name in [name for name in versions if name.startswith(prefix + _STUDENT)]:
            versions[prefix + name[len(prefix + _STUDENT) :]] = versions.pop(name)
        for name, value in _progress(module).items():
            state[prefix + name] = value

    def before_loading(
        self, module: Any, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self.prefix = prefix
        own = [name for name in state if name.startswith(prefix)]
        self.plain = not any(name.startswith(prefix + DISTILLER) for name in own)
        for name in own:
            if not name.startswith((prefix + _STUDENT, prefix + DISTILLER)):
                state[prefix + _STUDENT + name[len(prefix) :]] = state.pop(name)
        versions = getattr(state, "_metadata", {})
        for name, version in list(versions.items()):
            if name.startswith(prefix) and not name.startswith((prefix + _STUDENT, prefix + DISTILLER)):
                versions.setdefault(prefix + _STUDENT + name[len(prefix) :], version)
        extra = [
            name for name in state if name.startswith(tuple(prefix + one for one in (_PROGRESS, _COSTS, _MEASURED)))
        ]
        _continue_at(module, {name[len(prefix) :]: state.pop(name) for name in extra})

    def loaded(self, module: nn.Module, incompatible: Any) -> None:
        student, distiller = self.prefix + _STUDENT, self.prefix + DISTILLER
        for names in (incompatible.missing_keys, incompatible.unexpected_keys):
            names[:] = [
                self.prefix + name.removeprefix(student) if name.startswith(student) else name
                for name in names
                if not (self.plain and name.startswith(distiller))
            ]


def _progress(module: Any) -> dict[str, Tensor]:
    """What continues a schedule: the numbers of finished steps and, online, this rank's running costs."""
    if module.distiller is None:
        return {}
    rematcher = module.rematcher
    costs = module.distiller.costs if rematcher.source == "online" else {}
    return {
        _PROGRESS: torch.tensor([rematcher.finished, rematcher.checked]),
        **{_COSTS + name: cost.packed() for name, cost in costs.items()},
        **({} if module.distiller.measured is None else {_MEASURED: module.distiller.measured.clone()}),
    }


def _continue_at(module: Any, state: Mapping[str, Tensor]) -> None:
    if _PROGRESS in state:
        module.rematcher.finished, module.rematcher.checked = state[_PROGRESS].tolist()
    if _MEASURED in state and module.distiller is not None and module.distiller.measured is not None and rank() == 0:
        module.distiller.measured.copy_(state[_MEASURED])
    for name, cost in ({} if module.distiller is None else module.distiller.costs).items():
        if _COSTS + name in state:
            packed = state[_COSTS + name]
            # one rank wrote its costs; loaded on all ranks, its images would count several times
            cost.load_packed(packed if rank() == 0 else torch.zeros_like(packed))
