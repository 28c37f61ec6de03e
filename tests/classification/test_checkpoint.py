"""Checkpoints that are damaged, that the disk has no room for, or that are too many; safetensors."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from classification import main_base
from classification.checkpoint import checkpoints_of
from d2_mgd.errors import CommonError, UserError
from d2_mgd.training.processes import failing_together
from tests.classification.conftest import SMALL, Run, assert_same_run, command
from tests.ranks import free_port

METHOD = ["--arch", "shufflenet_v2_x0_5", "--checkpoint-freq", 2, "--lr", 0.01]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of three steps: checkpoints after steps 2, 3, 5 and 6, of which two stay."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = [data, *SMALL, *METHOD, "--epochs", 2, "--output-dir", folder]
    assert main_base.main([str(word) for word in words]) == 0
    return folder


def test_the_newest_checkpoints_stay_and_the_pointer_names_the_last(finished: Path) -> None:
    names = sorted(file.name for file in finished.glob("checkpoint_*"))
    assert names == ["checkpoint_epoch_0001_step_000002.pth", "checkpoint_epoch_0002.pth"]
    assert list(json.loads((finished / "checkpoints.json").read_text())) == names
    assert os.readlink(finished / "checkpoint.pth") == names[-1]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "problem"), [(cut, "bytes of the"), (flip_a_bit, "SHA-256 differs"), (remove, "is gone")]
)
def test_where_the_newest_is_damaged_the_one_before_it_is_used(
    base: Run,
    data: Path,
    finished: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    problem: str,
    capsys: pytest.CaptureFixture,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    damage(run / "checkpoint_epoch_0002.pth")
    assert base(data, *METHOD, "--epochs", 2, "--output-dir", run, "--resume") == 0
    said = capsys.readouterr().err
    assert f"{run}/checkpoint_epoch_0002.pth" in said
    assert problem in said
    assert "checkpoint_epoch_0001_step_000002.pth is used" in said
    assert "1 epochs and 2 steps are done" in said
    assert_same_run(finished, run)


def test_where_all_are_damaged_the_run_says_so(
    base: Run, data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    for file in run.glob("checkpoint_*"):
        flip_a_bit(file)
    assert base(data, *METHOD, "--epochs", 2, "--output-dir", run, "--resume") == 2
    assert "no earlier checkpoint is intact" in capsys.readouterr().err


def test_without_list_and_pointer_the_newest_that_can_be_read_is_used(
    base: Run, data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    (run / "checkpoints.json").write_text("")
    (run / "checkpoint.pth").unlink()
    cut(run / "checkpoint_epoch_0002.pth")
    assert base(data, *METHOD, "--epochs", 2, "--output-dir", run) == 2
    assert "already contains a run" in capsys.readouterr().err
    assert base(data, *METHOD, "--epochs", 2, "--output-dir", run, "--resume") == 0
    used = "checkpoint_epoch_0001_step_000002.pth, the newest intact one, is used"
    assert f"{run}/checkpoint.pth names no checkpoint: {used}" in capsys.readouterr().err
    assert_same_run(finished, run)
    (run / "checkpoints.json").unlink()
    assert base(data, *METHOD, "--output-dir", run, "--overwrite") == 0
    assert not (run / "checkpoint_epoch_0002.pth").exists()


def test_a_run_copied_without_its_list_goes_on_all_the_same(
    base: Run,
    data: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "checkpoint.pth", run / "checkpoint.pth")  # the file that the link names
    assert base(data, *METHOD, "--epochs", 3, "--output-dir", run, "--resume") == 0
    assert os.readlink(run / "checkpoint.pth") == "checkpoint_epoch_0003.pth"
    shutil.copy(finished / "checkpoint_epoch_0002.pth", tmp_path / "checkpoint.pth")
    cut(tmp_path / "checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    assert base(data, *METHOD, "--resume", "checkpoint.pth") == 2
    assert "cannot be read (is damaged or cut short" in capsys.readouterr().err


def test_as_many_stay_as_asked(base: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert base(data, *METHOD, "--epochs", 2, "--keep-checkpoints", 3) == 0
    assert len(list((tmp_path / "run").glob("checkpoint_*"))) == 3
    assert base(data, *METHOD, "--epochs", 1, "--overwrite") == 0
    assert len(list((tmp_path / "run").glob("checkpoint_*"))) == 2
    assert base(data, *METHOD, "--keep-checkpoints", 1) == 2
    assert "--keep-checkpoints: must be 2 or more, not 1" in capsys.readouterr().err


def test_a_file_that_may_not_grow_stops_the_run_with_that_sentence(
    base: Run, data: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The first epoch fits; then the system refuses larger files in the middle of a checkpoint's write."""
    run = tmp_path / "run"
    words = [data, *SMALL, *METHOD, "--output-dir", run]
    assert base(*words, "--epochs", 1, small=False) == 0
    whole = {file.name: file.read_bytes() for file in run.glob("checkpoint*")}

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        os._exit(main_base.main([str(word) for word in [*words, "--epochs", 2, "--resume"]]))

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join(200)
    said = capfd.readouterr().err
    assert process.exitcode == 2, said
    assert "checkpoint_epoch_0001_step_000002.pth could not be written (File too large)" in said
    assert "earlier checkpoints are intact" in said
    assert "Traceback" not in said
    assert {file.name: file.read_bytes() for file in run.glob("checkpoint*")} == whole
    assert not list(run.glob(".*.tmp"))
    assert base(*words, "--epochs", 2, "--resume", small=False) == 0
    assert_same_run(finished, run)


def test_a_full_disk_stops_the_run_with_that_sentence(data: Path, tmp_path: Path) -> None:
    """A file system of 8 MB, of which a checkpoint takes 3 and the student 1.5, twice."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=8m tmpfs {disk}"
    trial = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*trial, mount], capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    words = command("main_base.py", data, *SMALL, *METHOD, "--epochs", 9, "--output-dir", disk / "run")
    script = f'{mount} && {{ "$@"; status=$?; cp -r {disk}/run {tmp_path}/left; exit $status; }}'
    done = subprocess.run([*trial, script, "sh", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert "could not be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    left = checkpoints_of(tmp_path / "left")
    assert left.read()
    assert all(left.damage(name) is None for name in left.read())


def _fail(rank: int, url: str, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    try:
        with failing_together():
            if rank == 0:
                raise UserError("the disk is full.")
    except CommonError as error:
        (folder / str(rank)).write_text(str(error))
    torch.distributed.destroy_process_group()


def test_what_fails_in_the_process_that_writes_fails_in_all_alike(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _fail, (f"tcp://127.0.0.1:{free_port()}", tmp_path), nprocs=2, start_method="fork"
    )
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["the disk is full."] * 2


# ---- safetensors


def test_students_are_written_and_read_as_safetensors(
    base: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert base(data, *METHOD, "--safetensors") == 0
    run = tmp_path / "run"
    for name in ("student_last", "student_best"):
        plain = torch.load(run / f"{name}.pth", weights_only=True)["state_dict"]
        tensors = load_file(run / f"{name}.safetensors")
        assert tensors.keys() == plain.keys()
        assert all(torch.equal(tensors[key], plain[key]) for key in plain)
    shown = []
    for end in (".pth", ".safetensors"):
        file = (run / "student_last").with_suffix(end)
        capsys.readouterr()
        assert base(data, *METHOD, "--evaluate", "--student-resume", file) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_a_teacher_of_safetensors(
    base: Run, mgd: Run, data: Path, resnet18_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of strangers, whose metadata say what they like; of another architecture; and cut short."""
    file = tmp_path / "teacher.safetensors"
    weights = torch.load(resnet18_file, weights_only=True)["state_dict"]
    save_file(weights, file, {"format": "pt", "state_dict": "no"})
    teacher = ["--teacher-arch", "resnet18", "--teacher-resume", file]
    assert mgd(data, *METHOD, *teacher) == 0
    assert mgd(data, *METHOD, "--overwrite", "--teacher-arch", "resnet34", "--teacher-resume", file) == 2
    assert f"the teacher's file {file} is not of resnet34" in capsys.readouterr().err
    save_file(weights, file, {"arch": '"resnet50"'})
    assert mgd(data, *METHOD, "--overwrite", *teacher) == 2
    assert "is of resnet50, not of resnet18" in capsys.readouterr().err
    for damage in (cut, lambda path: path.write_bytes(b"\x10")):
        damage(file)
        assert mgd(data, *METHOD, "--overwrite", *teacher) == 2
        assert f"{file} is damaged or cut short" in capsys.readouterr().err


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.pth names no checkpoint, and the folder contains no intact one"):
        checkpoints_of(tmp_path).newest_whole()
