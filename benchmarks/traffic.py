"""What processes tell each other, and what each holds: measured, and compared with the formulas of docs/scaling.md.

    python -m benchmarks.traffic [--processes 1 2 4] [--output benchmarks/results/traffic_cpu.json]

A small student is distilled by classification's trainer, in one process and in several that share the same batches over
gloo, twice:

- ``traffic``: float32, as users train. Every collective of every process is counted, with its payload, and by what it
  is for. Where the system allows it (unshare), the processes have a network of their own, whose loopback device counts
  the bytes that really went over it.
- ``equality``: float64 with synchronised norms, where the number of processes may change rounding alone. In float32
  training multiplies rounding by tens a step, so that after a few steps nothing can be told from it.

The run fails where a count differs from its formula, or where matchings or weights depend on the number of processes.

Shape shorthand: P processes, p trained parameters, S student channels, T teacher channels.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from PIL import Image
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import classification.engine as engine
from benchmarks.machine import commit, machine
from benchmarks.meter import Meter, loopback_bytes, raise_loopback, tensor_bytes
from classification.assembly import TeacherNetwork, make_trainer
from classification.features import pair_features
from classification.folders import find_folders
from classification.models import build, measure_features
from classification.options import parse_mgd
from classification.processes import Process
from d2_mgd.distill import load_reports
from d2_mgd.distill.norms import MaskedBatchNorm

__all__ = ["collected", "compare", "main", "measure", "run", "sizes", "train", "write_images"]

ROOT = Path(__file__).resolve().parents[1]
STUDENT, TEACHER = "shufflenet_v2_x0_5", "resnet18"
TOGETHER = 16  # images of a step of all processes
OPTIONS = [
    *("--arch", STUDENT, "--teacher-arch", TEACHER, "--features", "stage2", "stage3", "--image-size", "64"),
    *("--epochs", "2", "--mgd-update-freq", "1", "--mgd-with-kd", "1", "--lr", "0.01", "--workers", "0"),
    *("--device", "cpu", "--seed", "0"),
]
KINDS = {"traffic": (torch.float32, 0), "equality": (torch.float64, 1)}  # kind of run -> dtype, --sync-bn
# Largest difference of a weight from the run of one process, over the largest weight of its tensor, in float64.
ROUNDING = 1e-5
# What TCP and gloo may add to the payload on the loopback device.
OVERHEAD = 1.05
# Published pairs, and a larger one, whose sizes are computed.
PAIRS = [
    ("mobilenet_v1", "resnet50"),
    ("mobilenet_v2", "resnet50"),
    ("resnet18", "resnet50"),
    ("resnet50", "resnet152"),
]


# ---- one process of a run


def measure(rank: int, world: int, port: int, kind: str, folder: Path, own_network: bool) -> None:
    """Train as one of ``world`` processes; writes what was counted to ``folder``."""
    torch.set_num_threads(1)
    torch.set_default_dtype(KINDS[kind][0])
    meter = Meter()
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    with meter.counting():
        trainer = _trainer(meter, rank, world, kind, folder)
        wire = _watch_wire(trainer) if own_network and world > 1 else {}
        trainer.fit()
        found = {
            "bytes": dict(meter.bytes),
            "calls": dict(meter.calls),
            "expected": _expected(trainer),
            "held": _held(),
            "expected_held": _expected_held(trainer),
            "saved": _saved_by_step(trainer),
            "wire": wire,
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
    meter.attach(engine, "largest", "agreement")
    meter.attach(engine, "average_buffers", "running statistics")
    wrapped = trainer.stepper.step.student
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # postponed annotations are refused here
            with meter.of("gradients"):
                return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: all processes

        wrapped.register_comm_hook(None, hook)
    return trainer


@torch.no_grad()
def _settled(network: nn.Module) -> nn.Module:
    """Fresh weights with running statistics that fit them; maps of a sane size have one best matching."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.normal_(norm.bias, std=0.5)
    for _ in range(2):
        network.train()(torch.randn(8, 3, 64, 64))
    for norm in norms:
        norm.momentum = 0.1
    return network


def _watch_wire(trainer: engine.Trainer) -> dict[str, int]:
    """Count what all processes together send, in the epochs' steps and in the rematches."""
    wire = {"steps": 0, "rematches": 0}

    def watched(name: str, what: str) -> None:
        original = getattr(trainer, name)

        def around(*arguments: Any) -> Any:
            c10d.barrier()
            before = loopback_bytes()
            result = original(*arguments)
            c10d.barrier()
            wire[what] += loopback_bytes() - before
            return result

        setattr(trainer, name, around)

    watched("_train", "steps")
    watched("_rematch", "rematches")
    return wire


def _expected(trainer: engine.Trainer) -> dict[str, int]:
    """The formulas of docs/scaling.md, over the whole run."""
    world = trainer.process.world
    if world == 1:
        return {}
    epochs, steps = trainer.options.epochs, trainer.order.steps * trainer.options.epochs
    trained = [tensor_bytes(parameter) for parameter in trainer.student.parameters()]
    pairs = [cost.num_student * cost.num_teacher for cost in trainer.distiller.costs.values()]
    costs = sum(8 * (pair + 1) for pair in pairs)
    norms = [norm for norm in trainer.student.modules() if isinstance(norm, MaskedBatchNorm) and norm.sync]
    statistics = sum(8 * buffer.numel() for buffer in trainer.student.buffers() if buffer.is_floating_point())
    losses = len(trainer.summed) - 3  # beside their sum and two errors
    expected = {
        "gradients: all_reduce": sum(trained) * steps,
        "agreement: all_reduce": 16 * steps,
        "rematch: all_reduce": costs * epochs,
        "running statistics: all_reduce": statistics * epochs,
        "checkpoint: all_reduce": (statistics + costs) * epochs,
        "evaluation: all_reduce": (8 + 32) * epochs + 8 * epochs,
        "other: all_reduce": 8 * (losses + 4) * epochs,
        "start: broadcast": sum(tensor_bytes(tensor) for tensor in _state(trainer.student)),
    }
    if norms:
        elements = sum(2 * (2 * norm.num_features + 1) for norm in norms)  # forward and backward
        expected["synchronised norms: all_reduce"] = elements * norms[0].weight.element_size() * steps
    return expected


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _held() -> int:
    """Bytes of all tensors that live in this process."""
    gc.collect()
    stores = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not thing.is_meta:
            store = thing.untyped_storage()
            stores[store.data_ptr()] = store.nbytes()
            if thing.grad is not None:
                stores[thing.grad.untyped_storage().data_ptr()] = thing.grad.untyped_storage().nbytes()
    return sum(stores.values())


def _expected_held(trainer: engine.Trainer) -> int:
    """Between two steps: weights, gradients and momentum; buffers; the teacher."""
    trained = sum(tensor_bytes(parameter) for parameter in trainer.student.parameters())
    buffers = sum(tensor_bytes(buffer) for buffer in trainer.student.buffers())
    teacher = trainer.stepper.step.teacher
    assert isinstance(teacher, nn.Module)
    return 3 * trained + buffers + sum(tensor_bytes(tensor) for tensor in _state(teacher))


def _saved(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the maps that a forward pass keeps for its backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    stores: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        stores[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    size = sum(store.nbytes() for address, store in stores.items() if address not in own)
    del result
    return size


def _saved_by_step(trainer: engine.Trainer) -> int:
    trainer.step.train()
    trainer.order.set_epoch(0)
    images, targets = trainer.intake(next(iter(trainer.batches)))
    student = trainer.student
    teacher = trainer.stepper.step.teacher
    assert isinstance(teacher, nn.Module)
    maps, logits = teacher(images)
    return _saved(lambda: student(images, targets, maps, logits), student.parameters())


# ---- runs, and what they have in common


_UNSHARE = ["unshare", "--net", "--map-root-user"]


def run(world: int, kind: str, folder: Path) -> dict[str, Any]:
    """Train with ``world`` processes in a network of their own, where that is possible.

    Returns:
        What the first process counted; ``others`` has the bytes of the others.
    """
    target = folder / f"{kind}_{world}"
    target.mkdir()
    command = [sys.executable, "-m", "benchmarks.traffic", "--part", str(world), kind, str(target)]
    own_network = subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode == 0
    words = [*_UNSHARE, *command, "--own-network"] if own_network else command
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the run of {world} processes failed:\n{done.stderr}")
    return collected(world, kind, target, own_network)


def collected(world: int, kind: str, target: Path, own_network: bool) -> dict[str, Any]:
    """What the processes of a run wrote to ``target``."""
    ranks = [json.loads((target / f"rank_{rank}.json").read_text()) for rank in range(world)]
    about = {"kind": kind, "processes": world, "images": TOGETHER // world, "own_network": own_network}
    return {**about, **ranks[0], "others": [rank["bytes"] for rank in ranks[1:]]}


def train(world: int, kind: str, folder: Path, own_network: bool) -> None:
    """Train with ``world`` processes, forked, which saves their start; they write to ``folder``.

    Args:
        world: how many.
        kind: of ``KINDS``.
        folder: beside a folder ``data`` with the images.
        own_network: whether this process is in a network of its own, whose traffic is theirs.
    """
    if own_network:
        raise_loopback()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = [(rank, world, port, kind, folder, own_network) for rank in range(world)]
    processes = [context.Process(target=measure, args=own) for own in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(1)


def compare(runs: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """What differs from the formulas, and between the runs; adds to each run its difference from one process.

    Args:
        runs: of :func:`run`; the first of each kind is what the others are compared with.
        folder: where they are.

    Returns:
        Sentences; none if all is as it should be.
    """
    wrong: list[str] = []
    references: dict[str, dict[str, Any]] = {}
    for found in runs:
        kind, world = found["kind"], found["processes"]
        who = f"{kind}, {world} processes"
        for counted in (found["bytes"], *found.pop("others")):
            for purpose, size in found["expected"].items():
                if counted.get(purpose) != size:
                    wrong.append(f"{who}, {purpose}: {counted.get(purpose)} bytes, expected {size}.")
        if abs(found["held"] / found["expected_held"] - 1.0) > 0.02:
            wrong.append(f"{who} hold {found['held']} bytes each, expected {found['expected_held']}.")
        reference = references.setdefault(kind, found)
        if kind == "traffic":  # synchronised norms keep maps of their own
            found["expected_saved"] = reference["saved"] * found["images"] // reference["images"]
            if abs(found["saved"] / found["expected_saved"] - 1.0) > 0.05:
                wrong.append(f"{who} keep {found['saved']} bytes each, expected {found['expected_saved']}.")
        if found["wire"] and kind == "traffic":
            found["expected_wire"] = _expected_wire(found)
            for what, size in found["expected_wire"].items():
                if not size <= found["wire"][what] <= OVERHEAD * size:
                    wrong.append(f"{who} sent {found['wire'][what]} bytes for {what}, expected {size}.")
        own = folder / f"{kind}_{world}"
        one = folder / f"{kind}_{reference['processes']}"
        found["same_matchings"] = _same_matchings(one, own)
        found["largest_difference"] = _largest_difference(one / "student.pth", own / "student.pth")
        same = found["same_matchings"] if kind == "equality" else found["same_matchings"][:1]
        if not all(same):
            wrong.append(f"{who} found other matchings than one process.")
        if kind == "equality" and found["largest_difference"] > ROUNDING:
            wrong.append(f"{who}: weights differ by {found['largest_difference']:.1e}.")
    return wrong


def _expected_wire(found: dict[str, Any]) -> dict[str, int]:
    """On the wire a ring sends 2 (P - 1) times an all-reduce's payload, a broadcast P - 1 times."""
    others, size = found["processes"] - 1, found["bytes"]
    steps = size["gradients: all_reduce"] + size["agreement: all_reduce"]
    rematches = 2 * size["rematch: all_reduce"] + size["rematch: broadcast"]
    return {"steps": 2 * others * steps, "rematches": others * rematches}


def _same_matchings(one: Path, other: Path) -> list[bool]:
    """Whether all features' matchings are the same, rematch by rematch."""
    files = sorted(path.name for path in (one / "matching").iterdir())
    assert files == sorted(path.name for path in (other / "matching").iterdir())
    pairs = [(load_reports(one / "matching" / name), load_reports(other / "matching" / name)) for name in files]
    return [all(left[name].matching == right[name].matching for name in left) for left, right in pairs]


def _largest_difference(one: Path, other: Path) -> float:
    left, right = (torch.load(path, weights_only=True) for path in (one, other))
    floats = [name for name, value in left.items() if value.is_floating_point()]
    return max(float((left[name] - right[name]).abs().max() / left[name].abs().max()) for name in floats)


def sizes(student: str, teacher: str) -> dict[str, Any]:
    """What the formulas say of networks of full size, for 1,000 classes and images of 224 px; nothing is trained."""
    pairs = {name: pair for name, pair in pair_features(student, teacher).items() if pair.distilled}
    networks = [build(name, 1000) for name in (student, teacher)]
    taps = ({name: pair.student for name, pair in pairs.items()}, {name: pair.teacher for name, pair in pairs.items()})
    widths = [measure_features(name, net, tap, 224) for name, net, tap in zip((student, teacher), networks, taps)]
    channels = {name: (widths[0][name][0], widths[1][name][0]) for name in pairs}
    trained_tensors = list(networks[0].parameters())
    trained = sum(parameter.numel() for parameter in trained_tensors)
    trained += sum(2 * width for width, _ in channels.values())  # the distiller's norms
    costs = sum(s * t for s, t in channels.values())
    return {
        "student": student,
        "teacher": teacher,
        "channels": channels,
        "trained_parameters": trained,
        "step_bytes": 4 * trained + 16,
        "rematch_bytes": 8 * (costs + len(channels)),
        "held_bytes": 12 * trained
        + sum(tensor_bytes(tensor) for network in networks for tensor in network.buffers())
        + sum(tensor_bytes(parameter) for parameter in networks[1].parameters()),
        "rematch_held_bytes": 16 * costs,
        "saved_bytes_an_image": _saved(lambda: networks[0].train()(torch.zeros(2, 3, 224, 224)), trained_tensors) // 2,
    }


def write_images(folder: Path) -> None:
    """Coloured noise: 16 training and 4 evaluation images of each of three classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("valid", 4)):
        for index in range(3 * count):
            path = folder / split / f"class{index % 3}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (72, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 where something differs from what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--output", type=Path, help="json file for what was measured")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--own-network", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        train(int(options.part[0]), options.part[1], Path(options.part[2]), options.own_network)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "data")
        runs = [run(world, kind, folder) for kind in KINDS for world in options.processes]
        wrong = compare(runs, folder)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.traffic", *(arguments or sys.argv[1:])]),
        "commit": commit(),
        "machine": machine(),
        "options": [*OPTIONS, "--batch-size (of all processes)", str(TOGETHER)],
        "rounding": ROUNDING,
        "runs": runs,
        "computed": [sizes(*pair) for pair in PAIRS],
        "wrong": wrong,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
