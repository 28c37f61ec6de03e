"""A frozen teacher in other precisions, and compiled, gives the maps of the plain network."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from d2_mgd.distill.teacher_forward import TeacherForward
from d2_mgd.errors import UserError
from d2_mgd.training import check_same_teacher
from tests.distill import compiled_teacher
from tests.distill.compiled_teacher import difference, small


def test_a_compiled_teacher() -> None:
    """A process that compiles has threads, and other tests of this process fork."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", compiled_teacher.__file__]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_precision_is_that_of_the_caller_unless_it_is_named() -> None:
    taps = small()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = taps.run(images)
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        for precision in ("student", "float32", "bfloat16"):
            found[precision] = TeacherForward(precision)(taps.run, images)
    assert {name: maps["two"].dtype for name, maps in found.items()} == {
        "student": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16
    }  # fmt: skip
    assert difference(found["float32"], wanted) < 1e-5
    assert difference(found["bfloat16"], wanted) < 0.03


def test_bad_precisions_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"unknown teacher precision 'half'; there are: auto, student, float32"):
        TeacherForward("half")
    taps = small()
    with pytest.raises(UserError, match="float16 needs a GPU: use bfloat16 or auto"):
        TeacherForward("float16")(taps.run, torch.randn(1, 3, 16, 16))


def test_resuming_in_another_precision_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    recorded = {"weights": "teacher.pth", "digest": "0", "precision": "bfloat16"}
    with caplog.at_level(logging.WARNING):
        check_same_teacher("checkpoint.pth", recorded, recorded)
        assert not caplog.records
        check_same_teacher("checkpoint.pth", recorded, {**recorded, "precision": "float32"})
    assert "another way (float32) than before checkpoint.pth (bfloat16)" in caplog.text
