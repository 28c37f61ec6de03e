"""Meta-architectures beyond detectors of boxes, and the evaluators that data sets ask for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import lazyconfig_train_net
import own_project  # noqa: F401 - registers a meta-architecture
import train_net as command_line
from architectures import ARCHITECTURES, Architecture, table
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, SemSegEvaluator
from labelled_images import register_labelled
from tiny_detectors import batch, distilled_config, narrow, step, tiny, tiny_config
from training_runs import ROOT, write_coco

from d2_mgd import configs
from d2_mgd.detection import FrozenTeacher, TeacherStudentDetector
from d2_mgd.detection.datasets import name_keypoints
from d2_mgd.detection.evaluation import check_evaluators, evaluator_of
from d2_mgd.errors import UserError

SHORT = {
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.STEPS": (1,),
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "MGD.TEACHER.WEIGHTS": "untrained",
    "MGD.REMATCH.NUM_IMAGES": 2,
}
NO_TEST = ("DATASETS.TEST", ())
STEPS = 2


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    register_labelled(tmp_path_factory.mktemp("labelled"), "labelled")
    return "labelled"


@pytest.mark.parametrize("one", [pytest.param(one, id=one.name) for one in ARCHITECTURES])
def test_it_trains_evaluates_resumes_and_teaches(one: Architecture, labelled: str, tmp_path: Path) -> None:
    if one.needs:
        pytest.importorskip(one.needs, reason=f"{one.needs} cannot be imported")
    evaluated = not one.evaluator_needs or importlib.util.find_spec(one.evaluator_needs) is not None
    run = python_run if one.small else yaml_run
    run(one, f"{labelled}_{one.data}", tmp_path, evaluated)
    if not evaluated:
        pytest.skip(f"{one.evaluator_needs} is not installed: trained, resumed and taught, but not evaluated")


def yaml_run(one: Architecture, data: str, output: Path, evaluated: bool) -> None:
    sets = {"DATASETS.TRAIN": (data,), "DATASETS.TEST": (data,) if evaluated else (), "OUTPUT_DIR": output}
    opts = [*narrow(32), *one.options]
    settings = {**SHORT, **sets, "MGD.TEACHER.OPTS": opts, "SOLVER.MAX_ITER": STEPS}
    pairs = [word for pair in settings.items() for word in pair]
    words = [str(word) for word in (*narrow(16), "MODEL.RESNETS.DEPTH", 50, *one.options, *pairs)]
    metrics = command_line.main(["--config-file", one.config, *words])
    if evaluated:
        assert set(metrics) == set(one.tasks)
        assert set(json.loads((output / f"inference/{data}/results.json").read_text())) == set(one.tasks)
    command_line.main(["--config-file", one.config, "--resume", *words, "SOLVER.MAX_ITER", str(STEPS + 1)])
    numbers = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [line for line in numbers if "total_loss" in line]
    assert [line["iteration"] for line in losses][-1] == STEPS and all(line["loss_distill/p3"] > 0 for line in losses)
    given = ["MGD.TEACHER.CONFIG_FILE", str(output / "student.yaml"), "MGD.TEACHER.WEIGHTS", ""]
    teaches(TeacherStudentDetector(distilled_config("retinanet", "retinanet", *given, "MGD.TEACHER.OPTS", [])))


def python_run(one: Architecture, data: str, output: Path, evaluated: bool) -> None:
    cfg = LazyConfig.load(configs.get(one.config))
    one.small(cfg)
    resize = LazyCall(ResizeShortestEdge)(short_edge_length=64, max_size=64)
    for loader in (cfg.dataloader.train, cfg.dataloader.test):
        loader.dataset.names, loader.mapper.augmentations, loader.num_workers = data, [resize], 0
    cfg.dataloader.train.total_batch_size = 2
    cfg.model.teacher.weights = "untrained"
    cfg.train.update(max_iter=STEPS, eval_period=STEPS, device="cpu", init_checkpoint="", output_dir=str(output))
    cfg.optimizer.lr = 1e-4
    found = lazyconfig_train_net.train(cfg, resume=False).storage.latest()
    assert {name.split("/")[0] for name in found if name.endswith("/AP")} == set(one.tasks)
    assert found["loss_distill/p3"][0] > 0
    cfg.train.update(max_iter=STEPS + 1, eval_period=0)
    resumed = lazyconfig_train_net.train(cfg, resume=True)
    assert resumed.start_iter == STEPS and resumed.storage.latest()["loss_distill/p3"][0] > 0
    own = instantiate(cfg.model.student)
    teacher = FrozenTeacher(own, input_format="RGB", weights=str(output / "model_final.pth"))
    distiller = {"reducer": "amp", "loss": "pearson", "norm": "none"}
    teaches(TeacherStudentDetector(student=tiny(), teacher=teacher, features=["p3"], distiller=distiller))


def teaches(model: TeacherStudentDetector) -> None:
    losses = step(model, batch((64, 64), (64, 64)))
    assert all(float(losses[f"loss_distill/{name}"].detach()) > 0 for name in model.pairs)


def test_keypoints_are_named_by_the_json_of_a_set(labelled: str, tmp_path: Path) -> None:
    name = f"{labelled}_keypoints"
    name_keypoints(tiny_config("retinanet", 16, "MODEL.KEYPOINT_ON", True, "DATASETS.TRAIN", (name,), *NO_TEST))
    known = MetadataCatalog.get(name)
    assert known.keypoint_names == ["head", "left_ear", "right_ear"]
    assert known.keypoint_flip_map == [("left_ear", "right_ear")]
    path, root = write_coco(tmp_path, "without_points", 1, seed=0)
    register_coco_instances("without_points", {}, str(path), str(root))
    cfg = tiny_config("retinanet", 16, "MODEL.KEYPOINT_ON", True, "DATASETS.TRAIN", ("without_points",), *NO_TEST)
    with pytest.raises(UserError, match=r"'without_points' has no keypoints for MODEL\.KEYPOINT_ON: its categories"):
        name_keypoints(cfg)


def test_the_table_in_the_documentation() -> None:
    assert table() in (ROOT / "docs/detection.md").read_text()


@pytest.mark.parametrize(
    ("kind", "metadata", "expected"),
    [
        ("coco", {}, [COCOEvaluator]),
        (None, {}, [COCOEvaluator]),
        ("sem_seg", {"stuff_classes": ["sky"], "ignore_label": 255}, [SemSegEvaluator]),
    ],
)
def test_evaluators_are_those_of_the_type(kind: str | None, metadata: Any, expected: Any, tmp_path: Path) -> None:
    name = f"evaluated_{kind}"
    DatasetCatalog.register(name, list)
    if kind:
        MetadataCatalog.get(name).set(evaluator_type=kind)
    MetadataCatalog.get(name).set(thing_classes=["fish"], json_file=str(tmp_path / "none.json"), **metadata)
    (tmp_path / "none.json").write_text('{"images": [], "annotations": [], "categories": []}')
    found = evaluator_of(tiny_config(), name, str(tmp_path))
    found = found._evaluators if isinstance(found, DatasetEvaluators) else [found]
    assert [type(one) for one in found] == expected


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (
            "coco_panoptic_seg",
            [],
            r"no ground truth for its evaluators .*lack panoptic_json, panoptic_root",
        ),
        ("coco", ["MODEL.KEYPOINT_ON", True], r"\(coco, keypoints\): its metadata lack keypoint_names"),
        ("depth", [], "has evaluator_type 'depth'; there are: coco, sem_seg"),
        ("lvis", [], r"evaluated \(lvis\) with lvis, which is not installed: pip install lvis; or leave it out"),
    ],
)
def test_a_data_set_that_cannot_be_evaluated_is_named_before_the_training(
    kind: str, overrides: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name = f"without_{kind}"
    MetadataCatalog.get(name).set(evaluator_type=kind, **({"json_file": "lvis.json"} if kind == "lvis" else {}))
    with pytest.raises(UserError, match=message):
        check_evaluators(tiny_config("retinanet", 16, "DATASETS.TEST", (name,), *overrides))
