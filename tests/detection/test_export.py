"""Exported detectors, narrow and untrained, on images of several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from tiny_detectors import batch, tiny, tiny_fcos
from torch import nn

from d2_mgd.detection.export import ExportableDetector
from d2_mgd.errors import UserError
from d2_mgd.export import Options, Runtime, export

SIZES = ((64, 96), (96, 64), (128, 70))
ANY_SCORE = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.02)


class Count(DatasetEvaluator):
    """A stand-in for an AP: the mean number of detections."""

    def reset(self) -> None:
        self.found: list[int] = []

    def process(self, inputs: Any, outputs: Any) -> None:
        self.found += [len(output["instances"]) for output in outputs]

    def evaluate(self) -> dict[str, dict[str, float]]:
        return {"bbox": {"AP": sum(self.found) / len(self.found)}, "sem_seg": {"mIoU": 0.0}}


def detector(model: nn.Module, folder: Path, size: tuple[int, int] | None = None) -> ExportableDetector:
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    samples = [[{**sample, "image_id": index}] for index, sample in enumerate(batch(*SIZES))]
    return ExportableDetector(
        model,
        str(folder / "model.pth"),
        validation=lambda: iter(samples),
        training=lambda count: iter(samples),
        evaluator=lambda folder: Count(),
        channels="BGR",
        size=size,
        facts={},
    )


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    if name != "fcos":
        return tiny(name, 16, *ANY_SCORE)
    model: Any = tiny_fcos(channels=64)
    model.test_score_thresh = 0.05
    return model


@pytest.mark.parametrize("name", ["retinanet", "fcos", "faster_rcnn", "mask_rcnn"])
def test_an_onnx_detector_answers_as_pytorch_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    student = detector(model_of(name), tmp_path)
    assert list(student.signature.outputs) == [
        "pred_boxes",
        "pred_classes",
        *(["pred_masks"] if name == "mask_rcnn" else []),
        "scores",
        "image_size",
    ]
    done = export(student, tmp_path / "out", Options())
    network, file = done.check.accuracy["box AP, %"]
    assert network == file > 1
    box, score, unmatched = done.check.differences.values()
    assert box < 0.05 and score < 1e-3
    assert unmatched < 0.25 * network * len(SIZES)  # untrained networks give boxes of 1e-4 px, which overlap by chance


def test_torchscript_and_int8_detectors(tmp_path: Path) -> None:
    student = detector(model_of("retinanet"), tmp_path)
    exact = export(student, tmp_path, Options("torchscript")).check
    assert exact.differences["detections without a match"] == 0 and exact.images == len(SIZES)
    pytest.importorskip("onnxruntime")
    coarse = export(student, tmp_path, Options(int8=3, tolerance=100)).check
    assert 0 < coarse.differences["largest difference of a matched score"] < 0.2


def test_torch_export_names_the_line_that_it_cannot_export(tmp_path: Path) -> None:
    student = detector(model_of("retinanet"), tmp_path)
    with pytest.raises(UserError, match=r"cannot export this student at detectron2/.*\.py:\d+ in \w+: "):
        export(student, tmp_path, Options("pt2"))
    assert not list(tmp_path.glob("*student*"))


def test_a_fixed_size_refuses_other_images(tmp_path: Path) -> None:
    student = detector(model_of("retinanet"), tmp_path, size=(64, 96))
    with pytest.raises(UserError, match="takes images of 64 x 96 px, and this one has 96 x 64"):
        export(student, tmp_path, Options("torchscript"))
    assert export(student, tmp_path, Options("torchscript", images=1)).file.is_file()
    run = Runtime(tmp_path / "student.ts", "torchscript", student.signature)
    assert run(torch.zeros(3, 64, 96))[-1].tolist() == [64, 96]


def test_half_keeps_box_arithmetic_in_float32(tmp_path: Path) -> None:
    student = detector(model_of("faster_rcnn"), tmp_path)
    done = export(student, tmp_path, Options("torchscript", half=True, tolerance=100))
    network = torch.jit.load(str(done.file))
    dtypes = {value.dtype for value in network(torch.zeros(3, 64, 96))}
    assert dtypes == {torch.float32, torch.int64}
    assert {value.dtype for value in network.parameters()} == {torch.float16}


def test_what_is_no_detector_or_not_its_weights(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="a Linear cannot be exported: RetinaNet, FCOS, Faster R-CNN and Mask R-CNN can"
    ):
        detector(nn.Linear(1, 1), tmp_path)
    other = detector(model_of("retinanet"), tmp_path)
    wide = tiny("retinanet", 32)
    with pytest.raises(UserError, match=r"is not of this student: \d+ of its weights are not there"):
        ExportableDetector(
            wide,
            str(other.file),
            validation=lambda: iter(()),
            training=lambda count: iter(()),
            evaluator=lambda folder: Count(),
            channels="BGR",
            size=(64, 64),
            facts={},
        )
