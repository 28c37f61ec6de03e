"""The student of a classification run, for :mod:`d2_mgd.export`.

Shape shorthand: N images, K classes, (H, W) of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from classification_run import read_classifier
from run_folder import Run
from run_numbers import spread
from torch import Tensor, nn

from classification.checkpoint import STUDENT_LAST
from classification.data import ImageDataset, Key, image_statistics, normalize
from d2_mgd.data.class_folders import find_folders
from d2_mgd.errors import UserError, located
from d2_mgd.export import Comparison, Signature, Student, size_of


class _Network(nn.Module):
    """A classifier with its normalisation: (N, 3, H, W) pixels in 0..255 -> ((N, K) logits,)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize(image_statistics(classifier))
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.classifier(self.normalize(images)),)


class ExportableClassifier(Student):
    """The student of a run after its last epoch, with the run's images.

    Args:
        run: of classification/main_*.py.
        size: (H, W) of the file's images; ``dynamic``; or an empty string for the run's.

    Raises:
        UserError: the run has no student yet, or its images are not there.
    """

    def __init__(self, run: Run, size: tuple[int, int] | str) -> None:
        if not (run.folder / STUDENT_LAST).is_file():
            raise UserError(f"{run.folder} has no student yet: its training has not finished an epoch.")
        found, data = read_classifier(run), Path(run.settings["data"])
        with located(f"the images of {run.folder} are not there: "):
            folders = find_folders(data, run.settings["val_split"])
        side, name = found.image_size, str(run.settings["arch"])
        self._train, self._valid = (ImageDataset(folder, side, augment=False) for folder in folders)
        self.network = _Network(found.network).eval()
        self.file = found.weights
        example = torch.zeros(2, 3, *((side, side) if isinstance(size, str) else size))
        self.signature = Signature(example, {"logits": {0: "batch"}}, dynamic_size=size == "dynamic")
        self.description = {
            "architecture": name,
            "library": "timm" if name.startswith("timm:") else "torchvision",
            "task": "image-classification",
            "channels": "RGB",
            "image_size": side,
            "classes": found.classes,
        }
        self.facts = {
            "student": f"{name}, {size_of(found.network)}",
            "teacher": _teacher(run),
            "data": f"{data.name}, {len(self._train):,} training images of {len(found.classes)} classes",
            "image size": f"{side} px, the centre of {round(side * 256 / 224)} px",
            "trained by": f"`{run.record['command']}`",
        }

    def half_parts(self, network: nn.Module) -> list[nn.Module]:
        """All but the normalisation."""
        return [network.get_submodule("classifier")]

    def weights(self) -> dict[str, Tensor]:
        return self.network.get_submodule("classifier").state_dict()

    def training_images(self, count: int) -> Iterator[Tensor]:
        chosen = np.random.default_rng(0).permutation(len(self._train))[:count]
        return (image for image, _ in _read(self._train, chosen.tolist()))

    def validation(self, count: int | None) -> Iterator[tuple[Tensor, int]]:
        places = range(len(self._valid))
        return _read(self._valid, places if count is None else spread(places, count))

    def comparison(self) -> ClassComparison:
        return ClassComparison()


def _read(images: ImageDataset, indices: Iterable[int]) -> Iterator[tuple[Tensor, int]]:
    for item in (images[Key(index)] for index in indices):
        if item.image is None:
            raise UserError(f"the image {item.broken[0]} cannot be read.")
        yield item.image[None].float(), item.target


def _teacher(run: Run) -> str:
    """The teacher of a run, for the model card."""
    record, errors = run.record["teacher"], run.record.get("teacher_errors")
    if record is None or run.settings["method"] == "base":
        return "none"
    digest = f" (SHA-256 {record['sha256']})" if "sha256" in record else ""
    accuracy = f", top-1 {100 - errors['err1']:.2f} %" if errors else ""
    return f"{record['arch']}, {Path(record['file']).name}{digest}{accuracy}"


class ClassComparison(Comparison):
    """Top-1 accuracy, and the differences of the classes' probabilities."""

    def __init__(self) -> None:
        self._hits: list[tuple[bool, bool]] = []
        self._changed, self._largest = 0, 0.0

    def add(self, target: int, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        network, file = (outputs[0][0].softmax(0) for outputs in (expected, found))
        classes = int(network.argmax()), int(file.argmax())
        self._hits.append((classes[0] == target, classes[1] == target))
        self._changed += classes[0] != classes[1]
        self._largest = max(self._largest, float((network - file).abs().max()))

    def accuracy(self) -> dict[str, tuple[float, float]]:
        network, file = 100 * np.mean(self._hits, axis=0)
        return {"top-1, %": (float(network), float(file))}

    def differences(self) -> dict[str, float]:
        return {"largest difference of a probability": self._largest, "images with another class": self._changed}
