"""Shape shorthand: N images, C channels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import FPN, Backbone, build_model
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from tiny_detectors import batch, image, lively, tiny, tiny_config, tiny_fcos
from torch import nn

from d2_mgd.detection.features import (
    Feature,
    feature_names,
    find_feature,
    find_last_norm,
    pair_features,
    teacher_margin,
)
from d2_mgd.detection.maps import WatchedMaps, valid_masks
from d2_mgd.detection.norms import TrainableSyncNorm, export_student_state, make_trainable
from d2_mgd.distill import Tap, batch_norm_margin


class Detector(nn.Module):
    """A backbone and nothing else."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.backbone(pixels)


class Patches(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.p3, self.p4 = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(3, 4, 16, 16)
        self._out_features = ["p4", "p3"]
        self._out_feature_channels = {"p3": 4, "p4": 4}
        self._out_feature_strides = {"p3": 8, "p4": 16}

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"p4": self.p4(pixels), "p3": self.p3(pixels)}


def basic_block_model() -> nn.Module:
    overrides = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    return tiny("retinanet", 16, *overrides)


class TestNames:
    def test_retinanet(self) -> None:
        # res2 is no output of the backbone, and a feature all the same
        assert feature_names(tiny()) == ["res2", "res3", "res4", "res5", "p3", "p4", "p5", "p6", "p7"]

    def test_faster_rcnn(self) -> None:
        names = feature_names(tiny("faster_rcnn"))
        assert names == ["res2", "res3", "res4", "res5", "p2", "p3", "p4", "p5", "p6"]

    def test_without_fpn(self) -> None:
        assert feature_names(tiny("faster_rcnn_c4")) == ["res2", "res3", "res4"]

    def test_unknown_feature_lists_what_there_is(self) -> None:
        with pytest.raises(
            ValueError, match=r"the student has no feature 'p2'; it has: res2, .*, p3, p4, p5, p6, p7\."
        ):
            pair_features(tiny(), tiny("faster_rcnn"), ["p2"])
        with pytest.raises(ValueError, match=r"the teacher has no feature 'p7'; it has: res2, .* p6\."):
            pair_features(tiny(), tiny("faster_rcnn"), ["p7"])

    def test_model_without_backbone(self) -> None:
        with pytest.raises(ValueError, match="Linear has no Detectron2 backbone"):
            feature_names(nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn", "faster_rcnn_c4", "fcos"])
@pytest.mark.parametrize("before_activation", [True, False])
def test_widths_and_strides_are_those_of_the_maps(name: str, before_activation: bool) -> None:
    model = (tiny_fcos() if name == "fcos" else tiny(name)).eval()
    features = {found: find_feature(model, found, before_activation) for found in feature_names(model)}
    maps, pixels = WatchedMaps(model, features).run(batch((128, 128)))
    assert pixels.shape == (1, 3, 128, 128)
    for found, feature in features.items():
        assert maps[found].shape[1] == feature.channels
        assert maps[found].shape[2] == 128 // feature.stride


@pytest.mark.parametrize("make", [tiny, basic_block_model], ids=["bottleneck", "basic"])
def test_stages_before_and_after_the_activation(make: object) -> None:
    """Unmodified blocks end in an in-place ReLU; the map before it survives, and is what the ReLU got."""
    model = make().eval()  # type: ignore[operator]
    stages = ["res2", "res3", "res4", "res5"]
    before = {name: find_feature(model, name, True) for name in stages}
    after = {name: find_feature(model, name, False) for name in stages}
    pre, _ = WatchedMaps(model, before).run(batch())
    post, _ = WatchedMaps(model, after).run(batch())
    for name in stages:
        assert pre[name].min() < 0
        assert torch.equal(pre[name].relu(), post[name])


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn", "fcos"])
def test_levels_are_what_the_backbone_gives_to_the_head(name: str) -> None:
    model = (tiny_fcos() if name == "fcos" else tiny(name)).eval()
    levels = {found: find_feature(model, found) for found in feature_names(model) if found.startswith("p")}
    maps, pixels = WatchedMaps(model, levels).run(batch((64, 96)))
    output = model.backbone(pixels)
    assert set(levels) == set(output)
    for found in levels:
        assert torch.equal(maps[found], output[found])


def test_forward_watches_without_changing_anything() -> None:
    model = tiny().eval()
    watched = WatchedMaps(model, {"p4": find_feature(model, "p4"), "res4": find_feature(model, "res4")})
    samples = batch((64, 64))
    with torch.no_grad():
        (plain,), ((seen,), maps, _) = model(samples), watched.forward(samples)
    assert torch.equal(plain["instances"].scores, seen["instances"].scores)
    assert set(maps) == {"p4", "res4"}


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_forward_nobody_asked_for_takes_the_hooks_off() -> None:
    model = tiny().eval()
    watched = WatchedMaps(model, {"res4": find_feature(model, "res4")})
    watched.run(batch())
    assert hook_count(model) > 0
    with torch.no_grad():
        model(batch())
    assert hook_count(model) == 0
    assert "res4" in watched.run(batch())[0]  # and they come back


class TestOtherBackbones:
    def test_regnet(self) -> None:
        regnet = RegNet(
            stem_class=SimpleStem, stem_width=8, block_class=ResBottleneckBlock, depth=3, w_a=8.0, w_0=8, w_m=2.0,
            group_width=8, norm="FrozenBN", out_features=["s1", "s2"],
        )  # fmt: skip
        model = lively(Detector(FPN(regnet, ["s1", "s2"], 8, top_block=None))).eval()
        names = feature_names(model)
        assert names[:2] == ["s1", "s2"]
        feature = find_feature(model, "s2")
        maps, _ = WatchedMaps(model, {"s2": feature}).run(torch.randn(1, 3, 64, 64))
        assert maps["s2"].shape == (1, feature.channels, 64 // feature.stride, 64 // feature.stride)
        assert maps["s2"].min() < 0
        parent, name = find_last_norm(model, feature) or (None, "")
        assert isinstance(getattr(parent, name), FrozenBatchNorm2d)

    def test_of_any_kind(self) -> None:
        """A backbone that only says what it gives, as a vision transformer's pyramid does."""
        model = Detector(Patches())
        assert feature_names(model) == ["p3", "p4"]
        found = {name: find_feature(model, name) for name in ("p3", "p4")}
        maps, _ = WatchedMaps(model, found).run(torch.randn(1, 3, 64, 64))
        assert (maps["p3"].shape, maps["p4"].shape) == ((1, 4, 8, 8), (1, 4, 4, 4))

    def test_max_pooled_top_level(self) -> None:
        model = tiny("faster_rcnn")
        assert isinstance(model.backbone.top_block, LastLevelMaxPool)
        assert find_feature(model, "p6").tap == Tap("backbone.top_block", key=0)


class TestPairs:
    def test_widths_of_both(self) -> None:
        pairs = pair_features(tiny("retinanet", 16), tiny("mask_rcnn", 32), ["res2", "res5", "p4"])
        assert {name: pair.channels for name, pair in pairs.items()} == {
            "res2": (16, 32), "res5": (128, 256), "p4": (8, 8),
        }  # fmt: skip

    def test_frozen_stage_cannot_learn(self) -> None:
        student = tiny("retinanet", 16, "MODEL.BACKBONE.FREEZE_AT", 2)
        with pytest.raises(ValueError, match=r"feature res2 is frozen in the student.*FREEZE_AT"):
            pair_features(student, tiny(), ["res2"])
        pair_features(student, tiny(), ["res3"])


class TestMargins:
    @pytest.mark.parametrize("make", [tiny, basic_block_model], ids=["bottleneck", "basic"])
    def test_of_the_last_norm(self, make: object) -> None:
        model = make()  # type: ignore[operator]
        block = model.backbone.bottom_up.res4[-1]
        norm = block.conv3.norm if hasattr(block, "conv3") else block.conv2.norm
        margin = teacher_margin(model, find_feature(model, "res4"))
        assert torch.equal(margin, batch_norm_margin(norm))
        assert bool((margin < 0).all())

    def test_none_at_an_fpn_level(self) -> None:
        model = tiny()
        with pytest.raises(ValueError, match=r"feature p3: the teacher has no norm there to make margins from"):
            teacher_margin(model, find_feature(model, "p3"))

    def test_none_without_batch_norm(self) -> None:
        model = tiny("retinanet", 32, "MODEL.RESNETS.NORM", "")
        with pytest.raises(ValueError, match=r"feature res4: the teacher has no norm there"):
            teacher_margin(model, find_feature(model, "res4"))
        model = tiny("retinanet", 32, "MODEL.RESNETS.NORM", "LN")
        with pytest.raises(ValueError, match=r"feature res4: .*LayerNorm"):
            teacher_margin(model, find_feature(model, "res4"))

    def test_folded_statistics_say_nothing(self) -> None:
        """A frozen norm from Caffe2's files: mean zero, variance one, all of it in scale and shift."""
        model = build_model(tiny_config())
        feature = find_feature(model, "res4")
        with pytest.raises(ValueError, match=r"feature res4: the statistics .* are folded into its scale"):
            teacher_margin(model, feature)
        assert teacher_margin(model, feature, statistics_needed=False).shape == (64,)


class TestValidMasks:
    @staticmethod
    def masks(sizes: list[tuple[int, int]], padded: tuple[int, int], stride: int) -> torch.Tensor | None:
        feature = Feature("f", Tap("backbone"), 4, stride)
        height, width = (math.ceil(side / stride) for side in padded)
        return valid_masks(sizes, {"f": torch.zeros(len(sizes), 4, height, width)}, {"f": feature})["f"]

    def test_none_where_nothing_is_padded(self) -> None:
        assert self.masks([(64, 96), (64, 96)], (64, 96), 8) is None

    def test_none_where_no_cell_is_of_padding_alone(self) -> None:
        assert self.masks([(60, 90)], (64, 96), 8) is None  # the last cells begin inside the image

    def test_cells_that_begin_inside_their_image(self) -> None:
        mask = self.masks([(64, 64), (33, 17)], (64, 64), 8)
        assert mask is not None and mask.shape == (2, 1, 8, 8) and mask.dtype == torch.bool
        assert bool(mask[0].all())
        assert int(mask[1].sum()) == 5 * 3  # ceil(33 / 8) x ceil(17 / 8)
        assert bool(mask[1, 0, :5, :3].all())

    def test_every_image_keeps_a_cell(self) -> None:
        mask = self.masks([(128, 128), (1, 1)], (128, 128), 64)
        assert mask is not None and int(mask[1].sum()) == 1


def _normalise(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    norm = TrainableSyncNorm(FrozenBatchNorm2d(3)).train()
    found = {str(dtype): norm(_far_from_zero(rank).to(dtype)).detach() for dtype in (torch.float32, torch.bfloat16)}
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


def _far_from_zero(rank: int) -> torch.Tensor:
    """(2, 3, 16, 16), of means that are many deviations."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    return noise + torch.tensor([0.0, 5.0, 20.0]).view(1, 3, 1, 1)


def test_statistics_of_two_processes_are_the_batchs_in_bfloat16_too(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_normalise, (tmp_path,), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1)]
    whole = nn.BatchNorm2d(3)(torch.cat([_far_from_zero(rank) for rank in (0, 1)])).detach()
    torch.testing.assert_close(torch.cat([one["torch.float32"] for one in found]), whole, rtol=0, atol=1e-3)
    half = torch.cat([one["torch.bfloat16"] for one in found])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=0, atol=0.1)  # 20 is held to a sixteenth


class TestTrainableNorms:
    @pytest.mark.parametrize("kind", ["affine", "sync_bn"])
    def test_state_is_that_of_the_frozen_norm(self, kind: str) -> None:
        model = tiny()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert make_trainable(model.backbone.bottom_up.res4[-1].conv3, "norm", kind)
        after = export_student_state(model)
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)

    @pytest.mark.parametrize("kind", ["affine", "sync_bn"])
    def test_exports_exactly_into_the_plain_student(self, kind: str) -> None:
        """Train some steps; an unmodified, frozen student then gives the same numbers, to the bit."""
        model = tiny()
        place = model.backbone.bottom_up.res4[-1].conv3
        make_trainable(place, "norm", kind)
        frozen = {name: value.clone() for name, value in place.norm.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9)
        for seed in range(3):
            pixels = image(64, 64, seed)[None].float() / 255
            sum(level.square().mean() for level in model.backbone(pixels).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        changed = {name for name, value in place.norm.state_dict().items() if not torch.equal(value, frozen[name])}
        expected = {"weight", "bias"} if kind == "affine" else {"weight", "bias", "running_mean", "running_var"}
        assert changed == expected

        plain = build_model(tiny_config())
        plain.load_state_dict(export_student_state(model), strict=True)
        assert isinstance(plain.backbone.bottom_up.res4[-1].conv3.norm, FrozenBatchNorm2d)
        plain.eval()
        model.eval()
        samples = batch((64, 96), (50, 60))
        with torch.no_grad():
            pixels = model.preprocess_image(samples).tensor
            ours, theirs = model.backbone(pixels), plain.backbone(pixels)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            for one, other in zip(model(samples), plain(samples)):
                assert torch.equal(one["instances"].scores, other["instances"].scores)
                assert torch.equal(one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)

    def test_affine_ignores_batch_statistics_in_training(self) -> None:
        model = tiny()
        place = model.backbone.bottom_up.res2[-1].conv3
        frozen = place.norm
        make_trainable(place, "norm", "affine")
        x = torch.randn(2, frozen.num_features, 4, 4)
        assert place.norm.training
        torch.testing.assert_close(place.norm(x), frozen(x))

    @pytest.mark.parametrize("norm", ["BN", "", "LN"])
    def test_other_norms_are_left_alone(self, norm: str) -> None:
        model = tiny("retinanet", 16, "MODEL.RESNETS.NORM", norm)
        place = model.backbone.bottom_up.res4[-1].conv3
        before = place.norm
        assert not make_trainable(place, "norm", "affine")
        assert place.norm is before

    @pytest.mark.parametrize("kind", ["affine", "sync_bn"])
    def test_loads_files_without_statistics_and_with_counters(self, kind: str) -> None:
        """Caffe2's files have no statistics, torchvision's count batches; the frozen norm takes both."""
        holder = nn.Module()
        holder.norm = FrozenBatchNorm2d(4)
        plain = nn.Module()
        plain.norm = FrozenBatchNorm2d(4)
        make_trainable(holder, "norm", kind)
        caffe2 = {"norm.weight": torch.rand(4), "norm.bias": torch.rand(4)}
        for model in (holder, plain):
            model.load_state_dict(caffe2, strict=True)
        assert all(torch.equal(holder.state_dict()[name], value) for name, value in plain.state_dict().items())
        torchvision = {**plain.state_dict(), "norm.num_batches_tracked": torch.tensor(7)}
        holder.load_state_dict(torchvision, strict=True)

    def test_counts_as_a_norm_for_weight_decay(self) -> None:
        from detectron2.solver.build import get_default_optimizer_params

        model = tiny()
        place = model.backbone.bottom_up.res4[-1].conv3
        make_trainable(place, "norm", "affine")
        groups = get_default_optimizer_params(model, base_lr=1.0, weight_decay=1.0, weight_decay_norm=0.0)
        without = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
        assert {id(p) for p in place.norm.parameters()} <= without
