"""Python configs: of a whole training, and of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lazyconfig_train_net
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_detectors import SIZES, batch, distilled_config
from training_runs import in_process_trainer, train_net

from d2_mgd.detection import TeacherStudentDetector
from d2_mgd.detection.config import student_config, teacher_config
from d2_mgd.detection.datasets import registered
from d2_mgd.detection.lazy_network import load_lazy
from d2_mgd.detection.teacher import build_teacher
from d2_mgd.errors import UserError
from tests.ranks import in_processes

CONFIG = str(Path(__file__).with_name("lazy_tiny.py"))
ZOO = "COCO-Detection/retinanet_R_50_FPN_1x.py"


@pytest.fixture(scope="module")
def sets(workplace: Any) -> Any:
    for name, files in (("tiny_train", workplace.train), ("tiny_valid", workplace.valid)):
        try:
            registered(name)
        except UserError:
            register_coco_instances(name, {}, *map(str, files))
    return workplace


def losses_of(model: TeacherStudentDetector, batches: list[Any]) -> list[dict[str, float]]:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9)
    found = []
    # TorchScript changes the rounding of the focal loss after its first calls
    with torch.jit.optimized_execution(False), EventStorage(0) as storage:
        for iteration, samples in enumerate(batches):
            storage.iter = iteration
            losses = model(samples)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            found.append({name: float(loss.detach()) for name, loss in losses.items()})
    return found


def test_yaml_and_python_give_the_same_losses(workplace: Any, tmp_path: Path) -> None:
    online = ("MGD.REMATCH.SOURCE", "online", "MGD.REMATCH.EVERY", "1")
    trainer = in_process_trainer(workplace, tmp_path, *online, "MGD.LOSS", "mse", "MGD.REDUCER", "amp")
    lazy = instantiate(LazyConfig.load(CONFIG).model)
    lazy.load_state_dict(trainer.detector.state_dict())
    lazy.teacher.model.load_state_dict(trainer.detector.teacher.model.state_dict(), strict=False)
    stream = iter(trainer.data_loader)
    batches = [next(stream) for _ in range(20)]
    by_yaml, by_python = losses_of(trainer.detector, batches), losses_of(lazy, batches)
    for one, other in zip(by_yaml, by_python):
        assert one.keys() == other.keys() and one["loss_distill/p4"] > 0
        assert one == pytest.approx(other, abs=1e-6)


def test_the_command_line_trains_evaluates_and_resumes(sets: Any, tmp_path: Path) -> None:
    arguments = ["--config-file", CONFIG, f"train.output_dir={tmp_path}"]
    lazyconfig_train_net.main(arguments)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 2 and "backbone.fpn_output4.weight" in state["model"]
    assert sorted(path.name for path in (tmp_path / "matching").iterdir()) == ["iter_0000000.npz", "iter_0000002.npz"]
    resumed = lazyconfig_train_net.run(
        lazyconfig_train_net.default_argument_parser().parse_args(
            ["--config-file", CONFIG, "--resume", f"train.output_dir={tmp_path}", "train.max_iter=5"]
        )
    )
    assert resumed.iter == 5 and resumed.storage.latest()["loss_distill/p4"][0] > 0
    plain = build_model(student_config(in_process_trainer(sets, tmp_path / "yaml").cfg))
    left = plain.load_state_dict(state["model"], strict=False)
    assert not left.missing_keys and all(name.startswith("distiller.") for name in left.unexpected_keys)


def test_two_ranks_on_cpus(sets: Any, tmp_path: Path) -> None:
    words = ["--config-file", CONFIG, f"train.output_dir={tmp_path}", "train.max_iter=2", "train.device=cuda"]
    assert in_processes(lazyconfig_train_net.main, words, 2) == [0, 0]
    log = (tmp_path / "log.txt.rank1").read_text()
    assert "Rank of current process: 1. World size: 2" in log
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 1 and int(state["model"]["distiller.progress"][0]) == 2


def python_teacher(name: str, *overrides: Any) -> Any:
    given = ["MGD.TEACHER.CONFIG_FILE", name, "MGD.TEACHER.OPTS", []]
    return distilled_config("retinanet", "retinanet", *given, *overrides)


def test_a_python_config_teaches_a_yaml_student(tmp_path: Path) -> None:
    small = ["model.backbone.out_channels=16", "model.head.conv_dims=[16]", "model.backbone.bottom_up.stages.depth=50"]
    cfg = python_teacher(ZOO, "MGD.TEACHER.OPTS", small)
    assert build_teacher(cfg).model.backbone.output_shape()["p3"].channels == 16
    trace = tmp_path / "trace"
    own = tmp_path / "own.py"
    text = f"from pathlib import Path\nfrom detectron2 import model_zoo\nPath({str(trace)!r}).touch()\n"
    own.write_text(f"{text}model = model_zoo.get_config({ZOO!r}).model\n")
    with pytest.raises(UserError, match=r"own\.py is a python config, .*TRUST_PYTHON to True"):
        teacher_config(python_teacher(str(own)))
    assert not trace.exists()
    model = TeacherStudentDetector(python_teacher(str(own), "MGD.TEACHER.TRUST_PYTHON", True, "MGD.FEATURES", ["p4"]))
    with EventStorage(0):
        assert float(model(batch(*SIZES))["loss_distill/p4"].detach()) > 0


def test_what_is_wrong_with_a_python_config_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    for text, message in (("train = dict()", "has no 'model'; it has: train"), ("model = (", "cannot be loaded")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_lazy(str(path), [], "--config-file")
    with pytest.raises(UserError, match=r"takes overrides path\.key=value, not 'MODEL\.X'"):
        load_lazy(CONFIG, ["MODEL.X", "1"], "--config-file")
    with pytest.raises(UserError, match=r"has no 'max_iters' for train\.max_iters=5; it has: .*max_iter, "):
        load_lazy(CONFIG, ["train.max_iters=5"], "--config-file")
    with pytest.raises(UserError, match=r"has no 'trian' for trian\.max_iter=5; it has: .*train"):
        load_lazy(CONFIG, ["trian.max_iter=5"], "--config-file")
    assert load_lazy(CONFIG, ["+train.max_iters=5"], "--config-file").train.max_iters == 5
    done = train_net("--config-file", CONFIG, check=False)
    assert done.returncode == 2 and "lazyconfig_train_net.py trains those" in done.stderr
