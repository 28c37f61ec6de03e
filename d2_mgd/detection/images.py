"""Detectron2's dataset mapper, for images and boxes that it would silently get wrong."""

from __future__ import annotations

import io
from typing import IO, Any

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from d2_mgd.data.images import needs_preparation, prepared
from d2_mgd.errors import UserError

__all__ = ["ImageMapper"]

_PREFIX = "upright-8-bit://"


class _PreparedImages(PathHandler):
    """``upright-8-bit://PATH`` -> the image at PATH as a file that is in no way odd, and not compressed."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        encoded = io.BytesIO()
        with PathManager.open(path.removeprefix(_PREFIX), "rb") as file, Image.open(file) as image:
            upright = prepared(image)
            (upright if upright.mode == "L" else upright.convert("RGB")).save(encoded, "PPM")
        encoded.seek(0)
        return encoded


PathManager.register_handler(_PreparedImages())


class ImageMapper(DatasetMapper):
    """Detectron2's mapper. 16-bit greyscale is scaled instead of clipped to white, turned TIFFs are turned once, and
    damaged PNGs and boxes that are none are errors instead of black pixels and a loss that is not finite.

    Calling it raises UserError for such a box and for images of 32-bit numbers, and what Detectron2's raises.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        if self.is_train:
            _check_boxes(dataset_dict.get("annotations", ()))
        path = dataset_dict["file_name"]
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            prepare = needs_preparation(image)
        if not prepare:
            return super().__call__(dataset_dict)
        try:
            sample = super().__call__({**dataset_dict, "file_name": _PREFIX + path})
        except SizeMismatchError as error:
            raise SizeMismatchError(str(error).replace(_PREFIX, "")) from error
        sample["file_name"] = path
        return sample


def _check_boxes(annotations: Any) -> None:
    """Sets in COCO's format were checked as a whole; others only here."""
    for index, annotation in enumerate(annotations):
        box = np.asarray(annotation["bbox"], dtype=np.float64)
        sized = annotation["bbox_mode"] in (BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)
        if not np.isfinite(box).all() or (sized and (box[2:4] < 0).any()):
            raise UserError(
                f"the box of its annotation {index + 1} of {len(annotations)} is not finite or has a negative side: "
                f"{box.tolist()}"
            )
