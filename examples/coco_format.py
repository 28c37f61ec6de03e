"""Data in COCO format for torchvision's detectors: images with boxes, COCO AP, and pictures of detections.

Shape shorthand: N images, B boxes, H, W.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from d2_mgd.data.files import find_files
from d2_mgd.data.images import prepared
from d2_mgd.visualize import Detections, draw_detections


class CocoImages(torch.utils.data.Dataset):
    """Images (3, H, W) in 0..1 with targets for torchvision's detectors: boxes (B, 4), labels from 1, image_id.

    Args:
        annotations: json file in COCO format.
        folder: of the images.
        mirror: for training: mirror images at random, and leave out those without annotations.

    Raises:
        SystemExit: a file does not exist, or there are no images or no categories.
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
            raise SystemExit(
                f"error: the image {name} is at {place}, outside {folder} ({len(found.outside)} such images)."
            )
        if found.missing:
            raise SystemExit(f"error: {found.missing[0]} does not exist ({len(found.missing)} such images).")

    def files(self) -> list[str]:
        return [self.coco.imgs[key]["file_name"] for key in self.ids]

    @property
    def names(self) -> list[str]:
        """Names of the classes with the labels 1, 2, ..."""
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
        """A dataloader of lists of N images and N targets, shuffled if there is a ``seed``."""
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
def show_detections(models: Mapping[str, nn.Module], data: CocoImages, device: str, least: float) -> Figure:
    """Draw the annotations and each network's detections on five images; detections need a score of ``least``."""
    samples = [data[index] for index in range(min(5, len(data)))]
    columns = {"ground truth": [_detections(target) for _, target in samples]}
    for caption, model in models.items():
        model.to(device).eval()
        columns[caption] = [_detections(model([image.to(device)])[0]) for image, _ in samples]
    pixels = [(image.permute(1, 2, 0) * 255).byte().numpy() for image, _ in samples]
    return draw_detections(pixels, columns, data.names, threshold=least, truth="ground truth")


def _detections(output: Mapping[str, Tensor]) -> Detections:
    found = {key: output[key].cpu().numpy() for key in ("boxes", "labels", "scores") if key in output}
    return Detections(found["boxes"], found["labels"] - 1, found.get("scores"))
