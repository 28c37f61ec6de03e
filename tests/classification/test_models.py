"""The table of architectures: widths, strides, norms, and maps before the activation."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from classification.features import pair_features, published_factors
from classification.models import ARCHITECTURES, architecture, available, build
from classification.networks import MobileNetV1, PreActivationShuffleNetV2
from d2_mgd.distill import FeatureTaps, Tap, batch_norm_margin
from d2_mgd.distill.margins import tap_margins
from d2_mgd.distill.stages import measure_maps
from d2_mgd.errors import UserError

RESNET_WIDE = ((256, 4), (512, 8), (1024, 16), (2048, 32))
RESNET_NARROW = ((64, 4), (128, 8), (256, 16), (512, 32))
EXPECTED = {  # width and stride of each feature
    "mobilenet_v1": ((128, 4), (256, 8), (512, 16), (1024, 32)),
    "mobilenet_v2": ((144, 8), (192, 8), (384, 16), (960, 32)),
    "shufflenet_v2": ((24, 4), (116, 8), (232, 16), (464, 32)),
    "shufflenet_v2_x0_5": ((24, 4), (48, 8), (96, 16), (192, 32)),
    "shufflenet_v2_x1_0": ((24, 4), (116, 8), (232, 16), (464, 32)),
    "shufflenet_v2_x1_5": ((24, 4), (176, 8), (352, 16), (704, 32)),
    "shufflenet_v2_x2_0": ((24, 4), (244, 8), (488, 16), (976, 32)),
    "resnet18": RESNET_NARROW,
    "resnet34": RESNET_NARROW,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_row_of_the_table_has_its_widths_strides_and_norms(name: str) -> None:
    with torch.device("meta"):
        network = build(name, 10)
    row = architecture(name)
    images = torch.zeros(1, 3, 224, 224, device="meta")
    found = measure_maps(name, network, {key: feature.tap for key, feature in row.features.items()}, images)
    expected = EXPECTED.get(name, RESNET_WIDE)
    assert [(width, 224 // height) for width, height, _ in found.values()] == list(expected)
    assert list(found) == ["stage1", "stage2", "stage3", "stage4"]
    modules = dict(network.named_modules())
    for feature, (width, _) in zip(row.features.values(), expected):
        assert modules[feature.norm].num_features == (width if not feature.norm.startswith("stage") else width // 2)


def test_published_teachers_and_ignored_features_are_the_defaults() -> None:
    ignored = {
        name: architecture(name).ignored for name in ("mobilenet_v1", "mobilenet_v2", "shufflenet_v2", "resnet50")
    }
    assert ignored == {"mobilenet_v1": (), "mobilenet_v2": ("stage1",), "shufflenet_v2": ("stage1",), "resnet50": ()}
    assert [architecture(name).teacher for name in ignored] == ["resnet50", "resnet50", "resnet50", "resnet152"]


def test_ignored_features_count_in_the_published_factors() -> None:
    factors = published_factors(pair_features("mobilenet_v2", "resnet50"), 1e4)
    assert factors == {"stage2": 1e-4 / 4, "stage3": 1e-4 / 2, "stage4": 1e-4}


@pytest.mark.parametrize("specs", [["stage2", "stage3"], ["stage3", "stage2"], ["stage3", "stage2", "stage1"]])
def test_chosen_features_keep_their_published_factors(specs: list[str]) -> None:
    factors = published_factors(pair_features("mobilenet_v2", "resnet50", specs), 1e4)
    published = {"stage1": 1e-4 / 8, "stage2": 1e-4 / 4, "stage3": 1e-4 / 2}
    assert factors == {name: published[name] for name in specs}


def test_factors_of_named_modules_go_by_their_order() -> None:
    specs = ["low=features.4.conv.1:layer1", "stage2", "stage3=features.12:layer3", "last=features.17:layer4"]
    factors = published_factors(pair_features("mobilenet_v2", "resnet50", specs), 1.0)
    assert factors == {"low": 1 / 8, "stage2": 1 / 4, "stage3": 1 / 2, "last": 1.0}


@pytest.mark.parametrize(
    ("name", "after"), [("mobilenet_v1", "model.5"), ("resnet18", "layer2"), ("resnet50", "layer2")]
)
def test_maps_are_what_the_last_relu_reads(name: str, after: str) -> None:
    network = build(name, 5).train()
    taps = {"before": architecture(name).features["stage2"].tap, "after": Tap(after)}
    with FeatureTaps(network, taps) as tapped:
        network(torch.randn(2, 3, 64, 64))
        maps = tapped.collect()
    assert (maps["before"] < 0).any()
    torch.testing.assert_close(F.relu(maps["before"]), maps["after"], rtol=0, atol=0)


def test_mobilenet_v2_is_tapped_before_relu6() -> None:
    network = build("mobilenet_v2", 5).eval()
    features = architecture("mobilenet_v2").features
    with FeatureTaps(network, {"before": features["stage4"].tap, "after": Tap("features.17.conv.1")}) as tapped:
        maps = tapped.run(3 * torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(F.relu6(maps["before"]), maps["after"], rtol=0, atol=0)


def test_shufflenet_computes_what_torchvisions_does_and_shares_its_weights() -> None:
    theirs = torchvision.models.shufflenet_v2_x1_0(num_classes=7)
    ours = build("shufflenet_v2", 7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(4, 3, 64, 64)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(images), theirs.train(mode)(images), rtol=0, atol=0)


def test_shufflenet_stages_end_before_their_activation() -> None:
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=7).eval()
    ours = PreActivationShuffleNetV2([4, 8, 4], [24, 48, 96, 192, 1024], 7).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with FeatureTaps(ours, {"stage": "stage3"}) as mine, FeatureTaps(theirs, {"stage": "stage3"}) as reference:
        before, after = mine.run(images)["stage"], reference.run(images)["stage"]
    # every channel, not only those of the last unit's branch: half of the map passes that unit as it is
    assert ((before < 0).flatten(2).any(dim=2).float().mean(dim=0) > 0).float().mean() > 0.9
    torch.testing.assert_close(F.relu(before), after, rtol=0, atol=0)


def test_mobilenet_v1_has_the_published_names_and_takes_any_size() -> None:
    network = MobileNetV1(10)
    names = network.state_dict()
    assert {"model.0.0.weight", "model.3.0.weight", "model.13.4.running_mean", "fc.weight"} <= set(names)
    assert sum(parameter.numel() for parameter in MobileNetV1().parameters()) == 4_231_976
    for size in (32, 65):
        assert network(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_any_network_of_torchvision_can_be_tapped_by_name() -> None:
    specs = ["low=stage2:features.6.block.0@pre:features.6.block.0.1", "high=stage4:features.12@pre"]
    pairs = pair_features("shufflenet_v2", "mobilenet_v3_small", specs)
    with torch.device("meta"):
        teacher, images = build("mobilenet_v3_small", 10), torch.zeros(1, 3, 64, 64)
    taps = {name: pair.teacher for name, pair in pairs.items()}
    assert measure_maps("mobilenet_v3_small", teacher, taps, images)["high"] == (576, 2, 2)
    real = build("mobilenet_v3_small", 10)
    margins = tap_margins(real, taps, {name: pair.norm for name, pair in pairs.items()})
    assert torch.equal(margins["high"], batch_norm_margin(real.features[12][1]))


def test_features_can_be_chosen_by_name() -> None:
    pairs = pair_features("mobilenet_v2", "resnet18", ["stage1", "stage4"])
    assert list(pairs) == ["stage1", "stage4"]


@pytest.mark.parametrize(
    ("student", "teacher", "specs", "message"),
    [
        ("mobilenet_v2", "resnet18", ["stage7"], "mobilenet_v2 has no such feature. Available: stage1, stage2"),
        ("mobilenet_v3_small", "resnet18", ["stage2"], "It has no default features"),
        ("mobilenet_v2", "resnet18", ["a=b:c:d:e"], "expected NAME"),
        ("mobilenet_v2", "resnet18", ["a=b:"], "expected NAME"),
        ("mobilenet_v2", "resnet18", ["stage1", "stage1"], "expected NAME"),
    ],
)
def test_features_that_do_not_exist(student: str, teacher: str, specs: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pair_features(student, teacher, specs)


def test_module_that_does_not_exist_is_named_with_its_neighbours() -> None:
    with pytest.raises(UserError, match=r"mobilenet_v1: .*model\.99.*there are: 0, 1"):
        measure_maps("mobilenet_v1", MobileNetV1(3), {"a": Tap("model.99")}, torch.zeros(1, 3, 64, 64))


def test_margins_need_a_batch_norm_at_the_map() -> None:
    with pytest.raises(UserError, match=r"feature a: .*no margins for partial_l2.*layer1@pre.* or use the loss mse"):
        tap_margins(build("resnet18", 3), {"a": Tap("layer1")})


def test_networks_outside_the_table_are_paired_by_their_common_stages() -> None:
    pre = Tap("layer3.1", before_activation=True)
    stages = {"stride16": (Tap("features.8"), pre), "stride32": (Tap("features"), Tap("layer4"))}
    pairs = pair_features("mobilenet_v3_small", "resnet18", None, lambda: stages)
    assert {name: (pair.student, pair.teacher) for name, pair in pairs.items()} == stages
    assert published_factors(pairs, 1.0) == {"stride16": 0.5, "stride32": 1.0}
    specs = ["stride16", "own=features.12:layer4"]
    assert list(pair_features("mobilenet_v3_small", "resnet18", specs, lambda: stages)) == ["stride16", "own"]
    with pytest.raises(UserError, match=r"mobilenet_v3_small has no such feature\. Available: stride16, stride32"):
        pair_features("mobilenet_v3_small", "resnet18", ["stage2"], lambda: stages)
    assert list(pair_features("resnet18", "resnet50", None, lambda: stages)) == ["stage1", "stage2", "stage3", "stage4"]


def test_unknown_architecture_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown architecture 'mobilenet_v9'\. Nearest: mobilenet_v2, mobilenet_v1"):
        architecture("mobilenet_v9")


def test_networks_with_auxiliary_heads_are_not_offered() -> None:
    assert not {"googlenet", "inception_v3"} & set(available())
    with pytest.raises(UserError):
        architecture("googlenet")


def test_timm_is_asked_for_where_it_is_not_installed() -> None:
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"timm:resnet18 needs timm.*pip install timm"):
            build("timm:resnet18", 3)
    else:
        assert build("timm:resnet18", 3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
        with pytest.raises(UserError, match=r"no model 'mobilnetv3_small_100'\. Nearest: mobilenetv3_small_100, "):
            build("timm:mobilnetv3_small_100", 3)
        with pytest.raises(UserError, match=r"no model 'x'\. Nearest: none; timm\.list_models\(\) lists all\."):
            build("timm:x", 3)
