"""Detectors for :mod:`d2_mgd.export`: through Detectron2's TracingAdapter, judged by its evaluators.

Shape shorthand: (H, W) of an image.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from torch import Tensor, nn
from torchvision.ops import box_iou

from d2_mgd.data.formats import LabelFiles
from d2_mgd.detection.checkpoint import TrainingCheckpointer
from d2_mgd.detection.config import add_mgd_config, student_config
from d2_mgd.detection.config_files import merge_file
from d2_mgd.detection.config_loaders import build_evaluation_loader, training_records
from d2_mgd.detection.datasets import check_classes, register_coco, register_label_files, registered
from d2_mgd.detection.evaluation import evaluator_of
from d2_mgd.detection.images import ImageMapper
from d2_mgd.detection.lazy_network import load_lazy
from d2_mgd.detection.loader import rematch_pass
from d2_mgd.detection.networks import build_network
from d2_mgd.detection.weights import fresh_parameters, load_weights, local_weights_file, read_model
from d2_mgd.errors import UserError, reason
from d2_mgd.export import Comparison, Signature, Student, size_of
from d2_mgd.export.formats import quiet
from d2_mgd.training import file_digest

Sample = dict[str, Any]
_TITLES = {"bbox": "box AP, %", "segm": "mask AP, %", "keypoints": "keypoint AP, %"}
_SAME_BOX = 0.5  # IoU from which two detections of one class are matched


class ExportableDetector(Student):
    """A detector with its images.

    Args:
        model: a RetinaNet, FCOS or R-CNN.
        weights: its file.
        validation: returns batches of one sample.
        training: number of images -> batches of one sample, transformed as for an evaluation.
        evaluator: folder for its files -> a new evaluator of the validation set.
        channels: of the images, ``RGB`` or ``BGR``.
        size: (H, W) of a file of fixed size; None: any.
        facts: for the model card.

    Raises:
        UserError: a model of another kind, or weights that are not its own.
    """

    network: _Adapter

    def __init__(
        self,
        model: nn.Module,
        weights: str,
        *,
        validation: Callable[[], Iterable[list[Sample]]],
        training: Callable[[int], Iterable[list[Sample]]],
        evaluator: Callable[[str], DatasetEvaluator],
        channels: str,
        size: tuple[int, int] | None,
        facts: dict[str, str],
    ) -> None:
        name = type(model).__name__
        if not isinstance(model, (DenseDetector, GeneralizedRCNN)) or isinstance(model, PanopticFPN):
            raise UserError(f"a {name} cannot be exported: RetinaNet, FCOS, Faster R-CNN and Mask R-CNN can.")
        self.file = _load(model, weights)
        self._validation, self._training, self._evaluator = validation, training, evaluator
        example = torch.zeros(3, *size) if size else next(self.validation(1))[0]
        self.network = _Adapter(model.cpu().eval(), example)
        self.signature = Signature(example, self.network.outputs(), dynamic_size=size is None)
        self.facts = {"student": f"{name}, {size_of(model)}", **facts}
        self.description = {
            "architecture": name,
            "library": "detectron2",
            "task": "object-detection",
            "channels": channels,
        }

    def half_parts(self, network: nn.Module) -> list[nn.Module]:
        """Convolutions, with their norms, and linear layers: boxes are decoded in float32."""
        return [one for one in network.modules() if isinstance(one, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]

    def weights(self) -> dict[str, Tensor]:
        return self.network.model.state_dict()

    def training_images(self, count: int) -> Iterator[Tensor]:
        return (batch[0]["image"].float() for batch in itertools.islice(self._training(count), count))

    def validation(self, count: int | None) -> Iterator[tuple[Tensor, Sample]]:
        return ((batch[0]["image"].float(), batch[0]) for batch in itertools.islice(self._validation(), count))

    def comparison(self) -> DetectionComparison:
        return DetectionComparison(self.network.outputs_schema, self._evaluator)


class _Adapter(TracingAdapter):
    """(3, H, W) -> the fields of the detections, and (2,) height and width. Masks are not pasted into the image."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        infer = self._infer if isinstance(model, GeneralizedRCNN) else None
        super().__init__(model, [{"image": example}], infer)
        self.eval()(example)  # sets outputs_schema

    def forward(self, image: Tensor) -> Any:  # torch.export needs its name
        return super().forward(image)

    @staticmethod
    def _infer(model: Any, inputs: Any) -> list[dict[str, Any]]:
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]

    def outputs(self) -> dict[str, dict[int, str]]:
        """Name -> dynamic axes."""
        fields = self.outputs_schema.schemas[0].schemas[0].keys
        return {**{name: {0: "detections"} for name in fields}, "image_size": {}}


class DetectionComparison(Comparison):
    """AP by Detectron2's evaluators, and the differences of matched detections.

    Args:
        schema: of a TracingAdapter; tensors -> detections.
        evaluator: folder for its files -> a new evaluator.
    """

    def __init__(self, schema: Callable[[Any], Any], evaluator: Callable[[str], DatasetEvaluator]) -> None:
        self._schema = schema
        self._folder = tempfile.TemporaryDirectory()
        self._evaluators = [evaluator(self._folder.name) for _ in range(2)]
        for one in self._evaluators:
            one.reset()
        self._images: list[int] = []
        self._box = self._score = 0.0
        self._unmatched = 0

    def add(self, target: Sample, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        both = [self._schema(tuple(outputs))[0]["instances"] for outputs in (expected, found)]
        self._match(*both)
        for evaluator, instances in zip(self._evaluators, both):
            pasted = detector_postprocess(instances, target["height"], target["width"])
            evaluator.process([target], [{"instances": pasted}])
        self._images.append(target["image_id"])

    def _match(self, expected: Any, found: Any) -> None:
        """Match each detection, likeliest first, to the nearest unmatched one of its class."""
        boxes, other_boxes = expected.pred_boxes.tensor, found.pred_boxes.tensor
        overlaps = box_iou(boxes, other_boxes)
        overlaps[expected.pred_classes[:, None] != found.pred_classes[None]] = 0
        self._unmatched += len(expected) + len(found)
        for index in expected.scores.argsort(descending=True) if overlaps.numel() else ():
            overlap, other = overlaps[index].max(dim=0)
            if overlap >= _SAME_BOX:
                overlaps[:, other] = 0
                self._unmatched -= 2
                self._box = max(self._box, float((boxes[index] - other_boxes[other]).abs().max()))
                self._score = max(self._score, float((expected.scores[index] - found.scores[other]).abs()))

    def accuracy(self) -> dict[str, tuple[float, float]]:
        network, file = (self._evaluate(one) for one in self._evaluators)
        return {_TITLES[task]: (network[task]["AP"], file[task]["AP"]) for task in network if task in _TITLES}

    def _evaluate(self, evaluator: DatasetEvaluator) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            if isinstance(evaluator, COCOEvaluator):
                return evaluator.evaluate(img_ids=self._images)
            return evaluator.evaluate()

    def differences(self) -> dict[str, float]:
        return {
            "largest difference of a matched box, px of the input": self._box,
            "largest difference of a matched score": self._score,
            "detections without a match": self._unmatched,
        }


def from_config(
    path: str, weights: str | None, files: Iterable[LabelFiles], output: Path, size: tuple[int, int] | None
) -> ExportableDetector:
    """The student of a yaml config.

    Args:
        path: of a plain config, or of the ``student.yaml`` or ``config.yaml`` in a training's folder.
        weights: its file; by default the last checkpoint of that folder.
        files: data sets in other formats than COCO's.
        output: folder for those in COCO's format.
        size: see :class:`ExportableDetector`.

    Raises:
        UserError: there is no student yet, or the model or a data set cannot be loaded.
    """
    cfg = get_cfg()
    add_mgd_config(cfg)
    merge_file(cfg, path)
    folder = Path(path).parent
    weights = weights or _last_checkpoint(folder)
    cfg = student_config(cfg)
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR = "cpu", 0, str(output)
    if not cfg.DATASETS.TEST:
        raise UserError(f"{path}: DATASETS.TEST names no data set to check the file on.")
    name = cfg.DATASETS.TEST[0]
    register_label_files(files, cfg)
    _register(folder / "datasets.json")
    registered(name)
    model = build_network(cfg)
    check_classes([name], model)
    mapper = ImageMapper(cfg, is_train=False)
    return ExportableDetector(
        model,
        weights,
        validation=lambda: build_evaluation_loader(cfg, name),
        training=lambda count: rematch_pass(
            training_records(cfg), mapper, num_images=count, batch_size=1, num_workers=0, seed=[0]
        ),
        evaluator=lambda folder: evaluator_of(cfg, name, folder),
        channels=cfg.INPUT.FORMAT,
        size=size,
        facts={
            "teacher": _teacher(weights),
            "data": f"{', '.join(cfg.DATASETS.TRAIN)}; validation: {name}",
            "image size": f"shortest side {cfg.INPUT.MIN_SIZE_TEST} px, longest at most {cfg.INPUT.MAX_SIZE_TEST} px",
            "config": f"{Path(path).name} (SHA-256 {file_digest(path)})",
        },
    )


def from_lazy_config(path: str, weights: str, size: tuple[int, int] | None) -> ExportableDetector:
    """The detector of a python config, or the student in it; the config is executed. See :func:`from_config`."""
    cfg = load_lazy(path, [], "--config-file")
    if "evaluator" not in cfg.dataloader:
        raise UserError(f"{path} has no dataloader.evaluator to check the file with.")
    test = cfg.dataloader.test
    test.num_workers = 0
    return ExportableDetector(
        instantiate(cfg.model.get("student", cfg.model)),
        weights,
        validation=lambda: instantiate(test),
        training=lambda count: instantiate({**test, "dataset": cfg.dataloader.train.dataset}),
        evaluator=lambda folder: instantiate(cfg.dataloader.evaluator),
        channels=test.mapper.image_format,
        size=size,
        facts={"config": f"{Path(path).name} (SHA-256 {file_digest(path)})"},
    )


def _last_checkpoint(folder: Path) -> str:
    checkpointer = TrainingCheckpointer(nn.Module(), str(folder), save_to_disk=False)
    if not checkpointer.has_checkpoint():
        raise UserError(f"{folder} has no student yet: its training has written no checkpoint.")
    return checkpointer.newest_whole()


def _register(path: Path) -> None:
    """Register the data sets of a training's ``datasets.json``; those of the command line keep their place."""
    try:
        places = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {reason(error)}; name the data sets by --register-coco.") from error
    for name, place in places.items():
        if name not in DatasetCatalog.list():
            register_coco(name, place["json_file"], place["image_root"])


def _teacher(weights: str) -> str:
    """The teacher of a training, for the model card."""
    record = read_model(local_weights_file(weights)).get("distillation", {}).get("teacher")
    return f"{Path(record['weights']).name} (SHA-256 {record['digest']})" if record else "none in the weights file"


def _load(model: nn.Module, weights: str) -> Path:
    """Load all weights of a model; returns the path of their file."""
    with quiet():  # Detectron2 warns of each weight that does not fit
        left = load_weights(model, weights)
    if fresh := fresh_parameters(model, left):
        raise UserError(
            f"{weights} is not of this student: {len(fresh)} of its weights are not there, first {fresh[0]}."
        )
    return Path(local_weights_file(weights))
