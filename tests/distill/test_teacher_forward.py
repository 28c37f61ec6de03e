"""A frozen teacher in other precisions and compiled gives the maps of the plain network.

A process that has compiled cannot fork processes that train, as other tests do. So each test that compiles forks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from classification.features import pair_features
from classification.models import build
from d2_mgd.distill import FeatureTaps, Tap, teacher_forward
from d2_mgd.distill.teacher_forward import TeacherForward
from d2_mgd.errors import UserError
from d2_mgd.training import check_same_teacher
from tests.ranks import in_processes


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


def passes(check: Callable[[], None]) -> bool:
    """Run a check in a forked process."""
    return in_processes(lambda words: check(), [], 1) == [0]


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_compiled_maps_are_those_of_the_plain_network(name: str) -> None:
    network = build(name, 10).eval()
    taps = FeatureTaps(network, {stage: pair.teacher for stage, pair in pair_features("resnet18", name).items()})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = taps.run(images)

    def check() -> None:
        forward = TeacherForward(compile=True)
        forward.prepare(network)
        assert difference(forward(taps.run, images), wanted) < 1e-5
        assert difference(forward(taps.run, images.flip(0)), {k: found.flip(0) for k, found in wanted.items()}) < 1e-5

    assert passes(check)


def test_precision_is_that_of_the_caller_unless_it_is_named() -> None:
    taps = small()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = taps.run(images)
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        for precision in ("student", "float32", "bfloat16"):
            found[precision] = TeacherForward(precision)(taps.run, images)
    assert {name: maps["two"].dtype for name, maps in found.items()} == {
        "student": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16
    }  # fmt: skip
    assert difference(found["float32"], wanted) < 1e-5
    assert difference(found["bfloat16"], wanted) < 0.03


def test_compiled_in_bfloat16_it_ends_at_the_deepest_tap() -> None:
    taps = small()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = taps.run(images)

    def check() -> None:
        found = TeacherForward("bfloat16", compile=True)(taps.run, images)
        assert found["two"].dtype == torch.bfloat16
        assert float(found["two"].min()) < 0
        assert difference(found, wanted) < 0.03

    assert passes(check)


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    taps = small()
    images = torch.randn(2, 3, 20, 20)

    def check() -> None:
        forward = TeacherForward(compile=True)
        with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
            first, second = forward(taps.run, images), forward(taps.run, images)
        with torch.no_grad():
            assert difference(first, taps.run(images)) == difference(second, taps.run(images)) == 0.0
        said = [record.message for record in caplog.records if record.name == teacher_forward.__name__]
        assert len(said) == 1
        assert said[0].startswith("The teacher cannot be compiled, so it runs eagerly: ")

    assert passes(check)


def test_images_of_further_sizes_run_eagerly(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_forward, "_MOST_GRAPHS", 1)
    taps = small()

    def check() -> None:
        forward = TeacherForward(compile=True)
        forward(taps.run, torch.randn(2, 3, 16, 16))
        images = torch.randn(2, 3, 24, 18)
        with torch.no_grad():
            assert difference(forward(taps.run, images), taps.run(images)) < 1e-5
        assert "runs eagerly for all others" in caplog.text

    assert passes(check)


def test_bad_precisions_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"unknown teacher precision 'half'; there are: auto, student, float32"):
        TeacherForward("half")
    taps = small()
    with pytest.raises(UserError, match="float16 needs a GPU: use bfloat16 or auto"):
        TeacherForward("float16")(taps.run, torch.randn(1, 3, 16, 16))


def test_resuming_in_another_precision_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    recorded = {"weights": "teacher.pth", "digest": "0", "precision": "bfloat16"}
    with caplog.at_level(logging.WARNING):
        check_same_teacher("checkpoint.pth", recorded, recorded)
        assert not caplog.records
        check_same_teacher("checkpoint.pth", recorded, {**recorded, "precision": "float32"})
    assert "another way (float32) than before checkpoint.pth (bfloat16)" in caplog.text
