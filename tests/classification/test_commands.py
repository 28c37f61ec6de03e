"""The published command lines, and ours, through the real entry points on small folders."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from classification.networks import MobileNetV1
from classification.options import parse_base, parse_mgd
from d2_mgd.distill import load_reports
from d2_mgd.errors import UserError
from tests.classification.conftest import CLASSES, REPOSITORY, Run, assert_same_run, make_folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_base_training(base: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert base(data, "--arch", "mobilenet_v1", "--epochs", 2) == 0
    run = tmp_path / "run"
    history = lines(run)
    assert [line["epoch"] for line in history] == [1, 2]
    assert {"lr", "train_loss", "train_err1", "err1", "err5", "loss", "seconds", "images_per_second"} <= set(history[0])
    assert all(line["err5"] == 0.0 for line in history)  # there are three classes
    shown = capsys.readouterr().out
    assert "mobilenet_v1 (best)" in shown
    assert "mobilenet_v1 (last)" in shown
    assert list((run / "tensorboard").glob("events*"))
    assert json.loads((run / "run.json").read_text())["options"]["arch"] == "mobilenet_v1"
    for name in ("student_last.pth", "student_best.pth"):
        stored = torch.load(run / name, weights_only=True)
        MobileNetV1(len(CLASSES)).load_state_dict(stored["state_dict"], strict=True)
        assert stored["classes"] == list(CLASSES)
    best = min(history, key=lambda line: line["err1"])
    assert torch.load(run / "student_best.pth", weights_only=True)["epoch"] == best["epoch"]


def test_mgd_training_as_published(mgd: Run, data: Path, tmp_path: Path, pretrained: Path) -> None:
    """The first published line: the ImageNet teacher knows other classes, and its features are used all the same."""
    arguments = ["--arch", "mobilenet_v1", "--distiller", "mgd", "--mgd-reducer", "amp", "--mgd-update-freq", 1]
    assert mgd(data, *arguments, "--epochs", 2, "--image-size", 64) == 0
    history = lines(tmp_path / "run")
    for stage in range(1, 5):
        assert all(line[f"train_loss_distill/stage{stage}"] > 0 < line[f"train_ratio/stage{stage}"] for line in history)
        assert "matching/stage4/mean_cost" in history[0]
    assert "matching/stage4/mean_cost" not in history[1]  # nothing follows that would use it
    reports = [load_reports(tmp_path / "run" / "matching" / f"epoch_{epoch:04d}.npz") for epoch in (0, 1)]
    assert reports[0]["stage4"].cost.shape == (1024, 2048)
    assert reports[0]["stage4"].num_images == 24
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["teacher"].pop("precision") in ("bfloat16", "as the student")
    assert record["teacher"] == {"arch": "resnet50", "file": "torchvision IMAGENET1K_V1"}
    stored = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert not any(key.startswith("layer") for key in stored["student"])  # nothing of the teacher is kept


def test_mgd_with_kd_and_warm_up(mgd: Run, data: Path, tmp_path: Path, resnet18_file: Path) -> None:
    arguments = [
        "--arch",
        "mobilenet_v1",
        "--print-freq",
        10,
        "--learning-rate",
        0.1,
        "--warmup",
        1,
        "--warmup-epochs",
        1,
    ]
    teacher = ["--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    assert mgd(data, *arguments, "--mgd-with-kd", 1, "--recipe", "published", *teacher, "--distill-stop", 9) == 0
    history = lines(tmp_path / "run")
    assert [line["lr"] for line in history] == pytest.approx([0.01, 0.1])
    assert all(line["train_loss_kd"] > 0 for line in history)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["teacher"]["sha256"]) == 64
    log = (tmp_path / "run" / "log.txt").read_text()
    assert 60 < record["teacher_errors"]["err1"] <= 100  # it was never trained
    assert log.count("the teacher is hardly better than chance") == 2  # before the first step, and last
    assert "--distill-stop 9 is after the last epoch, 2: the weight does not reach zero" in log


def test_a_baseline_is_a_run_without_a_teacher_and_is_compared(
    mgd: Run, base: Run, data: Path, tmp_path: Path, resnet18_file: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    teacher = ["--arch", "mobilenet_v1", "--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    assert mgd(data, *teacher, "--with-baseline") == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == str(folder / "comparison" / "report.html")
    assert re.match(r"run is (.* than|as good as) baseline: top-1 error \d+\.\d\d against ", last[1])
    assert base(data, "--arch", "mobilenet_v1", "--nesterov", 1, "--output-dir", tmp_path / "alone") == 0
    assert_same_run(tmp_path / "alone", folder / "baseline")

    said = (folder / "log.txt").read_text()
    assert "recipe recommended: --loss partial_l2 " in said and "is after the last epoch" not in said
    log = (folder / "baseline" / "log.txt").read_text()
    assert mgd(data, *teacher, "--with-baseline", "--output-dir", folder) == 2  # it already contains a run
    assert mgd(data, *teacher, "--with-baseline", "--evaluate", "--output-dir", tmp_path / "none") == 2
    assert capsys.readouterr().err.endswith("it needs a training, not --evaluate.\n")
    other = ["--mgd-reducer", "max", "--overwrite"]  # the student alone stays the same, and is not trained again
    assert mgd(data, *teacher, "--with-baseline", *other, "--output-dir", folder) == 0
    assert (folder / "baseline" / "log.txt").read_text() == log


def test_transfer_learning_as_published(
    mgd: Run, data: Path, tmp_path: Path, pretrained: Path, resnet18_file: Path
) -> None:
    """CUB-200's line: a pretrained MobileNet-V2, and a teacher trained on the same classes."""
    arguments = ["--arch", "mobilenet_v2", "--batch-size", 8, "--learning-rate", 0.01, "--distiller", "mgd"]
    arguments += ["--mgd-reducer", "amp", "--mgd-update-freq", 2, "--use-pretrained", 1]
    assert mgd(data, *arguments, "--teacher-arch", "resnet18", "--teacher-resume", resnet18_file) == 0
    history = lines(tmp_path / "run")
    assert not any("stage1" in key for key in history[0])
    stored = torch.load(tmp_path / "run" / "student_best.pth", weights_only=True)
    torchvision.models.mobilenet_v2(num_classes=len(CLASSES)).load_state_dict(stored["state_dict"])


@pytest.mark.parametrize("reducer", ["sm", "rd", "sp", "max", "mean"])
def test_every_reducer(mgd: Run, data: Path, tmp_path: Path, resnet18_file: Path, reducer: str) -> None:
    arguments = ["--arch", "shufflenet_v2_x0_5", "--mgd-reducer", reducer, "--teacher-arch", "resnet18"]
    assert mgd(data, *arguments, "--teacher-resume", resnet18_file) == 0
    assert lines(tmp_path / "run")[0]["train_loss_distill/stage3"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss", "pearson", "--mgd-metric", "pearson", "--loss-weight", 2],
        ["--loss", "channel_kl", "--mgd-reducer", "max", "--mgd-mode", "even", "--mgd-update-source", "online"],
        ["--loss", "mse", "--mgd-align", "conv1x1", "--features", "stage3", "stage4"],
        ["--distiller", "kd", "--kd-temperature", 4, "--kd-weight", 0.5],
        ["--distiller", "kd", "--kd-loss", "dkd", "--kd-standardize", 1, "--kd-options", "beta=2", "alpha=0.5"],
        ["--mixed-precision", "bf16", "--mgd-with-kd", 1, "--kd-loss", "dist", "--mgd-spatial", "attention"],
        ["--loss", "mse", "--features", "only=layer4.1@pre:layer4.1@pre", "--mgd-update-freq", 0],
    ],
)
def test_our_options(mgd: Run, data: Path, tmp_path: Path, resnet18_file: Path, arguments: list) -> None:
    given = ["--arch", "resnet18", "--teacher-arch", "resnet18", "--teacher-resume", resnet18_file, "--epochs", 2]
    assert mgd(data, *given, *arguments) == 0
    features = {key for key in lines(tmp_path / "run")[1] if key.startswith("train_loss_distill/")}
    expected = 0 if "kd" in arguments else 2 if "conv1x1" in arguments else 1 if "--features" in arguments else 4
    assert len(features) == expected


def test_the_documented_line_for_a_network_outside_the_table(
    mgd: Run, data: Path, tmp_path: Path, pretrained: Path
) -> None:
    text = (REPOSITORY / "docs" / "classification.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^python classification/main_mgd.py DATA (.*mobilenet_v3_small.*)$", text, re.MULTILINE)
    assert mgd(data, *shlex.split(line)) == 0
    assert {key for key in lines(tmp_path / "run")[0] if "distill/" in key} == {
        "train_loss_distill/mid",
        "train_loss_distill/high",
    }


def test_evaluating_teacher_and_student_together(
    base: Run, data: Path, tmp_path: Path, resnet18_file: Path, capsys: pytest.CaptureFixture
) -> None:
    """The published line; the files are those that training writes, and the errors those that it found."""
    assert base(data, "--arch", "mobilenet_v1") == 0
    student = tmp_path / "run" / "student_best.pth"
    expected = torch.load(student, weights_only=True)["err1"]
    capsys.readouterr()
    arguments = ["--arch", "mobilenet_v1", "--teacher-resume", resnet18_file, "--teacher-arch", "resnet18"]
    assert base(data, *arguments, "--student-resume", student, "--evaluate", "--output-dir", tmp_path / "no") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in shown] == ["network", shown[1], "resnet18", "mobilenet_v1"]
    assert float(shown[3].split()[-2]) == pytest.approx(expected, abs=0.01)
    assert not (tmp_path / "no").exists()


def test_evaluating_a_checkpoint(base: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By its path, or as that of the output folder; pretrained weights that the training began with do not matter."""
    words, run = [data, "--arch", "mobilenet_v1"], tmp_path / "run"
    assert base(*words, "--epochs", 2, "--lr", 0.01) == 0
    expected = f"{lines(run)[-1]['err1']:.2f}"
    before = sorted(run.rglob("*"))
    path = run / "checkpoint.pth"
    for named in (["--resume", path], ["--resume", "auto", "--output-dir", run, "--use-pretrained", 1]):
        capsys.readouterr()
        assert base(*words, "--evaluate", *named) == 0
        assert capsys.readouterr().out.splitlines()[-1].split()[-2] == expected
    assert sorted(run.rglob("*")) == before
    for wrong, message in (
        (["--resume", tmp_path / "none.pth"], "none.pth does not exist"),
        (["--resume", "auto", "--output-dir", tmp_path / "none"], "none/checkpoint.pth does not exist"),
        (["--resume", path, "--student-resume", path], "both name the student to evaluate: choose one."),
    ):
        assert base(*words, "--evaluate", *wrong) == 2
        assert message in capsys.readouterr().err


def test_only_given_weights_are_evaluated(
    base: Run, mgd: Run, data: Path, resnet18_file: Path, pretrained: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [data, "--arch", "mobilenet_v1", "--evaluate"]
    for run in (base, mgd):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert "--evaluate has no weights to evaluate: name the student's with --student-resume" in error
        assert error.count("\n") == 1
        assert run(*words, "--teacher-arch", "resnet18", "--teacher-resume", resnet18_file) == 0
        assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:]] == ["resnet18"]
    assert mgd(*words, "--teacher-arch", "resnet50") == 2
    assert "name the student's weights, or a teacher that was trained on these classes" in capsys.readouterr().err


def test_evaluation_splits_and_missing_classes(base: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_folder(tmp_path / "d")
    (root / "valid").rename(root / "val")
    shutil.copytree(root / "val", root / "test")
    shutil.rmtree(root / "test" / "ant")
    torch.save(MobileNetV1(len(CLASSES)).state_dict(), tmp_path / "s.pth")
    student = ["--arch", "mobilenet_v1", "--student-resume", tmp_path / "s.pth"]
    for split in ("val", "test"):
        assert base(root, *student, "--evaluate", "--val-split", split) == 0
    assert "test has images of 2 of the 3 classes" in capsys.readouterr().err


def test_broken_images_stop_a_run_unless_skipped(base: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_folder(tmp_path / "d")
    for split in ("train", "valid"):
        (root / split / "bee" / "2.png").write_bytes(b"\x89PNG")
    assert base(root, "--arch", "mobilenet_v1") == 2
    assert "bee/2.png cannot be read" in capsys.readouterr().err
    assert base(root, "--arch", "mobilenet_v1", "--skip-broken-images", "--overwrite") == 0
    assert lines(tmp_path / "run")[0]["broken_images"] == 2
    assert "which cannot be read (1 so far)" in (tmp_path / "run" / "log.txt").read_text()


def test_a_folder_with_a_run_is_not_written_over(
    base: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert base(data, "--arch", "mobilenet_v1", "--epochs", 2) == 0
    assert base(data, "--arch", "mobilenet_v1") == 2
    assert "already contains a run: continue it with --resume" in capsys.readouterr().err
    assert base(data, "--arch", "mobilenet_v1", "--overwrite") == 0
    assert len(lines(tmp_path / "run")) == 1


@pytest.mark.parametrize("below", ["", "run"])
def test_an_output_folder_that_is_a_file(
    base: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, below: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert base(data, "--arch", "mobilenet_v1", "--output-dir", file / below) == 2
    assert f"cannot be created, because {file} is a file: name a folder." in capsys.readouterr().err
    assert file.read_text() == "mine"


MISTAKES = [
    (["--arch", "mobilenet_v9"], "unknown architecture 'mobilenet_v9'. Nearest: mobilenet_v2, mobilenet_v1"),
    (["--teacher-arch", "my_net"], "unknown architecture 'my_net'. Available: mobilenet_v1, mobilenet_v2"),
    (["--arch", "resnet152"], "resnet152 has no default teacher: name one with --teacher-arch"),
    (["--batch-size", "0"], "argument -b/--batch-size: must be 1 or more, not 0; "),
    (["--epochs", "many"], "invalid whole number value: 'many'"),
    (["--lr", "nan"], "must be 0 or more, not nan"),
    (["--mgd-reducer", "best"], "argument --mgd-reducer: invalid choice: 'best' (choose from "),
    (["--mgd-with-kd", "1", "--kd-options", "beta"], "--kd-options needs NAME=NUMBER, such as beta=8, not 'beta'"),
    (["--distiller", "kd", "--kd-options", "beta=8"], "logit loss 'kd' has no option beta; it has: temperature"),
    (["--kd-temperature", "1.5"], "--kd-temperature needs distillation of logits: add --mgd-with-kd 1"),
    (["--mgd-with-kd", "0", "--kd-options", "a=1"], "--kd-options needs distillation of logits"),
    (["--distiller", "kd", "--loss", "mse"], "--loss needs distillation of features, and --distiller kd has none"),
    (["--distiller", "kd", "--mgd-update-freq", "3"], "--mgd-update-freq needs distillation of features"),
    (
        ["--mgd-align", "conv1x1", "--mgd-reducer", "max"],
        "--mgd-reducer needs --mgd-align matching, not conv1x1: add it",
    ),
    (["--mgd-align", "none", "--mgd-metric", "pearson"], "--mgd-metric is not used with --mgd-align none"),
    (["--loss-weight", "1"], "--loss-weight is of --loss pearson and --loss channel_kl: add one of them, or leave"),
    (["--loss", "partial_l2", "--loss-weight", "1"], "--loss-weight is not used with --loss partial_l2: use --loss-f"),
    (["--loss", "mse", "--loss-weight", "2"], "--loss-weight is not used with --loss mse"),
    (["--loss", "pearson", "--loss-factor", "10"], "--loss-factor is not used with --loss pearson: use --loss-weight"),
    (["--mgd-spatial", "boxes"], "argument --mgd-spatial: invalid choice: 'boxes'"),
    (["--unknown"], "unrecognized arguments: --unknown"),
    (["x", "--blance", "auto"], "unrecognized arguments: x --blance auto, but there is --balance"),
    (["--momentum", "0"], "--nesterov 1 needs a --momentum above 0"),
    (["--use-pretrained", "1", "--student-resume", "a.pth"], "choose one"),
    (["--mixed-precision", "fp16"], "fp16 needs a GPU"),
    (["--device", "abacus"], "--device abacus is not a device"),
    (["--device", "cuda:77"], "GPU 77 does not exist"),
    (["--device", "mps"], "--device mps is not supported"),
    (["--teacher-resume", "none.pth"], "none.pth does not exist"),
    (["--student-resume", "none.pth"], "none.pth does not exist"),
    (["--features", "stage9"], "has no such feature"),
    (["--teacher-arch", "resnet50", "--features", "stage9"], "has no such feature"),  # before a download
    (["--mgd-mode", "one_to_one", "--mgd-reducer", "amp", "--arch", "wide_resnet50_2"], "needs T >= S"),
    (["--resume", "none/checkpoint.pth", "--output-dir", "elsewhere"], "continues in that folder"),
    (["--world-size", "3", "--rank", "5", "--dist-url", "tcp://localhost:1"], "--rank 5 must be 0 to 2"),
    (["--world-size", "2", "--rank", "1"], "several machines need --dist-url"),
    (["--multiprocessing-distributed", "--nproc", "2", "--gpu", "0"], "--gpu 0 names one GPU for 2 processes"),
    (
        ["--multiprocessing-distributed", "--nproc", "2", "--device", "cuda:1"],
        "--device cuda:1 names one GPU for 2 processes",
    ),
    (
        ["--batch-size", "1", "--multiprocessing-distributed", "--nproc", "2"],
        "smaller than this machine's number of processes, 2",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes_are_one_sentence(
    mgd: Run,
    data: Path,
    tmp_path: Path,
    resnet18_file: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    teacher = ["--teacher-resume", resnet18_file, "--teacher-arch", "resnet18"]
    if "152" in str(arguments) or any(word.startswith("--teacher") for word in arguments):
        teacher = []
    assert mgd(data, *(["--arch", "mobilenet_v1"] if "--arch" not in arguments else []), *teacher, *arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_cannot_give_logits(
    mgd: Run,
    base: Run,
    data: Path,
    pretrained: Path,
    resnet18_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    assert mgd(data, "--arch", "mobilenet_v1", "--mgd-with-kd", 1) == 2
    assert "the teacher has 1000 classes and the data has 3, so its logits cannot be used" in capsys.readouterr().err
    two = make_folder(tmp_path / "two", classes=("ant", "bee"))
    arguments = ["--arch", "mobilenet_v1", "--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    assert mgd(two, *arguments, "--distiller", "kd") == 2
    assert "has 3 classes, and 2 are needed" in capsys.readouterr().err
    assert base(data, "--arch", "mobilenet_v1", "--teacher-arch", "resnet18") == 2
    assert "with --evaluate only; main_mgd.py distils" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(base: Run, data: Path, capsys: pytest.CaptureFixture) -> None:
    assert base(data, "--arch", "resnet18", "--lr", "1e30", "--epochs", 3, "--print-freq", 1) == 2
    assert re.search("error: loss_class is (nan|inf) at epoch 1, step 2, ", capsys.readouterr().err)


def test_an_installed_command_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bin/d2-mgd-classify"])
    with pytest.raises(UserError, match="d2-mgd-classify --help lists all options"):
        parse_mgd(["DATA", "--unknown"])


def test_every_option_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # an option's name is not broken at its hyphen
    text = (REPOSITORY / "docs" / "classification.md").read_text()
    for parse in (parse_base, parse_mgd):
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
            parse(["--help"])
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", shown.getvalue())) - {"--help"}
        assert len(options) > 30
        assert [option for option in sorted(options) if f"`{option}`" not in text] == []


def test_a_folder_that_another_training_writes_to(base: Run, data: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "run").mkdir()
    claim = "import sys; from d2_mgd.training import claimed_folder as c"
    code = f"{claim}\nwith c(sys.argv[1]): print(flush=True); input()"
    words = [sys.executable, "-c", code]
    with subprocess.Popen([*words, str(tmp_path / "run")], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline()
        assert base(data, "--arch", "resnet18", "--output-dir", tmp_path / "run") == 2
        assert f"run is in use by process {other.pid} on" in capfd.readouterr().err
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".in_use"]
        other.stdin.write("\n")
    assert base(data, "--arch", "resnet18", "--output-dir", tmp_path / "run") == 0
