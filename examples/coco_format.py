"""Data in COCO format for torchvision's detectors: images with boxes, COCO AP, and pictures of detections.

Shape shorthand: N images, B boxes, H, W.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

from d2_mgd.data.files import find_files
from d2_mgd.data.images import prepared

__all__ = ["CocoImages", "draw_detections", "evaluate"]

_COLOURS = ("red", "lime", "cyan", "yellow", "magenta", "orange", "white")


class CocoImages(torch.utils.data.Dataset):
    """Images (3, H, W) in 0..1 and targets as torchvision's detectors take them: boxes (B, 4), labels from 1, image_id.

    Args:
        annotations: json file in COCO format.
        folder: of the images.
        mirror: for training: mirror at random, and leave out images without annotations.

    Raises:
        SystemExit: a sentence: a file is absent, or there is nothing to train on.
    """

    def __init__(self, annotations: Path, folder: Path, mirror: bool) -> None:
        for path in (annotations, folder):
            if not path.exists():
                raise SystemExit(f"error: {path} does not exist.")
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(annotations))
        self.folder, self.mirror = folder, mirror
        self.ids = sorted(key for key in self.coco.imgs if self.coco.getAnnIds(key) or not mirror)
        self.categories = sorted(self.coco.cats)
        if not self.ids or not self.categories:
            raise SystemExit(f"error: {annotations} has no {'annotated images' if self.categories else 'categories'}.")
        found = find_files(str(folder), self.files())
        if found.outside:
            name, place = next(iter(found.outside.items()))
            raise SystemExit(f"error: the image {name} leads to {place}, outside {folder} ({len(found.outside)} such).")
        if found.missing:
            raise SystemExit(f"error: {found.missing[0]} does not exist ({len(found.missing)} such images).")

    def files(self) -> list[str]:
        return [self.coco.imgs[key]["file_name"] for key in self.ids]

    @property
    def names(self) -> list[str]:
        """Of the classes with the labels 1, 2, ..."""
        return [self.coco.cats[key]["name"] for key in self.categories]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        key = self.ids[index]
        path = self.folder / self.coco.imgs[key]["file_name"]
        try:
            with path.open("rb") as file, Image.open(file) as picture:
                image = pil_to_tensor(prepared(picture).convert("RGB")).float() / 255
        except (OSError, SyntaxError, ValueError) as error:
            raise RuntimeError(f"{path} cannot be read: {error}") from error
        things = [
            thing for thing in self.coco.imgToAnns[key] if not thing.get("iscrowd") and min(thing["bbox"][2:]) > 0
        ]
        boxes = torch.tensor([thing["bbox"] for thing in things], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if self.mirror and torch.rand(()) < 0.5:
            image, boxes[:, [0, 2]] = image.flip(-1), image.shape[-1] - boxes[:, [2, 0]]
        labels = torch.tensor([self.categories.index(thing["category_id"]) + 1 for thing in things], dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor(key)}

    def batches(self, size: int, seed: int | None = None, workers: int = 0) -> torch.utils.data.DataLoader:
        """Lists of N images and of N targets, in an order that follows from ``seed``; without one, in the file's."""
        order = torch.Generator().manual_seed(seed or 0)
        return torch.utils.data.DataLoader(
            self, size, seed is not None, generator=order, num_workers=workers, collate_fn=_as_lists
        )


def _as_lists(batch: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return [image for image, _ in batch], [target for _, target in batch]


@torch.no_grad()
def evaluate(
    model: nn.Module, data: CocoImages, device: str, batch_size: int = 16, workers: int = 0
) -> dict[str, float]:
    """COCO AP and AP50 of a torchvision detector, in percent."""
    model.to(device).eval()
    found = []
    for images, targets in tqdm(data.batches(batch_size, None, workers), desc="evaluating", leave=False):
        for output, target in zip(model([image.to(device) for image in images]), targets):
            boxes = output["boxes"].cpu().clone()
            boxes[:, 2:] -= boxes[:, :2]
            for box, score, label in zip(boxes.tolist(), output["scores"].tolist(), output["labels"].tolist()):
                category = data.categories[label - 1]
                found.append(
                    {"image_id": int(target["image_id"]), "category_id": category, "bbox": box, "score": score}
                )
    if not found:
        return {"AP": 0.0, "AP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(data.coco, data.coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP": 100 * float(evaluation.stats[0]), "AP50": 100 * float(evaluation.stats[1])}


@torch.no_grad()
def draw_detections(models: Mapping[str, nn.Module], data: CocoImages, device: str, path: Path, least: float) -> None:
    """Some images, one a row: the annotations, then every network's detections that score ``least`` or more."""
    rows = []
    for index in range(min(5, len(data))):
        image, target = data[index]
        scale = 256 / image.shape[-1]
        large = F.interpolate(image[None], (round(image.shape[-2] * scale), 256), mode="bilinear")[0]
        outputs = [target, *(model.to(device).eval()([image.to(device)])[0] for model in models.values())]
        rows.append(torch.cat([_draw(large, output, scale, data.names, least) for output in outputs], dim=2))
    save_image(torch.cat(rows, dim=1), path)


def _draw(image: Tensor, output: dict[str, Tensor], scale: float, names: list[str], least: float) -> Tensor:
    boxes, labels = output["boxes"].cpu() * scale, output["labels"].cpu() - 1
    if "scores" in output:
        boxes, labels = boxes[output["scores"].cpu() >= least], labels[output["scores"].cpu() >= least]
    if len(boxes):
        colours = [_COLOURS[label % len(_COLOURS)] for label in labels.tolist()]
        image = draw_bounding_boxes(image, boxes, [names[label] for label in labels.tolist()], colours, width=2)
    return F.pad(image, (2, 2, 2, 2), value=1.0)
