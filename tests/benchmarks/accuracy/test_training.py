"""One training: rematches, precision, compilation, CUDA graphs, and no wait for the device in a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.accuracy.data import Choice, load_split
from benchmarks.accuracy.distillation import Distillation
from benchmarks.accuracy.engine import Engine, Outcome, WeightStore
from benchmarks.accuracy.networks import build_network
from benchmarks.accuracy.study import Method, Recipe, Run
from benchmarks.accuracy.training import _Training, train

CPU = torch.device("cpu")


def test_online_rematches_use_the_maps_of_training_steps(data: Path, tmp_path: Path) -> None:
    split = load_split(data, Choice(pixels=8), CPU)
    recipe = Recipe(epochs=3, batch=16, drops=())
    weights = WeightStore(tmp_path)
    teacher = Run("teacher", "resnet8x2", Choice(pixels=8), recipe, 0)
    train(teacher, split, Engine(CPU), weights)
    outcomes = {}
    for source in ("pass", "online"):
        method = Method(rematch={"every": 2, "images": 32, "source": source}, reduction="mean")
        again = Run("mgd", "resnet8", Choice(pixels=8), recipe, 0, teacher=teacher, distil=method)
        outcomes[source] = train(again, split, Engine(CPU), weights)
        assert [entry["epoch"] for entry in outcomes[source].rematches] == [0, 0, 0, 2, 2, 2]
    assert outcomes["pass"].rematches[:3] == outcomes["online"].rematches[:3]
    assert outcomes["pass"].rematches[3:] != outcomes["online"].rematches[3:]


def test_rematches_change_neither_the_students_statistics_nor_the_batches_it_sees(data: Path, tmp_path: Path) -> None:
    split = load_split(data, Choice(pixels=8), CPU)
    weights = WeightStore(tmp_path)
    still = Recipe(epochs=1, batch=16, lr=1e-12, drops=(), weight_decay=0.0)
    teacher = Run("teacher", "resnet8x2", Choice(pixels=8), still, 0)
    train(teacher, split, Engine(CPU), weights)
    found = []
    for images in (16, 160):
        method = Method(rematch={"images": images})
        run_ = Run("mgd", "resnet8", Choice(pixels=8), still, 0, teacher=teacher, distil=method)
        train(run_, split, Engine(CPU), weights)
        found.append(weights.load(run_)["stem.1.running_mean"])
    torch.testing.assert_close(*found)
    assert found[0].all()


def test_accuracies_are_those_of_float32_whatever_the_training(data: Path, tmp_path: Path) -> None:
    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            dtypes[module.training].add(output.dtype)

    recipe = Recipe(epochs=1, batch=16, drops=())
    found = Run("student", "resnet8", Choice(pixels=8), recipe, 0)
    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        train(found, load_split(data, found.data, CPU), Engine(CPU, mixed_precision=True), WeightStore(tmp_path))
    finally:
        hook.remove()
    assert dtypes == {True: {torch.bfloat16}, False: {torch.float32}}


def taught(
    student: str, teacher: str, method: Method, data: Path, weights: WeightStore, engine: Engine | None = None
) -> tuple[Run, Outcome]:
    """A run of one epoch behind a teacher that is trained for it, and what came of it."""
    choice, recipe = Choice(pixels=16, train_per_class=8), Recipe(epochs=1, batch=12, lr=0.01, drops=())
    split = load_split(data, choice, CPU)
    teaching = Run("teacher", teacher, choice, recipe, 0)
    if not weights.path(teaching).exists():
        train(teaching, split, Engine(CPU), weights)
    found = Run("taught", student, choice, recipe, 0, teacher=teaching, distil=method)
    return found, train(found, split, engine or Engine(CPU), weights)


def test_projections_between_maps_of_different_sizes(data: Path, tmp_path: Path) -> None:
    method = Method(align="conv1x1", rematch={"images": 12})
    _, outcome = taught("mobilenet_v2_half", "resnet8", method, data, WeightStore(tmp_path))
    assert [entry["feature"] for entry in outcome.projections] == ["stage1", "stage2", "stage3"]
    assert all(0 < entry["share"] <= entry["best"] <= 1 for entry in outcome.projections)


class Waits(TorchDispatchMode):
    """Counts what makes a processor wait for a GPU: numbers that it sends there or reads, choices by a mask."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select")
        masks = [index.dtype for index in args[1] if index is not None] if "aten.index." in str(function) else []
        self.count += any(name in str(function) for name in waits) or torch.bool in masks
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"features": (), "logits": {"name": "dkd"}, "schedule": {"warmup": 3}},
        {"loss": "pearson", "reducer": "rd", "rematch": {"every": 1, "images": 96, "source": "online"}},
        {"loss": "mse", "norm": "none", "align": "conv1x1"},
    ],
    ids=["logits", "features, online", "conv1x1"],
)
def test_no_step_waits_for_the_device(options: dict[str, Any], data: Path) -> None:
    split, counts = load_split(data, Choice(pixels=8), CPU), []
    for batch in (48, 24, 6):  # 1, 2 and 8 steps
        recipe = Recipe(epochs=1, batch=batch, lr=0.01, drops=())
        found = Run("a", "resnet8", Choice(pixels=8), recipe, 0, distil=Method(**options))
        student, teacher = build_network("resnet8", 3), build_network("resnet8x2", 3)
        distillation = Distillation(Method(**options), student, teacher, Engine(CPU))
        training = _Training(found, student, split, Engine(CPU), distillation, Outcome())
        training.rematch(0)
        with Waits() as waits:
            training._epoch(0)
        counts.append(waits.count)
    assert counts[0] >= counts[1] == counts[2] > 0  # the first also makes what is kept


SMALL = Method(logits={"name": "dist"}, rematch={"images": 12})


@pytest.mark.parametrize("options", [{"compiled": "eager"}, {"mixed_precision": True}], ids=str)
def test_engines_compute_the_same_or_nearly(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    split = load_split(data, Choice(pixels=8, train_per_class=8), CPU)
    recipe = Recipe(epochs=1, batch=12, drops=())
    weights = WeightStore(tmp_path)
    teacher = Run("teacher", "resnet8x2", Choice(pixels=8), recipe, 0)
    train(teacher, split, Engine(CPU), weights)
    run_ = Run("mgd", "resnet8", Choice(pixels=8), recipe, 0, teacher=teacher, distil=SMALL)
    heads = []
    for engine in (Engine(CPU), Engine(CPU, **options)):
        assert isinstance(train(run_, split, engine, weights), Outcome)
        heads.append(weights.load(run_)["head.weight"])
    torch.testing.assert_close(*heads, atol=0.02 if "mixed_precision" in options else 1e-4, rtol=0)


@pytest.mark.gpu
def test_a_step_as_one_cuda_graph_computes_the_same(data: Path, tmp_path: Path) -> None:
    device, weights = torch.device("cuda"), WeightStore(tmp_path)
    split = load_split(data, Choice(pixels=8, train_per_class=8), device)
    teacher = Run("teacher", "resnet8x2", Choice(pixels=8), Recipe(epochs=3, batch=8, drops=(1,)), 0)
    train(teacher, split, Engine(device), weights)
    run_ = dataclasses.replace(teacher, method="mgd", network="resnet8", teacher=teacher, distil=SMALL)
    heads = []
    for graphs in (False, True):
        train(run_, split, Engine(device, graphs=graphs), weights)
        heads.append(weights.load(run_)["head.weight"])
    torch.testing.assert_close(*heads, atol=1e-3, rtol=0)


def test_every_run_of_a_process_is_compiled(data: Path, tmp_path: Path) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    engine, weights = Engine(CPU, compiled=counting), WeightStore(tmp_path)  # type: ignore[arg-type]
    compiled = []
    with torch._dynamo.config.patch(recompile_limit=1):  # 8 by default: for a ninth run what is here for a second
        for beta in (1.0, 2.0, 3.0):
            method = Method(features=(), logits={"name": "dkd", "beta": beta})
            taught("resnet8", "resnet8", method, data, weights, engine)
            compiled.append(len(graphs))
    assert compiled == [1, 2, 3]
