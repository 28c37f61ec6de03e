"""A compiled teacher gives the maps of the plain network. ``test_teacher_forward`` runs this in a fresh process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from classification.features import pair_features
from classification.models import build
from d2_mgd.distill import FeatureTaps, Tap, teacher_forward
from d2_mgd.distill.teacher_forward import TeacherForward


class Small(nn.Module):
    """Two stages, the second of which overwrites the map before its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True))

    def forward(self, images: Tensor) -> Tensor:
        self.two(self.one(images))
        raise AssertionError("the forward ends at the deepest tap")


def small() -> FeatureTaps:
    return FeatureTaps(Small().eval(), {"one": Tap("one"), "two": Tap("two", before_activation=True)})


def difference(maps: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert maps.keys() == wanted.keys()
    return max(float((maps[name].float() - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_compiled_maps_are_those_of_the_plain_network(name: str, caplog: pytest.LogCaptureFixture) -> None:
    network = build(name, 10).eval()
    taps = FeatureTaps(network, {stage: pair.teacher for stage, pair in pair_features("resnet18", name).items()})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = taps.run(images)

    forward = TeacherForward(compile=True)
    forward.prepare(network)
    assert difference(forward(taps.run, images), wanted) < 1e-5
    assert difference(forward(taps.run, images.flip(0)), {k: found.flip(0) for k, found in wanted.items()}) < 1e-5
    assert "runs eagerly" not in caplog.text


def test_compiled_in_bfloat16_it_ends_at_the_deepest_tap(caplog: pytest.LogCaptureFixture) -> None:
    taps = small()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = taps.run(images)

    found = TeacherForward("bfloat16", compile=True)(taps.run, images)
    assert found["two"].dtype == torch.bfloat16
    assert float(found["two"].min()) < 0
    assert difference(found, wanted) < 0.03
    assert "runs eagerly" not in caplog.text


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    taps = small()
    images = torch.randn(2, 3, 20, 20)

    forward = TeacherForward(compile=True)
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
        first, second = forward(taps.run, images), forward(taps.run, images)
        forward(taps.run, images[..., :16])
    with torch.no_grad():
        assert difference(first, taps.run(images)) == difference(second, taps.run(images)) == 0.0
    said = [record.message for record in caplog.records if record.name == teacher_forward.__name__]
    assert len(said) == 1
    assert said[0].startswith("The teacher cannot be compiled, so it runs eagerly: ")


def test_images_of_further_sizes_run_eagerly(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_forward, "_MOST_GRAPHS", 1)
    taps = small()

    forward = TeacherForward(compile=True)
    forward(taps.run, torch.randn(2, 3, 16, 16))
    images = torch.randn(2, 3, 24, 18)
    with torch.no_grad():
        assert difference(forward(taps.run, images), taps.run(images)) < 1e-5
    assert "runs eagerly for all others" in caplog.text
