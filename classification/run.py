"""A run of either entry point, from the options to the table at the end."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from classification.assembly import TeacherNetwork, make_student, make_teacher, make_trainer, teacher_name
from classification.checkpoint import (
    CHECKPOINT,
    STUDENT_BEST,
    STUDENT_LAST,
    checkpoints_of,
    read_training_state,
    replace_file,
)
from classification.engine import Trainer
from classification.evaluation import Evaluation
from classification.features import needs_stages, pair_features
from classification.models import architecture
from classification.options import as_values, baseline_of, gives_student
from classification.processes import Process, launch
from classification.state import Progress
from d2_mgd.commands import compare_runs
from d2_mgd.data.class_folders import Folder, find_classes, find_folders
from d2_mgd.errors import CommonError, UserError, missing
from d2_mgd.training import (
    Interrupted,
    StopRequest,
    check_same_teacher,
    claimed_for_all_ranks,
    lasting_output,
    remove_leftovers,
    restarted,
)
from d2_mgd.training.launch import report
from d2_mgd.training.processes import failing_together, from_main, largest
from d2_mgd.training.randomness import seed_all
from d2_mgd.training.services import SERVICES, check_services
from d2_mgd.training.tables import table
from d2_mgd.training.verdict import verdict
from d2_mgd.training.weights_files import trust

logger = logging.getLogger(__name__)

_TABLE = ("network", "top-1 error", "top-5 error", "epoch")
_LOG_FORMAT = "%(asctime)s %(message)s"
# Options that may change when a run is resumed, without a warning.
_FREE = {
    "workers", "resume", "print_freq", "overwrite", "device", "gpu", "dist_url", "rank", "data", "output_dir", "nproc",
    "trust_weights", "log", "log_student", "with_baseline",
}  # fmt: skip


def main(parse: Callable[[Sequence[str] | None], argparse.Namespace], arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    try:
        options = parse(arguments)
        _check(options)
    except UserError as error:
        return report(error)
    return launch(_work, options)


def _check(options: argparse.Namespace) -> None:
    """Check what can be checked before processes start."""
    architecture(options.arch)
    if options.teacher_arch is not None:
        architecture(options.teacher_arch)
    find_classes(options.data, options.val_split)
    if options.method not in ("base", "kd"):
        names = options.arch, teacher_name(options)
        if not needs_stages(*names, options.features):
            pair_features(*names, options.features)  # before a teacher is downloaded
    for file in (options.student_resume, options.teacher_resume):
        if file is not None and not file.is_file():
            raise missing("the file", file)
    if not options.evaluate:
        _check_output(options.output_dir)


def _check_output(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise UserError(f"--output-dir {folder} cannot be created, because {existing} is a file: name a folder.")


@lasting_output()
def _work(process: Process, options: argparse.Namespace) -> None:
    for file in options.trust_weights:
        trust(file)
    if options.method == "base" or not options.with_baseline:
        _run(process, options)
        return
    alone = baseline_of(options)
    _agreed_resume(process, options)  # what does not fit is an error now, not after the baseline
    _assemble(process, options, find_folders(options.data, options.val_split))
    if not from_main(_is_finished(alone)):
        _run(process, alone)
    _run(process, options)
    if process.is_main:
        compare_runs([alone.output_dir, options.output_dir], options.output_dir / "comparison")


def _is_finished(options: argparse.Namespace) -> bool:
    """Whether the output folder contains a run with these options to its last epoch."""
    record, metrics = (options.output_dir / name for name in ("run.json", "metrics.json"))
    if not (record.is_file() and metrics.is_file()):
        return False
    done = json.loads(record.read_text())["options"]
    return len(metrics.read_text().splitlines()) == options.epochs - options.start_epoch and not _changed(done, options)


def _assemble(
    process: Process, options: argparse.Namespace, folders: tuple[Folder, Folder]
) -> tuple[Trainer, TeacherNetwork | None]:
    num_classes = len(folders[0].classes)
    seed_all(options.seed)
    network = make_student(options, num_classes)  # before the teacher, so that all methods start from the same weights
    teacher = make_teacher(options, num_classes)
    return make_trainer(process, options, network, teacher, folders), teacher


def _run(process: Process, options: argparse.Namespace) -> None:
    _start_logging(process)
    _check_process(process, options)
    folders = find_folders(options.data, options.val_split)
    classes = list(folders[0].classes)
    resume = None if options.evaluate else _agreed_resume(process, options)
    state = None if resume is None else read_training_state(resume, options.arch, classes)
    trainer, teacher = _assemble(process, options, folders)
    if options.evaluate:
        _describe(trainer, teacher)
        _evaluate(trainer, teacher, len(classes))
        return
    with claimed_for_all_ranks(options.output_dir), StopRequest(confirm=process.is_main):
        if process.is_main:
            _open_folder(options, anew=state is None)
        _describe(trainer, teacher)
        if state is None:
            _evaluate_before(trainer, teacher, len(classes))
        seed_all(options.seed + 1 + process.rank)  # ranks differ, also after a restart with another number of ranks
        if resume is not None and state is not None:
            _restore(trainer, resume, state)
        if process.is_main and trainer.progress.epoch < options.epochs:  # else nothing is trained with these options
            _record(trainer)
        progress = trainer.fit()
    if process.is_main:
        print(_summary(progress, options, teacher))
    if progress.best is not None:
        _judge_teacher(trainer, progress.best["err1"])
        if process.is_main and progress.before is not None and progress.best["err1"] > progress.before:
            logger.warning(
                "the student was better before this training: top-1 error %.2f, now %.2f at best",
                progress.before, progress.best["err1"],
            )  # fmt: skip


def _restore(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    changed = _changed(state["options"], trainer.options)
    if changed and trainer.process.is_main:
        logger.warning("options changed since the checkpoint: %s", "; ".join(changed))
    if trainer.teacher and state["teacher"] and trainer.options.method != "base":
        check_same_teacher(path, _identity(state["teacher"]), _identity(trainer.teacher))
    trainer.restore(state)
    done = trainer.progress
    logger.info("Resumed %s: %d epochs and %d steps are done", path, done.epoch, done.step)
    if done.share < 1.0:
        logger.info("the distillation has %.2f of its weight (auto)", done.share)


def _start_logging(process: Process) -> None:
    form = (
        _LOG_FORMAT if process.world == 1 else _LOG_FORMAT.replace("%(message)s", f"rank {process.rank}: %(message)s")
    )
    level = logging.INFO if process.is_main else logging.WARNING
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", stream=sys.stderr, force=True)


def _check_process(process: Process, options: argparse.Namespace) -> None:
    if options.mixed_precision == "fp16" and process.device.type != "cuda":
        raise CommonError("--mixed-precision fp16 needs a GPU; on a CPU use bf16.")
    with failing_together():
        if process.is_main:
            check_services(options.log, options.log_student)
    if options.batch_size % process.local_world:
        logger.warning(
            "--batch-size %d is not a multiple of the %d processes: each gets %d images.",
            options.batch_size, process.local_world, options.batch_size // process.local_world,
        )  # fmt: skip


def _agreed_resume(process: Process, options: argparse.Namespace) -> Path | None:
    """The checkpoint to resume, chosen by rank 0; None for a new run (collective)."""
    chosen = None
    restart = largest([restarted()]) == [1]
    with failing_together():
        if process.is_main:
            chosen = _find_resume(options, restart)
    chosen = from_main(chosen)
    if chosen is not None and not chosen.is_file():
        raise UserError(f"{chosen} does not exist on this machine: all machines must share the folder {chosen.parent}.")
    return chosen


def _find_resume(options: argparse.Namespace, restart: bool) -> Path | None:
    """The checkpoint to resume, or None; after a restart by torchrun, a run resumes without ``--resume``."""
    own = options.output_dir / CHECKPOINT
    named = options.resume not in (None, "auto") and not (restart and own.is_symlink())
    path = Path(options.resume) if named else own
    checkpoints = checkpoints_of(path.parent)
    last = path.name == CHECKPOINT
    there = checkpoints.exist() if last else path.is_file()
    if named and not there:
        raise missing("the checkpoint", path)
    if there and options.resume is None and not restart and not options.overwrite:
        raise UserError(
            f"{options.output_dir} already contains a run: continue it with --resume, replace it with --overwrite, or "
            "choose another --output-dir."
        )
    if there and (options.resume is not None or restart):
        return Path(checkpoints.newest_whole(None if last else path.name))
    if options.resume is not None:
        logger.info("%s does not exist yet: starting a new run.", own)
    return None


def _open_folder(options: argparse.Namespace, anew: bool) -> None:
    folder = options.output_dir
    try:
        if anew:
            _clear(folder)
        remove_leftovers(folder)
        handler = logging.FileHandler(folder / "log.txt")
    except OSError as error:
        raise UserError(f"--output-dir {folder} is not writable: {error.strerror}.") from error
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    logging.getLogger().addHandler(handler)


def _clear(folder: Path) -> None:
    """Remove the files of an earlier run."""
    checkpoints_of(folder).clear()
    students = [
        Path(name).with_suffix(end).name for name in (STUDENT_LAST, STUDENT_BEST) for end in (".pth", ".safetensors")
    ]
    ids = [f"{name}_run.txt" for name in SERVICES]
    for name in (*students, *ids, "metrics.json", "run.json", "log.txt"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tensorboard", "matching", "nonfinite"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _describe(trainer: Trainer, teacher: TeacherNetwork | None) -> None:
    data = trainer.data
    logger.info(
        "%d training and %d evaluation images of %d classes; batches of %d in %d process(es) on %s",
        len(data["train"]), len(data["valid"]), len(data["train"].folder.classes), trainer.batch_size,
        trainer.process.world, trainer.process.device,
    )  # fmt: skip
    logger.info("student %s: %.2f million parameters", trainer.options.arch, _millions(trainer.student.network))
    if teacher is not None:
        logger.info("teacher %s: %.2f million parameters", teacher.name, _millions(teacher.network))
    options, stop = trainer.options, trainer.schedules.weight.stop
    if trainer.student.distiller is not None:
        logger.info(
            "recipe %s: --loss %s --mgd-align %s --balance %s --distill-decay %s --distill-stop %d",
            options.recipe, options.loss, options.mgd_align, options.balance, options.distill_decay, stop,
        )  # fmt: skip
    if stop is not None and stop > options.epochs and trainer.process.is_main and not options.evaluate:
        logger.warning(
            "--distill-stop %d is after the last epoch, %d: the weight does not reach zero", stop, options.epochs
        )


def _millions(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def _evaluate(trainer: Trainer, teacher: TeacherNetwork | None, num_classes: int) -> None:
    rows: list[list[Any]] = []
    found = _evaluate_teacher(trainer, teacher, num_classes)
    if teacher is not None and found is not None:
        rows.append([f"{teacher.name} (teacher)", found.err1, found.err5])
    if gives_student(trainer.options):
        found = trainer.evaluate()
        rows.append([f"{trainer.options.arch} (student)", found.err1, found.err5])
    if not rows:
        raise CommonError(
            "there is nothing to evaluate: name the student's weights, or a teacher that was trained on these classes."
        )
    if trainer.process.is_main:
        print(table(rows, _TABLE[:3]))


def _evaluate_teacher(trainer: Trainer, teacher: TeacherNetwork | None, num_classes: int) -> Evaluation | None:
    """Evaluate the teacher; None without a teacher, or if its classes are not the data's."""
    if teacher is None:
        return None
    if teacher.num_classes != num_classes:
        logger.info(
            "the teacher is not evaluated: it has %d classes, not the data's %d.", teacher.num_classes, num_classes
        )
        return None
    return trainer.evaluate(teacher.network)


def _evaluate_before(trainer: Trainer, teacher: TeacherNetwork | None, num_classes: int) -> None:
    """Evaluate both networks before the training; exit after a signal."""
    try:
        found = _evaluate_teacher(trainer, teacher, num_classes)
        if found is not None:
            trainer.progress.teacher = {"err1": found.err1, "err5": found.err5}
            logger.info("teacher before training: error top-1 %.3f, top-5 %.3f", found.err1, found.err5)
        found = trainer.evaluate()
    except Interrupted as stopped:
        trainer.leave(stopped.number)
    logger.info("student before training: error top-1 %.3f, top-5 %.3f", found.err1, found.err5)
    if gives_student(trainer.options):
        trainer.progress.before = found.err1
    trainer.compare_with_teacher(found.err1)
    _judge_teacher(trainer, found.err1)


def _judge_teacher(trainer: Trainer, student: float) -> None:
    """Warn of a teacher with little to teach; ``student`` is the student's lowest top-1 error."""
    teacher = trainer.progress.teacher
    if teacher is not None and trainer.process.is_main:
        chance = 100.0 / len(trainer.data["train"].folder.classes)
        warning = verdict("top-1 accuracy", 100.0 - teacher["err1"], 100.0 - student, chance)
        if warning:
            logger.warning(warning)


def _changed(before: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What differs from the options of an earlier start."""
    now = {key: value for key, value in as_values(options).items() if key not in _FREE}
    return [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]


def _identity(teacher: dict[str, Any]) -> dict[str, str]:
    """A teacher's file, digest and precision; torchvision's published weights are identified by their name."""
    return {**teacher, "weights": teacher["file"], "digest": teacher.get("sha256", teacher["file"])}


def _record(trainer: Trainer) -> None:
    record = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "options": as_values(trainer.options),
        "teacher": trainer.teacher,
        "teacher_errors": trainer.progress.teacher,
        "processes": trainer.process.world,
        "device": torch.cuda.get_device_name(trainer.process.device)
        if trainer.process.device.type == "cuda"
        else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
    replace_file(trainer.options.output_dir / "run.json", json.dumps(record, indent=2) + "\n")


def _summary(progress: Progress, options: argparse.Namespace, teacher: TeacherNetwork | None) -> str:
    rows: list[list[Any]] = []
    if teacher is not None:
        errors = progress.teacher or {}
        rows.append([f"{teacher.name} (teacher)", errors.get("err1"), errors.get("err5"), None])
    if progress.best is not None:
        for what, line in (("best", progress.best), ("last", progress.history[-1])):
            rows.append([f"{options.arch} ({what})", line["err1"], line["err5"], line["epoch"]])
    return f"{table(rows, _TABLE)}\nweights, metrics and matchings: {options.output_dir}"
