"""The flags of both entry points: those of the published code, with its defaults, and additional ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from d2_mgd.distill import ALIGNMENTS, BALANCES, DECAYS, FEATURE_LOSSES, LOGIT_LOSSES, REDUCERS, SPATIAL_WEIGHTS
from d2_mgd.distill.registry import names
from d2_mgd.distill.teacher_forward import TEACHER_PRECISIONS
from d2_mgd.matching import METRICS, MODES
from d2_mgd.training.options import number, whole
from d2_mgd.training.services import add_log_arguments

# Defaults of --recipe published, where they differ.
PUBLISHED = {
    "mgd_align": "matching",
    "balance": "fixed",
    "distill_decay": "constant",
    "mgd_update_freq": 2,
    "mgd_update_images": 20000,
}

# fmt: off

def add_common(parser: argparse.ArgumentParser, nesterov: int, drops: list[int]) -> None:
    """Add the flags of every run; ``nesterov`` and ``drops`` are the defaults of --nesterov and --lr-drop-epochs."""
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="folder with train/ and valid/ (or val/), a folder per class in each"
    )
    add = parser.add_argument_group("networks and images").add_argument
    add("-a", "--arch", default="resnet18", help="mobilenet_v1, shufflenet_v2, any of torchvision, or timm:NAME")
    add("--teacher-arch", metavar="ARCH",
        help="architecture of the teacher (default: resnet50, or resnet152 for larger ResNets)")
    add("--val-split", metavar="NAME", help="folder of DATA to evaluate on (default: valid, or val)")
    add("--image-size", type=whole(16), default=224, metavar="PX", help="side of the network's square input")
    add("--skip-broken-images", action="store_true", help="skip images that cannot be read, and log each")
    _add_weights(parser)
    _add_schedule(parser, nesterov, drops)
    _add_processes(parser)
    output = parser.add_argument_group("output and resume")
    add = output.add_argument
    add("--output-dir", type=Path, metavar="DIR", help="default: output/classification/DATA.ARCH.METHOD")
    add("--overwrite", action="store_true", help="start a new run in an output folder that contains one")
    add("--resume", nargs="?", const="auto", metavar="PATH",
        help="resume from a checkpoint.pth; without PATH, from the one in the output folder, if any")
    add("--checkpoint-freq", type=whole(0), default=0, metavar="STEPS",
        help="also write a checkpoint every STEPS steps; 0: after each epoch only")
    add("--keep-checkpoints", type=whole(2), default=2, metavar="N",
        help="number of checkpoints to keep; an older one is used if the newest is damaged")
    add("--safetensors", action="store_true", help="also write the student's files as safetensors")
    add_log_arguments(output)
    add("-p", "--print-freq", type=whole(1), default=10, metavar="STEPS", help="steps between log lines")


def _add_schedule(parser: argparse.ArgumentParser, nesterov: int, drops: list[int]) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole(1), default=100, help="number of epochs, without those of the warm-up")
    add("--start-epoch", type=whole(0), default=0, help="first epoch, for a restart by hand; --resume restores it")
    add("-b", "--batch-size", type=whole(1), default=256, help="images of a step, over all processes of this machine")
    add("--lr", "--learning-rate", dest="lr", type=number(0.0), default=0.1, help="learning rate")
    add("--momentum", type=number(0.0), default=0.9, help="momentum of SGD")
    add("--wd", "--weight-decay", dest="weight_decay", type=number(0.0), default=1e-4, help="weight decay")
    add("--nesterov", type=int, choices=(0, 1), default=nesterov, help="1: Nesterov momentum")
    add("--lr-drop-ratio", type=number(0.0), default=0.1, help="factor of the learning rate at each drop")
    add("--lr-drop-epochs", type=whole(0), nargs="*", default=drops, metavar="EPOCH",
        help="epochs at which the learning rate drops, counted from the end of the warm-up")
    add("--warmup", type=int, choices=(0, 1), default=0, help="1: warm up linearly from a tenth of --lr")
    add("--warmup-epochs", type=whole(1), default=10, help="number of warm-up epochs, with --warmup 1")
    add("--seed", type=whole(0), default=0, help="seed of new weights, and of the order, crops and flips of images")
    add("--mixed-precision", choices=("none", "bf16", "fp16"), default="none", help="of the forwards; fp16: GPUs only")
    add("--accumulate", type=whole(1), default=1, metavar="PARTS",
        help="number of micro-batches of a step (gradient accumulation), which takes less memory")
    add("--skip-nonfinite", type=whole(0), default=0, metavar="N",
        help="skip up to N steps in a row with non-finite losses or gradients; 0: stop at the first")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("weights and evaluation").add_argument
    add("--use-pretrained", type=int, choices=(0, 1), default=0,
        help="start the student from torchvision's ImageNet weights")
    add("--pretrained", dest="use_pretrained", action="store_const", const=1, help="the same as --use-pretrained 1")
    add("--student-resume", type=Path, metavar="PATH", help="the student's weights file, to start from or to evaluate")
    add("--teacher-resume", type=Path, metavar="PATH", help="the teacher's weights file (default: torchvision's)")
    add("--trust-weights", action="append", default=[], metavar="FILE",
        help="load this file even if it contains python objects, which runs code of the file")
    add("-e", "--evaluate", action="store_true", help="evaluate the student, the teacher or both, and exit")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("devices and processes").add_argument
    add("-j", "--workers", type=whole(0), help="image-loading processes (default: this machine's cores, at most 32)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--gpu", type=whole(0), metavar="N", help="the same as --device cuda:N")
    add("--multiprocessing-distributed", action="store_true", help="start one process per GPU, as torchrun does")
    add("--nproc", type=whole(1), metavar="N", help="processes of this machine (default: one per GPU; 1 on CPUs)")
    add("--world-size", type=int, default=-1, help="number of machines")
    add("--rank", type=int, default=-1, help="index of this machine, from 0")
    add("--dist-url", metavar="URL", help="tcp://ADDRESS:PORT of machine 0 (default with one machine: a free port)")
    add("--dist-backend", choices=("nccl", "gloo"), help="default: nccl on GPUs, gloo on CPUs")
    add("--sync-bn", type=int, choices=(0, 1), default=0, help="1: batch-norm over the images of all processes")


def add_distillation(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run with a teacher."""
    add = parser.add_argument_group("distillation").add_argument
    add("--with-baseline", action="store_true", help="first train the student alone, in DIR/baseline; compare both")
    add("--distiller", choices=("mgd", "kd"), default="mgd", help="distil features (mgd), or only the logits (kd)")
    add("--recipe", choices=("recommended", "published"),
        help="defaults of the following options: recommended, as shown, or published: "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in PUBLISHED.items())
        + " (default: published with --mgd-reducer, --mgd-update-freq, -at, -log, --loss-factor or --distiller kd)")
    add("--teacher-precision", choices=TEACHER_PRECISIONS, default="auto",
        help="of the teacher's forward; student: --mixed-precision; auto: bfloat16 if the device has it, else student")
    add("--teacher-compile", type=int, choices=(0, 1), default=0, help="1: torch.compile the teacher's forward")
    add("--features", nargs="+", metavar="SPEC",
        help="features to distil: stage2, or NAME=STUDENT_MODULE:TEACHER_MODULE[:TEACHER_NORM]; MODULE@pre taps before "
        "the module's last activation (default: those of the paper, else the deepest map of each common stride)")
    add("--loss", choices=names(FEATURE_LOSSES),
        help="loss between two maps (default: partial_l2 if all maps of the teacher have a batch-norm, else pearson)")
    add("--loss-factor", type=number(0.0, above=True), default=1e4,
        help="divisor of partial_l2 and mse, which are sums over an image (published: 1e4 for 224 px)")
    add("--loss-weight", type=number(0.0), default=1.0, help="weight of pearson and channel_kl, which are means")
    add("--balance", choices=BALANCES, default="auto",
        help="weights of the features: from the losses, less for a trained student, until better than its teacher "
        "(auto); or fixed, those of --loss-weight or --loss-factor, either of which selects fixed")
    add("--mgd-spatial", choices=[name for name in names(SPATIAL_WEIGHTS) if name != "boxes"], default="all",
        help="weights of the pixels in the feature loss: equal, or the teacher's attention")
    add = parser.add_argument_group("matching").add_argument
    add("--mgd-reducer", choices=names(REDUCERS), default="amp", help="reduces a group of teacher channels to one map")
    add("--mgd-update-freq", type=whole(0), default=0, metavar="EPOCHS",
        help="epochs between rematches; 0: keep the first matching")
    add("--mgd-update-at", type=whole(1), nargs="+", default=[], metavar="EPOCH",
        help="rematch after these epochs, instead of every --mgd-update-freq epochs")
    add("--mgd-update-log", type=whole(1), nargs=3, metavar=("FIRST", "LAST", "COUNT"),
        help="rematch after COUNT epochs from FIRST to LAST, spaced by a constant factor")
    add("--mgd-update-images", type=whole(1), default=2000, metavar="N", help="number of images of a matching")
    add("--mgd-update-source", choices=("pass", "online"), default="pass",
        help="maps for a rematch: of a separate pass over training images, or of the last training steps")
    add("--mgd-mode", choices=MODES, help="constraint on the matching (default: balanced, for sm one_to_one)")
    add("--mgd-metric", choices=METRICS,
        help="distance between two channels (default: pearson with --loss pearson, else cosine)")
    add("--mgd-align", choices=ALIGNMENTS, default="matched_projection",
        help="how channels are aligned: by the matching, by a learned 1x1 convolution that starts as the matching "
        "(matched_projection) or at random (conv1x1), or by index (none)")
    add = parser.add_argument_group("distillation of logits").add_argument
    add("--mgd-with-kd", type=int, choices=(0, 1), default=0, help="1: also distil the logits")
    add("--kd-temperature", type=number(0.0, above=True), default=1.5, help="temperature of the logits")
    add("--kd-weight", type=number(0.0), default=1.0, help="weight of the logit loss")
    add("--kd-loss", choices=names(LOGIT_LOSSES), default="kd", help="loss between the logits of both networks")
    add("--kd-standardize", type=int, choices=(0, 1), default=0, help="1: compare z-scores of each image's logits")
    add("--kd-options", nargs="+", default=[], metavar="NAME=NUMBER",
        help="parameters of the logit loss: alpha and beta of dkd, beta and gamma of dist")
    add = parser.add_argument_group("weight of the distillation during training").add_argument
    add("--distill-decay", choices=DECAYS, default="cosine",
        help="how the weight of distillation falls from --distill-start to --distill-stop")
    add("--distill-start", type=whole(0), default=0, metavar="EPOCH", help="first epoch with distillation, from 0")
    add("--distill-stop", type=whole(1), metavar="EPOCH", help="first epoch without distillation (default: --epochs)")
    add("--distill-end", type=number(0.0), default=0.0, metavar="SHARE",
        help="share of the weight that is left at --distill-stop")
    add("--distill-warmup", type=whole(0), default=0, metavar="EPOCHS",
        help="epochs in which the weight of distillation first rises from 0")
