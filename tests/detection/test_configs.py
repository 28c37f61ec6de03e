"""Every shipped config is loaded and built."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model

import d2_mgd.detection  # noqa: F401 - registers the meta-architecture
from d2_mgd.detection.config import add_mgd_config, student_config
from d2_mgd.detection.config_checks import Recipe, validate_config
from d2_mgd.distill import published_weights

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAVES = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("Base-"))
BASES = sorted(CONFIGS.rglob("Base-*.yaml"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(CONFIGS)) for path in paths]


def load(name: str | Path) -> CfgNode:
    cfg = get_cfg()
    add_mgd_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def is_plain(path: str) -> bool:
    return "MGD" not in CfgNode.load_yaml_with_base(str(CONFIGS / path))


@pytest.mark.parametrize("path", names(BASES))
def test_bases_merge(path: str) -> None:
    load(path)


@pytest.mark.parametrize("name", ["Base-RetinaNet.yaml", "Base-RCNN-FPN.yaml"])
def test_bases_are_detectron2s(name: str) -> None:
    theirs, ours = get_cfg(), get_cfg()
    theirs.merge_from_file(model_zoo.get_config_file(name))
    ours.merge_from_file(str(CONFIGS / name))
    assert ours == theirs


@pytest.mark.parametrize("path", names(LEAVES))
def test_every_config_is_built(path: str) -> None:
    if is_plain(path):
        cfg = get_cfg()  # an unmodified Detectron2 reads it, without the MGD node
        cfg.merge_from_file(str(CONFIGS / path))
        cfg.MODEL.DEVICE = "cpu"
        assert type(build_model(cfg)).__name__ == cfg.MODEL.META_ARCHITECTURE
        return
    cfg = load(path)
    cfg.MODEL.DEVICE = "cpu"
    assert cfg.MGD.TEACHER.WEIGHTS, "a shipped config says where its teacher's weights are"
    cfg.MGD.TEACHER.WEIGHTS = "untrained"
    validate_config(cfg)
    model = META_ARCH_REGISTRY.get("TeacherStudentDetector")(cfg)
    assert list(model.pairs) == list(cfg.MGD.FEATURES)
    if "levels" in path:
        warmup = 0 if cfg.SOLVER.CLIP_GRADIENTS.ENABLED else 1000
        assert Recipe.of(cfg) == Recipe("pearson", "none", "auto", "cosine", warmup)


@pytest.mark.parametrize("path", names(sorted((CONFIGS / "lazy").glob("*.py"))))
def test_every_python_config_is_built(path: str) -> None:
    if "pointrend" in path:
        pytest.importorskip("detectron2.projects.point_rend", reason="Detectron2's PointRend cannot be imported")
    if "vitdet" in path or "swin" in path:
        pytest.importorskip("timm", reason="timm is not installed")
    cfg = LazyConfig.load(str(CONFIGS / path))
    assert {"model", "train", "dataloader", "optimizer", "lr_multiplier"} <= set(cfg)
    assert "://" in cfg.model.teacher.weights, "a shipped config says where its teacher's weights are"
    cfg.model.teacher.weights = "untrained"
    model = instantiate(cfg.model)
    assert list(model.pairs) == list(cfg.model.features)
    assert model.balances and model.schedule.stop == cfg.train.max_iter
    assert cfg.train.output_dir.endswith(path.removeprefix("lazy/").removesuffix(".py"))


@pytest.mark.parametrize("path", names(LEAVES))
def test_weights_are_numbers_to_yaml(path: str) -> None:
    """2e-8, without a point, would be text."""
    weights = yaml.safe_load((CONFIGS / path).read_text()).get("MGD", {}).get("WEIGHTS", [])
    assert all(isinstance(weight, float) for weight in weights)


@pytest.mark.parametrize(
    ("distilled", "alone"),
    [
        ("RetinaNet/mgd_stages_R_50_R_18_FPN_1x.yaml", "RetinaNet/retinanet_torchvision_R_18_FPN_1x.yaml"),
        ("RetinaNet/mgd_levels_R_50_R_18_FPN_1x.yaml", "RetinaNet/retinanet_torchvision_R_18_FPN_1x.yaml"),
        ("RetinaNet/mgd_levels_R_101_R_50_FPN_1x.yaml", "RetinaNet/retinanet_R_50_FPN_1x.yaml"),
        ("FasterRCNN/mgd_levels_R_50_R_18_FPN_1x.yaml", "FasterRCNN/faster_rcnn_torchvision_R_18_FPN_1x.yaml"),
        ("MaskRCNN/mgd_levels_R_50_R_18_FPN_1x.yaml", "MaskRCNN/mask_rcnn_torchvision_R_18_FPN_1x.yaml"),
        ("small/mgd_levels_R_18_narrow_FPN.yaml", "small/retinanet_narrow_FPN.yaml"),
    ],
)
def test_the_distilled_student_is_the_plain_student(distilled: str, alone: str) -> None:
    """Alike but for where results go, and the two settings that the published stages need."""
    one, other = student_config(load(distilled)), student_config(load(alone))
    for cfg in (one, other):
        cfg.OUTPUT_DIR = ""
        if "stages" in distilled:
            cfg.MODEL.BACKBONE.FREEZE_AT = 1
            cfg.SOLVER.NESTEROV = True
    assert one == other


def test_model_zoo_student_is_detectron2s() -> None:
    ours = student_config(load("RetinaNet/retinanet_R_50_FPN_1x.yaml"))
    theirs = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    ours.OUTPUT_DIR = theirs.OUTPUT_DIR
    assert ours == theirs


def test_published_pair_has_the_published_numbers() -> None:
    cfg = load("RetinaNet/mgd_stages_R_50_R_18_FPN_1x.yaml")
    processes = 8  # that the published code was run with, and by which it divides once more
    published = published_weights("detection", cfg.MGD.FEATURES)
    assert pytest.approx([weight / processes for weight in published.values()], rel=1e-6) == cfg.MGD.WEIGHTS
    assert (cfg.MGD.REDUCER, cfg.MGD.LOSS, cfg.MGD.REDUCTION) == ("amp", "partial_l2", "image_sum")
    assert Recipe.of(cfg) == Recipe("cosine", "gn", "fixed", "constant", 0)
    assert (cfg.MGD.REMATCH.PERIODS, cfg.MGD.REMATCH.MILESTONES) == ([5000, 31000], [20000])
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("RGB", [123.675, 116.28, 103.53])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.IMS_PER_BATCH) == (90000, (60000, 80000), 16)
