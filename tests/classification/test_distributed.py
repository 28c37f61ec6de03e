"""The published spawn flags and torchrun, with two processes on the CPU; and what must not depend on their number."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from classification import main_base
from classification.assembly import TeacherNetwork, make_trainer
from classification.distillation import Student
from classification.models import build
from classification.options import parse_mgd
from classification.processes import Process
from d2_mgd.data.class_folders import find_folders
from d2_mgd.distill import MatchingGuidedDistiller, Tap, load_reports
from d2_mgd.distill.norms import MaskedBatchNorm, synchronised_norms
from d2_mgd.training.processes import average_buffers, gather, sum_over_ranks
from d2_mgd.training.sums import Sums
from tests.classification.conftest import (
    CLASSES,
    SMALL,
    Run,
    command,
    make_folder,
    run_command,
    settled,
)
from tests.ranks import fork_launched_ranks, free_port, in_processes

METHOD = [
    "--arch",
    "shufflenet_v2_x0_5",
    "--distiller",
    "mgd",
    "--mgd-reducer",
    "amp",
    "--mgd-update-freq",
    1,
    "--mgd-with-kd",
    1,
]
# Maps of few pixels have many optimal matchings, and rounding would choose among them.
METHOD += ["--image-size", 64, "--features", "stage2", "stage3"]


def spawn_flags(port: int) -> list[object]:
    return ["--world-size", 1, "--rank", 0, "--dist-url", f"tcp://localhost:{port}", "--multiprocessing-distributed"]


@pytest.fixture(scope="module")
def two_processes(data: Path, resnet18_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published line for DDP, with synchronised batch-norm; two epochs."""
    folder = tmp_path_factory.mktemp("ddp")
    teacher = ["--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    words = command(
        "main_mgd.py", data, *SMALL, *METHOD, *teacher, *spawn_flags(free_port()), "--nproc", 2, "--sync-bn", 1,
        "--epochs", 2, "--output-dir", folder / "run",
    )  # fmt: skip
    done = run_command(words, folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_two_processes_and_one_give_the_same_matching(
    two_processes: Path, mgd: Run, data: Path, resnet18_file: Path, tmp_path: Path
) -> None:
    teacher = ["--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    assert mgd(data, *METHOD, *teacher) == 0
    together, alone = (load_reports(run / "matching" / "epoch_0000.npz") for run in (two_processes, tmp_path / "run"))
    assert list(alone) == ["stage2", "stage3"]
    for feature, report in alone.items():
        assert together[feature].num_images == report.num_images == 24
        np.testing.assert_allclose(together[feature].cost, report.cost, atol=1e-5)
        assert together[feature].matching == report.matching
    later = load_reports(two_processes / "matching" / "epoch_0001.npz")
    assert all(report.num_images == 24 for report in later.values())


def test_two_processes_write_one_run(two_processes: Path) -> None:
    history = [json.loads(line) for line in (two_processes / "metrics.json").read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2]
    assert {"train_loss_kd", "train_loss_distill/stage3", "err1"} <= set(history[0])
    stored = torch.load(two_processes / "checkpoint.pth", weights_only=True)
    assert (stored["world"], len(stored["processes"])) == (2, 2)
    assert stored["distiller"]["features.stage3.norm.num_batches_tracked"] == 6


def _gradients(rank: int, world: int, url: str, target: Path) -> None:
    """One backward of a distilled student on this process's share of eight images, in float64."""
    if world > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=world)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    distiller = MatchingGuidedDistiller({"a": (6, 12)}, norm="sync_bn", reduction="image_sum")
    images, targets, maps = torch.randn(8, 3, 9, 9), torch.arange(8) % 3, {"a": torch.randn(8, 12, 7, 7).double()}
    network, mine = synchronised_norms(network, torch.device("cpu")), slice(rank, None, world)
    student = Student(network, {"a": Tap("1")}, distiller).double()
    distiller.observe(student.maps(images[mine].double()), {"a": maps["a"][mine]})
    distiller.rematch()
    step: nn.Module = student
    if world > 1:
        step = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
    output = step(images[mine].double(), targets[mine], {"a": maps["a"][mine]}, None)
    (sum(output.losses.values()).sum() / len(targets[mine])).backward()
    distiller.update_balance()  # what a step measured stays with its rank until then
    average_buffers(student)
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    found.update({name: buffer for name, buffer in student.named_buffers()})
    if rank == 0:
        torch.save(found, target)
    if world > 1:
        torch.distributed.destroy_process_group()


def test_halves_of_a_batch_in_two_processes_are_the_batch(tmp_path: Path) -> None:
    """With synchronised statistics: the same gradients, running statistics and matching."""
    url = f"tcp://127.0.0.1:{free_port()}"
    arguments = (2, url, tmp_path / "two.pth")
    torch.multiprocessing.start_processes(_gradients, arguments, nprocs=2, start_method="fork")
    _gradients(0, 1, "", tmp_path / "one.pth")
    two, one = (torch.load(tmp_path / name, weights_only=True) for name in ("two.pth", "one.pth"))
    assert {"network.0.weight", "distiller.features.a.norm.weight", "distiller.features.a.groups"} <= set(one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_two_processes_count_every_image_once(
    base: Run, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """15 images in two processes: 8 and 7."""
    assert base(data, "--arch", "mobilenet_v1", "--epochs", 2) == 0
    student = ["--arch", "mobilenet_v1", "--student-resume", tmp_path / "run" / "student_last.pth", "--evaluate"]
    capfd.readouterr()
    assert base(data, *student) == 0
    alone = capfd.readouterr().out
    assert in_processes(main_base.main, [data, *SMALL, *student], 2) == [0, 0]
    assert capfd.readouterr().out == alone


def test_an_error_in_the_processes_is_said_and_ends_all(
    base: Run, data: Path, resnet18_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    fork_launched_ranks(monkeypatch)
    student = ["--arch", "mobilenet_v1", "--student-resume", resnet18_file]
    assert base(data, *student, "--multiprocessing-distributed", "--nproc", 2) == 2
    said = capfd.readouterr().err
    assert "is of resnet18, not of mobilenet_v1" in said
    assert "Traceback" not in said


def test_what_ends_one_process_ends_the_others_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """An image that one of two processes reads, and cannot."""
    root = make_folder(tmp_path / "data")
    (root / "train" / "bee" / "2.png").write_bytes(b"\x89PNG")
    words = [root, *SMALL, "--arch", "shufflenet_v2_x0_5", "--output-dir", tmp_path / "run"]
    statuses = in_processes(main_base.main, words, 2)
    said = capfd.readouterr().err
    assert sorted(statuses) == [1, 2]
    assert "bee/2.png cannot be read" in said
    assert "another rank has ended; its error is the cause" in said
    assert "Traceback" not in said


def test_broken_images_are_counted_over_processes_and_restarts(base: Run, tmp_path: Path) -> None:
    """Each of two processes evaluates one of them; those that are mended meanwhile still count."""
    root = make_folder(tmp_path / "data")
    broken = [root / "valid" / "ant" / f"{number}.png" for number in (0, 1)]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"\x89PNG")
    words = [root, *SMALL, "--arch", "shufflenet_v2_x0_5", "--lr", 0.01, "--skip-broken-images"]
    assert in_processes(main_base.main, [*words, "--output-dir", tmp_path / "run"], 2) == [0, 0]
    for path, content in zip(broken, whole):
        path.write_bytes(content)
    root.rename(tmp_path / "moved")
    words[0] = tmp_path / "moved"
    (tmp_path / "moved" / "valid" / "bee" / "0.png").write_bytes(b"")
    assert base(*words, "--epochs", 2, "--resume", tmp_path / "run" / "checkpoint.pth", small=False) == 0
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert [line["broken_images"] for line in history] == [2, 3]


def test_a_port_in_use(mgd: Run, data: Path, resnet18_file: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        teacher = ["--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
        for flags in (spawn_flags(port), ["--world-size", 2, "--rank", 0, "--dist-url", f"tcp://localhost:{port}"]):
            assert mgd(data, *METHOD, *teacher, *flags) == 2
            assert f"--dist-url tcp://localhost:{port} cannot be used" in capsys.readouterr().err
    assert mgd(data, *METHOD, *teacher, "--multiprocessing-distributed", "--dist-url", "tcp://localhost") == 2
    assert "is not of the form tcp://ADDRESS:PORT" in capsys.readouterr().err


def test_one_gpu_for_the_processes_of_torchrun(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    words = [data, *SMALL[:-2], "--arch", "shufflenet_v2_x0_5", "--gpu", 0, "--output-dir", tmp_path / "run"]
    assert in_processes(main_base.main, words, 2) == [2, 2]
    assert capfd.readouterr().err.count("--gpu 0 names one GPU for 2 processes") == 1


def test_synchronised_norms_keep_weights_and_names() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)))
    nn.init.normal_(network[1][0].weight)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    converted = synchronised_norms(network, torch.device("cpu"))
    norm = converted[1][0]
    assert isinstance(norm, MaskedBatchNorm)
    assert (norm.sync, norm.eps, norm.momentum) == (True, 1e-3, 0.2)
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())


def test_a_single_process_needs_no_group() -> None:
    assert Process(0, 1, 0, 1, torch.device("cpu")).is_main
    assert gather("a") == ["a"]
    assert torch.equal(sum_over_ranks(torch.ones(2)), torch.ones(2))
    norm = nn.BatchNorm2d(2)
    average_buffers(norm)
    sums = Sums(torch.device("cpu"))
    sums.add(3, {"x": torch.tensor([1.0, 2.0])})
    sums.add(1, {"x": torch.tensor(5.0)})
    assert sums.totals(["x"]) == (4, {"x": 8.0})
    assert sums.means(["x"]) == {"x": 2.0}


# ---- what is wrapped, and what is sent


def _wrap(rank: int, url: str, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    given = [*SMALL, "--arch", "shufflenet_v2_x0_5", "--teacher-arch", "resnet18", "--output-dir", folder]
    given += ["--distill-start", 1, "--mgd-with-kd", 1, "--epochs", 2, "--lr", 0.001]
    torch.manual_seed(rank)  # the students differ, until the wrapper makes them one
    teacher = TeacherNetwork("resnet18", settled(build("resnet18", len(CLASSES))), len(CLASSES))
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    process = Process(rank, 2, rank, 2, torch.device("cpu"))
    options = parse_mgd([str(word) for word in [data, *given]])
    network = build("shufflenet_v2_x0_5", len(CLASSES))
    trainer = make_trainer(process, options, network, teacher, find_folders(data))
    wrapped = trainer.step.student
    inside = {id(tensor) for tensor in [*wrapped.parameters(), *wrapped.buffers()]}
    trainer.fit()
    of_teacher = teacher.network.state_dict(keep_vars=True)
    torch.save(
        {
            "find_unused": wrapped.find_unused_parameters,
            "buffers sent": wrapped.will_sync_module_buffers(),
            "teacher inside": any(id(tensor) in inside for tensor in of_teacher.values()),
            "teacher kept": all(torch.equal(value, before[name]) for name, value in of_teacher.items()),
            "teacher": before["conv1.weight"],
            "student": {name: value.detach() for name, value in trainer.student.named_parameters()},
        },
        folder / f"{rank}.pth",
    )
    torch.distributed.destroy_process_group()


def test_only_what_is_trained_is_wrapped_and_the_teacher_is_not_sent(data: Path, tmp_path: Path) -> None:
    """Each process has a teacher of its own here; a distillation that starts later leaves no parameter unused."""
    url = f"tcp://127.0.0.1:{free_port()}"
    torch.multiprocessing.start_processes(_wrap, (url, data, tmp_path), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    for one in found:
        assert not one["find_unused"]
        assert not one["buffers sent"]
        assert not one["teacher inside"]
        assert one["teacher kept"]
    assert not torch.equal(found[0]["teacher"], found[1]["teacher"])
    assert all(torch.equal(value, found[1]["student"][name]) for name, value in found[0]["student"].items())
