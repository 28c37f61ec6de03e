"""The networks are the protocol's, and data is cut, cropped and mirrored as a study says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.accuracy.data import Choice, Images, StudyError, batches, load_split, normalised
from benchmarks.accuracy.networks import build_network

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "millions", "widths"),
    [  # the protocol's numbers of parameters for 100 classes
        ("resnet20", 0.28, [16, 32, 64]),
        ("resnet56", 0.86, [16, 32, 64]),
        ("resnet8x4", 1.23, [64, 128, 256]),
        ("resnet32x4", 7.43, [64, 128, 256]),
        ("resnet50_bottleneck", 23.71, [256, 512, 1024, 2048]),
        ("mobilenet_v2_half", 0.81, [12, 16, 48, 160]),
        ("shufflenet_v2", 1.36, [116, 232, 464]),
    ],
)
def test_networks_are_the_protocols(name: str, millions: float, widths: list[int]) -> None:
    network = build_network(name, 100).eval()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps, logits = network.maps_and_logits(images)
        assert torch.equal(network(images), logits) and logits.shape == (2, 100)
    assert [found.shape[1] for found in maps.values()] == widths == list(network.widths.values())
    assert all((found < 0).any() for found in maps.values())  # before the activation
    sizes = [found.shape[2] for found in maps.values()]
    assert sizes == [sizes[0] // 2**index for index in range(len(sizes))]


def test_margins_come_from_the_norm_that_the_map_leaves() -> None:
    network = build_network("resnet8", 3)
    norm = network.last_norm("stage2")
    assert isinstance(norm, nn.BatchNorm2d) and norm.num_features == 32
    with pytest.raises(ValueError, match="no single batch-norm"):
        build_network("shufflenet_v2", 3).last_norm("stage1")


def test_the_chosen_part(data: Path) -> None:
    whole = load_split(data, Choice(), CPU)
    assert (len(whole.train), len(whole.test), whole.classes) == (48, 12, 3)
    part = load_split(data, Choice(classes=(1, 3), train_per_class=4, test_per_class=1, pixels=8), CPU)
    assert part.train.images.shape == (8, 3, 8, 8) and sorted(part.train.labels.tolist()) == [0] * 4 + [1] * 4
    first = int(np.flatnonzero(whole.train.labels.numpy() > 0)[0])
    assert part.train.labels[0] == whole.train.labels[first] - 1
    squares = whole.train.images[first].float().view(3, 8, 4, 8, 4).mean(dim=(2, 4))
    assert (part.train.images[0].float() - squares).abs().max() <= 0.5


def test_batches_hold_each_image_once_cropped_and_mirrored() -> None:
    base = torch.arange(6 * 3 * 16 * 16).view(6, 3, 16, 16) * 7 % 251
    images = Images(base.to(torch.uint8), torch.arange(6))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    found = list(batches(images, 4, *generators))
    assert [len(labels) for _, labels in found] == [4]  # two wait for another epoch
    padded = torch.nn.functional.pad(images.images, (2,) * 4)
    flips = 0
    for image, label in zip(*found[0]):
        crops = [
            (
                padded[label, :, y : y + 16, x : x + 16].flip(-1) if flip else padded[label, :, y : y + 16, x : x + 16],
                flip,
            )
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
        ]
        hits = [flip for crop, flip in crops if torch.equal(normalised(crop[None])[0], image)]
        assert hits
        flips += hits[0]
    again = list(batches(images, 4, *(torch.Generator().manual_seed(seed) for seed in (1, 2))))
    assert torch.equal(found[0][0], again[0][0])
    assert len(found[0][1].unique()) == 4
    assert len(list(batches(images, 64, *generators))) == 1  # fewer images than a batch are a batch


def test_data_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no data at"):
        load_split(tmp_path / "no.npz", Choice(), CPU)
    with pytest.raises(StudyError, match=r"classes \[0, 4\] do not fit .* 0 to 2"):
        load_split(data, Choice(classes=(0, 4)), CPU)
    with pytest.raises(StudyError, match="class 0 has 16 train images, and the study wants 17"):
        load_split(data, Choice(train_per_class=17), CPU)
    with pytest.raises(StudyError, match="pixels must divide 32, got 12"):
        load_split(data, Choice(pixels=12), CPU)
    np.savez(tmp_path / "part.npz", x_train=np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(StudyError, match="lacks y_train, x_test, y_test"):
        load_split(tmp_path / "part.npz", Choice(), CPU)
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(StudyError, match="numpy can read"):
        load_split(tmp_path / "text.npz", Choice(), CPU)
