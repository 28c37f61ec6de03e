from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.utils.comm as comm
from detectron2.config import CfgNode, get_cfg
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import TrainingSampler

from d2_mgd.detection import add_mgd_config
from d2_mgd.detection.config_loaders import build_pass_loader, build_train_loader
from d2_mgd.detection.datasets import register_coco
from d2_mgd.detection.loader import SampleError, TrainLoader, rematch_pass
from d2_mgd.training.randomness import random_state

RECORDS = [{"file_name": f"{i}.png", "width": 96 if i % 3 else 64, "height": 64 if i % 3 else 96} for i in range(11)]


def draw(record: dict[str, Any]) -> dict[str, Any]:
    """A mapper that augments with every generator there is."""
    return {**record, "drawn": (random.random(), float(np.random.rand()), float(torch.rand(())))}


def break_at_seven(record: dict[str, Any]) -> dict[str, Any]:
    if record["file_name"] == "7.png":
        raise OSError("image file is truncated\nand more lines")
    return record


def records() -> DatasetFromList:
    return DatasetFromList(RECORDS, copy=False)


def train_loader(mapper: Any = draw, workers: int = 0, group: bool = True, seed: int = 5) -> TrainLoader:
    return TrainLoader(
        records(),
        mapper,
        lambda run_seed: TrainingSampler(len(RECORDS), seed=run_seed),
        batch_size=2,
        num_workers=workers,
        group=group,
        seed=seed,
    )


def first(loader: Any, number: int) -> list[Any]:
    return list(itertools.islice(iter(loader), number))


def same_state(one: Any, other: Any) -> bool:
    return (
        one["python"] == other["python"]
        and torch.equal(one["numpy"][1], other["numpy"][1])
        and one["numpy"][2:] == other["numpy"][2:]
        and torch.equal(one["torch"], other["torch"])
    )


@pytest.mark.parametrize("group", [True, False])
def test_batches_follow_from_seed_and_position_with_any_number_of_workers(group: bool) -> None:
    whole = first(train_loader(group=group), 15)
    random.seed(123)
    np.random.seed(123)
    torch.manual_seed(123)
    assert first(train_loader(group=group, workers=2), 15) == whole
    assert first(train_loader(group=group, seed=6), 15) != whole
    drawn = [sample["drawn"] for batch in whole for sample in batch]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_continued_at_a_batch_is_the_rest_of_the_whole(workers: int) -> None:
    whole = first(train_loader(), 12)
    continued = train_loader(workers=workers, seed=99)
    continued.continue_at(7, seed=5)
    assert first(continued, 5) == whole[7:]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_alone(workers: int) -> None:
    before = random_state()
    first(train_loader(workers=workers), 3)
    assert same_state(before, random_state())


def test_a_group_of_images_a_batch_and_every_image_an_epoch() -> None:
    batches = first(train_loader(), 44)
    assert all(len({sample["width"] > sample["height"] for sample in batch}) == 1 for batch in batches)
    seen = [sample["file_name"] for batch in batches for sample in batch]
    assert {name: seen.count(name) for name in set(seen)}.keys() == {record["file_name"] for record in RECORDS}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_sentence(workers: int) -> None:
    with pytest.raises(SampleError) as caught:
        first(train_loader(break_at_seven, workers=workers), 30)
    assert str(caught.value) == "cannot read 7.png: image file is truncated and more lines."


def test_processes_share_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [sample["drawn"] for batch in first(train_loader(group=False), 8) for sample in batch]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        shares.append([sample["drawn"] for batch in first(train_loader(group=False), 4) for sample in batch])
    assert [drawn for pair in zip(*shares) for drawn in pair] == alone


# --- the pass ---


def pass_names(**changes: Any) -> list[list[str]]:
    settings = {"num_images": 7, "batch_size": 2, "num_workers": 0, "seed": (5, 0), **changes}
    return [[sample["file_name"] for sample in batch] for batch in rematch_pass(records(), dict, **settings)]


def test_a_pass_sees_each_chosen_image_once_and_each_pass_chooses_anew() -> None:
    names = [name for batch in pass_names() for name in batch]
    assert len(names) == len(set(names)) == 7
    assert pass_names() == pass_names(num_workers=2)
    assert pass_names() != pass_names(seed=(5, 100))
    assert len([name for batch in pass_names(num_images=1000) for name in batch]) == len(RECORDS)


def test_any_number_of_processes_sees_the_same_batches_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = pass_names()
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    shared = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shared += pass_names()
    assert sorted(shared) == sorted(alone)


# --- from a config ---


def config(workplace: Any, **changes: Any) -> CfgNode:
    register_coco("tiny_train", *map(str, workplace.train))
    register_coco("tiny_valid", *map(str, workplace.valid))
    cfg = get_cfg()
    add_mgd_config(cfg)
    cfg.merge_from_file(str(workplace.config))
    cfg.merge_from_list([word for pair in changes.items() for word in pair])
    return cfg


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"])
def test_every_sampler_of_detectron2_is_a_function_of_the_seed(workplace: Any, sampler: str) -> None:
    cfg = config(workplace)
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.6
    names = []
    for state in (1, 2):
        np.random.seed(state)
        batches = first(build_train_loader(cfg, seed=3), 6)
        names.append([(sample["file_name"], sample["image"].shape) for batch in batches for sample in batch])
    assert names[0] == names[1]


def test_the_pass_of_a_config_uses_the_test_time_size(workplace: Any) -> None:
    cfg = config(workplace)
    loader = build_pass_loader(cfg, build_train_loader(cfg, seed=3).records, (3, 0))
    samples = [sample for batch in loader for sample in batch]
    assert len(samples) == loader.num_images == cfg.MGD.REMATCH.NUM_IMAGES
    assert {min(sample["image"].shape[1:]) for sample in samples} == {cfg.INPUT.MIN_SIZE_TEST}
    assert all("instances" not in sample for sample in samples)


def test_a_broken_image_file_is_named(workplace: Any, tmp_path: Path) -> None:
    cfg = config(workplace)
    loader = build_train_loader(cfg, seed=3)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    loader.records = DatasetFromList([{**RECORDS[0], "file_name": str(broken)}], copy=False)
    loader.make_sampler = lambda seed: TrainingSampler(1, seed=seed)
    with pytest.raises(SampleError, match=str(broken)):
        first(loader, 1)
