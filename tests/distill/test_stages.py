"""Stages of networks: which module of each stride is tapped, and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from d2_mgd.distill import Tap
from d2_mgd.distill.stages import Stage, example_image, find_stages, fitting_loss, measure_maps, pair_stages
from d2_mgd.errors import UserError


def down(inputs: int, outputs: int, norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 2, 2), norm(outputs), nn.ReLU(inplace=True))


class Encoder(nn.Module):
    """Two stages, a map that attention could compute, and a decoder; in training mode it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"low": down(3, 4), "high": down(4, 6, nn.InstanceNorm2d)})
        self.attention, self.up, self.flat = nn.Identity(), nn.Upsample(scale_factor=2), nn.Flatten()
        self.feature_info = [{"module": "flat"}]  # returns no map, so all modules are searched

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        found = self.body["high"](self.body["low"](images))
        self.attention(torch.zeros(1, 2, 8, 8))
        return self.flat(self.up(found))


def test_the_deepest_map_of_each_stride_is_found_without_a_trace_in_the_network() -> None:
    network = Encoder().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    drawn = torch.get_rng_state()
    found = find_stages("it", network, torch.zeros(1, 3, 16, 16))
    assert found == {2: Stage("body.low", 4, "body.low"), 4: Stage("body.high", 6, None)}
    assert network.training and torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_residual_stage_is_tapped_in_its_last_block() -> None:
    found = find_stages("resnet18", resnet18(), torch.zeros(1, 3, 64, 96))
    assert {stride: stage.block for stride, stage in found.items() if stride > 2} == {
        4: "layer1.1", 8: "layer2.1", 16: "layer3.1", 32: "layer4.1",
    }  # fmt: skip
    assert found[16] == Stage("layer3", 256, "layer3.1")


class ChannelsLast(nn.Module):
    """Maps (N, H, W, C) as Swin transformers have them, the first with C = H = W, and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.tokens = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 6, 2, 2), nn.Identity()
        self.turn = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.feature_info = [{"module": name} for name in ("turn.0", "turn.1", "gone")]

    def forward(self, images: Tensor) -> Tensor:
        found = self.turn[0](self.first(images).permute(0, 2, 3, 1))
        found = self.turn[1](F.relu(self.second(found.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
        return self.tokens(F.pad(found.flatten(1, 2), (0, 0, 2, 0)))


def test_channels_may_come_last_and_feature_info_names_the_modules() -> None:
    network, images = ChannelsLast(), torch.rand(1, 3, 16, 16)
    assert find_stages("it", network, images) == {2: Stage("turn.0", 8, None), 4: Stage("turn.1", 6, None)}
    assert measure_maps("it", network, {"a": Tap("turn.1"), "b": Tap("tokens")}, images) == dict.fromkeys(
        "ab", (6, 4, 4)
    )


def test_pairs_of_strides_and_their_loss() -> None:
    with_norm, without = {8: Stage("a", 4, "a.1"), 16: Stage("b", 4, None)}, {8: Stage("c", 4, None)}
    assert pair_stages(without, with_norm) == {"stride8": (Tap("c"), Tap("a.1", before_activation=True))}
    assert pair_stages(with_norm, without) == {"stride8": (Tap("a"), Tap("c"))}
    deep = {2**power: Stage("m", 4, None) for power in range(7)}
    assert list(pair_stages(deep, deep)) == ["stride8", "stride16", "stride32", "stride64"]
    with pytest.raises(UserError, match=r"no maps of a common stride: the student's strides are 8, the teacher's 16\."):
        pair_stages(without, {16: Stage("b", 4, None)})
    network = resnet18()
    assert fitting_loss(network, {"a": Tap("layer1.1", before_activation=True)}) == "partial_l2"
    assert fitting_loss(network, {"a": Tap("layer1.1", before_activation=True), "b": Tap("layer2")}) == "pearson"


def test_a_network_that_cannot_run_on_the_images() -> None:
    with pytest.raises(UserError, match=r"^the student cannot run on images of shape \(4, 8, 8\): .*expected input"):
        find_stages("the student", resnet18(), torch.zeros(1, 4, 8, 8))
    with pytest.raises(UserError, match=r"^it: the map of a \(fc\) has shape \(1, 1000\), not \(N, C, H, W\)"):
        measure_maps("it", resnet18(), {"a": Tap("fc")}, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "strides", "loss"),
    [
        ("resnet26t", [2, 4, 8, 16, 32], "partial_l2"),
        ("mobilenetv3_small_100", [2, 4, 8, 16, 32], "pearson"),
        ("convnext_atto", [4, 8, 16, 32], "pearson"),
        ("vit_tiny_patch16_224", [16], "pearson"),
        ("swin_tiny_patch4_window7_224", [4, 8, 16, 32], "pearson"),
        ("deit_tiny_distilled_patch16_224", [16], "pearson"),
    ],
)
def test_networks_of_timm(name: str, strides: list[int], loss: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    network = timm.create_model(name)
    image = example_image(network)
    stages = find_stages(name, network, image)
    assert list(stages) == strides
    taps = {name: teacher for name, (_, teacher) in pair_stages(stages, stages).items()}
    assert fitting_loss(network, taps) == loss
    widths = {info["reduction"]: info["num_chs"] for info in network.feature_info}
    side = image.shape[-1]
    expected = {f"stride{stride}": (widths[stride], side // stride, side // stride) for stride in strides[-4:]}
    assert measure_maps(name, network, taps, image) == expected
