"""One process of a run: it trains, and writes what it sent and held.

Shape shorthand: P processes.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing import start_processes

import classification.engine as engine
import d2_mgd.distill.rematching as rematching
import d2_mgd.training.steps as steps
from benchmarks.traffic.collectives import Meter
from benchmarks.traffic.formulas import expected_bytes, expected_held, saved_bytes
from classification.assembly import TeacherNetwork, make_trainer
from classification.models import build
from classification.options import parse_mgd
from classification.processes import Process
from d2_mgd.data.class_folders import find_folders

STUDENT, TEACHER = "shufflenet_v2_x0_5", "resnet18"
TOGETHER = 16  # images of a step of all processes
OPTIONS = [
    *("--arch", STUDENT, "--teacher-arch", TEACHER, "--features", "stage2", "stage3", "--image-size", "64"),
    *("--epochs", "2", "--mgd-update-freq", "1", "--mgd-with-kd", "1", "--lr", "0.01", "--workers", "0"),
    *("--device", "cpu", "--seed", "0", "--recipe", "published"),
]
KINDS = {"traffic": (torch.float32, 0), "equality": (torch.float64, 1)}  # kind of run -> dtype, --sync-bn


def train(world: int, kind: str, folder: Path) -> None:
    """Train with ``world`` processes, which write their counts to ``folder``.

    Args:
        world: number of processes.
        kind: of ``KINDS``.
        folder: its parent has a folder ``data`` with the images.
    """
    # fork: a process has few tensors beside those that are counted, and starts fast
    start_processes(measure, (world, kind, folder), nprocs=world, start_method="fork")


def measure(rank: int, world: int, kind: str, folder: Path) -> None:
    """Train as one of ``world`` processes and write the counts to ``folder``."""
    torch.set_num_threads(1)
    torch.set_default_dtype(KINDS[kind][0])
    meter = Meter()
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder.resolve()}/store", rank=rank, world_size=world)
    with meter.counting():
        trainer = _trainer(meter, rank, world, kind, folder)
        trainer.fit()
        found = {
            "bytes": dict(meter.bytes),
            "calls": dict(meter.calls),
            "expected": expected_bytes(trainer),
            "held": _held(),
            "expected_held": expected_held(trainer),
            "saved": _saved_by_step(trainer),
        }
    if rank == 0:
        torch.save(trainer.student.network.state_dict(), folder / "student.pth")
    (folder / f"rank_{rank}.json").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


def _trainer(meter: Meter, rank: int, world: int, kind: str, folder: Path) -> engine.Trainer:
    own = ["--batch-size", str(TOGETHER), "--sync-bn", str(KINDS[kind][1]), "--output-dir", str(folder)]
    options = parse_mgd([str(folder.parent / "data"), *OPTIONS, *own])
    torch.manual_seed(0)
    data = find_folders(options.data)
    classes = len(data[0].classes)
    student, teacher = (_settled(build(name, classes)) for name in (STUDENT, TEACHER))
    with meter.of("start"):
        process = Process(rank, world, rank, world, torch.device("cpu"))
        trainer = make_trainer(process, options, student, TeacherNetwork(TEACHER, teacher, classes), data)
    for name, purpose in (("_rematch", "rematch"), ("save", "checkpoint"), ("evaluate", "evaluation")):
        meter.attach(trainer, name, purpose)
    meter.attach(trainer, "_observe_pass", "evaluation")
    meter.attach(trainer.stepper, "backward", "synchronised norms")
    meter.attach(steps, "largest", "agreement")
    for module in (engine, rematching):
        meter.attach(module, "average_buffers", "running statistics")
    wrapped = trainer.step.student
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # postponed annotations are refused here
            with meter.of("gradients"):
                return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: all processes

        wrapped.register_comm_hook(None, hook)
    return trainer


@torch.no_grad()
def _settled(network: nn.Module) -> nn.Module:
    """Set running statistics that fit fresh weights, so that maps have a sane size and one best matching."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.normal_(norm.bias, std=0.5)
    for _ in range(2):
        network.train()(torch.randn(8, 3, 64, 64))
    for norm in norms:
        norm.momentum = 0.1
    return network


def _held() -> int:
    """Return the bytes of all tensors of this process."""
    gc.collect()
    stores = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not thing.is_meta:
            store = thing.untyped_storage()
            stores[store.data_ptr()] = store.nbytes()
            if thing.grad is not None:
                stores[thing.grad.untyped_storage().data_ptr()] = thing.grad.untyped_storage().nbytes()
    return sum(stores.values())


def _saved_by_step(trainer: engine.Trainer) -> int:
    trainer.step.train()
    trainer.order.set_epoch(0)
    images, targets = trainer.intake(next(iter(trainer.batches)))
    student = trainer.student
    teacher = trainer.step.teacher
    assert isinstance(teacher, nn.Module)
    maps, logits = teacher(images)
    return saved_bytes(lambda: student(images, targets, maps, logits), student.parameters())
