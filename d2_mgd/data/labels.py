"""Labels of another format as the content of a COCO-format json, so that checks, training and evaluation exist once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from d2_mgd.data.coco import ERROR, NOTE, WARNING, Finding, Findings
from d2_mgd.data.images import upright_size

__all__ = ["IMAGE_ENDINGS", "LabelBuilder", "LabelledSet", "image_size", "in_threads"]

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".mpo", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_NO_LABEL_FILE = "images without a label file"
_READERS = 16  # threads; they wait for the disk

Given = TypeVar("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class LabelledSet:
    """A data set in COCO form.

    Args:
        source: the file or folder that it was read from.
        content: as in a COCO-format json.
        image_root: the folder that its file names are relative to.
        findings: what is wrong with the label files; annotations with an error are not in ``content``.
    """

    source: str
    content: dict[str, Any]
    image_root: str
    findings: list[Finding]


class LabelBuilder:
    """Collects images and annotations. Ids count from 1, in the order of the calls.

    Args:
        source: the file or folder that is read.
        image_root: the folder that file names are relative to.
        classes: names by class number, which may have gaps.
    """

    def __init__(self, source: str, image_root: str, classes: dict[int, str]) -> None:
        self.source, self.image_root = source, image_root
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories = [{"id": number + 1, "name": classes[number]} for number in sorted(classes)]
        self._found = Findings()
        self._seen: Counter[str] = Counter()

    def count(self, things: str, number: int = 1) -> None:
        """Count what :meth:`add` gives a share of."""
        self._seen[things] += number

    def add(self, kind: str, example: str, things: str, severity: str = ERROR) -> None:
        """Report a fault of the label files."""
        self._found.add(kind, example, severity=severity, things=things)

    def without_labels(self, image: str, expected: str) -> None:
        """Report an image without a label file: it is background."""
        self.add(_NO_LABEL_FILE, f"the image {image} has no label file {expected}: it is background", "images", NOTE)

    def image(self, file_name: str, size: tuple[int, int]) -> int:
        """Add an image of (width, height) pixels; returns its id."""
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": file_name, "width": size[0], "height": size[1]})
        return number

    def annotation(
        self, image: int, class_number: int, box: Sequence[float], polygon: Sequence[float] = (), crowd: bool = False
    ) -> None:
        """Add an object.

        Args:
            image: id of its image.
            class_number: its class.
            box: [x, y, width, height] in pixels.
            polygon: [x1, y1, x2, y2, ...] in pixels, for a mask.
            crowd: not trained on, and ignored in evaluation.
        """
        entry = {
            "id": len(self.annotations) + 1,
            "image_id": image,
            "category_id": class_number + 1,
            "bbox": list(box),
            "area": _polygon_area(polygon) if polygon else box[2] * box[3],
            "iscrowd": int(crowd),
        }
        if polygon:
            entry["segmentation"] = [list(polygon)]
        self.annotations.append(entry)

    def built(self) -> LabelledSet:
        """All that was added."""
        content = {
            "info": {"description": f"from {self.source}"},
            "images": self.images,
            "annotations": self.annotations,
            "categories": self.categories,
        }
        findings = list(self._found)
        for finding in findings:
            finding.of = self._seen[finding.things]
            if finding.kind == _NO_LABEL_FILE and finding.count == finding.of:
                finding.severity = WARNING
        return LabelledSet(self.source, content, self.image_root, findings)

    def size_fault(self, error: Exception, image: str) -> None:
        """Report an image file whose size could not be read."""
        if isinstance(error, FileNotFoundError):
            self.add("missing images", f"the image {image} does not exist", "images")
        else:
            self.add("images that cannot be read", f"the image {image} cannot be read: {error}", "images")


def image_size(path: str) -> tuple[int, int] | Exception:
    """(width, height) of an image file, or why they cannot be read."""
    try:
        return upright_size(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return error


def in_threads(read: Callable[[Given], Result], things: Iterable[Given]) -> Iterator[Result]:
    """``read`` of each thing, in their order, many files at the same time."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(read, things)


def _polygon_area(points: Sequence[float]) -> float:
    """The shoelace formula."""
    xs, ys = points[::2], points[1::2]
    around = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]])
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in around)) / 2
