"""Loaders whose batches follow from (seed, position) alone: the training stream, the passes of rematch and evaluation.

What a batch holds, augmentation included, depends neither on the number of workers nor on what was drawn before. So a
training that continues at batch k only counts off k batches of indices, which reads no image.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.build import _train_loader_from_config
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from d2_mgd.detection.images import ImageMapper
from d2_mgd.detection.weights import local_weights_file, read_pickled_arrays
from d2_mgd.errors import UserError
from d2_mgd.training import Interrupted, loader_process_signals, received_signal
from d2_mgd.training.processes import first_failure, largest
from d2_mgd.training.randomness import seeded_randomness

__all__ = [
    "EvaluationLoader",
    "PassLoader",
    "SampleError",
    "TrainLoader",
    "build_evaluation_loader",
    "build_pass_loader",
    "build_train_loader",
]

logger = logging.getLogger(__name__)

Sample = dict[str, Any]  # an element of a Detectron2 batch
Mapper = Callable[[Sample], "Sample | None"]

# Streams of random numbers that follow from one run seed.
_ORDER, _SAMPLE, _PASS = 0, 1, 2


class SampleError(UserError):
    """An image of the data set cannot be read, or the process that reads is gone; the message says which."""


@dataclass(frozen=True)
class _Unreadable:
    """Carries a worker's error to the main process as one sentence, without the worker's traceback."""

    reason: str
    traceback: str = ""


class _SeededSamples(Dataset):
    """Maps ``(position, index)`` to a sample whose randomness follows from ``(seed, position)``."""

    def __init__(self, records: DatasetFromList, mapper: Mapper, seed: int) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> Sample | _Unreadable:
        position, index = item
        record = self.records[index]
        with seeded_randomness(self.seed, _SAMPLE, position):
            try:
                sample = self.mapper(record)
            except Exception as error:  # of any image library
                where = record.get("file_name", f"image {record.get('image_id', index)}")
                return _Unreadable(f"cannot read {where}: {_first_line(error)}", traceback.format_exc())
        if sample is None:
            return _Unreadable(f"the data set's mapper returned nothing for {record.get('file_name', index)}")
        return sample


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _is_wide(records: DatasetFromList, indices: Iterable[int]) -> np.ndarray:
    """(number of indices,) boolean: which images are wider than high. Two groups, as Detectron2 has them."""
    sizes = (records[int(index)] for index in indices)
    return np.array([record["width"] > record["height"] for record in sizes], dtype=bool)


class _GroupedBatches(Sampler):
    """Endless batches of ``(position, index)`` from a sampler's stream, each of one group of images.

    The grouping looks at indices only, so batches that a resumed training has behind it cost nothing to skip.

    Args:
        sampler: this process's share of an endless stream of indices.
        batch_size: of this process.
        group: (number of images,) group of each image; None is one group.
        skip: the number of batches to count off first.
    """

    def __init__(self, sampler: Any, batch_size: int, group: np.ndarray | None, skip: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.group = group
        self.skip = skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, processes = comm.get_rank(), comm.get_world_size()
        waiting: dict[int, list[tuple[int, int]]] = {}
        produced = 0
        for count, index in enumerate(self.sampler):
            group = 0 if self.group is None else int(self.group[index])
            batch = waiting.setdefault(group, [])
            batch.append((count * processes + rank, int(index)))
            if len(batch) == self.batch_size:
                del waiting[group]
                produced += 1
                if produced > self.skip:
                    yield batch


class TrainLoader:
    """An endless, resumable stream of training batches.

    A collective at every batch: one that cannot be read in one process is a :class:`SampleError` in all.

    Args:
        records: the data set.
        mapper: reads and augments one record, drawing from the global generators.
        make_sampler: builds this process's sampler, drawing from the global generators, which are seeded for it.
        batch_size: of this process.
        num_workers: loading processes; the batches are the same with any number.
        group: whether a batch holds wide images or high ones, never both.
        seed: the run's; the same in all processes.
    """

    def __init__(
        self,
        records: DatasetFromList,
        mapper: Mapper,
        make_sampler: Callable[[int], Any],
        *,
        batch_size: int,
        num_workers: int,
        group: bool,
        seed: int,
    ) -> None:
        self.records = records
        self.mapper = mapper
        self.make_sampler = make_sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.group = group
        self.seed = seed
        self.first_batch = 0

    def continue_at(self, batch: int, seed: int) -> None:
        """Start the stream of ``seed`` at ``batch``. Before the first iteration."""
        self.first_batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[list[Sample]]:
        with seeded_randomness(self.seed, _ORDER):
            sampler = self.make_sampler(self.seed)
        group = _is_wide(self.records, range(len(self.records))) if self.group else None
        batches = _GroupedBatches(sampler, self.batch_size, group, self.first_batch)
        yield from _together(_load(self.records, self.mapper, batches, self.num_workers, self.seed))


class PassLoader:
    """One pass over a seeded choice of images, shared out to the processes; sized.

    The batches are formed before they are dealt out, so any number of processes sees the same ones. Wide and high
    images are batched apart, which keeps padding small. A collective at the end: what cannot be read in one process is
    a :class:`SampleError` in all, and where one was asked to leave, all are :class:`Interrupted`.

    Args:
        records: the data set.
        mapper: reads one record as for inference.
        num_images: how many images; all if there are fewer.
        batch_size: of one process.
        num_workers: loading processes.
        seed: of the choice.
    """

    def __init__(
        self,
        records: DatasetFromList,
        mapper: Mapper,
        *,
        num_images: int,
        batch_size: int,
        num_workers: int,
        seed: Sequence[int],
    ) -> None:
        self.records = records
        self.mapper = mapper
        self.num_workers = num_workers
        chosen = np.random.default_rng([_PASS, *seed]).permutation(len(records))[:num_images]
        wide = _is_wide(records, chosen)
        batches = [
            [(0, int(index)) for index in images[start : start + batch_size]]
            for images in (chosen[wide], chosen[~wide])
            for start in range(0, len(images), batch_size)
        ]
        self.batches = batches[comm.get_rank() :: comm.get_world_size()]
        self.num_images = len(chosen)  # of all processes

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        return _to_the_end(_load(self.records, self.mapper, self.batches, self.num_workers, 0))


class EvaluationLoader:
    """Every image of a set once, one at a time, shared out to the processes; sized.

    A collective at the end, as :class:`PassLoader` is.

    Args:
        records: the data set.
        mapper: reads one record as for inference.
        num_workers: loading processes.
    """

    def __init__(self, records: DatasetFromList, mapper: Mapper, num_workers: int) -> None:
        self.records = records
        self.mapper = mapper
        self.num_workers = num_workers
        self.batches = [[(0, index)] for index in InferenceSampler(len(records))]

    def __len__(self) -> int:
        """Images of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        return _to_the_end(_load(self.records, self.mapper, self.batches, self.num_workers, 0))


def _load(records: DatasetFromList, mapper: Mapper, batches: Any, num_workers: int, seed: int) -> Iterator:
    """Batches of samples; an unreadable one raises its sentence, in this process."""
    loader = DataLoader(
        _SeededSamples(records, mapper, seed),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=loader_process_signals,
        # an own generator: starting workers draws a number, which must not come from the training's
        generator=torch.Generator(),
    )
    for batch in loader:
        for sample in batch:
            if isinstance(sample, _Unreadable):
                raise SampleError(f"{sample.reason}.") from RuntimeError(sample.traceback)
        yield batch


def _together(batches: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
    """An endless stream, until a batch cannot be read in any process."""
    while True:
        batch, error = _next(batches)
        _raise_in_all(error)
        assert batch is not None
        yield batch


def _to_the_end(batches: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
    """A pass, of which processes have unequal shares; what ends it early in any of them is raised after the last."""
    batch, error = _next(batches)
    while batch is not None and not received_signal():
        yield batch
        batch, error = _next(batches)
    _raise_in_all(error)
    number = largest([received_signal()])[0]
    if number:
        raise Interrupted(number)


def _next(batches: Iterator[list[Sample]]) -> tuple[list[Sample] | None, SampleError | None]:
    """The next batch or an error; neither at the end."""
    try:
        return next(batches, None), None
    except SampleError as error:
        return None, error
    except (ConnectionError, EOFError) as error:  # torch tells of a lost process itself, but not of this moment
        raise RuntimeError("DataLoader worker was lost while it handed over a batch") from error


def _raise_in_all(error: SampleError | None) -> None:
    sentence = first_failure("" if error is None else str(error))
    if sentence:
        raise SampleError(sentence) from (None if error is None else error.__cause__)


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples


def build_train_loader(cfg: CfgNode, seed: int) -> TrainLoader:
    """The training stream of Detectron2's config: its data sets, filters, mapper, samplers and aspect-ratio groups.

    Args:
        cfg: DATASETS, DATALOADER, INPUT and SOLVER.IMS_PER_BATCH count.
        seed: the run's; the same in all processes.

    Raises:
        ValueError: a batch that the processes cannot share evenly, or a data set without random access.
    """
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {processes} processes cannot share evenly."
        )
    records = _training_records(cfg)
    mapper = ImageMapper(cfg, is_train=True)

    def make_sampler(run_seed: int) -> Any:
        seeded = cfg.clone()
        seeded.defrost()
        seeded.SEED = run_seed
        return _train_loader_from_config(seeded, mapper=mapper, dataset=records)["sampler"]

    return TrainLoader(
        records,
        mapper,
        make_sampler,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // processes,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        group=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        seed=seed,
    )


def build_pass_loader(cfg: CfgNode, records: DatasetFromList, seed: Sequence[int]) -> PassLoader:
    """The pass of one rematch, with the test-time augmentation: MGD.REMATCH.{NUM_IMAGES, BATCH_SIZE}.

    Args:
        cfg: the training's.
        records: :attr:`TrainLoader.records`, so that the data set is read once.
        seed: the run's seed and the iteration, which choose the images.
    """
    return PassLoader(
        records,
        ImageMapper(cfg, is_train=False),
        num_images=cfg.MGD.REMATCH.NUM_IMAGES,
        batch_size=cfg.MGD.REMATCH.BATCH_SIZE,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
    )


def build_evaluation_loader(cfg: CfgNode, name: str) -> EvaluationLoader:
    """The images of one of DATASETS.TEST, with the test-time size.

    Raises:
        ValueError: as :func:`build_train_loader` does of the data set.
    """
    proposals = None
    if cfg.MODEL.LOAD_PROPOSALS:
        proposals = [cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(name)]]
    records = _records((name,), proposals, filter_empty=False)
    return EvaluationLoader(records, ImageMapper(cfg, is_train=False), cfg.DATALOADER.NUM_WORKERS)


def _training_records(cfg: CfgNode) -> DatasetFromList:
    """The records of DATASETS.TRAIN after Detectron2's filters."""
    return _records(
        cfg.DATASETS.TRAIN,
        cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
    )


def _records(names: Sequence[str], proposals: Sequence[str] | None, **filters: Any) -> DatasetFromList:
    """The records of data sets in one block of memory that workers share."""
    for file in proposals or ():  # Detectron2 would run whatever the file asks for
        read_pickled_arrays(local_weights_file(file))
    records = get_detection_dataset_dicts(names, proposal_files=proposals, **filters)
    if not isinstance(records, list):
        raise UserError(f"the data sets {names} must be lists of records, not {type(records).__name__}.")
    return DatasetFromList(records, copy=False)
