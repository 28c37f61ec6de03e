"""Loaders whose batches follow from (seed, position) alone: the training stream, and passes over chosen images.

What a batch holds, augmentation included, depends neither on the number of workers nor on what was drawn before. So a
training that continues at batch k only counts off k batches of indices, which reads no image.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
from detectron2.data.common import DatasetFromList
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import InferenceSampler
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset, Sampler

from d2_mgd.data.images import ImageError, read_rgb
from d2_mgd.errors import UserError, reason
from d2_mgd.training import Interrupted, received_signal
from d2_mgd.training.loading import keyed_loader
from d2_mgd.training.processes import first_failure, largest
from d2_mgd.training.randomness import seeded_randomness

Sample = dict[str, Any]  # an element of a Detectron2 batch
Mapper = Callable[[Sample], "Sample | None"]
Keys = list[tuple[int, int]]  # (position, index) of each image of a batch

# Streams of random numbers that follow from one run seed.
_ORDER, _SAMPLE, _PASS = 0, 1, 2


class SampleError(UserError):
    """An image of the data set cannot be read, or the process that reads is gone; the message says which."""


@dataclass(frozen=True)
class _Unreadable:
    """Carries a worker's error to the main process without the worker's traceback in its message."""

    message: str
    traceback: str = ""


class _SeededSamples(Dataset):
    """Maps ``(position, index)`` to a sample whose randomness follows from ``(seed, position)``."""

    def __init__(self, records: DatasetFromList, mapper: Mapper, seed: int) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample | _Unreadable:
        position, index = key
        record = self.records[index]
        where = record.get("file_name", f"image {record.get('image_id', index)}")
        with seeded_randomness(self.seed, _SAMPLE, position):
            try:
                sample = self.mapper(record)
            except (OSError, UserError, SizeMismatchError) as error:
                return _Unreadable(f"cannot read {where}: {reason(error)}.", traceback.format_exc())
            except Exception as error:
                if _decodes(record):  # so the mapper is at fault
                    raise RuntimeError(f"the data set's mapper failed on {where}") from error
                return _Unreadable(f"cannot read {where}: {reason(error)}.", traceback.format_exc())
        return _Unreadable(f"the data set's mapper returned nothing for {where}.") if sample is None else sample


def _decodes(record: Sample) -> bool:
    """Whether a record's image can be decoded. Pillow's decoders raise errors of any type for one that cannot."""
    try:
        read_rgb(PathManager.get_local_path(record["file_name"]))
    except ImageError:
        return False
    return True


def _is_wide(records: DatasetFromList, indices: Iterable[int]) -> np.ndarray:
    """(number of indices,) boolean: which images are wider than high. Two groups, as Detectron2 has them."""
    sizes = (records[int(index)] for index in indices)
    # records of semantic segmentation have no sizes: they are one group
    return np.array([record.get("width", 1) > record.get("height", 1) for record in sizes], dtype=bool)


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

    A batch with an image that cannot be read is a :class:`SampleError`, on this rank alone.

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
        yield from _load(self.records, self.mapper, batches, self.num_workers, self.seed)


class PassLoader:
    """One pass over some images, of which this process has a share; sized.

    A collective at the end: what cannot be read in one process is a :class:`SampleError` in all, and where one received
    a signal, all are :class:`Interrupted`.

    Args:
        records: the data set.
        mapper: reads one record as for inference.
        batches: this process's indices of records.
        num_workers: loading processes.
        num_images: of all processes.
    """

    def __init__(
        self,
        records: DatasetFromList,
        mapper: Mapper,
        batches: Sequence[Sequence[int]],
        num_workers: int,
        num_images: int,
    ) -> None:
        self.records = records
        self.mapper = mapper
        self.batches = [[(0, int(index)) for index in batch] for batch in batches]
        self.num_workers = num_workers
        self.num_images = num_images

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        return _to_the_end(_load(self.records, self.mapper, self.batches, self.num_workers, 0))


def rematch_pass(
    records: DatasetFromList, mapper: Mapper, *, num_images: int, batch_size: int, num_workers: int, seed: Sequence[int]
) -> PassLoader:
    """A pass over ``num_images`` images that ``seed`` chooses, or all if there are fewer.

    The batches are formed before they are dealt out, so any number of processes sees the same ones. Wide and high
    images are batched apart, which keeps padding small.
    """
    chosen = np.random.default_rng([_PASS, *seed]).permutation(len(records))[:num_images]
    wide = _is_wide(records, chosen)
    batches = [
        images[start : start + batch_size]
        for images in (chosen[wide], chosen[~wide])
        for start in range(0, len(images), batch_size)
    ]
    own = batches[comm.get_rank() :: comm.get_world_size()]
    return PassLoader(records, mapper, own, num_workers, len(chosen))


def evaluation_pass(records: DatasetFromList, mapper: Mapper, num_workers: int) -> PassLoader:
    """A pass over every image once, one at a time, in order."""
    own = [[index] for index in InferenceSampler(len(records))]
    return PassLoader(records, mapper, own, num_workers, len(records))


def _load(records: DatasetFromList, mapper: Mapper, batches: Iterable[Keys], num_workers: int, seed: int) -> Iterator:
    """Batches of samples; raises :class:`SampleError` in this process."""
    try:
        for batch in keyed_loader(_SeededSamples(records, mapper, seed), batches, num_workers, _as_list):
            for sample in batch:
                if isinstance(sample, _Unreadable):
                    raise SampleError(sample.message) from RuntimeError(sample.traceback)
            yield batch
    except (ConnectionError, EOFError) as error:  # torch reports a lost worker itself, but not at this moment
        raise RuntimeError("DataLoader worker was lost while it handed over a batch") from error


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples


def _to_the_end(batches: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
    """A pass, of which ranks have unequal shares; what ends it early on any of them is raised after the last batch."""
    failure: SampleError | None = None
    try:
        for batch in batches:
            if received_signal():
                break
            yield batch
    except SampleError as error:
        failure = error
    message = first_failure(str(failure or ""))
    if message:
        raise SampleError(message) from failure
    number = largest([received_signal()])[0]
    if number:
        raise Interrupted(number)
