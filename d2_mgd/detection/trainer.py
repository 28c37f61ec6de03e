"""The trainer: Detectron2's, for a student with or without a teacher, on CPUs and GPUs, resumable to the bit."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter
from torch import nn

from d2_mgd.detection.checkpoint import TrainingCheckpointer
from d2_mgd.detection.config import META_ARCHITECTURE, student_config
from d2_mgd.detection.config_checks import CheckedConfig, check_scaling, check_supported, validate_config
from d2_mgd.detection.config_loaders import build_pass_loader, build_train_loader
from d2_mgd.detection.datasets import check_classes, check_datasets_once
from d2_mgd.detection.evaluation import EvaluatingTrainer
from d2_mgd.detection.hooks import BalanceHook, CheckpointHook, FirstStepHook, distillation_hooks
from d2_mgd.detection.loader import SampleError, TrainLoader
from d2_mgd.detection.networks import build_network
from d2_mgd.detection.norms import export_student_state
from d2_mgd.detection.preemption import PreemptionHook
from d2_mgd.detection.steps import StepTrainer, precision_of, predict_in_float32
from d2_mgd.detection.teacher_evaluation import cache_path, evaluate_once, remember
from d2_mgd.detection.verdict import BestStudentHook, EvaluationHook, StoppedEarly, TeacherVerdict
from d2_mgd.detection.weights import fresh_parameters, load_weights
from d2_mgd.distill.rematching import gather_costs
from d2_mgd.errors import UserError, located
from d2_mgd.training import Interrupted, file_digest
from d2_mgd.training.checkpoints import check_same_teacher
from d2_mgd.training.modules import changed_numbers, module_numbers, set_module_numbers
from d2_mgd.training.nonfinite import NonFinitePolicy
from d2_mgd.training.processes import from_main, largest
from d2_mgd.training.randomness import random_state, set_random_state

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer(EvaluatingTrainer):
    """Trains a student, distilled where MGD.ENABLED, else alone; everything else is the same for both.

    Runs alone, or in every process of an initialised ``torch.distributed`` (NCCL or gloo). Only student and distiller
    are wrapped for it. Two trainings with the same config and seed start from the same student and see the same images,
    with or without a teacher.

    Args:
        cfg: a config with the `MGD` node; ``MODEL.WEIGHTS`` are the student's, loaded by :meth:`resume_or_load`.
        checked: what :func:`~d2_mgd.detection.config_checks.validate_config` returned, where the caller has also run
            :func:`~d2_mgd.detection.datasets.check_datasets_once`; otherwise both are done here.
        writers: event writers beside Detectron2's own; with any, each rematch also draws its matchings.

    Raises:
        ValueError: anything that cannot be trained, before the first step; one sentence.
    """

    def __init__(
        self, cfg: CfgNode, *, checked: CheckedConfig | None = None, writers: Sequence[EventWriter] = ()
    ) -> None:
        TrainerBase.__init__(self)
        self.writers = writers
        check_scaling(cfg, comm.get_world_size())
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_supported(cfg, comm.get_world_size())
        if checked is None:
            checked = validate_config(cfg)
            check_datasets_once(cfg)
        self.precision = precision_of(cfg)
        self.seed = _run_seed(cfg)
        logger.info("The seed of this run is %d", self.seed)
        self.cfg = cfg = _with_seed(cfg, self.seed)
        self.distilled = bool(cfg.MGD.ENABLED)
        self._last_eval_results: Any = None

        seed_all_rng(self.seed + comm.get_rank())
        # an override with Detectron2's own arguments reads the teacher's config again
        takes_teacher = "teacher_cfg" in inspect.signature(self.build_model).parameters
        model = self.build_model(cfg, checked.teacher) if takes_teacher else self.build_model(cfg)
        self.detector: Any = model
        self.student = model.get_submodule("student") if self.distilled else model
        self._initial_numbers = module_numbers(model)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        if not isinstance(loader, TrainLoader):
            logger.warning(
                "The training loader is a %s: a resumed training continues with other images than an uninterrupted "
                "one. A mapper for Trainer.build_train_loader(cfg, mapper=...) keeps the order.",
                type(loader).__name__,
            )
        check_classes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], self.student)
        if self.precision.mixed:
            predict_in_float32(self.student)
        distiller: Any = self.detector.distiller if self.distilled else None
        policy = NonFinitePolicy(
            model,
            cfg.MGD.NONFINITE.SKIP,
            os.path.join(cfg.OUTPUT_DIR, "nonfinite"),
            self._state_before_step,
            costs=None if distiller is None else distiller.costs,
        )
        self._trainer = StepTrainer(
            model,
            loader,
            optimizer,
            policy=policy,
            micro_batches=cfg.MGD.ACCUMULATE,
            precision=self.precision,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = TrainingCheckpointer(
            self.student, cfg.OUTPUT_DIR, export=self._plain_state, keep=cfg.MGD.CHECKPOINT.KEEP
        )
        self.verdict = TeacherVerdict(None, "")
        self.best: BestStudentHook | None = None
        self._student_is_trained = False
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())
        # building a teacher drew numbers that a student alone did not
        seed_all_rng(self.seed + comm.get_rank())

    @classmethod
    def build_model(cls, cfg: CfgNode, teacher_cfg: CfgNode | None = None) -> nn.Module:
        """The student with its teacher and distiller, or the plain student, on MODEL.DEVICE.

        Args:
            cfg: the training's.
            teacher_cfg: the teacher's, where ``cfg`` has been checked already.
        """
        if not cfg.MGD.ENABLED:
            return build_network(student_config(cfg))
        model: nn.Module = META_ARCH_REGISTRY.get(META_ARCHITECTURE)(cfg, teacher_cfg=teacher_cfg)
        return model.to(torch.device(cfg.MODEL.DEVICE))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, mapper: Callable[..., Any] | None = None) -> Any:
        """The resumable stream of training batches that follows from ``cfg.SEED``; from a drawn seed if that is -1.

        An override may return any iterable of batches.

        Args:
            cfg: the training's.
            mapper: makes a sample from a record, as for Detectron2's own loader; its augmentations may draw from the
                global generators.
        """
        return build_train_loader(cfg, _run_seed(cfg), mapper)

    def build_hooks(self) -> list[HookBase]:
        """First step, timer, schedule, preemption, rematch, checkpoint, evaluation, best, balance and writers."""
        cfg = self.cfg
        self.preemption = PreemptionHook(self.save_checkpoint, lambda: self._trainer.received)
        self.first_step = FirstStepHook(cfg.OUTPUT_DIR)
        built: list[HookBase] = [self.first_step, hooks.IterationTimer(), hooks.LRScheduler(), self.preemption]
        if self.distilled:
            built += self._distillation_hooks()
        built.append(CheckpointHook(self.save_checkpoint, cfg.SOLVER.CHECKPOINT_PERIOD))
        evaluation = EvaluationHook(cfg.TEST.EVAL_PERIOD, self._evaluate)
        built.append(evaluation)
        if cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST:
            stop = cfg.MGD.EARLY_STOP
            best = self.checkpointer.save_student
            self.best = BestStudentHook(evaluation, best, self.save_checkpoint, stop.PATIENCE, stop.METRIC)
            built.append(self.best)
        if comm.is_main_process():
            if self.distilled and self.detector.distiller is not None:
                built.append(BalanceHook(self.detector.distiller))
            built.append(hooks.PeriodicWriter([*self.writers, *self.build_writers()], period=20))
        return built

    def _distillation_hooks(self) -> list[HookBase]:
        def passes(finished: int) -> Any:
            return build_pass_loader(self.cfg, self.data_loader.records, (self.seed, finished))

        return distillation_hooks(
            self.cfg,
            self.detector,
            build_loader=passes if isinstance(self.data_loader, TrainLoader) else None,
            leave=self.preemption.leave,
            pictures=bool(self.writers),
        )

    def run_step(self) -> None:
        # TorchScript changes rounding after a function's first calls, so a resumed process would differ from one that
        # went on. On GPUs, where that saves time and memory, only those who ask for determinism do without.
        exact = self.cfg.MODEL.DEVICE == "cpu" or torch.are_deterministic_algorithms_enabled()
        with torch.jit.optimized_execution(not exact):
            super().run_step()

    def train(self) -> Any:
        """Train to SOLVER.MAX_ITER.

        Returns:
            The metrics of the last evaluation.

        Raises:
            UserError: what ended it.
            SystemExit: after a signal, see :class:`PreemptionHook`.
        """
        self._judge_teacher()
        try:
            super().train()
        except StoppedEarly:
            pass
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):  # from a signal handler of torch, so at any line
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise SampleError(
                f"a loading process is gone ({reason}), perhaps for want of memory: lower DATALOADER.NUM_WORKERS."
            ) from error
        finally:
            self._trainer.close()
        self._conclude()
        return self._last_eval_results

    def _judge_teacher(self) -> None:
        """Evaluate the teacher, and a student whose weights are those of a whole detector (collective)."""
        if not self.distilled:
            return
        if self.start_iter > 0:  # with the verdict of its checkpoint
            self.verdict.measured({} if self.best is None else self.best.best)
        else:
            teacher = self.detector.teacher
            metrics = None
            if self.cfg.MGD.TEACHER.EVALUATE:
                metrics = evaluate_once(self.cfg, teacher, lambda: self.test_teacher(self.cfg, teacher))
            self.verdict = TeacherVerdict(metrics, self.cfg.MGD.EARLY_STOP.METRIC)
            if metrics and self._student_is_trained:
                logger.info("Evaluating the student before the first step")
                self._judge(from_main(self.test(self.cfg, self.detector)), 0)
        if self.detector.balances:
            self.verdict.log_share(self.detector.schedule.share)

    def _evaluate(self) -> dict[str, Any]:
        try:
            self._last_eval_results = from_main(self.test(self.cfg, self.detector))
        except Interrupted as stopped:
            self.preemption.leave(stopped.number)
        self._judge(self._last_eval_results, self.iter + 1)
        return self._last_eval_results

    def _judge(self, results: dict[str, Any], finished: int) -> None:
        """Compare the student with its teacher; under MGD.BALANCE auto the weight follows from it."""
        self.verdict.measured(flatten_results_dict(results), before=finished == 0)
        if self.distilled and self.detector.balances:
            self.verdict.weigh(self.detector.schedule, finished, self.max_iter)

    def _conclude(self) -> None:
        """Log the best and the last student and the verdict on the teacher, and keep what was measured."""
        if not comm.is_main_process():
            return
        final = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")
        if self._last_eval_results and os.path.isfile(final):  # this student may teach the next one
            path = cache_path(student_config(self.cfg), file_digest(final))
            remember(path, flatten_results_dict(self._last_eval_results))
        if self.best is not None:
            self.best.summarise()
        self.verdict.summarise({} if self.best is None else self.best.best)

    # --- checkpoints ---

    def _plain_state(self) -> dict[str, torch.Tensor]:
        return export_student_state(self.student) if self.distilled else self.student.state_dict()

    def save_checkpoint(self, name: str) -> None:
        """Save everything to ``OUTPUT_DIR/<name>.pth``. A collective: it gathers the random state of every rank."""
        self.checkpointer.save(name, **self._state(self.iter, random_state()))

    def _state_before_step(self, random: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint as it would have been before the step in progress, if that has changed nothing since."""
        return {"model": self._plain_state(), **self._state(self.iter - 1, random)}

    def _state(self, iteration: int, random: dict[str, Any]) -> dict[str, Any]:
        """All of a checkpoint but the student, after ``iteration``. A collective."""
        own = {
            "random": random,
            "numbers": changed_numbers(module_numbers(self.detector), self._initial_numbers),
        }
        training = {**self.state_dict(), "iteration": iteration, "seed": self.seed, "processes": comm.gather(own)}
        state: dict[str, Any] = {"iteration": iteration, "training": training}
        if self.distilled:
            distiller, teacher = self.detector.distiller, self.detector.teacher
            if distiller is not None and self.cfg.MGD.REMATCH.SOURCE == "online":
                gather_costs(distiller)
            state["distillation"] = {
                "distiller": None if distiller is None else distiller.state_dict(),
                "costs": None if distiller is None else distiller.cost_state_dict(),
                "teacher": teacher.record,
                "teacher_metrics": dict(self.verdict.metrics),
                "student_before": self.verdict.before,
                "share": self.detector.schedule.share,
            }
        return state

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in OUTPUT_DIR if ``resume`` and there is one, else load MODEL.WEIGHTS.

        A collective; that one process is to resume is enough for all.

        Raises:
            UserError: there are no such weights, or the checkpoint is of another student, teacher, or kind of training
                than the config describes.
        """
        resume = bool(largest([resume])[0])
        found = comm.all_gather(resume and self.checkpointer.has_checkpoint())
        if len(set(found)) > 1:
            raise UserError(
                f"only some processes see a checkpoint in {self.cfg.OUTPUT_DIR}; all must share that folder."
            )
        if found[0]:
            self._resume()
            return
        if resume:
            logger.info("There is no checkpoint in %s yet: this is a new training", self.cfg.OUTPUT_DIR)
        elif self.checkpointer.has_checkpoint():
            logger.warning(
                "%s holds an earlier training, whose checkpoints this one overwrites; --resume goes on with it",
                self.cfg.OUTPUT_DIR,
            )
        if self.cfg.MODEL.WEIGHTS:
            left = load_weights(self.student, self.cfg.MODEL.WEIGHTS)
            self._student_is_trained = not fresh_parameters(self.student, left)

    def _resume(self) -> None:
        path = self.checkpointer.newest_whole()
        state = self.checkpointer.resume(path)
        training = state["training"]
        if self.distilled != ("distillation" in state):
            raise UserError(
                f"{path} was trained {'without' if self.distilled else 'with'} a teacher: MGD.ENABLED cannot change in "
                "the middle of a training."
            )
        try:
            if self.distilled:
                self._resume_distillation(path, state["distillation"])
            self.load_state_dict(training)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not continue with this config, which has changed since: {reason}") from error
        self.start_iter = self.iter + 1
        if training["seed"] != self.seed:
            logger.info("The seed of this run is %d, from %s", training["seed"], path)
            self.seed = training["seed"]
            self.cfg = _with_seed(self.cfg, self.seed)
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.continue_at(self.start_iter, self.seed)
        self._resume_process(training["processes"])

    def _resume_distillation(self, path: str, state: dict[str, Any]) -> None:
        teacher, distiller = self.detector.teacher, self.detector.distiller
        check_same_teacher(path, state["teacher"], teacher.record)
        self.verdict = TeacherVerdict(state.get("teacher_metrics"), self.cfg.MGD.EARLY_STOP.METRIC)
        self.verdict.before, self.detector.schedule.share = state["student_before"], state["share"]
        if (distiller is None) != (state["distiller"] is None):
            raise KeyError("one of the two distils features and the other does not")
        if distiller is None:
            return
        with located(f"{path} does not continue with this config: "):
            distiller.load_state_dict(state["distiller"])
        if comm.is_main_process():  # it saved the sum over all processes
            distiller.load_cost_state_dict(state["costs"])

    def _resume_process(self, processes: list[dict[str, Any]]) -> None:
        """Random state and plain numbers of this process."""
        rank = comm.get_rank()
        if len(processes) == comm.get_world_size():
            set_random_state(processes[rank]["random"])
        else:
            logger.warning(
                "The checkpoint was written by %d processes and %d continue: not to the bit.",
                len(processes),
                comm.get_world_size(),
            )
            seed_all_rng(self.seed + self.start_iter + rank)
        set_module_numbers(self.detector, processes[rank % len(processes)]["numbers"])


def _run_seed(cfg: CfgNode) -> int:
    """SEED; if that is -1, a drawn one, the same on all ranks (collective)."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg
