"""Bad input ends before training, with one sentence and exit status 2."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import train_net as command_line
from detectron2.config import get_cfg
from training_runs import CLASSES, write_coco, write_yaml

from d2_mgd.detection.config import add_mgd_config
from d2_mgd.detection.config_checks import validate_config


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], output: Path) -> str:
    """Run the command line and return its one sentence."""
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("train_net.py: error: ")
    metrics = output / "metrics.json"
    assert not list(output.glob("*.pth")) and not (metrics.exists() and metrics.read_text())
    return lines[0]


OVERRIDES = {
    "no such feature": (("MGD.FEATURES", "['res9']", "MGD.LOSS", "mse"), r"no feature 'res9'; it has: .*p4"),
    "margins on an FPN level": (("MGD.FEATURES", "['p4']", "MGD.LOSS", "partial_l2"), "feature p4 cannot have"),
    "teacher weights absent": (("MGD.TEACHER.WEIGHTS", "nowhere.pth"), r"teacher's weights .*nowhere\.pth"),
    "teacher config absent": (("MGD.TEACHER.CONFIG_FILE", "nowhere.yaml"), r"nowhere\.yaml is found neither"),
    "teacher weights that do not fit": (
        ("MGD.TEACHER.OPTS", "['MODEL.FPN.OUT_CHANNELS', 10]"),
        "teacher's weights .* do not fit its config",
    ),
    "another number of classes": (
        ("MODEL.RETINANET.NUM_CLASSES", "80"),
        r"80 classes but the data set 'tiny_train' has 3 \(disc, box, cross\): set MODEL.RETINANET.NUM_CLASSES 3",
    ),
    "a negative weight": (("MGD.WEIGHTS", "[1.0, -1.0]"), "weight of feature p4 must be finite and not negative"),
    "a weight that is no number": (("MGD.WEIGHTS", "['nan', 1.0]"), "weight of feature res4 must be finite"),
    "an unknown reducer": (("MGD.REDUCER", "best"), "MGD.REDUCER is 'best'; there are: .*amp"),
    "an unknown loss": (("MGD.LOSS", "best"), "MGD.LOSS is 'best'; there are: .*partial_l2"),
    "an unknown metric": (("MGD.METRIC", "best"), "MGD.METRIC is 'best'; there are: '', cosine, pearson"),
    "a model that Detectron2 cannot build": (("MODEL.RESNETS.DEPTH", "18"), "MODEL.RESNETS.RES2_OUT_CHANNELS = 64"),
    "an unknown architecture": (("MODEL.META_ARCHITECTURE", "Nonsense", "MGD.ENABLED", "False"), "'Nonsense'"),
    "an unknown key": (("MGD.NONSENSE", "1"), "KEY VALUE overrides: .*MGD.NONSENSE"),
    "a value of another type": (("SOLVER.MAX_ITER", "many"), "KEY VALUE overrides: .*SOLVER.MAX_ITER"),
    "a batch without images": (("MGD.REMATCH.BATCH_SIZE", "0"), "MGD.REMATCH.BATCH_SIZE must be at least 1"),
    "student weights absent": (("MODEL.WEIGHTS", "nowhere.pth"), r"weights file nowhere\.pth does not exist"),
    "an unknown data set": (("DATASETS.TRAIN", "('unheard_of',)"), "no data set 'unheard_of'"),
    "half precision without a GPU": (("SOLVER.AMP.ENABLED", "True", "MGD.PRECISION", "float16"), "needs a GPU"),
    "an unknown precision": (("MGD.PRECISION", "fp8"), "MGD.PRECISION is 'fp8'; there are: '', float16, bfloat16"),
    "a batch in no parts": (("MGD.ACCUMULATE", "0"), "MGD.ACCUMULATE must be at least 1"),
    "a step of no images": (("SOLVER.IMS_PER_BATCH", "0"), "SOLVER.IMS_PER_BATCH must be at least 1, got 0"),
    "a training of no steps": (("MGD.ENABLED", "False", "SOLVER.MAX_ITER", "0"), "SOLVER.MAX_ITER must be at least 1"),
    "a last drop of the learning rate": (
        ("SOLVER.STEPS", "(4, 6)"),
        r"STEPS has 6, which is SOLVER.MAX_ITER, so .*raise",
    ),
    "drops out of order": (
        ("SOLVER.STEPS", "(4, 2)"),
        r"SOLVER.STEPS must be .* each above the one before, got \(4, 2\)",
    ),
    "drops that are no numbers": (("SOLVER.STEPS", "('a',)"), r"SOLVER.STEPS must be numbers of iterations"),
    "fewer than no workers": (("DATALOADER.NUM_WORKERS", "-1"), "DATALOADER.NUM_WORKERS must be at least 0, .* got -1"),
    "an unknown scheduler": (("SOLVER.LR_SCHEDULER_NAME", "Steps"), "LR_SCHEDULER_NAME is 'Steps'; there are: Warmup"),
    "an unknown sampler": (("DATALOADER.SAMPLER_TRAIN", "All"), "SAMPLER_TRAIN is 'All'; there are: TrainingSampler"),
    "no device": (("MODEL.DEVICE", "gpu"), "MODEL.DEVICE is 'gpu', which is no device: give cpu, cuda or cuda:N"),
    "a last key without a value": (("SEED", "1", "MODEL.WEIGHTS"), "overrides: MODEL.WEIGHTS has no value"),
    "a key without a value": (("MODEL.WEIGHTS", "SEED", "1"), "overrides: MODEL.WEIGHTS has no value"),
    "a flag too late": (("--resume",), "--resume comes after KEY VALUE overrides: put it before them"),
    "fewer than no steps left out": (("MGD.NONFINITE.SKIP", "-1"), "MGD.NONFINITE.SKIP must be at least 0"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_config_that_cannot_work(
    workplace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    overrides, message = OVERRIDES[case]
    sentence = refused(capsys, workplace.arguments(tmp_path, *overrides), tmp_path)
    assert re.search(message, sentence), sentence


def data_arguments(workplace: Any, name: str, path: Path, root: Path, output: Path) -> list[str]:
    known = workplace.arguments(output, "DATASETS.TRAIN", f"('{name}',)")
    return ["--register-coco", name, str(path), str(root), *known]


def test_an_image_missing_on_the_disk(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    path, root = write_coco(tmp_path, "missing_image", 4, seed=0)
    (root / "002.png").unlink()
    arguments = data_arguments(workplace, "missing_image", path, root, tmp_path / "out")
    assert f"the image {root / '002.png'} does not exist" in refused(capsys, arguments, tmp_path / "out")


def test_a_box_outside_its_image(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    path, root = write_coco(tmp_path, "outside", 4, seed=0)
    content = json.loads(path.read_text())
    content["annotations"][1]["bbox"] = [500, 10, 20, 20]
    path.write_text(json.dumps(content))
    arguments = data_arguments(workplace, "outside", path, root, tmp_path / "out")
    assert "annotation 2 of image" in refused(capsys, arguments, tmp_path / "out")


def test_an_empty_data_set(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    path, root = write_coco(tmp_path, "empty", 4, seed=0, annotations=[])
    arguments = data_arguments(workplace, "empty", path, root, tmp_path / "out")
    assert "no annotation to train on" in refused(capsys, arguments, tmp_path / "out")


def test_sets_that_differ_in_their_classes(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    other = [{"id": index, "name": name} for index, name in enumerate(reversed(CLASSES), 1)]
    path, root = write_coco(tmp_path, "reversed_classes", 4, seed=0, categories=other)
    arguments = data_arguments(workplace, "reversed_classes", path, root, tmp_path / "out")
    assert "'reversed_classes' and 'tiny_valid' differ" in refused(capsys, arguments, tmp_path / "out")


def test_student_weights_of_something_else(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    weights = tmp_path / "other.pth"
    torch.save({"strange.weight": torch.zeros(3)}, weights)
    arguments = workplace.arguments(tmp_path / "out", "MODEL.WEIGHTS", weights)
    assert f"no weight in {weights} fits the model" in refused(capsys, arguments, tmp_path / "out")


def test_weights_of_another_network_are_not_evaluated(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    teacher = workplace.teacher_weights
    arguments = workplace.arguments(tmp_path / "out", "MODEL.WEIGHTS", teacher, flags=("--eval-only",))
    sentence = refused(capsys, arguments, tmp_path / "out")
    assert f"MODEL.WEIGHTS {teacher} is not of the student that is to be evaluated: " in sentence
    assert re.search(r": \d+ of its weights are missing there or have another shape, first backbone\.\S+,", sentence)


@pytest.mark.parametrize("key", ["MGD.TEACHER.WEIGHTS", "MODEL.WEIGHTS"])
def test_weights_that_are_not_finite(workplace: Any, tmp_path: Path, capsys: Any, key: str) -> None:
    weights, broken = tmp_path / "broken.pth", "head.cls_score.bias"
    content = torch.load(workplace.teacher_weights, weights_only=True)
    content["model"][broken][0] = float("nan")
    torch.save(content, weights)
    arguments = workplace.arguments(tmp_path / "out", key, weights)
    assert f"{weights} holds weights that are not finite, first {broken}." in refused(
        capsys, arguments, tmp_path / "out"
    )


def test_nothing_to_evaluate(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = workplace.arguments(tmp_path / "out", flags=("--eval-only",))
    assert "give MODEL.WEIGHTS, or --resume" in refused(capsys, arguments, tmp_path / "out")


def test_evaluations_need_a_device_and_workers_too(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    for overrides, key in ((("MODEL.DEVICE", "gpu"), "MODEL.DEVICE"), (("DATALOADER.NUM_WORKERS", -1), "NUM_WORKERS")):
        arguments = workplace.arguments(tmp_path / "out", *overrides, flags=("--eval-teacher",))
        assert key in refused(capsys, arguments, tmp_path / "out")


def test_drops_after_the_end_are_left_to_detectron2() -> None:
    cfg = get_cfg()
    add_mgd_config(cfg)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 6, (4, 100)
    validate_config(cfg)


def test_one_of_two_is_evaluated(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = workplace.arguments(tmp_path / "out", flags=("--eval-only", "--eval-teacher"))
    assert "give one of them" in refused(capsys, arguments, tmp_path / "out")


@pytest.mark.parametrize("parts", [("file",), ("file", "out")], ids=["a file", "below a file"])
def test_a_folder_that_cannot_be_written(workplace: Any, tmp_path: Path, capsys: Any, parts: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    output = tmp_path.joinpath(*parts)
    assert f"OUTPUT_DIR '{output}' cannot be written: " in refused(capsys, workplace.arguments(output), output)


def test_a_folder_that_another_training_writes_to(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    claim = "import sys; from d2_mgd.training import claimed_folder as c"
    words = [sys.executable, "-c", f"{claim}\nwith c(sys.argv[1]): print(flush=True); input()", str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline()
        assert f"is in use by process {other.pid} on " in refused(capsys, workplace.arguments(tmp_path), tmp_path)
        other.stdin.write("\n")
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {", "config.yaml: "),
        ("MODEL:\n  NONSENSE: 1\n", "MODEL.NONSENSE"),
        ("VERSION: 2\nMODEL: !!python/object/apply:os.system ['true']\n", "asks for python"),
        (None, "config.yaml does not exist."),
    ],
    ids=["no yaml", "unknown key", "code", "missing"],
)
def test_a_config_file_that_cannot_be_read(
    workplace: Any, tmp_path: Path, capsys: Any, text: str | None, message: str
) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    arguments = workplace.arguments(tmp_path / "out")
    arguments[arguments.index("--config-file") + 1] = str(path)
    assert message in refused(capsys, arguments, tmp_path / "out")


def test_a_teacher_of_other_classes_teaches_but_is_not_evaluated(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    five = ("MGD.TEACHER.OPTS", "['MODEL.RETINANET.NUM_CLASSES', 5]", "MGD.TEACHER.WEIGHTS", "untrained")
    arguments = workplace.arguments(tmp_path / "out", *five, flags=("--eval-teacher",))
    assert "a teacher of other classes can teach, but not be evaluated here" in refused(
        capsys, arguments, tmp_path / "out"
    )


def test_an_image_that_breaks_during_training_is_named(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    path, root = write_coco(tmp_path, "breaks", 4, seed=0)
    (root / "001.png").write_bytes((root / "001.png").read_bytes()[:200])
    arguments = data_arguments(workplace, "breaks", path, root, tmp_path / "out")
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert f"train_net.py: error: cannot read {root / '001.png'}: " in capsys.readouterr().err


def test_machines_need_a_place_to_meet(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = workplace.arguments(tmp_path / "out", flags=("--num-machines", "2"))
    assert "several machines need --dist-url" in refused(capsys, arguments, tmp_path / "out")


def test_a_student_of_an_earlier_training_is_not_taken_for_its_checkpoint(
    workplace: Any, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    torch.save({"model": {}}, output / "model_final.pth")
    (output / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(SystemExit):
        command_line.main(workplace.arguments(output, flags=("--resume",)))
    assert "holds weights but no state of a training" in capsys.readouterr().err
    shutil.rmtree(output)


def test_the_student_needs_an_architecture_of_its_own(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    config = write_yaml(tmp_path / "c.yaml", {"MODEL": {"META_ARCHITECTURE": "TeacherStudentDetector"}})
    arguments = ["--config-file", str(config), "MGD.ENABLED", "True", "OUTPUT_DIR", str(tmp_path / "out")]
    assert "MGD.STUDENT.META_ARCHITECTURE must name" in refused(capsys, arguments, tmp_path / "out")


def test_bad_input_is_one_sentence_under_torchrun_on_gpus_too(
    workplace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the config is read before any GPU is touched
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    arguments = workplace.arguments(tmp_path, "MGD.REDUCER", "median")
    assert "MGD.REDUCER is 'median'; there are: " in refused(capsys, arguments, tmp_path)
