from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from tiny_detectors import CONFIGS, built, distilled_config, tiny_config

from d2_mgd._install import DETECTRON2_INSTALL
from d2_mgd.detection.config import add_mgd_config, student_config, teacher_config
from d2_mgd.detection.config_checks import Recipe, feature_losses, feature_weights, validate_config
from d2_mgd.errors import UserError


def test_only_the_mgd_node_is_added() -> None:
    plain, ours = get_cfg(), get_cfg()
    add_mgd_config(ours)
    assert set(ours) - set(plain) == {"MGD"}
    del ours["MGD"]
    assert ours == plain


def test_mgd_is_off_by_default_and_nothing_is_checked_then() -> None:
    cfg = get_cfg()
    add_mgd_config(cfg)
    assert cfg.MGD.ENABLED is False
    validate_config(cfg)


def test_student_config_is_plain_detectron2() -> None:
    cfg = distilled_config("faster_rcnn")
    plain = student_config(cfg)
    assert "MGD" in cfg and "MGD" not in plain
    fresh = get_cfg()
    fresh.merge_from_other_cfg(plain)  # an unknown key would raise
    assert type(build_model(fresh)).__name__ == "GeneralizedRCNN"


def test_student_config_names_the_students_own_architecture() -> None:
    cfg = distilled_config()
    cfg.MODEL.META_ARCHITECTURE = "TeacherStudentDetector"
    with pytest.raises(ValueError, match=r"MGD\.STUDENT\.META_ARCHITECTURE must name the student's own"):
        validate_config(cfg)
    cfg.MGD.STUDENT.META_ARCHITECTURE = "RetinaNet"
    assert student_config(cfg).MODEL.META_ARCHITECTURE == "RetinaNet"


def test_student_config_stays_frozen() -> None:
    cfg = distilled_config()
    cfg.freeze()
    assert student_config(cfg).is_frozen()


class TestTeacherConfig:
    def test_from_the_model_zoo(self) -> None:
        cfg = distilled_config("retinanet", "faster_rcnn")
        own = teacher_config(cfg)
        assert own.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        assert own.MODEL.RESNETS.RES2_OUT_CHANNELS == 32  # from MGD.TEACHER.OPTS
        assert own.MODEL.DEVICE == "cpu"
        assert "MGD" not in own and own.is_frozen()

    def test_zoo_weights(self) -> None:
        cfg = distilled_config("retinanet", "faster_rcnn", "MGD.TEACHER.WEIGHTS", "zoo")
        assert model_zoo.get_checkpoint_url(CONFIGS["faster_rcnn"]) == teacher_config(cfg).MODEL.WEIGHTS

    def test_own_weights_of_its_config(self) -> None:
        opts = ["MODEL.WEIGHTS", "teacher.pth"]
        cfg = distilled_config("retinanet", "retinanet", "MGD.TEACHER.WEIGHTS", "", "MGD.TEACHER.OPTS", opts)
        assert teacher_config(cfg).MODEL.WEIGHTS == "teacher.pth"

    def test_relative_to_the_working_directory_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("own.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet, WEIGHTS: here.pth}\nVERSION: 2\n")
        cfg = distilled_config("retinanet", "retinanet", "MGD.TEACHER.CONFIG_FILE", "own.yaml")
        cfg.MGD.TEACHER.WEIGHTS, cfg.MGD.TEACHER.OPTS = "", []
        assert teacher_config(cfg).MODEL.WEIGHTS == "here.pth"

    def test_relative_to_this_projects_configs(self) -> None:
        cfg = distilled_config()
        cfg.MGD.TEACHER.CONFIG_FILE = "RetinaNet/retinanet_torchvision_R_50_FPN_1x.yaml"
        assert teacher_config(cfg).INPUT.FORMAT == "RGB"

    def test_keys_that_a_project_has_added_are_the_teachers_too(self, tmp_path: Path) -> None:
        (tmp_path / "teacher.yaml").write_text("MODEL: {OWN_HEAD: {WIDTH: 64}}\nVERSION: 2\n")
        cfg = distilled_config("retinanet", "retinanet", "MGD.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml"))
        with pytest.raises(UserError, match=r"Non-existent config key: MODEL\.OWN_HEAD"):
            teacher_config(cfg)
        cfg.MODEL.OWN_HEAD = CfgNode({"WIDTH": 8, "DEPTH": 2})
        cfg.freeze()
        assert teacher_config(cfg).MODEL.OWN_HEAD == {"WIDTH": 64, "DEPTH": 2} and cfg.MODEL.OWN_HEAD.WIDTH == 8

    def test_config_written_by_a_training_with_a_teacher(self, tmp_path: Path) -> None:
        """A distilled student may teach the next one; its own teacher does not matter."""
        written = tmp_path / "config.yaml"
        written.write_text(distilled_config("faster_rcnn").dump())
        cfg = distilled_config("retinanet", "retinanet", "MGD.TEACHER.CONFIG_FILE", str(written))
        assert teacher_config(cfg).MODEL.META_ARCHITECTURE == "GeneralizedRCNN"

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["CONFIG_FILE", ""], r"MGD\.TEACHER\.CONFIG_FILE is empty"),
            (["CONFIG_FILE", "no/such.yaml"], r"no/such\.yaml is found neither from the working directory, nor in"),
            (
                ["CONFIG_FILE", "COCO-Detection/fcos_R_50_FPN_1x.py"],
                r"takes overrides path\.key=value, not 'MODEL",
            ),
            (["OPTS", ["MODEL.NO_SUCH", 1]], r"MGD\.TEACHER\.OPTS do not fit .*NO_SUCH"),
            (["OPTS", ["MODEL.WEIGHTS"]], r"MGD\.TEACHER\.OPTS do not fit"),
            (["OPTS", ["MODEL.WEIGHTS", ""], "WEIGHTS", ""], r"the teacher has no weights"),
            (["CONFIG_FILE", "Base-RetinaNet.yaml", "WEIGHTS", "zoo"], r"the model zoo has no checkpoint of"),
        ],
    )
    def test_bad_input(self, overrides: list[Any], message: str) -> None:
        keys = [f"MGD.TEACHER.{value}" if index % 2 == 0 else value for index, value in enumerate(overrides)]
        with pytest.raises(ValueError, match=message):
            validate_config(distilled_config("retinanet", "retinanet", *keys))

    def test_unknown_key_in_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "strange.yaml"
        path.write_text("MODEL: {STRANGE: 1}\nVERSION: 2\n")
        with pytest.raises(ValueError, match=r"strange\.yaml is not a config of a Detectron2 model: .*STRANGE"):
            validate_config(distilled_config("retinanet", "retinanet", "MGD.TEACHER.CONFIG_FILE", str(path)))


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system ''"])
def test_a_config_file_runs_no_code(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stranger.yaml").write_text(f"MODEL:\n  WEIGHTS: {text}\nVERSION: 2\n")
    Path("teacher.yaml").write_text("_BASE_: stranger.yaml\n")
    for name in ("stranger.yaml", "teacher.yaml"):
        with pytest.raises(ValueError, match=rf"{name} .*\(or a base of it\) asks for python, could not determine"):
            validate_config(distilled_config("retinanet", "retinanet", "MGD.TEACHER.CONFIG_FILE", name))
    assert not Path("ran").exists()


def test_a_broken_config_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("MODEL: {WEIGHTS: [1\nVERSION: 2\n")
    with pytest.raises(ValueError, match=r"broken\.yaml is not a config of a Detectron2 model: .*\.$") as raised:
        validate_config(distilled_config("retinanet", "retinanet", "MGD.TEACHER.CONFIG_FILE", str(path)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["FEATURES", []], r"MGD\.FEATURES is empty"),
        (["FEATURES", ["p3", "p3"]], r"names a feature twice"),
        (["FEATURES", [], "DENSE_KD.ENABLED", True, "BALANCE", "auto"], r"BALANCE is auto.* MGD\.FEATURES is empty"),
        (["WEIGHTS", [1.0, 2.0]], r"MGD\.WEIGHTS has 2 entries for the 3 features p3, p4, p5"),
        (["WEIGHTS", [1.0, -1.0, 1.0]], r"weight of feature p4 must be finite and not negative, got -1"),
        (["WEIGHTS", [1.0, 1.0, float("nan")]], r"weight of feature p5 must be finite and not negative, got nan"),
        (["WEIGHTS", [float("inf")]], r"must be finite and not negative, got inf"),
        (["WEIGHTS", ["much"]], r"the weight 'much' of feature p3 is not a number"),
        (["LOSS", "l3"], r"MGD\.LOSS is 'l3'; there are: partial_l2, mse, pearson"),
        (["LOSS", "mse, mse"], r"MGD\.LOSS names 2 losses for the 3 features"),
        (["LOSS", "partial_l2"], r"needs margins, which feature p3 cannot have: an FPN level ends in a convolution"),
        (["FEATURES", ["res4", "p4"], "LOSS", "partial_l2"], r"needs margins, which feature p4 cannot have"),
        (
            ["FEATURES", ["res4"], "LOSS", "partial_l2", "BEFORE_ACTIVATION", False],
            r"compares feature res4 before its activation: set MGD\.BEFORE_ACTIVATION to True",
        ),
        (["REDUCER", "median"], r"MGD\.REDUCER is 'median'; there are: amp, max"),
        (["REDUCTION", "sum"], r"MGD\.REDUCTION is 'sum'; there are: mean, image_sum"),
        (["SPATIAL", "corners"], r"MGD\.SPATIAL is 'corners'; there are: all, boxes, attention"),
        (["METRIC", "l1"], r"MGD\.METRIC is 'l1'; there are: '', cosine, pearson"),
        (["MODE", "greedy"], r"MGD\.MODE is 'greedy'; there are: '', balanced, even, one_to_one"),
        (["ALIGN", "linear"], r"MGD\.ALIGN is 'linear'; there are: matching, matched_projection, conv1x1, none"),
        (["NORM", "ln"], r"MGD\.NORM is 'ln'; there are: .*gn"),
        (["STUDENT.TRAIN_LAST_NORM", "yes"], r"TRAIN_LAST_NORM is 'yes'; there are: affine, sync_bn, none"),
        (["REMATCH.SOURCE", "dream"], r"MGD\.REMATCH\.SOURCE is 'dream'; there are: pass, online"),
        (["REMATCH.NUM_IMAGES", 0], r"MGD\.REMATCH\.NUM_IMAGES must be at least 1, got 0"),
        (["REMATCH.EVERY", 0], r"MGD\.REMATCH\.EVERY must be at least 1"),
        (["REMATCH.START", False, "REMATCH.PERIODS", [0], "REMATCH.MILESTONES", []], r"nothing would ever be matched"),
        (
            ["REMATCH.START", False, "REMATCH.PERIODS", [100_000], "REMATCH.MILESTONES", []],
            r"no rematch comes before SOLVER\.MAX_ITER 90000, so nothing would ever be matched",
        ),
        (["REMATCH.START", False, "REMATCH.AT", [90_000]], r"no rematch comes before SOLVER\.MAX_ITER 90000"),
        (["REMATCH.PERIODS", [1, 2, 3]], r"MGD\.REMATCH: a rematch schedule needs one period more"),
    ],
)
def test_bad_input(overrides: list[Any], message: str) -> None:
    cfg = distilled_config()
    for key, value in zip(overrides[::2], overrides[1::2]):
        cfg.merge_from_list([f"MGD.{key}", value])
    with pytest.raises(ValueError, match=message) as raised:
        validate_config(cfg)
    assert "\n" not in str(raised.value)


def test_one_weight_and_one_loss_for_all() -> None:
    cfg = distilled_config("retinanet", "retinanet", "MGD.WEIGHTS", [2], "MGD.LOSS", "pearson")
    assert feature_weights(cfg) == {"p3": 2.0, "p4": 2.0, "p5": 2.0}
    assert feature_losses(cfg) == {"p3": "pearson", "p4": "pearson", "p5": "pearson"}


def test_stages_and_levels_with_a_loss_each() -> None:
    cfg = distilled_config("retinanet", "retinanet", "MGD.FEATURES", ["res4", "p4"], "MGD.LOSS", "partial_l2, mse")
    validate_config(cfg)
    assert feature_losses(cfg) == {"res4": "partial_l2", "p4": "mse"}


def test_weights_that_yaml_reads_as_text() -> None:
    cfg = distilled_config("retinanet", "retinanet", "MGD.WEIGHTS", ["1e-9"])
    assert feature_weights(cfg)["p3"] == 1e-9


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Recipe("pearson", "none", "auto", "cosine", 1000)),
        (["MGD.LOSS", "mse"], Recipe("cosine", "gn", "auto", "cosine", 1000)),
        (["MGD.LOSS", "pearson,pearson,mse"], Recipe("cosine", "gn", "auto", "cosine", 1000)),
        (["MGD.WEIGHTS", [6.0]], Recipe("pearson", "none", "fixed", "constant", 0)),
        (["MGD.FEATURES", []], Recipe("cosine", "gn", "fixed", "constant", 0)),
        (["MGD.WEIGHTS", [6.0], "MGD.BALANCE", "auto"], Recipe("pearson", "none", "auto", "cosine", 1000)),
        (["MGD.SCHEDULE.DECAY", "linear", "MGD.NORM", "bn"], Recipe("pearson", "bn", "auto", "linear", 1000)),
        (["SOLVER.CLIP_GRADIENTS.ENABLED", True], Recipe("pearson", "none", "auto", "cosine", 0)),
        (["MGD.SCHEDULE.WARMUP", 7], Recipe("pearson", "none", "auto", "cosine", 7)),
        (
            ["SOLVER.MAX_ITER", 900, "MGD.SCHEDULE.START", 400, "MGD.SCHEDULE.STOP", 10**5],
            Recipe("pearson", "none", "auto", "cosine", 100),
        ),
    ],
)
def test_empty_keys_follow_from_the_others(overrides: list[Any], expected: Recipe) -> None:
    assert Recipe.of(tiny_config("retinanet", 16, *overrides)) == expected


def test_settings_without_effect_are_warnings(messages: pytest.LogCaptureFixture) -> None:
    late = ("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (), "MGD.SCHEDULE.STOP", 100, "MGD.SCHEDULE.WARMUP", 7)
    model = built("retinanet", "retinanet", "MGD.WEIGHTS", [6.0], "MGD.BALANCE", "auto", *late)
    assert "MGD.SCHEDULE.STOP 100 is after SOLVER.MAX_ITER 6" in messages.text
    assert "MGD.SCHEDULE.WARMUP 7 is more than SOLVER.MAX_ITER 6" in messages.text
    assert "Without TEST.EVAL_PERIOD, the distillation does not stop" in messages.text
    assert set(model.distiller.weights.values()) == {1.0}
    assert "MGD.WEIGHTS [6.0] are not used: MGD.BALANCE is auto" in messages.text
    assert "Distilling p3, p4, p5: align matching, loss mse, matching cost cosine, norm gn," in messages.text


def test_plain_config_has_no_teacher_to_look_for() -> None:
    validate_config(tiny_config())


def test_without_detectron2_the_import_says_how_to_get_it() -> None:
    code = """
        import sys
        sys.modules["detectron2"] = None  # as if it were not installed
        try:
            import d2_mgd.detection
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"d2_mgd.detection needs Detectron2, which is not installed: {DETECTRON2_INSTALL}"


def test_the_docs_name_keys_that_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    cfg = get_cfg()
    add_mgd_config(cfg)
    found = 0
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        for name in re.findall(r"\bMGD(?:\.[A-Z_0-9]+)+", page.read_text(encoding="utf-8")):
            found += 1
            node = cfg
            for part in name.split("."):
                assert part in node, f"{page.name} names {name}"
                node = node[part]
    assert found > 25


FILES = {
    "empty": ("", "it holds no keys"),
    "a list": ("- 1", "it holds no keys"),
    "its own base": ("_BASE_: strange.yaml", "its _BASE_ leads back to it"),
    "no such base": ("_BASE_: nowhere.yaml", r"No such file or directory: .*nowhere\.yaml"),
    "a group that is none": ("MODEL: null\nVERSION: 2", "MODEL must be a group of keys, not a null"),
    "a base that is no name": ("_BASE_: 3", "a key or value in it is of the wrong kind"),
    "a value that is none": ("MODEL: {META_ARCHITECTURE: null}", "MODEL.META_ARCHITECTURE must be of the kind of"),
    "a key that is no text": ("[1]: 2", "unhashable key"),
    "no text": ("\x1f", "special characters are not allowed"),
    "in itself": ("MODEL: &a {WEIGHTS: *a}\nVERSION: 2", "nested without end"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path: Path, case: str) -> None:
    text, message = FILES[case]
    path = tmp_path / "strange.yaml"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=rf"strange\.yaml is not a config of a Detectron2 model: .*{message}"
    ) as raised:
        validate_config(distilled_config("retinanet", "retinanet", "MGD.TEACHER.CONFIG_FILE", str(path)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("FEATURES", [["p3"]], r"MGD\.FEATURES must be a list of names, and \['p3'\] is none"),
        ("FEATURES", ["p3\n"], r"MGD\.FEATURES must be a list of names"),
        ("WEIGHTS", [10**400], r"MGD\.WEIGHTS: the weight 1000"),
        ("TIE", [3], r"each list in MGD\.TIE must be a list of names, got 3"),
        ("REMATCH.PERIODS", [float("inf")], r"MGD\.REMATCH\.PERIODS must be a list of whole numbers, and inf is none"),
        ("REMATCH.AT", [2.5], r"MGD\.REMATCH\.AT must be a list of whole numbers, and 2\.5 is none"),
        ("REMATCH.LOG_SPACED", [1, 10, 10**9], r"MGD\.REMATCH: LOG_SPACED asks for 1000000000 rematches"),
        ("REMATCH.NUM_IMAGES", None, r"MGD\.REMATCH\.NUM_IMAGES must be of the kind of 2000, not None"),
        ("ACCUMULATE", 10**30, r"MGD\.ACCUMULATE is too large a number"),
        ("TEACHER.OPTS", [1.0, "x"], r"MGD\.TEACHER\.OPTS do not fit .*: 1\.0 is no key"),
        (
            "TEACHER.OPTS",
            ["MODEL", "{}"],
            r"MGD\.TEACHER\.OPTS do not fit .*: MODEL must be a group of keys, not a dict",
        ),
        ("TEACHER.CONFIG_FILE", "a\nb.yaml", r"MGD\.TEACHER\.CONFIG_FILE holds characters that cannot be shown"),
        ("TEACHER.CONFIG_FILE", f"{'a' * 5000}.yaml", r"MGD\.TEACHER\.CONFIG_FILE a+\.yaml is found neither"),
    ],
)
def test_a_value_of_the_wrong_kind(key: str, value: Any, message: str) -> None:
    cfg = distilled_config()
    *groups, name = key.split(".")
    node = cfg.MGD
    for group in groups:
        node = node[group]
    node[name] = value
    with pytest.raises(ValueError, match=message) as raised:
        validate_config(cfg)
    assert "\n" not in str(raised.value)
