"""Folders, the order of images, augmentation by seed, shares of processes, and images that cannot be read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from classification.data import (
    IMAGENET,
    Folder,
    ImageDataset,
    Key,
    ShuffledBatches,
    Statistics,
    image_statistics,
    loader,
    normalize,
    rematch_indices,
    renormalize,
    strided_batches,
)
from classification.evaluation import Intake
from classification.models import build
from d2_mgd.data.class_folders import find_folders
from d2_mgd.errors import UserError
from tests.classification.conftest import CLASSES, make_folder

CPU = torch.device("cpu")


def flat(batches: ShuffledBatches) -> list[Key]:
    return [key for batch in batches for key in batch]


def batches_of(folder: Folder, epoch: int, workers: int = 0, first: int = 0, rank: int = 0, world: int = 1):
    order = ShuffledBatches(len(folder), 8 // world, seed=3, rank=rank, world=world)
    order.set_epoch(epoch, first)
    return list(loader(ImageDataset(folder, 32, augment=True), order, workers, CPU))


def test_classes_are_numbered_by_the_training_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d")
    for file in (root / "valid" / "ant").iterdir():
        file.unlink()
    (root / "valid" / "ant").rmdir()
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    train, valid = find_folders(root)
    assert train.classes == valid.classes == CLASSES
    assert (len(train), len(valid)) == (24, 10)
    assert sorted(set(valid.targets.tolist())) == [1, 2]
    assert train.path(0) == root / "train" / "ant" / "0.png"


def test_val_is_taken_where_there_is_no_valid_and_other_splits_by_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d")
    (root / "valid").rename(root / "val")
    assert find_folders(root)[1].root == root / "val"
    assert len(find_folders(root, "train")[1]) == 24
    with pytest.raises(UserError, match=r"there is no folder .*test.*has train/, val/"):
        find_folders(root, "test")


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        find_folders(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"needs train/ and valid/.*has no folder"):
        find_folders(tmp_path / "empty")
    one = make_folder(tmp_path / "one", classes=("ant",))
    with pytest.raises(UserError, match="has 1 class folder"):
        find_folders(one)
    root = make_folder(tmp_path / "d")
    (root / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"1 class folder\(s\) without an image, such as 'dog'"):
        find_folders(root)
    (root / "train" / "dog").rmdir()
    (root / "valid" / "dog").mkdir()
    with pytest.raises(UserError, match=r"that .*train lacks, such as 'dog'"):
        find_folders(root)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(data: Path, workers: int) -> None:
    train, _ = find_folders(data)
    for one, other in zip(batches_of(train, 5), batches_of(train, 5, workers)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_epochs_differ_and_loading_leaves_the_trainings_random_numbers_alone(data: Path) -> None:
    train, _ = find_folders(data)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = batches_of(train, 0)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(first[0].images, batches_of(train, 1)[0].images)
    assert torch.equal(first[0].images, batches_of(train, 0)[0].images)


def test_an_epoch_goes_on_in_the_middle(data: Path) -> None:
    train, _ = find_folders(data)
    whole, rest = batches_of(train, 2), batches_of(train, 2, first=2)
    assert len(rest) == len(whole) - 2
    assert torch.equal(rest[0].images, whole[2].images)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_steps_of_one(data: Path, world: int) -> None:
    train, _ = find_folders(data)
    alone = batches_of(train, 1)
    shares = [batches_of(train, 1, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(alone):
        together = torch.stack([share[step].images for share in shares], dim=1).flatten(0, 1)
        assert torch.equal(together, batch.images)


@pytest.mark.parametrize(
    ("length", "batch", "world"), [(10, 4, 1), (11, 4, 2), (9, 4, 1), (17, 4, 2), (7, 1, 3), (3, 8, 1)]
)
def test_every_process_has_the_same_number_of_steps_and_no_image_is_lost(length: int, batch: int, world: int) -> None:
    orders = [ShuffledBatches(length, batch, 0, rank, world) for rank in range(world)]
    steps = {len(order) for order in orders} | {len(list(order)) for order in orders}
    assert len(steps) == 1
    seen = [key.number for order in orders for key in flat(order)]
    dropped = length - len(set(seen))
    assert dropped <= world  # at most a last step of one image in each process
    assert all(len(keys) >= min(2, batch) for order in orders for keys in order)
    assert len(seen) - len(set(seen)) < world


def test_too_few_images_for_the_processes() -> None:
    with pytest.raises(UserError, match="3 training images are too few for 4 processes"):
        ShuffledBatches(3, 4, 0, 0, 4)


@pytest.mark.parametrize(("length", "world"), [(10, 3), (2, 4), (8, 2)])
def test_evaluation_sees_every_image_once(length: int, world: int) -> None:
    seen = [
        key.number for rank in range(world) for keys in strided_batches(range(length), 3, rank, world) for key in keys
    ]
    assert sorted(seen) == list(range(length))
    assert all(
        len(strided_batches(range(length), 3, r, world)) == len(list(strided_batches(range(length), 3, r, world)))
        for r in range(world)
    )


def test_rematching_draws_other_images_each_time() -> None:
    first, second = rematch_indices(100, 20, 0, 0), rematch_indices(100, 20, 0, 1)
    assert len(set(first.tolist())) == 20
    assert set(first.tolist()) != set(second.tolist())
    assert sorted(rematch_indices(5, 20, 0, 0).tolist()) == [0, 1, 2, 3, 4]


def test_evaluation_images_and_normalisation_are_the_published_ones(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype("uint8")
    root = make_folder(tmp_path / "d", train=1, valid=1)
    Image.fromarray(pixels).save(root / "valid" / "ant" / "0.png")
    _, valid = find_folders(root)
    found = normalize()(ImageDataset(valid, 224, augment=False)[Key(0, 0)].image.unsqueeze(0))
    published = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    torch.testing.assert_close(
        found[0], published(Image.fromarray(pixels)).as_subclass(torch.Tensor), rtol=1e-5, atol=1e-5
    )


def test_images_normalised_for_one_network_are_made_those_of_another() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    other = Statistics((0.5, 0.4, 0.0), (0.5, 0.25, 1.0))
    expected = (images.double() / 255 - torch.tensor(other.mean).view(3, 1, 1)) / torch.tensor(other.std).view(3, 1, 1)
    torch.testing.assert_close(normalize(other)(images), expected.float())
    torch.testing.assert_close(renormalize(IMAGENET, other)(normalize()(images)), expected.float())
    assert torch.equal(renormalize(other, other)(expected), expected)


def test_networks_of_timm_have_their_own_statistics() -> None:
    assert image_statistics(build("resnet18", 3)) == IMAGENET
    pytest.importorskip("timm", reason="timm is not installed")
    half = (0.5, 0.5, 0.5)
    assert image_statistics(build("timm:mobilenetv3_small_050.lamb_in1k", 3)) == IMAGENET
    assert image_statistics(build("timm:tf_efficientnet_es.in1k", 3)) == Statistics(half, half)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "1"])
def test_every_kind_of_image_has_three_channels(tmp_path: Path, mode: str) -> None:
    root = make_folder(tmp_path / "d", train=1, valid=1)
    image = Image.fromarray(np.zeros((50, 60), "uint16")) if mode == "I;16" else Image.new(mode, (60, 50))
    image.save(root / "train" / "ant" / "0.tif")
    train, _ = find_folders(root)
    dataset = ImageDataset(train, 32, augment=True)
    item = dataset[Key([train.path(i).suffix for i in range(len(train))].index(".tif"), 1)]
    assert item.image.shape == (3, 32, 32)


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_broken_images_are_named_and_skipped_if_asked(tmp_path: Path, content: bytes | str) -> None:
    root = make_folder(tmp_path / "d", train=4, valid=2)
    broken = root / "train" / "ant" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200] if content == "cut" else content)
    train, _ = find_folders(root)
    order = strided_batches(range(len(train)), 4)

    batch = next(iter(loader(ImageDataset(train, 32, augment=False), order, 1, CPU)))
    assert batch.broken == [str(broken)]
    assert batch.images.shape[0] == len(batch.targets) == 3
    with pytest.raises(UserError, match=r"the image .*ant/1\.png cannot be read"):
        Intake(CPU, skip_broken=False)(batch)
    skipping = Intake(CPU, skip_broken=True)
    for _ in range(2):
        images, targets = skipping(batch)
    assert (images.shape[0], len(targets), len(skipping.broken)) == (3, 3, 1)
    assert images.is_contiguous(memory_format=torch.channels_last)

    replaced = next(iter(loader(ImageDataset(train, 32, augment=True, replace_broken=True), order, 0, CPU)))
    assert replaced.images.shape[0] == 4
    assert replaced.broken == [str(broken)]


def test_a_batch_without_a_readable_image_is_empty(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", train=2, valid=1)
    (root / "valid" / "ant" / "0.png").write_bytes(b"")
    _, valid = find_folders(root)
    batch = next(iter(loader(ImageDataset(valid, 32, augment=False), strided_batches([0], 4), 0, CPU)))
    images, targets = Intake(CPU, skip_broken=True)(batch)
    assert (images.shape[0], len(targets)) == (0, 0)
