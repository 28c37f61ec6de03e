"""The loaders of a Detectron2 config: its data sets, filters, mapper and samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.build import _train_loader_from_config
from detectron2.data.common import DatasetFromList

from d2_mgd.detection.images import ImageMapper
from d2_mgd.detection.loader import Mapper, PassLoader, TrainLoader, evaluation_pass, rematch_pass
from d2_mgd.detection.weights import local_weights_file, read_pickled_arrays
from d2_mgd.errors import UserError


def build_train_loader(cfg: CfgNode, seed: int, mapper: Mapper | None = None) -> TrainLoader:
    """The training stream of Detectron2's config: its data sets, filters, mapper, samplers and aspect-ratio groups.

    Args:
        cfg: DATASETS, DATALOADER, INPUT and SOLVER.IMS_PER_BATCH count.
        seed: the run's; the same in all processes.
        mapper: in place of the config's.

    Raises:
        UserError: a batch that the processes cannot share evenly, or a data set without random access.
    """
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {processes} processes cannot share evenly."
        )
    records = training_records(cfg)
    mapper = mapper or ImageMapper(cfg, is_train=True)

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


def training_records(cfg: CfgNode) -> DatasetFromList:
    """The records of DATASETS.TRAIN, less those that Detectron2's config filters out."""
    return _records(
        cfg.DATASETS.TRAIN,
        cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
    )


def build_pass_loader(cfg: CfgNode, records: DatasetFromList, seed: Sequence[int]) -> PassLoader:
    """The pass of one rematch, with the test-time augmentation: MGD.REMATCH.{NUM_IMAGES, BATCH_SIZE}.

    Args:
        cfg: the training's.
        records: of :func:`training_records`, or :attr:`TrainLoader.records`, so that the data set is read once.
        seed: the run's seed and the iteration, which choose the images.
    """
    return rematch_pass(
        records,
        ImageMapper(cfg, is_train=False),
        num_images=cfg.MGD.REMATCH.NUM_IMAGES,
        batch_size=cfg.MGD.REMATCH.BATCH_SIZE,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
    )


def build_evaluation_loader(cfg: CfgNode, name: str, mapper: Mapper | None = None) -> PassLoader:
    """The images of one of DATASETS.TEST, with the test-time size, or with another ``mapper``.

    Raises:
        UserError: as :func:`build_train_loader` does of the data set.
    """
    proposals = None
    if cfg.MODEL.LOAD_PROPOSALS:
        proposals = [cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(name)]]
    records = _records((name,), proposals, filter_empty=False)
    return evaluation_pass(records, mapper or ImageMapper(cfg, is_train=False), cfg.DATALOADER.NUM_WORKERS)


def _records(names: Sequence[str], proposals: Sequence[str] | None, **filters: Any) -> DatasetFromList:
    """The records of data sets in one block of memory that workers share."""
    for file in proposals or ():  # Detectron2 would run whatever the file asks for
        read_pickled_arrays(local_weights_file(file))
    records = get_detection_dataset_dicts(names, proposal_files=proposals, **filters)
    if not isinstance(records, list):
        raise UserError(f"the data sets {names} must be lists of records, not {type(records).__name__}.")
    return DatasetFromList(records, copy=False)
