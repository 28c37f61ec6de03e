"""Batches in parts, precisions, and both on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.utils.events import EventStorage
from tiny_detectors import batch, built, lively, matched, tiny_fcos
from training_runs import in_process_trainer, same_tensors

from benchmarks.traffic.collectives import Meter
from d2_mgd.detection.steps import StepTrainer, predict_in_float32
from d2_mgd.training.nonfinite import NonFiniteError, NonFinitePolicy
from d2_mgd.training.steps import Precision

BFLOAT16 = ("SOLVER.AMP.ENABLED", "True")
PARTS = ("SOLVER.IMS_PER_BATCH", "4", "MGD.ACCUMULATE", "2")
# a detector whose losses are means over images: no batch statistics, no sampling, no running normaliser
PER_IMAGE = (
    *("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**6),
    *("MODEL.RPN.POSITIVE_FRACTION", 1.0, "MGD.FEATURES", ["res4", "p3"], "MGD.LOSS", "partial_l2,mse"),
)


def per_image_detector() -> Any:
    torch.manual_seed(0)
    return matched(built("faster_rcnn", "faster_rcnn", *PER_IMAGE))


def step_trainer(model: nn.Module, batches: Any, parts: int = 1, precision: Precision | None = None) -> StepTrainer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    policy = NonFinitePolicy(model, 0, "", lambda random: {})
    return StepTrainer(model, batches, optimizer, policy=policy, micro_batches=parts, precision=precision)


def stepped(
    model: Any,
    batches: list[Any],
    parts: int = 1,
    precision: Precision | None = None,
    exchanges: list[int] | None = None,
) -> dict[str, Tensor]:
    """Weights after a step with each batch, and gradients and losses of the last; counts DDP's ``exchanges``."""
    trainer = step_trainer(model, batches, parts, precision)
    if exchanges is not None:
        trainer.wrapped.register_comm_hook(exchanges, _counted)
    with EventStorage(0) as storage:
        for _ in batches:
            trainer.run_step()
        losses = {name: torch.tensor(value) for name, (value, _) in storage.latest().items() if "loss" in name}
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: p.detach().clone() for name, p in model.named_parameters()}, **gradients, **losses}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 1e-4) -> None:
    """Every tensor to a share of its norm: rounding moves a sum over pixels at every ReLU."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= share * tensor.norm() + 1e-6, name


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """Two steps with batches of four images."""
    return stepped(per_image_detector(), four_images())


def four_images() -> list[Any]:
    images = batch(*[(64, 64)] * 4)
    return [images, images[::-1]]


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_give_the_step_of_the_whole_batch(whole: dict[str, Tensor], parts: int) -> None:
    model = per_image_detector()
    begin = {name: p.clone() for name, p in model.named_parameters()}
    found = stepped(model, four_images(), parts)
    assert_close(found, whole)
    assert any(not torch.equal(begin[name], whole[name]) for name in begin)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mine = [images[rank :: dist.get_world_size()] for images in four_images()]
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        precision = Precision("cpu", dtype)
        exchanges: dict[int, list[int]] = {1: [], 2: []}
        results[dtype] = stepped(per_image_detector(), mine, 2, precision, exchanges[2])
        stepped(per_image_detector(), mine, 1, precision, exchanges[1])
        assert exchanges[2] == exchanges[1] != []  # as often as with whole batches
    if rank == 0:
        torch.save((results, _collectives(mine)), Path(folder) / "results.pth")
    else:
        _collectives(mine)
    dist.destroy_process_group()


def _collectives(batches: list[Any]) -> dict[str, int]:
    """Collectives of the steps, beside those of DDP."""
    trainer, meter = step_trainer(per_image_detector(), batches, 2), Meter()
    meter.attach(trainer, "_write_metrics", "log")
    with EventStorage(0), meter.counting():
        for _ in batches:
            trainer.run_step()
    return {name: count for name, count in meter.calls.items() if not name.startswith("log")}


def _counted(exchanges, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and wants no text
    exchanges.append(bucket.index())
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return work.then(lambda future: future.value()[0])


def test_parts_on_two_processes_give_the_step_of_one(whole: dict[str, Tensor], tmp_path: Path) -> None:
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    results, collectives = torch.load(tmp_path / "results.pth", weights_only=False)
    assert collectives == {"other: all_reduce": 2}  # one a step
    assert_close(results[torch.float32], whole)
    half = stepped(per_image_detector(), four_images(), 1, Precision("cpu", torch.bfloat16))
    found, wanted = (_gradient(one) for one in (results[torch.bfloat16], half))
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    assert not torch.equal(wanted, _gradient(whole))


def _gradient(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for name, value in found.items() if name.startswith("gradient of")])


def test_online_costs_see_every_part(workplace: Any, tmp_path: Path) -> None:
    online = ("MGD.REMATCH.SOURCE", "online", "MGD.REMATCH.EVERY", "2", "MGD.REMATCH.PERIODS", "[100]")
    trainer = in_process_trainer(workplace, tmp_path, *online, *PARTS)
    trainer.train()
    assert trainer.detector.distiller.costs["p4"].num_images == 2 + 4 + 4  # the first part was matched


@pytest.mark.parametrize(
    "overrides",
    [PARTS, BFLOAT16, (*PARTS, *BFLOAT16, "MGD.ALIGN", "matched_projection", "MGD.BALANCE", "auto")],
    ids=["parts", "bfloat16", "parts, bfloat16, projection, balance"],
)
def test_it_resumes_to_the_bit(workplace: Any, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    in_process_trainer(workplace, tmp_path, *overrides).train()
    whole = torch.load(tmp_path / "model_final.pth", weights_only=True)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    resumed = in_process_trainer(workplace, tmp_path, *overrides, resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    end = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert same_tensors(end["model"], whole["model"])
    assert same_tensors(end["distillation"]["distiller"], whole["distillation"]["distiller"])


def test_networks_run_in_bfloat16_and_losses_and_costs_in_float32(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, *BFLOAT16)
    seen: dict[str, set[torch.dtype]] = {"map": set(), "loss": set(), "cost": set()}

    def see(what: str, *tensors: Tensor) -> None:
        if trainer.iter < trainer.max_iter:  # not in the evaluation that follows
            seen[what] |= {tensor.dtype for tensor in tensors}

    for network in (trainer.student, trainer.detector.teacher.model):
        network.backbone.fpn_output4.register_forward_hook(lambda module, args, output: see("map", output))
    trainer.detector.register_forward_hook(
        lambda module, args, output: see("loss", *(output.values() if module.training else ()))
    )
    cost = trainer.detector.distiller.costs["p4"]
    directions = cost._directions
    cost._directions = lambda maps, valid: (see("cost", directions(maps, valid)), directions(maps, valid))[1]
    trainer.train()
    assert seen == {"map": {torch.bfloat16}, "loss": {torch.float32}, "cost": {torch.float32}}
    assert {p.dtype for p in trainer.detector.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn", "mask_rcnn", "cascade", "fcos"])
def test_every_detector_trains_in_bfloat16(name: str) -> None:
    model = matched(built(name)) if name != "fcos" else lively(tiny_fcos())
    predict_in_float32(model if name == "fcos" else model.student)
    # Not smaller: oneDNN leaves gradients of a strided convolution over a single pixel unwritten in bfloat16.
    images = batch((160, 160), (150, 140))
    found = stepped(model, [images], 1, Precision("cpu", torch.bfloat16))
    assert all(torch.isfinite(value).all() for value in found.values())


class Plain(nn.Module):
    """A weight, and a loss that float16 holds until it is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        images = torch.stack([sample["image"] for sample in batch])
        return {"loss": self.linear(images).float().square().sum()}


ONES = {"image": torch.ones(4)}


def test_an_infinite_scaled_gradient_is_the_scalers_business() -> None:
    model = Plain()
    precision = Precision("cpu", torch.float16)
    precision.scaler.load_state_dict({**precision.scaler.state_dict(), "scale": 2.0**60})
    trainer = step_trainer(model, [[ONES, ONES]] * 2, 2, precision)
    begin = model.linear.weight.detach().clone()
    with EventStorage(0):
        trainer.run_step()
        assert torch.equal(model.linear.weight, begin) and precision.scaler.get_scale() == 2.0**59
        other = step_trainer(Plain(), [], 1, Precision("cpu", torch.float16))
        other.load_state_dict(trainer.state_dict())
        assert other.precision.scaler.get_scale() == 2.0**59
        precision.scaler.update(2.0**4)
        trainer.run_step()
    assert not torch.equal(model.linear.weight, begin)


def test_a_gradient_that_is_not_finite_at_any_scale_is_named(tmp_path: Path) -> None:
    model = Plain()
    model.linear.weight.register_hook(lambda gradient: gradient * float("nan"))
    precision = Precision("cpu", torch.float16)
    trainer = step_trainer(model, [[ONES]] * 100, 1, precision)
    trainer.policy.folder = str(tmp_path)
    with EventStorage(0), pytest.raises(NonFiniteError, match=r"^the gradient of linear\.weight is not finite at"):
        for trainer.iter in range(100):
            trainer.run_step()
    assert 15 < trainer.iter < 40 and 0.0 < precision.scaler.get_scale() < 1.0


@pytest.mark.gpu
def test_float16_trains_on_a_gpu(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, *BFLOAT16, *PARTS, "MODEL.DEVICE", "cuda")
    assert trainer.precision.dtype == torch.float16 and trainer.precision.scaler.is_enabled()
    trainer.train()
    end = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert end["training"]["_trainer"]["grad_scaler"]["scale"] > 0
