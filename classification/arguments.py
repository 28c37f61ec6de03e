"""The flags of both entry points: the published names and defaults, and ours beside them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from d2_mgd.distill import ALIGNMENTS, BALANCE_CHOICES, DECAYS, FEATURE_LOSSES, LOGIT_LOSSES, REDUCERS, SPATIAL_WEIGHTS
from d2_mgd.distill.registry import names
from d2_mgd.errors import UserError
from d2_mgd.matching import METRICS, MODES
from d2_mgd.training.services import add_log_arguments


class Parser(argparse.ArgumentParser):
    """Raises :class:`UserError` where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())}; {self.prog} --help lists all options.")


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


# fmt: off

def add_common(parser: argparse.ArgumentParser, nesterov: int, drops: list[int]) -> None:
    """The flags of every run, with this program's defaults of ``--nesterov`` and ``--lr-drop-epochs``."""
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with train/ and valid/ (or val/), a folder per class in each")
    add("-a", "--arch", default="resnet18", help="network to train: one of the table, any of torchvision, or timm:NAME")
    add("-j", "--workers", type=_whole(0),
        help="processes that load images, on this machine (32, or its cores if fewer)")
    add("--val-split", metavar="NAME", help="folder of DATA to evaluate on (valid, or val)")
    add("--image-size", type=_whole(16), default=224, metavar="PX", help="side of the images that the network sees")
    add("--skip-broken-images", action="store_true", help="go on where an image cannot be read; each is named")
    _add_schedule(parser, nesterov, drops)
    _add_weights(parser)
    _add_processes(parser)
    add("--output-dir", type=Path, metavar="DIR", help="where to write (output/classification/DATA.ARCH.METHOD)")
    add("--overwrite", action="store_true", help="start anew in an output folder that holds a run")
    add("--resume", nargs="?", const="auto", metavar="PATH",
        help="go on from a checkpoint.pth; without PATH from the output folder's, if there is one")
    add("--checkpoint-freq", type=_whole(0), default=0, metavar="STEPS",
        help="also write a checkpoint every so many steps")
    add("--keep-checkpoints", type=_whole(2), default=2, metavar="N",
        help="how many checkpoints stay; the older one is used where the newest is damaged")
    add("--safetensors", action="store_true", help="write the student's files as safetensors, too")
    add_log_arguments(parser)
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
    add("--lr-drop-epochs", type=_whole(0), nargs="*", default=drops, metavar="EPOCH",
        help="when; the warm-up shifts them")
    add("--warmup", type=int, choices=(0, 1), default=0, help="start with a linear warm-up from a tenth of the rate")
    add("--warmup-epochs", type=_whole(1), default=10)
    add("--seed", type=_whole(0), default=0, help="decides fresh weights, the order of images, crops and flips")
    add("--mixed-precision", choices=("none", "bf16", "fp16"), default="none",
        help="of the forward passes; fp16 on GPUs only")
    add("--accumulate", type=_whole(1), default=1, metavar="PARTS",
        help="a step's images go through the networks in so many parts, which takes less memory")
    add("--skip-nonfinite", type=_whole(0), default=0, metavar="N",
        help="skip up to N steps in a row whose losses or gradients are not finite, rather than stop")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--use-pretrained", type=int, choices=(0, 1), default=0,
        help="start the student from torchvision's ImageNet weights")
    add("--pretrained", dest="use_pretrained", action="store_const", const=1, help="the same as --use-pretrained 1")
    add("--student-resume", type=Path, metavar="PATH",
        help="weights that the student starts from, or is evaluated with")
    add("--teacher-resume", type=Path, metavar="PATH", help="the teacher's weights (torchvision's ImageNet weights)")
    add("--trust-weights", action="append", default=[], metavar="FILE",
        help="read this file even if it asks for more than weights, and run what it asks for")
    add("--teacher-arch", metavar="ARCH", help="the teacher (resnet50; for resnet50 resnet152)")
    add("-e", "--evaluate", action="store_true", help="evaluate the student, the teacher or both, and leave")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--gpu", type=_whole(0), metavar="N", help="the same as --device cuda:N")
    add("--multiprocessing-distributed", action="store_true",
        help="start one process per GPU; torchrun is the other way")
    add("--nproc", type=_whole(1), metavar="N", help="processes to start on this machine (its GPUs; 1 without)")
    add("--world-size", type=int, default=-1, help="number of machines")
    add("--rank", type=int, default=-1, help="number of this machine")
    add("--dist-url", metavar="URL", help="tcp://ADDRESS:PORT of machine 0 (a free port where there is one machine)")
    add("--dist-backend", choices=("nccl", "gloo"), help="nccl on GPUs, gloo on CPUs")
    add("--sync-bn", type=int, choices=(0, 1), default=0, help="batch-norm over the images of all processes")


def add_distillation(parser: argparse.ArgumentParser) -> None:
    """The flags of a run with a teacher."""
    add = parser.add_argument
    add("--distiller", choices=("mgd", "kd"), default="mgd", help="features (mgd), or the logits alone (kd)")
    add("--mgd-reducer", choices=names(REDUCERS), default="amp", help="how a group of teacher channels becomes one map")
    add("--mgd-update-freq", type=_whole(0), default=2, metavar="EPOCHS",
        help="epochs from one matching to the next; 0: never")
    add("--mgd-update-at", type=_whole(1), nargs="+", default=[], metavar="EPOCH",
        help="match again after these epochs, in place of --mgd-update-freq")
    add("--mgd-update-log", type=_whole(1), nargs=3, metavar=("FIRST", "LAST", "COUNT"),
        help="the same, so many times, each a constant factor later than the one before")
    add("--mgd-update-images", type=_whole(1), default=20000, metavar="N", help="images that a matching is measured on")
    add("--mgd-update-source", choices=("pass", "online"), default="pass",
        help="a pass of its own over training images, or the maps of the last training steps")
    add("--mgd-mode", choices=MODES, help="which matchings are allowed (balanced; one_to_one for the reducer sm)")
    add("--mgd-metric", choices=METRICS, default="cosine", help="distance of two channels")
    add("--mgd-align", choices=ALIGNMENTS, default="matching",
        help="matching, a learned 1x1 convolution that starts as the matching or at random, or channel by channel")
    add("--balance", choices=BALANCE_CHOICES, default="fixed",
        help="fixed: --loss-factor or --loss-weight weighs the features; auto: the gradients at the student's maps do")
    add("--mgd-with-kd", type=int, choices=(0, 1), default=0, help="distil the logits, too")
    add("--kd-temperature", type=_number(0.0, above=True), default=1.5)
    add("--kd-weight", type=_number(0.0), default=1.0)
    add("--kd-loss", choices=names(LOGIT_LOSSES), default="kd", help="how two networks' logits are compared")
    add("--kd-standardize", type=int, choices=(0, 1), default=0, help="compare z-scores of each image's logits")
    add("--kd-options", nargs="+", default=[], metavar="NAME=NUMBER",
        help="of the logit loss: alpha and beta of dkd, beta and gamma of dist")
    add("--mgd-spatial", choices=[name for name in names(SPATIAL_WEIGHTS) if name != "boxes"], default="all",
        help="which pixels count how much in the loss: all alike, or by the teacher's attention")
    add("--loss", choices=names(FEATURE_LOSSES), default="partial_l2", help="how two maps are compared")
    add("--loss-factor", type=_number(0.0, above=True), default=1e4,
        help="what partial_l2 and mse, summed over an image, are divided by (1e4, published for 224 px)")
    add("--loss-weight", type=_number(0.0), default=1.0, help="weight of pearson and channel_kl, which are means")
    add("--distill-decay", choices=DECAYS, default="constant",
        help="how the weight of distillation falls from --distill-start to --distill-stop, step by step")
    add("--distill-start", type=_whole(0), default=0, metavar="EPOCH", help="epoch that distillation begins with")
    add("--distill-stop", type=_whole(1), metavar="EPOCH", help="epoch that it ends before (--epochs)")
    add("--distill-end", type=_number(0.0), default=0.0, metavar="SHARE", help="share of the weight that it falls to")
    add("--distill-warmup", type=_whole(0), default=0, metavar="EPOCHS", help="in which its weight first rises from 0")
    add("--features", nargs="+", metavar="SPEC",
        help="features to compare: stage2, or NAME=STUDENT_MODULE:TEACHER_MODULE[:TEACHER_NORM]; MODULE@pre is before "
        "its last activation (the table's features without the ignored ones)")
