"""The options of both entry points; published names and defaults, ours beside them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from classification.checkpoint import CHECKPOINT
from d2_mgd.distill import (
    ALIGNMENTS,
    DECAYS,
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    REDUCERS,
    SPATIAL_WEIGHTS,
    LogitLoss,
    RematchSchedule,
    WeightSchedule,
)
from d2_mgd.distill.registry import names
from d2_mgd.errors import UserError, located
from d2_mgd.matching import MODES
from d2_mgd.matching.cost import METRICS

__all__ = [
    "SUMMED_LOSSES",
    "gives_student",
    "logit_loss",
    "parse_base",
    "parse_mgd",
    "rematch_schedule",
    "weight_schedule",
]


SUMMED_LOSSES = ("partial_l2", "mse")  # over an image; they take the published factors


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())}; {self.prog} --help lists all options.")


def parse_base(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of ``main_base.py``: training without a teacher.

    Raises:
        UserError: an option that is unknown, malformed, or does not go with another.
    """
    parser = _Parser(
        prog="main_base.py", description="Train or evaluate a network; with --evaluate, also its teacher beside it."
    )
    _add_common(parser, nesterov=0, drops=[30, 60, 90])
    options = parser.parse_args(arguments)
    options.method = "base"
    if (options.teacher_arch or options.teacher_resume) and not options.evaluate:
        raise UserError("main_base.py uses a teacher with --evaluate only; main_mgd.py distils.")
    return _checked(options)


def parse_mgd(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of ``main_mgd.py``: training with a teacher. Errors as in :func:`parse_base`."""
    parser = _Parser(prog="main_mgd.py", description="Distil a teacher into a student by Matching Guided Distillation.")
    _add_common(parser, nesterov=1, drops=[31, 61, 81])
    _add_distillation(parser)
    options, given = _parse(parser, arguments)
    options.with_kd = bool(options.mgd_with_kd) or options.distiller == "kd"
    _check_in_vain(options, given)
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


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the names of those that the command line gave a value."""
    defaults = vars(parser.parse_args(["DATA"]))
    options = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults)))
    given = [name for name, value in vars(options).items() if value is not None]
    for name in defaults.keys() - set(given):
        setattr(options, name, defaults[name])
    return options, given


def _check_in_vain(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Refuse what was asked for and would change nothing."""
    about_logits = next((name for name in given if name.startswith("kd_")), None)
    if about_logits is not None and not options.with_kd:
        raise UserError(
            f"--{about_logits.replace('_', '-')} is about the logits, which are not distilled: add --mgd-with-kd 1, or "
            "--distiller kd, or leave it out."
        )
    if options.loss in SUMMED_LOSSES and "loss_weight" in given:
        raise UserError(f"--loss-weight is not used by --loss {options.loss}, which --loss-factor divides.")
    if options.loss not in SUMMED_LOSSES and "loss_factor" in given:
        raise UserError(f"--loss-factor is not used by --loss {options.loss}, which --loss-weight multiplies.")


def _add_common(parser: argparse.ArgumentParser, nesterov: int, drops: list[int]) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with train/ and valid/ (or val/), a folder per class in each")
    add("-a", "--arch", default="resnet18", help="network to train: one of the table, any of torchvision, or timm:NAME")
    add(
        "-j",
        "--workers",
        type=_whole(0),
        help="processes that load images, on this machine (32, or its cores if fewer)",
    )
    add("--val-split", metavar="NAME", help="folder of DATA to evaluate on (valid, or val)")
    add("--image-size", type=_whole(16), default=224, metavar="PX", help="side of the images that the network sees")
    add("--skip-broken-images", action="store_true", help="go on where an image cannot be read; each is named")
    _add_schedule(parser, nesterov, drops)
    _add_weights(parser)
    _add_processes(parser)
    add("--output-dir", type=Path, metavar="DIR", help="where to write (output/classification/DATA.ARCH.METHOD)")
    add("--overwrite", action="store_true", help="start anew in an output folder that holds a run")
    add("--resume", nargs="?", const="auto", metavar="PATH",
        help="go on from a checkpoint.pth; without PATH from the output folder's, if there is one")  # fmt: skip
    add(
        "--checkpoint-freq",
        type=_whole(0),
        default=0,
        metavar="STEPS",
        help="also write a checkpoint every so many steps",
    )
    add(
        "--keep-checkpoints",
        type=_whole(2),
        default=2,
        metavar="N",
        help="how many checkpoints stay; the older one is used where the newest is damaged",
    )
    add("--safetensors", action="store_true", help="write the student's files as safetensors, too")
    add("-p", "--print-freq", type=_whole(1), default=10, metavar="STEPS", help="steps from one log line to the next")


def _add_schedule(parser: argparse.ArgumentParser, nesterov: int, drops: list[int]) -> None:
    add = parser.add_argument
    add("--epochs", type=_whole(1), default=100, help="number of epochs; those of the warm-up come on top")
    add("--start-epoch", type=_whole(0), default=0, help="first epoch, for restarts by hand; --resume finds it itself")
    add("-b", "--batch-size", type=_whole(1), default=256, help="images of a step of all processes on this machine")
    add("--lr", "--learning-rate", dest="lr", type=_number(0.0), default=0.1, help="learning rate")
    add("--momentum", type=_number(0.0), default=0.9)
    add("--wd", "--weight-decay", dest="weight_decay", type=_number(0.0), default=1e-4)
    add("--nesterov", type=int, choices=(0, 1), default=nesterov, help="Nesterov's momentum")
    add("--lr-drop-ratio", type=_number(0.0), default=0.1, help="what the learning rate is multiplied by at a drop")
    add(
        "--lr-drop-epochs",
        type=_whole(0),
        nargs="*",
        default=drops,
        metavar="EPOCH",
        help="when; the warm-up shifts them",
    )
    add("--warmup", type=int, choices=(0, 1), default=0, help="start with a linear warm-up from a tenth of the rate")
    add("--warmup-epochs", type=_whole(1), default=10)
    add("--seed", type=_whole(0), default=0, help="decides fresh weights, the order of images, crops and flips")
    add(
        "--mixed-precision",
        choices=("none", "bf16", "fp16"),
        default="none",
        help="of the forward passes; fp16 on GPUs only",
    )

    add("--accumulate", type=_whole(1), default=1, metavar="PARTS",
        help="a step's images go through the networks in so many parts, which takes less memory")  # fmt: skip
    add("--skip-nonfinite", type=_whole(0), default=0, metavar="N",
        help="skip up to N steps in a row whose losses or gradients are not finite, rather than stop")  # fmt: skip


def _add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--use-pretrained",
        type=int,
        choices=(0, 1),
        default=0,
        help="start the student from torchvision's ImageNet weights",
    )
    add("--pretrained", dest="use_pretrained", action="store_const", const=1, help="the same as --use-pretrained 1")
    add(
        "--student-resume", type=Path, metavar="PATH", help="weights that the student starts from, or is evaluated with"
    )
    add("--teacher-resume", type=Path, metavar="PATH", help="the teacher's weights (torchvision's ImageNet weights)")
    add("--trust-weights", action="append", default=[], metavar="FILE",
        help="read this file even if it asks for more than weights, and run what it asks for")  # fmt: skip
    add("--teacher-arch", metavar="ARCH", help="the teacher (resnet50; for resnet50 resnet152)")
    add("-e", "--evaluate", action="store_true", help="evaluate the student, the teacher or both, and leave")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--gpu", type=_whole(0), metavar="N", help="the same as --device cuda:N")
    add(
        "--multiprocessing-distributed",
        action="store_true",
        help="start one process per GPU; torchrun is the other way",
    )
    add("--nproc", type=_whole(1), metavar="N", help="processes to start on this machine (its GPUs; 1 without)")
    add("--world-size", type=int, default=-1, help="number of machines")
    add("--rank", type=int, default=-1, help="number of this machine")
    add("--dist-url", metavar="URL", help="tcp://ADDRESS:PORT of machine 0 (a free port where there is one machine)")
    add("--dist-backend", choices=("nccl", "gloo"), help="nccl on GPUs, gloo on CPUs")
    add("--sync-bn", type=int, choices=(0, 1), default=0, help="batch-norm over the images of all processes")


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--distiller", choices=("mgd", "kd"), default="mgd", help="features (mgd), or the logits alone (kd)")
    add("--mgd-reducer", choices=names(REDUCERS), default="amp", help="how a group of teacher channels becomes one map")
    add(
        "--mgd-update-freq",
        type=_whole(0),
        default=2,
        metavar="EPOCHS",
        help="epochs from one matching to the next; 0: never",
    )
    add("--mgd-update-at", type=_whole(1), nargs="+", default=[], metavar="EPOCH",
        help="match again after these epochs, in place of --mgd-update-freq")  # fmt: skip
    add("--mgd-update-log", type=_whole(1), nargs=3, metavar=("FIRST", "LAST", "COUNT"),
        help="the same, so many times, each a constant factor later than the one before")  # fmt: skip
    add("--mgd-update-images", type=_whole(1), default=20000, metavar="N", help="images that a matching is measured on")
    add("--mgd-update-source", choices=("pass", "online"), default="pass",
        help="a pass of its own over training images, or the maps of the last training steps")  # fmt: skip
    add("--mgd-mode", choices=MODES, help="which matchings are allowed (balanced; one_to_one for the reducer sm)")
    add("--mgd-metric", choices=METRICS, default="cosine", help="distance of two channels")
    add(
        "--mgd-align",
        choices=ALIGNMENTS,
        default="matching",
        help="matching, a learned 1x1 convolution that starts as the matching or at random, or channel by channel",
    )
    add("--mgd-with-kd", type=int, choices=(0, 1), default=0, help="distil the logits, too")
    add("--kd-temperature", type=_number(0.0, above=True), default=1.5)
    add("--kd-weight", type=_number(0.0), default=1.0)
    add("--kd-loss", choices=names(LOGIT_LOSSES), default="kd", help="how two networks' logits are compared")
    add("--kd-standardize", type=int, choices=(0, 1), default=0, help="compare z-scores of each image's logits")
    add("--kd-options", nargs="+", default=[], metavar="NAME=NUMBER",
        help="of the logit loss: alpha and beta of dkd, beta and gamma of dist")  # fmt: skip
    add("--mgd-spatial", choices=[name for name in names(SPATIAL_WEIGHTS) if name != "boxes"], default="all",
        help="which pixels count how much in the loss: all alike, or by the teacher's attention")  # fmt: skip
    add("--loss", choices=names(FEATURE_LOSSES), default="partial_l2", help="how two maps are compared")
    add("--loss-factor", type=_number(0.0, above=True), default=1e4,
        help="what partial_l2 and mse, summed over an image, are divided by (1e4, published for 224 px)")  # fmt: skip
    add("--loss-weight", type=_number(0.0), default=1.0, help="weight of pearson and channel_kl, which are means")
    add("--distill-decay", choices=DECAYS, default="constant",
        help="how the weight of distillation falls from --distill-start to --distill-stop, step by step")  # fmt: skip
    add("--distill-start", type=_whole(0), default=0, metavar="EPOCH", help="epoch that distillation begins with")
    add("--distill-stop", type=_whole(1), metavar="EPOCH", help="epoch that it ends before (--epochs)")
    add("--distill-end", type=_number(0.0), default=0.0, metavar="SHARE", help="share of the weight that it falls to")
    add("--distill-warmup", type=_whole(0), default=0, metavar="EPOCHS", help="in which its weight first rises from 0")
    add("--features", nargs="+", metavar="SPEC",
        help="features to compare: stage2, or NAME=STUDENT_MODULE:TEACHER_MODULE[:TEACHER_NORM]; MODULE@pre is before "
        "its last activation (the table's features without the ignored ones)")  # fmt: skip


def logit_loss(options: argparse.Namespace) -> LogitLoss:
    """What the options say about logits.

    Raises:
        UserError: an option of the loss that it does not have, or a value that it cannot take.
    """
    own: dict[str, float] = {}
    for text in options.kd_options:
        name, _, value = text.partition("=")
        try:
            own[name] = float(value)
        except ValueError:
            raise UserError(f"--kd-options takes NAME=NUMBER, such as beta=8, not {text!r}.") from None
    if "temperature" in own:
        raise UserError("the temperature of the logits is --kd-temperature, not one of the --kd-options.")
    return LogitLoss(
        options.kd_loss,
        weight=options.kd_weight,
        standardize=bool(options.kd_standardize),
        temperature=options.kd_temperature,
        **own,
    )


def rematch_schedule(options: argparse.Namespace) -> RematchSchedule:
    """After which epochs to match again.

    Raises:
        UserError: numbers that do not fit together.
    """
    if not options.mgd_update_at and not options.mgd_update_log:
        return RematchSchedule([options.mgd_update_freq])
    spaced = RematchSchedule.log_spaced(*options.mgd_update_log).at if options.mgd_update_log else []
    return RematchSchedule(at=[*options.mgd_update_at, *spaced])


def weight_schedule(options: argparse.Namespace) -> WeightSchedule:
    """The factor of the distillation losses by epochs, those of the learning rate's warm-up included.

    Raises:
        UserError: numbers that do not fit together.
    """
    stop = options.epochs if options.distill_stop is None else options.distill_stop
    with located("--distill-...: "):
        return WeightSchedule(
            options.distill_decay, options.distill_start, stop, options.distill_warmup, options.distill_end
        )


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
        return value

    convert.__name__ = "whole number"  # argparse: "invalid whole number value: ..."
    return convert


def _number(least: float, above: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"must be {'above ' if above else ''}{least:g}{'' if above else ' or more'}, not {text}"
            )
        return value

    convert.__name__ = "number"
    return convert


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    if options.use_pretrained and options.student_resume:
        raise UserError("--use-pretrained and --student-resume both give the student's first weights: choose one.")
    if options.nesterov and options.momentum == 0:
        raise UserError("--nesterov 1 needs a --momentum above 0.")
    if options.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options.workers = min(32, cores)
    if options.accumulate > options.batch_size:
        raise UserError(
            f"--accumulate {options.accumulate} is more than --batch-size {options.batch_size}, whose images it parts."
        )
    if options.warmup:
        options.epochs += options.warmup_epochs
        options.lr_drop_epochs = [epoch + options.warmup_epochs for epoch in options.lr_drop_epochs]
    options.data = options.data.resolve()  # whoever reads it later stands somewhere else
    _set_output_dir(options)
    if options.evaluate and options.resume:
        _name_evaluated_student(options)
    if options.evaluate and not (gives_student(options) or options.teacher_arch or options.teacher_resume):
        raise UserError(
            "--evaluate has no weights to evaluate: name the student's by --student-resume, --resume or "
            "--use-pretrained 1, or a teacher by --teacher-resume or --teacher-arch."
        )
    return options


def gives_student(options: argparse.Namespace) -> bool:
    """Whether the student has weights other than fresh ones; with ``--evaluate``, whether it is evaluated."""
    return bool(options.use_pretrained or options.student_resume)


def _name_evaluated_student(options: argparse.Namespace) -> None:
    """With --evaluate, --resume names the checkpoint whose student is looked at; as in a training, it goes before
    pretrained weights."""
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
            f"--resume {options.resume} goes on in its own folder: leave --output-dir out, or copy the run there."
        )
    options.output_dir = folder


def as_values(options: argparse.Namespace) -> dict[str, Any]:
    """Options as plain values, for a checkpoint."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
