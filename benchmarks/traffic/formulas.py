"""The formulas of docs/scaling.md, for a trainer and for networks of full size.

Shape shorthand: p trained parameters, S student channels, T teacher channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import classification.engine as engine
from benchmarks.traffic.collectives import tensor_bytes
from classification.features import pair_features
from classification.models import build
from d2_mgd.distill.norms import MaskedBatchNorm
from d2_mgd.distill.stages import measure_maps


def expected_bytes(trainer: engine.Trainer) -> dict[str, int]:
    """Return the bytes that a process hands to each collective over the whole run."""
    world = trainer.process.world
    if world == 1:
        return {}
    epochs, steps = trainer.options.epochs, trainer.order.steps * trainer.options.epochs
    trained = [tensor_bytes(parameter) for parameter in trainer.student.parameters()]
    pairs = [cost.num_student * cost.num_teacher for cost in trainer.distiller.costs.values()]
    costs = sum(8 * (pair + 1) for pair in pairs)
    norms = [norm for norm in trainer.student.modules() if isinstance(norm, MaskedBatchNorm) and norm.sync]
    statistics = sum(8 * buffer.numel() for buffer in trainer.student.buffers() if buffer.is_floating_point())
    losses = len(trainer.summed) - 3  # beside their sum and two errors
    failures = 8  # whether rank 0 could write a file
    expected = {
        "gradients: all_reduce": sum(trained) * steps,
        "agreement: all_reduce": 16 * steps,
        "rematch: all_reduce": (costs + failures) * epochs,
        "running statistics: all_reduce": statistics * 2 * epochs,  # of an epoch, and before a pass
        "checkpoint: all_reduce": (statistics + failures) * epochs,
        "evaluation: all_reduce": (8 + 32) * epochs + 8 * epochs,
        "other: all_reduce": (8 * (losses + 4) + failures) * epochs,
        "start: broadcast": sum(tensor_bytes(tensor) for tensor in state(trainer.student)),
    }
    if norms:
        elements = sum(2 * (2 * norm.num_features + 1) for norm in norms)  # forward and backward
        expected["synchronised norms: all_reduce"] = elements * norms[0].weight.element_size() * steps
    return expected


def state(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def expected_held(trainer: engine.Trainer) -> int:
    """Return the bytes of tensors between two steps: weights, gradients, momentum, buffers and the teacher."""
    trained = sum(tensor_bytes(parameter) for parameter in trainer.student.parameters())
    buffers = sum(tensor_bytes(buffer) for buffer in trainer.student.buffers())
    teacher = trainer.step.teacher
    assert isinstance(teacher, nn.Module)
    return 3 * trained + buffers + sum(tensor_bytes(tensor) for tensor in state(teacher))


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Return the bytes of the maps that a forward pass keeps for its backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    stores: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        stores[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    size = sum(store.nbytes() for address, store in stores.items() if address not in own)
    del result
    return size


def sizes(student: str, teacher: str) -> dict[str, Any]:
    """Return the formulas' values for 1,000 classes and images of 224 px; nothing is trained."""
    pairs = pair_features(student, teacher)
    networks = [build(name, 1000) for name in (student, teacher)]
    taps = ({name: pair.student for name, pair in pairs.items()}, {name: pair.teacher for name, pair in pairs.items()})
    image = torch.zeros(1, 3, 224, 224)
    widths = [measure_maps(name, net, tap, image) for name, net, tap in zip((student, teacher), networks, taps)]
    channels = {name: (widths[0][name][0], widths[1][name][0]) for name in pairs}
    trained_tensors = list(networks[0].parameters())
    trained = sum(parameter.numel() for parameter in trained_tensors)
    trained += sum(2 * width for width, _ in channels.values())  # the distiller's norms
    costs = sum(s * t for s, t in channels.values())
    return {
        "student": student,
        "teacher": teacher,
        "channels": channels,
        "trained_parameters": trained,
        "step_bytes": 4 * trained + 16,
        "rematch_bytes": 8 * (costs + len(channels)),
        "held_bytes": 12 * trained
        + sum(tensor_bytes(tensor) for network in networks for tensor in network.buffers())
        + sum(tensor_bytes(parameter) for parameter in networks[1].parameters()),
        "rematch_held_bytes": 16 * costs,
        "saved_bytes_an_image": saved_bytes(lambda: networks[0].train()(torch.zeros(2, 3, 224, 224)), trained_tensors)
        // 2,
    }
