"""The accuracy studies: networks, data, studies as files, runs cut short and gone on with, tables that do not guess."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.accuracy.__main__ import REPORT, RESULTS, STUDIES, main
from benchmarks.accuracy.data import Choice, Images, StudyError, batches, load_split, normalised
from benchmarks.accuracy.networks import Staged, build_network
from benchmarks.accuracy.report import report
from benchmarks.accuracy.results import Results, mean_and_deviation, table
from benchmarks.accuracy.runner import _Place, _work
from benchmarks.accuracy.study import Method, Recipe, Run, load_study
from benchmarks.accuracy.training import Engine, Outcome, WeightStore, _Distillation, _Training, rate, train

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]

STUDY = {
    "name": "tiny",
    "title": "A tiny study",
    "teacher": "resnet8x2",
    "student": "resnet8",
    "seeds": [0, 1],
    "data": {"pixels": 8},
    "recipe": {"epochs": 2, "batch": 16, "lr": 0.02, "drops": [1]},
    "distil": {"reduction": "mean", "weight": 1.0, "rematch": {"every": 1, "images": 20}},
    "methods": {"mgd-amp": {}, "mgd-pearson + dkd": {"loss": "pearson", "logits": {"name": "dkd"}}},
    "published": {"teacher": 80.0, "OFD": 70.5},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured noise, 16 training and 4 test images of each, shuffled."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 48), ("test", 12)):
        labels = rng.permutation(np.arange(count) % 3).astype(np.uint8)
        images = rng.integers(0, 120, (count, 32, 32, 3))
        images[np.arange(count), :, :, labels] += 90
        arrays.update({f"x_{part}": images.astype(np.uint8), f"y_{part}": labels})
    path = tmp_path_factory.mktemp("data") / "cifar.npz"
    np.savez(path, **arrays)
    return path


def written(folder: Path, **changes: Any) -> Path:
    content = {**STUDY, **changes}
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def command(what: str, study: Path, folder: Path, *more: str) -> int:
    return main([what, str(study), "--results", str(folder / "results"), *more])


def run(study: Path, folder: Path, data: Path, *more: str) -> int:
    return command(
        "run", study, folder, "--data", str(data), "--weights", str(folder / "weights"), "--device", "cpu", *more
    )


# ---- networks


@pytest.mark.parametrize(
    ("name", "millions", "widths"),
    [  # the protocol's numbers of parameters for 100 classes
        ("resnet20", 0.28, [16, 32, 64]),
        ("resnet56", 0.86, [16, 32, 64]),
        ("resnet8x4", 1.23, [64, 128, 256]),
        ("resnet32x4", 7.43, [64, 128, 256]),
        ("resnet50_bottleneck", 23.71, [256, 512, 1024, 2048]),
        ("mobilenet_v2_half", 0.81, [12, 16, 48, 160]),
        ("shufflenet_v2", 1.36, [116, 232, 464]),
    ],
)
def test_networks_are_the_protocols(name: str, millions: float, widths: list[int]) -> None:
    network = build_network(name, 100).eval()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps, logits = network.maps_and_logits(images)
        assert torch.equal(network(images), logits) and logits.shape == (2, 100)
    assert [found.shape[1] for found in maps.values()] == widths == list(network.widths.values())
    assert all((found < 0).any() for found in maps.values())  # before the activation
    sizes = [found.shape[2] for found in maps.values()]
    assert sizes == [sizes[0] // 2**index for index in range(len(sizes))]


def test_margins_come_from_the_norm_that_the_map_leaves() -> None:
    network = build_network("resnet8", 3)
    norm = network.last_norm("stage2")
    assert isinstance(norm, nn.BatchNorm2d) and norm.num_features == 32
    with pytest.raises(ValueError, match="no single batch-norm"):
        build_network("shufflenet_v2", 3).last_norm("stage1")


@pytest.mark.parametrize("name", ["resnet9", "resnet8x3", "vgg8"])
def test_unknown_networks(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown network '{name}'; there are: resnetD"):
        build_network(name, 10)


# ---- data


def test_the_chosen_part(data: Path) -> None:
    whole = load_split(data, Choice(), CPU)
    assert (len(whole.train), len(whole.test), whole.classes) == (48, 12, 3)
    part = load_split(data, Choice(classes=(1, 3), train_per_class=4, test_per_class=1, pixels=8), CPU)
    assert part.train.images.shape == (8, 3, 8, 8) and sorted(part.train.labels.tolist()) == [0] * 4 + [1] * 4
    first = int(np.flatnonzero(whole.train.labels.numpy() > 0)[0])
    assert part.train.labels[0] == whole.train.labels[first] - 1
    squares = whole.train.images[first].float().view(3, 8, 4, 8, 4).mean(dim=(2, 4))
    assert (part.train.images[0].float() - squares).abs().max() <= 0.5


def test_batches_hold_each_image_once_cropped_and_mirrored() -> None:
    base = torch.arange(6 * 3 * 16 * 16).view(6, 3, 16, 16) * 7 % 251
    images = Images(base.to(torch.uint8), torch.arange(6))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    found = list(batches(images, 4, *generators))
    assert [len(labels) for _, labels in found] == [4]  # two wait for another epoch
    padded = torch.nn.functional.pad(images.images, (2,) * 4)
    flips = 0
    for image, label in zip(*found[0]):
        crops = [
            (
                padded[label, :, y : y + 16, x : x + 16].flip(-1) if flip else padded[label, :, y : y + 16, x : x + 16],
                flip,
            )
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
        ]
        hits = [flip for crop, flip in crops if torch.equal(normalised(crop[None])[0], image)]
        assert hits
        flips += hits[0]
    again = list(batches(images, 4, *(torch.Generator().manual_seed(seed) for seed in (1, 2))))
    assert torch.equal(found[0][0], again[0][0])
    assert len(found[0][1].unique()) == 4
    assert len(list(batches(images, 64, *generators))) == 1  # fewer images than a batch are a batch


def test_data_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no data at"):
        load_split(tmp_path / "no.npz", Choice(), CPU)
    with pytest.raises(StudyError, match=r"classes \[0, 4\] do not fit .* 0 to 2"):
        load_split(data, Choice(classes=(0, 4)), CPU)
    with pytest.raises(StudyError, match="class 0 has 16 train images, and the study wants 17"):
        load_split(data, Choice(train_per_class=17), CPU)
    with pytest.raises(StudyError, match="pixels must divide 32, got 12"):
        load_split(data, Choice(pixels=12), CPU)
    np.savez(tmp_path / "part.npz", x_train=np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(StudyError, match="lacks y_train, x_test, y_test"):
        load_split(tmp_path / "part.npz", Choice(), CPU)
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(StudyError, match="numpy can read"):
        load_split(tmp_path / "text.npz", Choice(), CPU)


# ---- studies


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_are_sound(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    assert {"teacher", "student", "conv1x1"} <= set(study.rows)  # the baselines are always in
    assert ("kd" in study.rows) == (path.stem != "aquarium_faster_rcnn_r50_r18")  # which has no dense logits
    digests = [found.digest for found in study.runs()]
    assert len(set(digests)) == len(digests)  # no row twice under two names


def test_a_study_means_these_runs(tmp_path: Path) -> None:
    study = load_study(written(tmp_path))
    assert study.rows == ["teacher", "student", "kd", "conv1x1", "mgd-amp", "mgd-pearson + dkd"]
    runs = list(study.runs())
    assert [(found.method, found.seed) for found in runs[:3]] == [("teacher", 0), ("student", 0), ("kd", 0)]
    assert len(runs) == 1 + 2 * 5
    assert study.methods["conv1x1"].align == "conv1x1" and study.methods["conv1x1"].weight == 1.0
    assert not study.methods["kd"].compares_features and study.methods["mgd-amp"].compares_features
    own = {"features": [], "logits": {"name": "kd", "weight": 0.1}}
    other = load_study(written(tmp_path, methods={"kd": own}))  # in place of the baseline's options
    assert other.methods["kd"].logits == own["logits"] and other.methods["kd"].task_weight == 0.1


def test_digests_change_with_what_decides_the_result_only() -> None:
    plain = Run("a", "resnet8", Choice(), Recipe(), 0, distil=Method())
    assert plain.digest == dataclasses.replace(plain, method="b").digest
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"network": "resnet14"},
        {"data": Choice(pixels=16)},
        {"recipe": Recipe(lr=0.1)},
        {"distil": Method(reducer="max")},
        {"start": plain},
        {"teacher": plain},
    ]
    assert len({plain.digest, *(dataclasses.replace(plain, **change).digest for change in changes)}) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "vgg8"}, "unknown network 'vgg8'"),
        ({"methds": {}}, "a study knows no methds; it knows: name, title"),
        ({"seeds": "012"}, "seeds must be a list of whole numbers"),
        ({"methods": {}}, "a study needs 'methods'"),
        ({"recipe": {"lr": "fast"}}, "recipe.lr must be a number, got 'fast'"),
        ({"recipe": {"epochs": 0}}, "recipe needs 1 epoch"),
        ({"methods": {"teacher": {}}}, "teacher is a baseline"),
        ({"methods": {"a": {"reducer": "median"}}}, "methods.a: unknown reducer 'median'"),
        (
            {"methods": {"a": {"features": ["stage9"]}}},
            "methods.a: both networks have stage1, stage2, stage3, not stage9",
        ),
        ({"methods": {"a": {"logits": {"name": "kl"}}}}, "methods.a: unknown logit loss 'kl'"),
        ({"methods": {"a": {"schedule": {"decay": "linear"}}}}, "methods.a: a linear decay .* needs a step"),
        ({"methods": {"a": {"rematch": {"often": 3}}}}, "methods.a: rematch knows no often"),
        ({"methods": {"a": {"rematch": {"source": "air"}}}}, "methods.a: rematch source is 'pass' or 'online'"),
    ],
)
def test_studies_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message):
        load_study(written(tmp_path, **changes))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(StudyError, match="no YAML that can be read"):
        load_study(tmp_path / "broken.yaml")


def test_rates() -> None:
    recipe = Recipe(lr=0.5, drops=(2, 4), drop_ratio=0.1)
    assert [rate(recipe, epoch) for epoch in range(6)] == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


# ---- runs


def test_a_study_from_the_command_line_cut_short_and_gone_on_with(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path)
    lines = tmp_path / "results" / "tiny.jsonl"
    assert run(study, tmp_path, data, "--methods", "student", "--seeds", "0") == 0
    assert len(lines.read_text().splitlines()) == 1
    shown = capsys.readouterr().out
    assert "| teacher | not run | not run | 0/1 |" in shown and "| mgd-amp | not run | not run | 0/2 |" in shown
    first = lines.read_text()
    lines.write_text(first + '{"digest": "cut sh')  # stopped in the middle of a line
    assert run(study, tmp_path, data, "--seeds", "0", "--methods", "teacher", "mgd-amp", "conv1x1") == 0
    kept = lines.read_text()
    assert kept.startswith(first)
    assert run(study, tmp_path, data, "--jobs", "2") == 0
    whole = lines.read_text()
    assert whole.startswith(kept)  # nothing ran twice
    assert run(study, tmp_path, data) == 0 and lines.read_text() == whole
    found = [json.loads(line) for line in whole.splitlines()]
    assert len(found) == 11
    for line in found:
        assert line["best"] == max(line["accuracy"]) and line["last"] == line["accuracy"][-1]
        assert len(line["accuracy"]) == line["epochs"] == 2
        assert {"commit", "versions", "device", "seed", "digest", "seconds"} <= set(line)
    matched = next(line for line in found if line["method"] == "mgd-amp")
    assert [entry["epoch"] for entry in matched["rematches"]] == [0, 0, 0, 1, 1, 1]
    assert all(entry["cost"] < entry["chance"] for entry in matched["rematches"])
    assert all(
        entry["kept"] >= entry["cost"] - 1e-6 for entry in matched["rematches"][3:]
    )  # the new one is the optimum
    learned = next(line for line in found if line["method"] == "conv1x1")
    assert len(learned["projections"]) == 3 and not matched["projections"]
    assert all(0 < entry["share"] <= entry["best"] <= 1 for entry in learned["projections"])
    assert all(entry["chance"] < entry["best"] for entry in learned["projections"])
    capsys.readouterr()
    assert command("table", study, tmp_path) == 0
    shown = capsys.readouterr().out
    assert "not run" not in shown and "| OFD |" in shown and "cost over chance" in shown
    assert "| | feature | on matched pairs | by chance | at best |\n" in shown
    picture = tmp_path / "plot" / "tiny.png"
    assert command("plot", study, tmp_path, "--output", str(picture)) == 0 and picture.stat().st_size > 10000


def test_runs_are_reproducible_and_processes_change_nothing(tmp_path: Path, data: Path) -> None:
    study = written(tmp_path, methods={"mgd-rd": {"reducer": "rd"}}, seeds=[3])
    for folder, more in ((tmp_path / "a", ()), (tmp_path / "b", ("--jobs", "2"))):
        assert run(study, folder, data, *more) == 0
    a, b = (
        {
            line["method"]: line["accuracy"]
            for line in Results(tmp_path / name / "results/tiny.jsonl").by_digest.values()
        }
        for name in "ab"
    )
    assert a == b and set(a) == {"teacher", "student", "kd", "conv1x1", "mgd-rd"}


def test_continuing_from_the_student_alone_and_transfer_to_other_classes(tmp_path: Path, data: Path) -> None:
    before = {"recipe": STUDY["recipe"]}
    study = written(
        tmp_path, seeds=[0], student_start=before, recipe={"epochs": 1, "batch": 16, "lr": 1e-6, "drops": []}
    )
    loaded = load_study(study)
    assert loaded.rows[:3] == ["teacher", "student before", "student"]
    assert run(study, tmp_path, data, "--methods", "student before", "student") == 0
    results = Results(tmp_path / "results" / "tiny.jsonl")
    weights = WeightStore(tmp_path / "weights")
    runs = {found.method: found for found in loaded.runs()}
    old, new = (weights.load(runs[name])["head.weight"] for name in ("student before", "student"))
    torch.testing.assert_close(old, new, atol=1e-4, rtol=0)  # it went on from there, at hardly any rate
    assert not torch.equal(old, new) and results.of(runs["student before"])
    start = {"data": {"pixels": 8, "classes": [0, 2]}}
    moved = {"pixels": 8, "classes": [1, 3]}
    other = written(tmp_path, name="transfer", seeds=[0], data=moved, student_start=start, teacher_start=start)
    assert "student before" not in load_study(other).rows  # its accuracy is that of other classes
    assert run(other, tmp_path, data, "--methods", "student", "mgd-amp") == 0
    assert len((tmp_path / "results" / "transfer.jsonl").read_text().splitlines()) == 3  # and the teacher


def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    methods = {"conv1x1": {"align": "conv1x1", "weight": 1e30, "reduction": "mean"}, "mgd-amp": {}}
    study = written(tmp_path, seeds=[0], methods=methods)
    assert run(study, tmp_path, data) == 1
    assert "conv1x1, seed 0: the loss is not finite in epoch" in caplog.text
    results = Results(tmp_path / "results" / "tiny.jsonl")
    text = table(load_study(study), results)
    assert "| conv1x1 | not run |" in text and "| mgd-amp | not run" not in text


def test_online_rematches_use_the_maps_of_training_steps(data: Path, tmp_path: Path) -> None:
    split = load_split(data, Choice(pixels=8), CPU)
    recipe = Recipe(epochs=3, batch=16, drops=())
    weights = WeightStore(tmp_path)
    teacher = Run("teacher", "resnet8x2", Choice(pixels=8), recipe, 0)
    train(teacher, split, Engine(CPU), weights)
    outcomes = {}
    for source in ("pass", "online"):
        method = Method(rematch={"every": 2, "images": 32, "source": source}, reduction="mean")
        again = Run("mgd", "resnet8", Choice(pixels=8), recipe, 0, teacher=teacher, distil=method)
        outcomes[source] = train(again, split, Engine(CPU), weights)
        assert [entry["epoch"] for entry in outcomes[source].rematches] == [0, 0, 0, 2, 2, 2]
    assert outcomes["pass"].rematches[:3] == outcomes["online"].rematches[:3]
    assert outcomes["pass"].rematches[3:] != outcomes["online"].rematches[3:]


def test_rematches_change_neither_the_students_statistics_nor_the_batches_it_sees(data: Path, tmp_path: Path) -> None:
    split = load_split(data, Choice(pixels=8), CPU)
    weights = WeightStore(tmp_path)
    still = Recipe(epochs=1, batch=16, lr=1e-12, drops=(), weight_decay=0.0)
    teacher = Run("teacher", "resnet8x2", Choice(pixels=8), still, 0)
    train(teacher, split, Engine(CPU), weights)
    found = []
    for images in (16, 160):
        method = Method(rematch={"images": images})
        run_ = Run("mgd", "resnet8", Choice(pixels=8), still, 0, teacher=teacher, distil=method)
        train(run_, split, Engine(CPU), weights)
        found.append(weights.load(run_)["stem.1.running_mean"])
    torch.testing.assert_close(*found)
    assert found[0].all()


def test_whatever_ends_a_run_the_others_go_on_and_it_is_named_at_the_end(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path, seeds=[0])
    assert run(study, tmp_path, data, "--methods", "teacher") == 0
    teacher, student, *taught_ = load_study(study).runs()
    WeightStore(tmp_path / "weights").path(teacher).write_bytes(b"no weights")  # no error that the runner knows of
    capsys.readouterr()
    assert run(study, tmp_path, data) == 1
    results = Results(tmp_path / "results" / "tiny.jsonl")
    assert results.of(student) and not any(map(results.of, taught_))
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert [line.split(", ")[0] for line in named] == [f"failed: {lost.method}" for lost in taught_]
    assert all("seed 0: UnpicklingError: " in line for line in named)


@contextmanager
def killed_processes(count: int) -> Iterator[None]:
    """The first ``count`` processes that this one starts meanwhile are killed as soon as they are there."""
    over = threading.Event()

    def kill() -> None:
        seen: set[int | None] = set()
        while not over.wait(0.02):
            for process in multiprocessing.active_children():
                if process.pid not in seen and len(seen) < count:
                    seen.add(process.pid)
                    process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_process_that_ends_without_a_word(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = written(tmp_path, seeds=[0, 1])
    with killed_processes(100):
        assert run(study, tmp_path, data, "--methods", "student", "--jobs", "2") == 1
    said = capsys.readouterr().err
    for seed in (0, 1):
        assert f"failed: student, seed {seed}: its process ended without a word (out of memory?)." in said
    with killed_processes(1):  # what was at work is started again
        assert run(study, tmp_path, data, "--methods", "student", "--seeds", "1", "--jobs", "2") == 0
    assert len(Results(tmp_path / "results" / "tiny.jsonl").by_digest) == 1


def test_processes_end_with_the_one_that_started_them(tmp_path: Path, data: Path) -> None:
    recipe = {"epochs": 100000, "batch": 16, "lr": 0.001, "drops": []}
    study, log = written(tmp_path, seeds=[0], recipe=recipe), tmp_path / "log"
    places = ["--data", data, "--weights", tmp_path / "weights", "--results", tmp_path]
    line = [sys.executable, "-m", "benchmarks.accuracy", "run", study, *places, "--device", "cpu", "--jobs", "2"]
    with open(log, "w") as file, subprocess.Popen(list(map(str, line)), cwd=ROOT, stderr=file) as process:
        try:
            wait_for(lambda: len(children(process.pid)) >= 2)
            time.sleep(0.5)
            started = children(process.pid)
        finally:
            process.kill()
    wait_for(lambda: not any(map(alive, started)))


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_run_leaves_its_memory_to_others(tmp_path: Path, data: Path) -> None:
    def networks() -> int:
        return sum(issubclass(type(found), Staged) for found in gc.get_objects())

    place = _Place(data, tmp_path, Engine(CPU))
    found = Run("student", "resnet8", Choice(pixels=8), Recipe(epochs=1, batch=16, drops=()), 0)
    gc.collect()
    before = networks()
    gc.disable()
    try:
        assert isinstance(_work(found, place), Outcome)
        assert networks() == before
    finally:
        gc.enable()


def test_accuracies_are_those_of_float32_whatever_the_training(data: Path, tmp_path: Path) -> None:
    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            dtypes[module.training].add(output.dtype)

    recipe = Recipe(epochs=1, batch=16, drops=())
    found = Run("student", "resnet8", Choice(pixels=8), recipe, 0)
    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        train(found, load_split(data, found.data, CPU), Engine(CPU, mixed_precision=True), WeightStore(tmp_path))
    finally:
        hook.remove()
    assert dtypes == {True: {torch.bfloat16}, False: {torch.float32}}


def taught(
    student: str, teacher: str, method: Method, data: Path, weights: WeightStore, engine: Engine | None = None
) -> tuple[Run, Outcome]:
    """A run of one epoch behind a teacher that is trained for it, and what came of it."""
    choice, recipe = Choice(pixels=16, train_per_class=8), Recipe(epochs=1, batch=12, lr=0.01, drops=())
    split = load_split(data, choice, CPU)
    teaching = Run("teacher", teacher, choice, recipe, 0)
    if not weights.path(teaching).exists():
        train(teaching, split, Engine(CPU), weights)
    found = Run("taught", student, choice, recipe, 0, teacher=teaching, distil=method)
    return found, train(found, split, engine or Engine(CPU), weights)


def test_projections_between_maps_of_different_sizes(data: Path, tmp_path: Path) -> None:
    method = Method(align="conv1x1", rematch={"images": 12})
    _, outcome = taught("mobilenet_v2_half", "resnet8", method, data, WeightStore(tmp_path))
    assert [entry["feature"] for entry in outcome.projections] == ["stage1", "stage2", "stage3"]
    assert all(0 < entry["share"] <= entry["best"] <= 1 for entry in outcome.projections)


def test_what_cannot_be_measured_afterwards_costs_no_result(data: Path, tmp_path: Path) -> None:
    impossible = Method(align="conv1x1", mode="one_to_one", rematch={"images": 12})  # with T < S
    weights = WeightStore(tmp_path)
    found, outcome = taught("resnet8x2", "resnet8", impossible, data, weights)
    assert len(outcome.accuracy) == 1 and weights.path(found).exists()
    assert not outcome.projections and "projections were not measured: ValueError: feature stage1" in outcome.trouble


def test_what_could_not_be_measured_is_named_beside_its_result(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = {"align": "conv1x1", "mode": "one_to_one", "rematch": {"images": 12}}
    study = written(tmp_path, teacher="resnet8", student="resnet8x2", seeds=[0], methods={"conv1x1": impossible})
    only = ("--methods", "conv1x1")
    assert run(study, tmp_path, data, *only) == 1
    shown = capsys.readouterr()
    assert "| conv1x1 | not run" not in shown.out
    assert "failed: conv1x1, seed 0: the learned projections were not measured: ValueError" in shown.err
    assert run(study, tmp_path, data, *only) == 0


class Waits(TorchDispatchMode):
    """Counts what makes a processor wait for a GPU: numbers that it sends there or reads, choices by a mask."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select")
        masks = [index.dtype for index in args[1] if index is not None] if "aten.index." in str(function) else []
        self.count += any(name in str(function) for name in waits) or torch.bool in masks
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"features": (), "logits": {"name": "dkd"}, "schedule": {"warmup": 3}},
        {"loss": "pearson", "reducer": "rd", "rematch": {"every": 1, "images": 96, "source": "online"}},
        {"loss": "mse", "norm": "none", "align": "conv1x1"},
    ],
    ids=["logits", "features, online", "conv1x1"],
)
def test_no_step_waits_for_the_device(options: dict[str, Any], data: Path) -> None:
    split, counts = load_split(data, Choice(pixels=8), CPU), []
    for batch in (48, 24, 6):  # 1, 2 and 8 steps
        recipe = Recipe(epochs=1, batch=batch, lr=0.01, drops=())
        found = Run("a", "resnet8", Choice(pixels=8), recipe, 0, distil=Method(**options))
        student, teacher = build_network("resnet8", 3), build_network("resnet8x2", 3)
        distillation = _Distillation(Method(**options), student, teacher, Engine(CPU))
        training = _Training(found, student, split, Engine(CPU), distillation, Outcome())
        training.rematch(0)
        with Waits() as waits:
            training._epoch(0)
        counts.append(waits.count)
    assert counts[0] >= counts[1] == counts[2] > 0  # the first also makes what is kept


SMALL = Method(logits={"name": "dist"}, rematch={"images": 12})


@pytest.mark.parametrize("options", [{"compiled": "eager"}, {"mixed_precision": True}], ids=str)
def test_engines_compute_the_same_or_nearly(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    split = load_split(data, Choice(pixels=8, train_per_class=8), CPU)
    recipe = Recipe(epochs=1, batch=12, drops=())
    weights = WeightStore(tmp_path)
    teacher = Run("teacher", "resnet8x2", Choice(pixels=8), recipe, 0)
    train(teacher, split, Engine(CPU), weights)
    run_ = Run("mgd", "resnet8", Choice(pixels=8), recipe, 0, teacher=teacher, distil=SMALL)
    heads = []
    for engine in (Engine(CPU), Engine(CPU, **options)):
        assert isinstance(train(run_, split, engine, weights), Outcome)
        heads.append(weights.load(run_)["head.weight"])
    torch.testing.assert_close(*heads, atol=0.02 if "mixed_precision" in options else 1e-4, rtol=0)


@pytest.mark.gpu
def test_a_step_as_one_cuda_graph_computes_the_same(data: Path, tmp_path: Path) -> None:
    device, weights = torch.device("cuda"), WeightStore(tmp_path)
    split = load_split(data, Choice(pixels=8, train_per_class=8), device)
    teacher = Run("teacher", "resnet8x2", Choice(pixels=8), Recipe(epochs=3, batch=8, drops=(1,)), 0)
    train(teacher, split, Engine(device), weights)
    run_ = dataclasses.replace(teacher, method="mgd", network="resnet8", teacher=teacher, distil=SMALL)
    heads = []
    for graphs in (False, True):
        train(run_, split, Engine(device, graphs=graphs), weights)
        heads.append(weights.load(run_)["head.weight"])
    torch.testing.assert_close(*heads, atol=1e-3, rtol=0)


def test_every_run_of_a_process_is_compiled(data: Path, tmp_path: Path) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    engine, weights = Engine(CPU, compiled=counting), WeightStore(tmp_path)  # type: ignore[arg-type]
    compiled = []
    with torch._dynamo.config.patch(recompile_limit=1):  # 8 by default: for a ninth run what is here for a second
        for beta in (1.0, 2.0, 3.0):
            method = Method(features=(), logits={"name": "dkd", "beta": beta})
            taught("resnet8", "resnet8", method, data, weights, engine)
            compiled.append(len(graphs))
    assert compiled == [1, 2, 3]


# ---- tables, the page, the command line


def test_means_and_deviations() -> None:
    assert mean_and_deviation([]) == "not run"
    assert mean_and_deviation([70.0]) == "70.00"
    assert mean_and_deviation([70.0, 71.0, 72.0]) == "71.00 ± 1.00"


def test_results_of_other_settings_do_not_count(tmp_path: Path, data: Path) -> None:
    assert run(written(tmp_path, seeds=[0]), tmp_path, data, "--methods", "student") == 0
    changed = load_study(written(tmp_path, seeds=[0], recipe={**STUDY["recipe"], "lr": 0.01}))
    assert "| student | not run | not run | 0/1 |" in table(changed, Results(tmp_path / "results" / "tiny.jsonl"))


def test_the_share_of_the_gap(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, seeds=[0]))
    results = Results(tmp_path / "tiny.jsonl")
    for found, last in zip(study.runs(), [80.0, 70.0, 72.5, 69.0]):
        results.add({"digest": found.digest, "best": last, "last": last})
    text = table(study, results)
    assert "| kd | 72.50 | 72.50 | 1/1 | 25% |" in text and "| conv1x1 | 69.00 | 69.00 | 1/1 | -10% |" in text
    assert "| teacher | 80.00 | 80.00 | 1/1 |  | 80.00 |" in text


def test_why_a_study_is_without_kd_stands_on_the_page(tmp_path: Path) -> None:
    rows = {name: text for name, text in COMMANDS["rows"].items() if name != "kd"}  # type: ignore[attr-defined]
    (tmp_path / "lines.yaml").write_text(yaml.safe_dump({**COMMANDS, "rows": rows, "without_kd": "no logits."}))
    assert "kd" not in load_study(tmp_path / "lines.yaml").rows
    assert "Without `kd`: no logits.\n" in report(tmp_path, tmp_path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"digest": "1"}\nnonsense\n')
    with pytest.raises(StudyError, match=r"a\.jsonl, line 2, is no result"):
        Results(tmp_path / "a.jsonl")


def test_the_page_of_results_is_what_the_results_say() -> None:
    assert REPORT.read_text(encoding="utf-8") == report(STUDIES, RESULTS), "run python -m benchmarks.accuracy report"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "mgd"], "tiny has no mgd; it has: teacher, student, kd"),
        (["--seeds", "7"], "tiny has no seed 7; it has: 0, 1"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--data", "no.npz"], "there is no data at no.npz"),
        (["--device", "tpu9"], "--device tpu9 is no device"),
        (["--compile", "fast"], "--compile fast is no backend of torch.compile; there are: "),
    ],
)
def test_bad_command_lines(
    more: list[str], message: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(written(tmp_path), tmp_path, data, *more) == 2
    assert message in capsys.readouterr().err
    assert main(["table", "nothing"]) == 2
    assert "there is no study 'nothing'; there are: aquarium_" in capsys.readouterr().err


# ---- studies of commands

COMMANDS = {
    "kind": "commands",
    "name": "lines",
    "title": "Commands",
    "seeds": [4, 5],
    "metric": {"name": "AP", "file": "metrics.json", "key": "bbox/AP"},
    "command": "python {data}/train.py {row} --seed {seed} --output {output}",
    "parts": {"taught": "--teacher {teacher}/weights"},
    "rows": {
        "teacher": "--gain 9",
        "student": "",
        "kd": "{taught}",
        "conv1x1": "{taught} --gain 1",
        "mgd": '{taught} --gain 2 --name "a b"',
    },
}

TRAIN = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("gain", "seed"):
    parser.add_argument(f"--{name}", type=float, default=0)
for name in ("teacher", "output", "name"):
    parser.add_argument(f"--{name}")
o = parser.parse_args()
if o.teacher and not pathlib.Path(o.teacher).exists():
    raise SystemExit("no teacher")
if o.name and not (pathlib.Path(__file__).parent / "allowed").exists():
    raise SystemExit("mgd is not allowed yet")
output = pathlib.Path(o.output)
(output / "weights").touch()
lines = [{"loss": 1.0}, {"bbox/AP": 10 + o.gain, "bbox/AP50": 20.0, "loss": 0.5}, {"bbox/AP": float("nan")}]
(output / "metrics.json").write_text("".join(json.dumps(line) + chr(10) for line in lines))
"""


def test_a_study_of_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    study = tmp_path / "lines.yaml"
    study.write_text(yaml.safe_dump(COMMANDS, sort_keys=False))
    (tmp_path / "train.py").write_text(TRAIN)
    assert run(study, tmp_path, tmp_path) == 1
    assert "mgd, seed 4, ended with status 1 and said: mgd is not allowed yet" in caplog.text
    assert "| mgd | not run |" in capsys.readouterr().out
    (tmp_path / "allowed").touch()
    assert run(study, tmp_path, tmp_path, "--jobs", "2") == 0
    shown = capsys.readouterr().out
    assert "| teacher | 19.00 | 19.00 | 1/1 |" in shown and "| mgd | 12.00 ± 0.00 | 12.00 ± 0.00 | 2/2 | 22% |" in shown
    lines = [json.loads(line) for line in (tmp_path / "results" / "lines.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    assert all(line["metrics"] == {"bbox/AP": line["last"], "bbox/AP50": 20.0} for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"teacher": "", "student": "", "kd": ""}}, "rows lacks conv1x1: the baselines are always in"),
        (
            {"rows": {"teacher": "", "student": "", "conv1x1": "-a"}},
            "rows lacks kd: the baselines are always in; where kd cannot be, without_kd says why",
        ),
        ({"without_kd": "no logits."}, "without_kd says why there is no kd, but rows has one"),
        ({"command": "python x.py {row}"}, "command needs the places {row} and {output}"),
        ({"command": "python x.py {row} {output} {weights}"}, "'weights' is no place that can be filled"),
        ({"metric": {"name": "AP"}}, "metric needs name, file and key"),
        ({"recipe": {}}, "a study of commands knows no recipe"),
    ],
)
def test_studies_of_commands_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.yaml"
    path.write_text(yaml.safe_dump({**COMMANDS, **changes}))
    with pytest.raises(StudyError, match=message):
        load_study(path)
