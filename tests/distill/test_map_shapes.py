"""Shape shorthand: N images, C channels, H, W of a map."""

from __future__ import annotations

import pytest
import torch

from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.distill.map_shapes import map_of_tokens, resized
from d2_mgd.errors import UserError


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 6), (5, 4)])
@pytest.mark.parametrize("class_tokens", [0, 1])
def test_tokens_become_the_map_that_they_were(height: int, width: int, class_tokens: int) -> None:
    found = torch.rand(2, 3, height, width)
    tokens = torch.cat([torch.rand(2, class_tokens, 3), found.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(map_of_tokens(tokens, height / width), found)


def test_tokens_whose_number_is_no_grid() -> None:
    with pytest.raises(UserError, match=r"15 tokens are no grid of height / width 1\.00"):
        map_of_tokens(torch.rand(2, 15, 3))


def test_maps_shrink_to_means_and_grow_bilinearly() -> None:
    found = torch.rand(2, 3, 4, 6)
    assert torch.allclose(resized(found, 2, 3), found.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean(dim=(3, 5)))
    assert torch.equal(resized(torch.full((1, 1, 2, 2), 3.0), 4, 4), torch.full((1, 1, 4, 4), 3.0))
    assert resized(found, 4, 6) is found


def test_a_vision_transformer_teaches_by_tokens() -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(2, 4, 6, 4, requires_grad=True), torch.rand(2, 1 + 24, 6)
    maps = teacher[:, 1:].transpose(1, 2).unflatten(2, (6, 4))
    distiller = MatchingGuidedDistiller({"p4": (4, 6)}, loss="mse", norm="none")
    distiller.observe({"p4": student}, {"p4": teacher})
    distiller.rematch()
    of_tokens, of_maps = (distiller({"p4": student}, {"p4": one})["loss_distill/p4"] for one in (teacher, maps))
    assert of_tokens > 0 and torch.equal(of_tokens, of_maps)


@pytest.mark.parametrize("others", [2, 5])
def test_register_tokens_are_cut(others: int) -> None:
    found = torch.rand(2, 3, 14, 14)
    tokens = torch.cat([torch.rand(2, others, 3), found.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(map_of_tokens(tokens), found)


@pytest.mark.parametrize("kind", ["tokens", "channels last"])
def test_a_balance_sees_the_task_through_the_view_that_is_compared(kind: str) -> None:
    """The task uses the student's tensor, the distillation a view of it."""
    torch.manual_seed(0)
    teacher = torch.rand(4, 6, 3, 4)

    def shaped(maps: torch.Tensor) -> torch.Tensor:
        rows = maps.permute(0, 2, 3, 1)
        return rows if kind == "channels last" else torch.cat([rows[:, 0, :1], rows.flatten(1, 2)], dim=1)

    factors = []
    for given in (shaped, torch.clone):
        student = torch.linspace(-1, 1, 4 * 5 * 12).view(4, 5, 3, 4).sin().requires_grad_()
        distiller = MatchingGuidedDistiller({"a": (5, 6)}, loss="mse", norm="none", align="conv1x1", balance="auto")
        torch.nn.init.constant_(distiller.features["a"].project.weight, 0.1)
        for _ in range(3):
            found = given(student)
            (loss,) = distiller({"a": found}, {"a": teacher}).values()
            (loss + student.square().sum()).backward() if given is torch.clone else (
                loss + (found if kind == "channels last" else found[:, 1:]).square().sum()
            ).backward()
            distiller.update_balance()
        factors.append(distiller.balance.factors)
    assert factors[0] != 1.0 and torch.allclose(*factors)
