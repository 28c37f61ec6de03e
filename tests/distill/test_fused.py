"""The pass over slices equals the plain path in value, gradients and running statistics, in every memory format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2_mgd.distill import FEATURE_LOSSES, REDUCERS, fused, reduce_loss
from d2_mgd.distill.fused import Comparison, can_fuse, fused_norm, sum_of_squares
from d2_mgd.distill.norms import MaskedBatchNorm, build_norm

GROUPS = torch.tensor([[4, 1, 7], [0, 2, -1], [8, 5, -1], [3, 6, -1]])
IMAGES, STUDENTS, TEACHERS, HEIGHT, WIDTH = 3, 4, 9, 5, 6


@pytest.fixture(params=[1, 40, 10**9], ids=["smallest slices", "small slices", "one slice"], autouse=True)
def _slice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_SLICE", request.param)


def maps(channels: int, memory_format: torch.memory_format, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(IMAGES, channels, HEIGHT, WIDTH, dtype=dtype).contiguous(memory_format=memory_format)


def compare(
    student: Tensor, comparison: Comparison, norm: torch.nn.Module, plain: bool
) -> tuple[Tensor, list[Tensor | None]]:
    student = student.detach().clone().requires_grad_()
    if not plain:
        taken = fused_norm(norm, student, comparison.valid)
        normalised = norm(student, comparison.valid) if taken is None else student
        total = sum_of_squares(normalised, comparison, taken)
    else:
        normalised = norm(student, comparison.valid)
        guided, margin = comparison.teacher, comparison.margin
        if comparison.reducer is not None:
            guided, margin = comparison.reducer(guided, comparison.groups, margin, None)
        elements = comparison.loss(normalised, guided.to(student.dtype), margin, comparison.valid)
        total = reduce_loss(elements, comparison.valid, "image_sum", comparison.spatial_weight) * IMAGES
    gradients = torch.autograd.grad(0.3 * total, [student, *norm.parameters()], allow_unused=True)
    return total.detach(), list(gradients)


@pytest.mark.parametrize("norm", ["bn", "gn", "none"])
@pytest.mark.parametrize("extras", ["plain", "margin", "mask", "spatial weight", "all"])
@pytest.mark.parametrize("reducer", ["amp", "max", "mean"])
@pytest.mark.parametrize("loss", ["partial_l2", "mse"])
def test_equals_the_plain_path(loss: str, reducer: str, extras: str, norm: str) -> None:
    wanted: Any = {
        "margin": -torch.rand(TEACHERS, dtype=torch.float64),
        "valid": torch.rand(IMAGES, 1, HEIGHT, WIDTH) > 0.3,
        "spatial_weight": torch.rand(IMAGES, 1, HEIGHT, WIDTH, dtype=torch.float64),
    }
    margin = wanted["margin"] if extras in ("margin", "all") else None
    valid = wanted["valid"] if extras in ("mask", "all") else None
    spatial_weight = wanted["spatial_weight"] if extras in ("spatial weight", "all") else None
    for formats in (
        (torch.contiguous_format, torch.contiguous_format),
        (torch.channels_last, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ):
        student, teacher = maps(STUDENTS, formats[0]), maps(TEACHERS, formats[1])
        comparison = Comparison(
            teacher, REDUCERS.get(reducer), GROUPS, margin, FEATURE_LOSSES.get(loss), valid, spatial_weight
        )
        before = teacher.clone()
        norms = [build_norm(norm, STUDENTS).double() for _ in range(2)]
        for module in norms:
            for value in module.parameters():
                torch.nn.init.uniform_(value, 0.5, 1.5)
        norms[1].load_state_dict(norms[0].state_dict())
        results = [compare(student, comparison, module, plain) for module, plain in zip(norms, (False, True))]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(dict(norms[0].state_dict()), dict(norms[1].state_dict()))
        assert torch.equal(teacher, before)


class _WithNorm(torch.nn.Module):
    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.norm = MaskedBatchNorm(STUDENTS).double()
        self.comparison = comparison

    def forward(self, student: Tensor) -> Tensor:
        return sum_of_squares(student, self.comparison, self.norm)


def test_gradients_are_the_derivatives() -> None:
    teacher = maps(TEACHERS, torch.contiguous_format)
    comparison = Comparison(teacher, REDUCERS.get("amp"), GROUPS, None, FEATURE_LOSSES.get("partial_l2"))
    whole = _WithNorm(comparison)

    def function(student: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(whole, {"norm.weight": weight, "norm.bias": bias}, (student,))

    student = maps(STUDENTS, torch.channels_last).requires_grad_()
    scale = torch.rand(STUDENTS, dtype=torch.float64, requires_grad=True)
    shift = torch.rand(STUDENTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (student, scale, shift))
    assert torch.autograd.gradcheck(lambda x: sum_of_squares(x, comparison), (student,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_teacher_is_compared_in_the_dtype_of_the_student(dtype: torch.dtype) -> None:
    student, teacher = maps(STUDENTS, torch.channels_last, torch.float32), maps(TEACHERS, torch.channels_last).to(dtype)
    comparison = Comparison(teacher, REDUCERS.get("amp"), GROUPS, None, FEATURE_LOSSES.get("partial_l2"))
    norm = build_norm("none", STUDENTS)
    results = [compare(student, comparison, norm, plain) for plain in (False, True)]
    torch.testing.assert_close(results[0], results[1])


def test_padding_may_hold_anything() -> None:
    student, teacher = maps(STUDENTS, torch.contiguous_format), maps(TEACHERS, torch.contiguous_format)
    valid = torch.ones(IMAGES, 1, HEIGHT, WIDTH, dtype=torch.bool)
    valid[0, :, 3:] = False
    teacher[0, :, 3:] = float("nan")
    student[0, :, 3:] = float("inf")
    comparison = Comparison(teacher, REDUCERS.get("amp"), GROUPS, None, FEATURE_LOSSES.get("partial_l2"), valid)
    total, (gradient,) = compare(student, comparison, build_norm("none", STUDENTS), plain=False)
    assert torch.isfinite(total) and gradient is not None and torch.isfinite(gradient).all()


def test_what_it_does_not_know_takes_the_plain_path() -> None:
    assert can_fuse(FEATURE_LOSSES.get("mse"), REDUCERS.get("sm")) and can_fuse(FEATURE_LOSSES.get("mse"), None)
    assert not can_fuse(FEATURE_LOSSES.get("pearson"), REDUCERS.get("amp"))
    assert not can_fuse(FEATURE_LOSSES.get("mse"), REDUCERS.get("rd"))  # its choice depends on the order of drawing
    norm, student = MaskedBatchNorm(STUDENTS), maps(STUDENTS, torch.contiguous_format)
    assert fused_norm(norm, student, None) is norm
    assert fused_norm(norm, student, torch.ones(IMAGES, 1, HEIGHT, WIDTH, dtype=torch.bool)) is None
    assert fused_norm(norm, student[:1, :, :1, :1], None) is None
    assert fused_norm(norm.eval(), student, None) is None
