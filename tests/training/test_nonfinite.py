"""Steps with non-finite numbers: what is undone, written and counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2_mgd.matching import ChannelCost
from d2_mgd.training.nonfinite import NonFiniteError, NonFinitePolicy, StepReport
from d2_mgd.training.steps import Precision, Stepper


class Network(nn.Module):
    """Has running statistics, a plain number that changes in a forward pass, and a matching cost."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.normalizer = 1.0
        self.costs = {"a": ChannelCost(2, 2)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.normalizer = 0.9 * self.normalizer + 0.1
        maps = images.view(-1, 2, 1, 2)
        self.costs["a"].update(maps, maps)
        return {"loss": self.norm(images).square().sum() / self.normalizer}


def policy_of(network: Network, skip: int, folder: Path) -> NonFinitePolicy:
    return NonFinitePolicy(network, skip, folder, lambda random: {"random": random}, costs=network.costs)


def step(network: Network, policy: NonFinitePolicy, images: Tensor) -> None:
    stepper = Stepper(network, torch.optim.SGD(network.parameters(), 0.1), Precision(), network)
    policy.before_step(observing=True)
    losses = stepper.backward([images], network, 1.0)
    if stepper.agree(losses, 0)[1]:
        values = {name: float(loss) for name, loss in losses.items()}
        report = StepReport(values, stepper.nonfinite_gradients(), ["a.png", "b.png"])
        policy.handle("step_3", "step 3", report, lambda: {"images": images})
    else:
        policy.after_finite_step()
        stepper.apply()


def state_of(network: Network) -> dict[str, Any]:
    packed = network.costs["a"].packed()
    return {"normalizer": network.normalizer, "packed": packed, **network.state_dict()}


def test_a_skipped_step_leaves_everything_as_it_was(tmp_path: Path) -> None:
    network = Network()
    policy = policy_of(network, 2, tmp_path)
    images = torch.randn(3, 4)
    step(network, policy, images)
    before = {name: torch.as_tensor(value).clone() for name, value in state_of(network).items()}
    for count in (1, 2):
        step(network, policy, images * math.nan)
        assert (policy.skipped, policy.in_a_row) == (count, count)
    assert all(torch.equal(torch.as_tensor(value), before[name]) for name, value in state_of(network).items())
    with pytest.raises(NonFiniteError, match=r"^loss is nan at step 3, images a\.png, b\.png; .*; stopped after 2 "):
        step(network, policy, images * math.nan)
    kept = torch.load(tmp_path / "step_3.pth", weights_only=False)
    (report,) = kept["nonfinite"]["processes"]
    assert report["images"] == ["a.png", "b.png"] and report["batch"]["images"].isnan().all()


def test_nothing_is_copied_where_no_step_may_be_skipped(tmp_path: Path) -> None:
    network = Network()
    policy = policy_of(network, 0, tmp_path)
    copied = []
    network.costs["a"].packed = lambda: copied.append(1)  # type: ignore[method-assign]
    step(network, policy, torch.randn(3, 4))
    assert policy.memory._copies == [] and copied == []


def test_only_the_first_of_a_run_is_written(tmp_path: Path) -> None:
    network = Network()
    policy = policy_of(network, 3, tmp_path)
    for _ in range(2):
        step(network, policy, torch.full((3, 4), math.nan))
        (tmp_path / "step_3.pth").unlink(missing_ok=policy.skipped > 1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_gradients_are_checked_by_their_largest_element(broken: float) -> None:
    linear = nn.Linear(2, 2)
    stepper = Stepper(linear, torch.optim.SGD(linear.parameters(), 0.1), Precision(), linear)
    for gradient, stops in ((1e30, False), (broken, True)):  # the squares of the first overflow
        hook = linear.bias.register_hook(lambda found, value=gradient: torch.full_like(found, value))
        losses = stepper.backward([torch.ones(1, 2)], lambda part: {"loss": linear(part).sum()}, 1.0)
        assert stepper.agree(losses, 15) == (15, stops)
        assert stepper.nonfinite_gradients() == (["bias"] if stops else [])
        hook.remove()
