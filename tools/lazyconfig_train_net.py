#!/usr/bin/env python
"""Train or evaluate a python config (LazyConfig), with the flags and overrides of Detectron2's tool of this name.

The config is executed: it is a program. Its model is a TeacherStudentDetector, which matches by itself, or any other.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

from d2_mgd._threads import let_waiting_threads_sleep
from d2_mgd._warnings import ignore_deprecations

let_waiting_threads_sleep()
ignore_deprecations()  # before Detectron2 is imported

import detectron2.utils.comm as comm
import torch
from detectron2.config import instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils.logger import setup_logger
from torch import nn

from d2_mgd import configs
from d2_mgd.detection import TeacherStudentDetector
from d2_mgd.detection.hooks import MatchingHook
from d2_mgd.detection.launch import run_ranks
from d2_mgd.detection.lazy_network import load_lazy
from d2_mgd.detection.weights import SafeCheckpointer
from d2_mgd.training.launch import rank_status


def evaluate(cfg: Any, model: nn.Module) -> Any:
    """Metrics of ``dataloader.test``, where the config has an evaluator."""
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def train(cfg: Any, resume: bool) -> SimpleTrainer:
    """Train to ``train.max_iter``."""
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer, loader = instantiate(cfg.optimizer), instantiate(cfg.dataloader.train)
    on_cpu = {"device_ids": None} if cfg.train.device == "cpu" else {}  # by default, Detectron2 names a GPU
    wrapped = create_ddp_model(model, **cfg.train.ddp, **on_cpu)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(wrapped, loader, optimizer)
    checkpointer = SafeCheckpointer(wrapped, cfg.train.output_dir, trainer=trainer)
    built = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        *([_matching_hook(cfg, model)] if isinstance(model, TeacherStudentDetector) else []),
        hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, wrapped)),
    ]
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        built.insert(-1, hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
        built.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    trainer.register_hooks(built)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return trainer


def _matching_hook(cfg: Any, model: nn.Module) -> MatchingHook:
    """Writes matchings; where the source is "pass", its passes are over ``dataloader.rematch``."""
    return MatchingHook(model, lambda finished: instantiate(cfg.dataloader.rematch), output_dir=cfg.train.output_dir)


def build_config(args: argparse.Namespace) -> Any:
    """The config of the command line; on the CPU where there is no GPU."""
    cfg = load_lazy(configs.find(args.config_file), args.opts, "--config-file")
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        cfg.train.device = "cpu"
    return cfg


def run(args: argparse.Namespace) -> Any:
    """One rank of the command line."""
    cfg = build_config(args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="d2_mgd")
    default_setup(cfg, args)
    if not args.eval_only:
        return train(cfg, args.resume)
    model = instantiate(cfg.model).to(cfg.train.device)
    SafeCheckpointer(model).load(cfg.train.init_checkpoint)
    return evaluate(cfg, model)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 after an error message for input that cannot work."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")  # a free port, so that two trainings on one machine do not meet
    args = parser.parse_args(arguments)
    status = rank_status(lambda: _start(args))
    if status:
        raise SystemExit(status)


def _start(args: argparse.Namespace) -> None:
    gpus = build_config(args).train.device.startswith("cuda")
    run_ranks(run, (args,), args, gpus=gpus)  # each rank reads the config again, which cannot always be pickled


if __name__ == "__main__":
    main()
