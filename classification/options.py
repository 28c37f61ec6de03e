"""Parsing and checking the options of both entry points."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classification.arguments import PUBLISHED, add_common, add_distillation
from classification.checkpoint import CHECKPOINT
from d2_mgd.distill import MATCHED_ALIGNMENTS, LogitLoss, RematchSchedule, WeightSchedule
from d2_mgd.errors import UserError, located
from d2_mgd.training.options import Parser

_OF_MATCHING = ("mgd_mode", "mgd_metric", "mgd_update")
_OF_FEATURES = ("recipe", "features", "balance", "loss", "mgd_align", "mgd_reducer", "mgd_spatial", *_OF_MATCHING)
_OF_PUBLISHED = {"mgd_reducer", "mgd_update_freq", "mgd_update_at", "mgd_update_log", "loss_factor"}
SUMMED_LOSSES = ("partial_l2", "mse")  # sums over an image, weighted by the published factors

_USAGE = "%(prog)s DATA [options]"
_BASE = """Train a network without a teacher, or evaluate it and its teacher.

  %(prog)s DATA --arch mobilenet_v2
  %(prog)s DATA --arch resnet50 --pretrained --learning-rate 0.01    # a teacher for these classes
  %(prog)s DATA --arch mobilenet_v2 --student-resume student_best.pth --evaluate"""

_MGD = """Distil a teacher into a student by Matching Guided Distillation.

  %(prog)s DATA --arch mobilenet_v2    # from torchvision's ResNet-50
  %(prog)s DATA --arch mobilenet_v2 --teacher-arch resnet50 --teacher-resume teacher.pth --mgd-with-kd 1
  %(prog)s DATA --arch timm:mobilenetv3_small_100 --teacher-arch timm:convnext_tiny"""


def parse_base(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of ``main_base.py``, which trains without a teacher.

    Raises:
        UserError: an option is unknown or malformed, or contradicts another.
    """
    parser = Parser(_USAGE, _BASE)
    add_common(parser, nesterov=0, drops=[30, 60, 90])
    options = parser.parse_args(arguments)
    options.method = "base"
    if (options.teacher_arch or options.teacher_resume) and not options.evaluate:
        raise UserError("main_base.py uses a teacher with --evaluate only; main_mgd.py distils.")
    return _checked(options)


def parse_mgd(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of ``main_mgd.py``, which distils a teacher. Errors as in :func:`parse_base`."""
    parser = Parser(_USAGE, _MGD)
    add_common(parser, nesterov=1, drops=[31, 61, 81])
    add_distillation(parser)
    options, given = _parse(parser, arguments)
    _set_recipe(options, given)
    options.with_kd = bool(options.mgd_with_kd) or options.distiller == "kd"
    if options.loss is None and "loss_factor" in given:
        options.loss = "partial_l2"  # published command lines with the factor of this loss do not name it
    _check_in_vain(options, given)
    if options.with_baseline and options.evaluate:
        raise UserError("--with-baseline compares a distilled student: it needs a training, not --evaluate.")
    if options.with_kd:
        logit_loss(options)
    if options.distiller == "kd":
        options.method = "kd"
    else:
        kind = f"mgd-{options.mgd_reducer}" if options.mgd_align == "matching" else options.mgd_align
        options.method = f"{kind}-kd" if options.with_kd else kind
    _checked(options)
    rematch_schedule(options)
    weight_schedule(options)
    return options


def baseline_of(options: argparse.Namespace) -> argparse.Namespace:
    """The options of a training of the same student alone, in the folder ``baseline`` of the output folder."""
    parser = Parser(_USAGE, _BASE)
    add_common(parser, nesterov=1, drops=[])
    alone = argparse.Namespace(**{name: getattr(options, name) for name in vars(parser.parse_args(["DATA"]))})
    alone.method, alone.teacher_arch, alone.teacher_resume = "base", None, None
    alone.output_dir, alone.resume = options.output_dir / "baseline", options.resume and "auto"
    return alone


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options; also returns the names of those that the command line sets."""
    defaults = vars(parser.parse_args(["DATA"]))
    options = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults)))
    given = [name for name, value in vars(options).items() if value is not None]
    for name in defaults.keys() - set(given):
        setattr(options, name, defaults[name])
    return options, given


def _set_recipe(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Set the defaults of the recipe. Options that published command lines contain choose the published one."""
    published = options.distiller == "kd" or not _OF_PUBLISHED.isdisjoint(given)
    options.recipe = options.recipe or ("published" if published else "recommended")
    defaults: dict[str, Any] = PUBLISHED if options.recipe == "published" else {}
    if not {"loss_weight", "loss_factor"}.isdisjoint(given):
        defaults = {**defaults, "balance": "fixed"}
    for name in defaults.keys() - set(given):
        setattr(options, name, defaults[name])


def _check_in_vain(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Check that no option is set that the run would not use."""
    summed, only_logits = options.loss in SUMMED_LOSSES, options.distiller == "kd"
    unmatched = options.mgd_align not in MATCHED_ALIGNMENTS
    rules: list[tuple[bool, tuple[str, ...], str]] = [
        (not options.with_kd, ("kd_",), "needs distillation of logits: add --mgd-with-kd 1 or --distiller kd"),
        (only_logits, _OF_FEATURES, "needs distillation of features, and --distiller kd has none"),
        (
            options.mgd_align != "matching",
            ("mgd_reducer",),
            f"needs --mgd-align matching, not {options.mgd_align}: add it",
        ),
        (unmatched, _OF_MATCHING, f"is not used with --mgd-align {options.mgd_align}"),
        (options.balance != "fixed", ("loss_weight", "loss_factor"), f"is not used with --balance {options.balance}"),
        (summed, ("loss_weight",), f"is not used with --loss {options.loss}: use --loss-factor"),
        (options.loss is None, ("loss_weight",), "is of --loss pearson and --loss channel_kl: add one of them"),
        (not summed, ("loss_factor",), f"is not used with --loss {options.loss}: use --loss-weight"),
    ]
    for in_vain, starts, why in rules:
        name = next((name for name in given if in_vain and name.startswith(starts)), None)
        if name is not None:
            raise UserError(f"--{name.replace('_', '-')} {why}{', or' if ':' in why else ':'} leave it out.")


def logit_loss(options: argparse.Namespace) -> LogitLoss:
    """Build the loss of the logits.

    Raises:
        UserError: the loss does not have a parameter of ``--kd-options``, or its value is invalid.
    """
    own: dict[str, float] = {}
    for text in options.kd_options:
        name, _, value = text.partition("=")
        try:
            own[name] = float(value)
        except ValueError:
            raise UserError(f"--kd-options needs NAME=NUMBER, such as beta=8, not {text!r}.") from None
    if "temperature" in own:
        raise UserError("--kd-options does not take the temperature: use --kd-temperature.")
    return LogitLoss(
        options.kd_loss,
        weight=options.kd_weight,
        standardize=bool(options.kd_standardize),
        temperature=options.kd_temperature,
        **own,
    )


def rematch_schedule(options: argparse.Namespace) -> RematchSchedule:
    """Build the schedule of rematches, in epochs.

    Raises:
        UserError: the numbers of epochs are invalid.
    """
    if not options.mgd_update_at and not options.mgd_update_log:
        return RematchSchedule([options.mgd_update_freq])
    spaced = RematchSchedule.log_spaced(*options.mgd_update_log).at if options.mgd_update_log else []
    return RematchSchedule(at=[*options.mgd_update_at, *spaced])


def weight_schedule(options: argparse.Namespace) -> WeightSchedule:
    """Build the schedule of the distillation weight, in epochs; those of the learning rate's warm-up count too.

    Raises:
        UserError: the numbers of epochs contradict each other.
    """
    stop = options.epochs if options.distill_stop is None else options.distill_stop
    with located("--distill-...: "):
        return WeightSchedule(
            options.distill_decay, options.distill_start, stop, options.distill_warmup, options.distill_end
        )


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    if options.use_pretrained and options.student_resume:
        raise UserError("--use-pretrained and --student-resume both set the student's initial weights: choose one.")
    if options.nesterov and options.momentum == 0:
        raise UserError("--nesterov 1 needs a --momentum above 0.")
    if options.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options.workers = min(32, cores)
    if options.accumulate > options.batch_size:
        raise UserError(
            f"--accumulate {options.accumulate} is larger than --batch-size {options.batch_size}: choose a smaller one."
        )
    if options.warmup:
        options.epochs += options.warmup_epochs
        options.lr_drop_epochs = [epoch + options.warmup_epochs for epoch in options.lr_drop_epochs]
    options.data = options.data.resolve()  # absolute, because readers of run.json may run in another folder
    _set_output_dir(options)
    if options.evaluate and options.resume:
        _name_evaluated_student(options)
    if options.evaluate and not (gives_student(options) or options.teacher_arch or options.teacher_resume):
        raise UserError(
            "--evaluate has no weights to evaluate: name the student's with --student-resume, --resume or "
            "--use-pretrained 1, or a teacher with --teacher-resume or --teacher-arch."
        )
    return options


def gives_student(options: argparse.Namespace) -> bool:
    """Whether the options name weights of the student; with ``--evaluate``, whether it is evaluated."""
    return bool(options.use_pretrained or options.student_resume)


def _name_evaluated_student(options: argparse.Namespace) -> None:
    """With ``--evaluate``, make the checkpoint of ``--resume`` the student's file; it overrides pretrained weights."""
    if options.student_resume:
        raise UserError("--resume and --student-resume both name the student to evaluate: choose one.")
    options.student_resume = options.output_dir / CHECKPOINT if options.resume == "auto" else Path(options.resume)
    options.resume, options.use_pretrained = None, 0


def _set_output_dir(options: argparse.Namespace) -> None:
    if options.resume in (None, "", "auto"):
        options.resume = options.resume or None
        if options.output_dir is None:
            name = f"{options.data.name}.{options.arch.replace(':', '-')}.{options.method}"
            options.output_dir = Path("output") / "classification" / name
        return
    folder = Path(options.resume).resolve().parent
    if options.output_dir is not None and options.output_dir.resolve() != folder:
        raise UserError(
            f"--resume {options.resume} continues in that folder: leave --output-dir out, or copy the run there first."
        )
    options.output_dir = folder


def as_values(options: argparse.Namespace) -> dict[str, Any]:
    """The options as plain values, for checkpoints."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
