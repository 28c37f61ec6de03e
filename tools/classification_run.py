"""What a run of classification/main_*.py sees in an image: the maps of its two networks, and its likeliest classes.

Shape shorthand: S student channels, T teacher channels, K classes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from run_folder import Maps, Run
from torch import nn

from classification.checkpoint import STUDENT_LAST
from classification.data import ImageDataset, Key, image_statistics, normalize
from classification.features import pair_features
from classification.models import build
from classification.weights import (
    load_file,
    load_weights,
    network_from_file,
    pretrained_network,
    read_checkpoint,
)
from d2_mgd.data.class_folders import Folder, find_folders
from d2_mgd.distill import FeatureTaps, Tap
from d2_mgd.distill.map_shapes import as_map
from d2_mgd.distill.stages import common_stages, measure_maps
from d2_mgd.errors import UserError, located
from d2_mgd.training import file_digest
from d2_mgd.visualize import Prediction


@dataclass(frozen=True)
class Classifier:
    """A run's student after its last epoch.

    Args:
        network: in eval mode, on the CPU.
        classes: names, by number.
        image_size: side of the square that it sees.
        weights: its file.
    """

    network: nn.Module
    classes: list[str]
    image_size: int
    weights: Path

    @torch.no_grad()
    def predict(self, images: Sequence[Path], best: int = 5) -> list[Prediction]:
        """The ``best`` likeliest classes of each image, or all K where there are fewer.

        Raises:
            UserError: an image cannot be read.
        """
        found = []
        for image in images:
            pixels = seen_pixels(image, self.image_size)
            shares = self.network(_normalised(pixels, self.network)).softmax(dim=1)[0]
            top = shares.topk(min(best, len(self.classes)))
            found.append(Prediction([self.classes[int(index)] for index in top.indices], top.values.numpy()))
        return found


def read_classifier(run: Run) -> Classifier:
    """A run's student after its last epoch.

    Raises:
        UserError: its file is gone, damaged, or of another network.
    """
    path = run.folder / STUDENT_LAST
    with located(f"the student of {run.folder} cannot be loaded: "):
        content = read_checkpoint(path, "its file")
        lacking = [key for key in ("arch", "classes", "image_size") if key not in content]
        if lacking:
            raise UserError(f"its file {path} lacks {', '.join(lacking)}, so no training has written it.")
        name, classes = content["arch"], list(content["classes"])
        network = build(name, len(classes), int(content["image_size"]))
        load_weights(network, load_file(path, name, "its file"), name, f"its file {path}")
        return Classifier(network.eval(), classes, int(content["image_size"]), path)


def validation_images(run: Run) -> tuple[list[Path], list[str]]:
    """All images that a run was evaluated on, and the class of each.

    Raises:
        UserError: its data are not there any more.
    """
    settings = run.settings
    with located(f"the images of {run.folder} are not there: "):
        _, held_out = find_folders(Path(settings["data"]), settings["val_split"])
        return (
            [held_out.path(index) for index in range(len(held_out))],
            [held_out.classes[int(target)] for target in held_out.targets],
        )


def first_image(run: Run) -> Path:
    """Of those that the run was evaluated on. Errors as in :func:`validation_images`."""
    return validation_images(run)[0][0]


@torch.no_grad()
def feature_maps(run: Run, image: Path) -> Maps:
    """Both networks' maps on an image that is resized and cropped as in an evaluation.

    Raises:
        UserError: a network or its weights cannot be loaded, or the image cannot be read.
    """
    settings = run.settings
    student = read_classifier(run)
    pixels = seen_pixels(image, student.image_size)
    with located("the teacher cannot be loaded: "):
        teacher = _teacher(run, len(student.classes))
        names = settings["arch"], run.record["teacher"]["arch"]
        networks = student.network, teacher
        images = [_normalised(pixels, network) for network in networks]
        stages = functools.partial(common_stages, names, networks, images)
        pairs = pair_features(*names, settings["features"], stages)
        taps = {f: pair.student for f, pair in pairs.items()}, {f: pair.teacher for f, pair in pairs.items()}
        student_maps, teacher_maps = (_tapped(*one) for one in zip(names, networks, taps, images))
        return Maps(pixels, student_maps, teacher_maps, student.weights)


def _teacher(run: Run, num_classes: int) -> nn.Module:
    record = run.record["teacher"]
    if run.settings["teacher_resume"] is None:
        return pretrained_network(record["arch"], None, run.settings["image_size"])[0]
    file = Path(record["file"])
    size = run.settings["image_size"]
    network, _ = network_from_file(record["arch"], file, num_classes, "its file", True, size)
    if file_digest(file) != record["sha256"]:
        raise UserError(f"the teacher's file {file} has changed since the training: its SHA-256 differs.")
    return network


def _tapped(name: str, network: nn.Module, taps: dict[str, Tap], images: torch.Tensor) -> dict[str, torch.Tensor]:
    widths = {feature: grid[0] for feature, grid in measure_maps(name, network, taps, images).items()}
    with FeatureTaps(network.eval(), taps) as found:
        return {feature: as_map(maps, widths[feature]) for feature, maps in found.run(images).items()}


def seen_pixels(image: Path, size: int) -> np.ndarray:
    """The part of an image that a network sees in an evaluation, (size, size, 3) uint8 RGB.

    Raises:
        UserError: the image cannot be read.
    """
    file = np.array([os.fsencode(image.name)], dtype=np.bytes_)
    folder = Folder(image.parent, ("",), file, np.zeros(1, dtype=np.int64))
    seen = ImageDataset(folder, size, augment=False)[Key(0, 0)].image
    if seen is None:
        raise UserError(f"{image} does not exist or is not a readable image.")
    return seen.numpy().transpose(1, 2, 0)


def _normalised(pixels: np.ndarray, network: nn.Module) -> torch.Tensor:
    """(1, 3, size, size), as the network takes images."""
    return normalize(image_statistics(network))(torch.from_numpy(pixels.transpose(2, 0, 1).copy()[None]))
