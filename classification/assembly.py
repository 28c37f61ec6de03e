"""Build networks, distiller and trainer from the options.

Shape shorthand: S student channels, T teacher channels, K classes.
"""

from __future__ import annotations

import argparse
import functools
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from classification.data import ImageDataset, image_statistics, renormalize
from classification.data_parallel import over_gpus
from classification.distillation import DistillationStep, Student, Teacher
from classification.engine import Trainer
from classification.features import pair_features, published_factors
from classification.models import architecture, build
from classification.options import SUMMED_LOSSES, logit_loss
from classification.processes import Process
from classification.weights import load_file, load_weights, network_from_file, pretrained_network
from d2_mgd.data.class_folders import Folder
from d2_mgd.distill import MatchingGuidedDistiller, Tap
from d2_mgd.distill.margins import tap_margins
from d2_mgd.distill.norms import synchronised_norms
from d2_mgd.distill.stages import common_stages, describe, fitting_loss, fitting_metric, measure_maps, running
from d2_mgd.distill.teacher_forward import TeacherForward
from d2_mgd.errors import UserError, located
from d2_mgd.training import file_digest
from d2_mgd.training.processes import distributed, one_rank_first
from d2_mgd.training.steps import Precision

logger = logging.getLogger(__name__)

Taps = dict[str, Tap]

_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherNetwork:
    """A teacher with its weights.

    Args:
        name: architecture.
        network: on the CPU.
        num_classes: of its head.
        record: its architecture, file and digest, for checkpoints.
    """

    name: str
    network: nn.Module
    num_classes: int
    record: dict[str, Any] = field(default_factory=dict)


def make_student(options: argparse.Namespace, num_classes: int) -> nn.Module:
    """Build the student with its initial weights, on the CPU; its head has the data's K classes."""
    name = options.arch
    if options.use_pretrained:
        with one_rank_first():
            return pretrained_network(name, num_classes, options.image_size)[0]
    network = build(name, num_classes, options.image_size)
    if options.student_resume is not None:
        what = f"the student's file {options.student_resume}"
        state = load_file(options.student_resume, name, "the student's file")
        load_weights(network, state, name, what, new_head=not options.evaluate)
    return network


def teacher_name(options: argparse.Namespace) -> str:
    """The teacher's architecture; a UserError if none is named and the student has no default teacher."""
    name = options.teacher_arch or architecture(options.arch).teacher
    if name is None:
        raise UserError(f"{options.arch} has no default teacher: name one with --teacher-arch.")
    return name


def make_teacher(options: argparse.Namespace, num_classes: int) -> TeacherNetwork | None:
    """Build the teacher that the options name, on the CPU; None for training without one.

    Raises:
        UserError: there is no teacher's name; the teacher's weights are missing or do not fit; or its logits
            are needed and its number of classes is not the data's.
    """
    distilling = options.method != "base"
    if not distilling and options.teacher_arch is None and options.teacher_resume is None:
        return None
    name = teacher_name(options)
    features_only = distilling and not options.with_kd
    if options.teacher_resume is not None:
        path, what = options.teacher_resume, "the teacher's file"
        network, classes = network_from_file(name, path, num_classes, what, features_only, options.image_size)
        record = {"arch": name, "file": str(path.resolve()), "sha256": file_digest(path)}
    else:
        with one_rank_first():
            network, classes, source = pretrained_network(name, None, options.image_size)
        record = {"arch": name, "file": source}
    if classes != num_classes and not features_only:
        raise UserError(
            f"the teacher has {classes} classes and the data has {num_classes}, so its logits cannot be used: train it "
            f"on the data first (main_base.py --arch {name} --use-pretrained 1) and name its file with "
            "--teacher-resume, or distil features only."
        )
    return TeacherNetwork(name, network, classes, record)


def make_trainer(
    process: Process,
    options: argparse.Namespace,
    network: nn.Module,
    teacher: TeacherNetwork | None,
    folders: tuple[Folder, Folder],
) -> Trainer:
    """Assemble the trainer: networks and distiller on their device, wrapped for several ranks or GPUs."""
    image = torch.zeros(1, 3, options.image_size, options.image_size)
    for name, one in [(options.arch, network), *([] if teacher is None else [(teacher.name, teacher.network)])]:
        with running(name, one, image):
            one(image)
    student_taps: Taps = {}
    teacher_taps: Taps = {}
    distiller = None
    if teacher is not None and options.method not in ("base", "kd"):
        student_taps, teacher_taps, distiller = _make_distiller(process, options, network, teacher, image)
    if options.sync_bn and process.world > 1:
        network = synchronised_norms(network, process.device)
    precision = Precision(process.device.type, _DTYPES[options.mixed_precision])
    statistics = image_statistics(network)
    student = Student(
        network.to(memory_format=torch.channels_last),
        student_taps,
        distiller,
        logit_loss=logit_loss(options) if options.method != "base" and options.with_kd else None,
        precision=precision,
    ).to(process.device)
    frozen = None
    if teacher is not None and options.method != "base":
        images = renormalize(statistics, image_statistics(teacher.network))
        runs = TeacherForward(options.teacher_precision, bool(options.teacher_compile))
        guide = teacher.network.to(memory_format=torch.channels_last)
        frozen = Teacher(guide, teacher_taps, options.with_kd, precision, images, runs).to(process.device)
        teacher.record["precision"] = runs.describe(process.device)
    elif teacher is not None:
        teacher.network.to(process.device)
    step = _wrapped(process, options, student, frozen)
    return Trainer(options, process, student, step, _data_sets(options, *folders), teacher and teacher.record)


def _make_distiller(
    process: Process, options: argparse.Namespace, network: nn.Module, teacher: TeacherNetwork, image: torch.Tensor
) -> tuple[Taps, Taps, MatchingGuidedDistiller]:
    """Taps of the student and the teacher, and their distiller; sets the options that follow from the taps."""
    names, networks = (options.arch, teacher.name), (network, teacher.network)
    stages = functools.partial(common_stages, names, networks, (image, image))
    pairs = pair_features(*names, options.features, stages)
    student_taps = {name: pair.student for name, pair in pairs.items()}
    teacher_taps = {name: pair.teacher for name, pair in pairs.items()}
    norms = {name: pair.norm for name, pair in pairs.items()}
    student_maps = measure_maps(options.arch, network, student_taps, image)
    teacher_maps = measure_maps(teacher.name, teacher.network, teacher_taps, image)
    for name in pairs:
        logger.info(
            "feature %s: student %s %s, teacher %s %s",
            name, describe(student_taps[name]), student_maps[name], describe(teacher_taps[name]), teacher_maps[name],
        )  # fmt: skip
    channels = {name: teacher_maps[name][0] for name in pairs}
    if options.loss is None:
        options.loss = fitting_loss(teacher.network, teacher_taps, norms, channels)
        logger.info("loss: %s, chosen by the teacher's maps; --loss selects another", options.loss)
    options.mgd_metric = options.mgd_metric or fitting_metric(options.loss)
    fixed = options.balance == "fixed"
    summed = fixed and options.loss in SUMMED_LOSSES
    weights = published_factors(pairs, options.loss_factor) if summed else dict.fromkeys(pairs, options.loss_weight)
    with located(f"{teacher.name}, "):
        margins = tap_margins(teacher.network, teacher_taps, norms, channels) if options.loss == "partial_l2" else None
    distiller = MatchingGuidedDistiller(
        {name: (student_maps[name][0], channels[name]) for name in pairs},
        reducer=options.mgd_reducer,
        loss=options.loss,
        metric=options.mgd_metric,
        mode=options.mgd_mode,
        align=options.mgd_align,
        norm="sync_bn" if options.sync_bn and process.world > 1 else "bn",
        weights=weights if fixed else None,
        balance=options.balance,
        margins=margins,
        reduction="image_sum" if summed else "mean",
        spatial=options.mgd_spatial,
    )
    return student_taps, teacher_taps, distiller


def _wrapped(process: Process, options: argparse.Namespace, student: Student, teacher: Teacher | None) -> nn.Module:
    """The module that a batch goes through: plain, in DDP with several ranks, or in DataParallel over GPUs."""
    if process.world > 1:
        return DistillationStep(distributed(student, gradient_as_bucket_view=True), teacher)
    return over_gpus(process, options, DistillationStep(student, teacher))


def _data_sets(options: argparse.Namespace, train: Folder, valid: Folder) -> dict[str, ImageDataset]:
    size = options.image_size
    return {
        "train": ImageDataset(train, size, augment=True, replace_broken=options.skip_broken_images),
        "valid": ImageDataset(valid, size, augment=False),
        "rematch": ImageDataset(train, size, augment=False),
    }
