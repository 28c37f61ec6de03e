"""Loaders, mappers, models and optimisers of one's own in subclasses of our Trainer, as in Detectron2's docs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.data.transforms as T
import train_net as command_line
from detectron2.data import DatasetMapper, build_detection_train_loader
from training_runs import same_tensors

from d2_mgd.detection import Trainer


def trainer_of(kind: type[Trainer], workplace: Any, output: Path, *overrides: Any, resume: bool = False) -> Any:
    words = workplace.arguments(output, "TEST.EVAL_PERIOD", 0, *overrides)
    args = command_line.parser().parse_args(words)
    for name, json_file, images in args.register_coco:
        command_line.register_coco(name, json_file, images)
    cfg, _ = command_line.build_config(args)
    output.mkdir(parents=True, exist_ok=True)
    trainer = kind(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def mapper_of(cfg: Any) -> DatasetMapper:
    return DatasetMapper(cfg, is_train=True, augmentations=[T.Resize((64, 64)), T.RandomBrightness(0.5, 1.5)])


class OwnLoader(Trainer):
    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return build_detection_train_loader(cfg, mapper=mapper_of(cfg))


class OwnMapper(Trainer):
    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return super().build_train_loader(cfg, mapper=mapper_of(cfg))


class OwnOptimizer(Trainer):
    @classmethod
    def build_model(cls, cfg: Any) -> Any:
        model = super().build_model(cfg)
        model.is_own = True
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: Any) -> Any:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], cfg.SOLVER.BASE_LR)

    @classmethod
    def build_lr_scheduler(cls, cfg: Any, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)


@pytest.mark.parametrize("source", ["pass", "online"])
def test_detectron2s_own_loader_trains_and_one_warning_says_what_is_lost(
    workplace: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    with caplog.at_level(logging.WARNING, "d2_mgd"):
        trainer = trainer_of(OwnLoader, workplace, tmp_path, "MGD.REMATCH.SOURCE", source)
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "training loader" in record.getMessage()]
    assert len(said) == 1 and "AspectRatioGroupedDataset: a resumed training continues with other images" in said[0]
    assert trainer.storage.latest()["loss_distill/p4"][0] > 0
    resumed = trainer_of(OwnLoader, workplace, tmp_path, "SOLVER.MAX_ITER", 8, resume=True)
    resumed.train()
    assert resumed.iter == 8 and (tmp_path / "model_final.pth").exists()


def test_a_mapper_of_ones_own_resumes_to_the_bit(workplace: Any, tmp_path: Path) -> None:
    trainer = trainer_of(OwnMapper, workplace, tmp_path)
    assert {sample["image"].shape[1:] for sample in next(iter(trainer.data_loader))} == {(64, 64)}
    trainer.train()
    whole = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    trainer_of(OwnMapper, workplace, tmp_path, resume=True).train()
    assert same_tensors(torch.load(tmp_path / "model_final.pth", weights_only=True)["model"], whole)


def test_a_model_optimiser_and_schedule_of_ones_own(workplace: Any, tmp_path: Path) -> None:
    trainer = trainer_of(OwnOptimizer, workplace, tmp_path, "SOLVER.BASE_LR", 1e-4)
    assert trainer.detector.is_own and isinstance(trainer.optimizer, torch.optim.AdamW)
    trainer.train()
    assert trainer.storage.latest()["lr"][0] == pytest.approx(1e-4)
    assert trainer.storage.latest()["loss_distill/p4"][0] > 0
