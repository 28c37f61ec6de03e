#!/usr/bin/env python
"""Train a student detector, with a teacher or alone; evaluate it; evaluate its teacher.

The flags are those of Detectron2's tools/train_net.py, and some more. Works alone, with --num-gpus and
--num-machines, and under torchrun; with NCCL on GPUs, and with gloo where there are none.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

from d2_mgd._threads import let_waiting_threads_sleep
from d2_mgd._warnings import ignore_deprecations

let_waiting_threads_sleep()
ignore_deprecations()  # before Detectron2 is imported

try:
    import detectron2.utils.comm as comm
except ModuleNotFoundError as error:
    from d2_mgd._install import DETECTRON2_INSTALL

    raise SystemExit(f"train_net.py needs Detectron2, which is not installed: {DETECTRON2_INSTALL}") from error
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from d2_mgd import configs
from d2_mgd.commands import compare_runs
from d2_mgd.data.formats import add_dataset_arguments, label_files
from d2_mgd.detection import Trainer, add_mgd_config
from d2_mgd.detection.checkpoint import TrainingCheckpointer
from d2_mgd.detection.config import baseline_config, student_config
from d2_mgd.detection.config_checks import CheckedConfig, validate_config, validate_running
from d2_mgd.detection.config_files import changed_settings, merge_file, merge_overrides
from d2_mgd.detection.datasets import (
    check_classes,
    check_datasets_once,
    name_keypoints,
    register_coco,
    register_label_files,
)
from d2_mgd.detection.evaluation import check_evaluators
from d2_mgd.detection.launch import run_ranks
from d2_mgd.detection.networks import build_network
from d2_mgd.detection.teacher import build_teacher
from d2_mgd.detection.weights import fresh_parameters, load_weights, local_weights_file
from d2_mgd.detection.writers import service_writers
from d2_mgd.errors import UserError
from d2_mgd.training import claimed_for_all_ranks, lasting_output, restarted
from d2_mgd.training.launch import rank_status
from d2_mgd.training.processes import failing_together, from_main
from d2_mgd.training.services import add_log_arguments, check_services
from d2_mgd.training.weights_files import trust

logger = logging.getLogger("d2_mgd.train_net")

_NAMED = 3  # weights in an error
_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")  # Detectron2's
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def parser() -> argparse.ArgumentParser:
    """Detectron2's flags and ours."""
    built = default_argument_parser()
    built.description = __doc__
    built.set_defaults(dist_url="auto")  # a free port, so that two trainings on one machine do not meet
    add_dataset_arguments(built)
    built.add_argument(
        "--eval-teacher", action="store_true", help="evaluate the teacher alone on DATASETS.TEST, and train nothing"
    )
    built.add_argument(
        "--with-baseline",
        action="store_true",
        help="first train the same student alone, in OUTPUT_DIR/baseline, and in the end compare both",
    )
    add_log_arguments(built)
    built.add_argument(
        "--trust-weights",
        action="append",
        default=[],
        metavar="FILE",
        help="read this weights file or checkpoint even if it asks for more than tensors, and run what it asks for; "
        "any number of times, for files whose maker you know",
    )
    return built


def build_config(args: argparse.Namespace) -> tuple[CfgNode, CheckedConfig | None]:
    """The frozen config of the command line, and for a training what its checks found.

    Raises:
        UserError: the config cannot work, as far as it alone says so.
    """
    if args.eval_only and args.eval_teacher:
        raise UserError("--eval-only evaluates the student and --eval-teacher the teacher: give one of them.")
    late = [word for word in args.opts[::2] if word.startswith("--")]
    if late:
        raise UserError(f"{late[0]} comes after KEY VALUE overrides: put it before them.")
    cfg = get_cfg()
    add_mgd_config(cfg)
    if args.config_file:
        args.config_file = configs.find(args.config_file)
        if args.config_file.endswith(".py"):
            raise UserError(f"{args.config_file} is a python config: tools/lazyconfig_train_net.py trains those.")
        # Detectron2's own files hold python expressions and came with its code; others are not trusted.
        merge_file(cfg, args.config_file, allow_unsafe=_is_of_detectron2(args.config_file))
    merge_overrides(cfg, args.opts, what="KEY VALUE overrides")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.LR_SCHEDULER_NAME not in _SCHEDULERS:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME is {cfg.SOLVER.LR_SCHEDULER_NAME!r}; there are: {', '.join(_SCHEDULERS)}."
        )
    if args.with_baseline:
        if args.eval_only or args.eval_teacher or not cfg.MGD.ENABLED:
            raise UserError("--with-baseline compares a distilled student: it needs a training, and MGD.ENABLED True.")
        cfg.SEED = max(cfg.SEED, 0)  # a drawn one would differ between the two trainings
    checked = None
    if args.eval_only or args.eval_teacher:  # a student is evaluated where its teacher is not at hand
        validate_running(cfg)
    else:
        checked = validate_config(cfg)
    cfg.freeze()
    return cfg, checked


def set_up(args: argparse.Namespace, cfg: CfgNode, claims: ExitStack, labels: CfgNode | None = None) -> None:
    """Data sets, loggers, and what OUTPUT_DIR holds of them. In every process.

    Args:
        args: the command line.
        cfg: its config.
        claims: where a training's claim of OUTPUT_DIR ends.
        labels: the config with the OUTPUT_DIR for label files of other formats; ``cfg`` by default.
    """
    for name, json_file, images in args.register_coco:
        register_coco(name, json_file, images)
    for file in args.trust_weights:
        trust(local_weights_file(file))
    trains = not (args.eval_only or args.eval_teacher)
    _check_output(cfg.OUTPUT_DIR)
    if trains:
        claims.enter_context(claimed_for_all_ranks(cfg.OUTPUT_DIR))
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_mgd")
    logger.info(_purpose(args, cfg))
    register_label_files(label_files(args), labels or cfg)
    check_datasets_once(cfg, train=trains)
    with failing_together():
        name_keypoints(cfg)
        if comm.is_main_process():
            check_evaluators(cfg)
            check_services(args.log, args.log_student)
    if trains and args.resume:
        for change in changed_settings(cfg, os.path.join(cfg.OUTPUT_DIR, "config.yaml")):
            logger.warning("Changed since the training to resume: %s", change)
    with _kept(os.path.join(cfg.OUTPUT_DIR, "config.yaml")):  # tools read it, and this run may train nothing
        default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu":
        logger.info("No GPU is used: the model is on the CPU")


@contextmanager
def _kept(path: str) -> Iterator[None]:
    """Context that leaves a file as it was, or absent."""
    file = Path(path)
    before = file.read_bytes() if file.is_file() else None
    try:
        yield
    finally:
        if comm.is_main_process():
            file.unlink(missing_ok=True) if before is None else file.write_bytes(before)


def _purpose(args: argparse.Namespace, cfg: CfgNode) -> str:
    """What this run does, in one line."""
    teacher = cfg.MGD.TEACHER.CONFIG_FILE
    if args.eval_teacher:
        return f"Evaluating the teacher {teacher} on {', '.join(cfg.DATASETS.TEST)}"
    student = f"{student_config(cfg).MODEL.META_ARCHITECTURE} of {args.config_file or 'the command line'}"
    if args.eval_only:
        return f"Evaluating {student} on {', '.join(cfg.DATASETS.TEST)}"
    source = f"from the teacher {teacher}" if cfg.MGD.ENABLED else "without a teacher"
    return f"Training {student} {source} on {', '.join(cfg.DATASETS.TRAIN)}; output: {cfg.OUTPUT_DIR}"


@lasting_output()
def run(args: argparse.Namespace, cfg: CfgNode, checked: CheckedConfig | None) -> Any:
    """Train or evaluate, in every process; ``cfg`` and ``checked`` as :func:`build_config` returns them."""
    try:
        with ExitStack() as claims:
            if args.with_baseline:
                _train_baseline(args, cfg, checked)
            set_up(args, cfg, claims)
            if args.eval_teacher:
                return evaluate_teacher(cfg)
            if args.eval_only:
                return evaluate_student(cfg, args.resume)
            results = _train(args, cfg, checked)
        if args.with_baseline and comm.is_main_process():
            compare_runs([baseline_config(cfg).OUTPUT_DIR, cfg.OUTPUT_DIR], os.path.join(cfg.OUTPUT_DIR, "comparison"))
        return results
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be written: {error.strerror}.") from error


def _train(args: argparse.Namespace, cfg: CfgNode, checked: CheckedConfig | None) -> Any:
    resume = args.resume or restarted()  # after a restart by torchrun, a training goes on by itself
    writers = service_writers(cfg, args.log, args.log_student, resume)
    trainer = Trainer(cfg, checked=checked, writers=writers)
    trainer.resume_or_load(resume=resume)
    trainer.first_step.actions += [lambda: _write_configs(cfg), lambda: _write_places(cfg)]
    return trainer.train()


def _train_baseline(args: argparse.Namespace, cfg: CfgNode, checked: CheckedConfig | None) -> None:
    """Train the student of ``cfg`` alone, unless that is finished (collective)."""
    alone = baseline_config(cfg)
    settings = student_config(alone).dump() + str({key: alone.MGD[key] for key in configs.WITHOUT_TEACHER})
    finished = Path(alone.OUTPUT_DIR, "finished.yaml")
    if from_main(finished.is_file() and finished.read_text(encoding="utf-8") == settings):
        return
    with ExitStack() as claims:
        set_up(args, alone, claims, labels=cfg)
        assert checked is not None
        Trainer.build_model(cfg, checked.teacher)  # a teacher that does not fit is an error now
        finished.unlink(missing_ok=True)
        _train(args, alone, CheckedConfig(teacher=None))
        if comm.is_main_process():
            finished.write_text(settings, encoding="utf-8")
    gc.collect()  # hooks and trainer refer to each other
    for name in ("d2_mgd", "detectron2", "fvcore"):  # the log of the next training is another file
        for handler in list(logging.getLogger(name).handlers):
            logging.getLogger(name).removeHandler(handler)


def evaluate_student(cfg: CfgNode, resume: bool) -> Any:
    """Evaluate MODEL.WEIGHTS, or with ``resume`` the last checkpoint, as a plain Detectron2 model without a teacher."""
    model = build_network(student_config(cfg))
    check_classes(cfg.DATASETS.TEST, model)
    checkpointer = TrainingCheckpointer(model, cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        checkpointer.resume()
    elif cfg.MODEL.WEIGHTS:
        _check_whole(model, load_weights(model, cfg.MODEL.WEIGHTS), cfg.MODEL.WEIGHTS)
    else:
        raise UserError("there is nothing to evaluate: give MODEL.WEIGHTS, or --resume and a training's OUTPUT_DIR.")
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _check_whole(model: nn.Module, left: Any, file: str) -> None:
    """Whether loading left no parameter of a model as it was initialised."""
    fresh = fresh_parameters(model, left)
    if fresh:
        raise UserError(
            f"MODEL.WEIGHTS {file} is not of the student that is to be evaluated: {len(fresh)} of its weights are "
            f"missing there or have another shape, first {', '.join(fresh[:_NAMED])}."
        )


def evaluate_teacher(cfg: CfgNode) -> Any:
    """Evaluate the teacher alone."""
    if not cfg.MGD.TEACHER.CONFIG_FILE:
        raise UserError("--eval-teacher needs a config with MGD.TEACHER.CONFIG_FILE.")
    return Trainer.test_teacher(cfg, build_teacher(cfg))


def _check_output(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"OUTPUT_DIR '{folder}' cannot be written: {error.strerror}.") from error


def _write_configs(cfg: CfgNode) -> None:
    """``config.yaml``, and ``student.yaml``, with which Detectron2's tools/train_net.py evaluates the student."""
    Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump(), encoding="utf-8")
    plain = student_config(cfg)
    plain.defrost()
    plain.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    plain.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "student")
    Path(cfg.OUTPUT_DIR, "student.yaml").write_text(plain.dump(), encoding="utf-8")


def _write_places(cfg: CfgNode) -> None:
    """``datasets.json``: where the COCO-format sets of the config are, for tools that show pictures of them."""
    places = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        known = MetadataCatalog.get(name)
        if known.get("evaluator_type") == "coco":
            paths = {key: PathManager.get_local_path(known.get(key)) for key in ("json_file", "image_root")}
            places[name] = {key: os.path.abspath(path) for key, path in paths.items()}
    with open(os.path.join(cfg.OUTPUT_DIR, "datasets.json"), "w", encoding="utf-8") as file:
        json.dump(places, file, indent=2)


def _is_of_detectron2(path: str) -> bool:
    """Whether a file is one of the model zoo's, where Detectron2 is installed."""
    return Path(model_zoo.__file__).resolve().parent in Path(path).resolve().parents


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line.

    Args:
        arguments: of the command line; by default those of this process.

    Returns:
        The metrics of the last evaluation, if it ran in this process.

    Raises:
        SystemExit: 2 after an error message, for input that cannot work; 143 or 130 after a checkpoint, for SIGTERM or
            Ctrl-C.
    """
    args = parser().parse_args(arguments)
    results: list[Any] = []
    status = rank_status(lambda: results.append(_start(args)))
    if status:
        raise SystemExit(status)
    return results[0]


def _start(args: argparse.Namespace) -> Any:
    cfg, checked = build_config(args)
    gpus = torch.cuda.is_available() and cfg.MODEL.DEVICE.startswith("cuda")
    return run_ranks(run, (args, cfg, checked), args, gpus=gpus)


if __name__ == "__main__":
    main()
