"""Checks of a whole data set in COCO format: its json, the presence of its files, and their pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from d2_mgd.data.coco import NOTE, CocoError, Finding, Findings, Inspection, inspect_coco, read_coco
from d2_mgd.data.files import find_files
from d2_mgd.data.images import ImageFacts, inspect_image

__all__ = ["OUTSIDE", "inspect_content", "inspect_pixels", "inspect_set", "inspected_images"]

OUTSIDE = "images outside their folder"  # a kind of finding; MGD.DATA.ALLOW_OUTSIDE_ROOT allows it

_PORTION = 4096


def inspect_set(
    json_file: str, image_root: str, wanted: Inspection, allow_outside: bool = False
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Check the json of a data set and the presence of its image files; no image is read.

    Args:
        json_file: annotations in COCO's instance format.
        image_root: the folder that the json's file names are relative to.
        wanted: the intended use.
        allow_outside: whether file names may leave ``image_root``.

    Returns:
        the findings, and the json entries of the images whose files exist.

    Raises:
        CocoError: the json is not in COCO's format, or the folder does not exist.
    """
    return inspect_content(read_coco(json_file), json_file, image_root, wanted, allow_outside)


def inspect_content(
    content: dict[str, Any], source: str, image_root: str, wanted: Inspection, allow_outside: bool = False
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """:func:`inspect_set` of the content of a json, which messages call ``source``."""
    if not os.path.isdir(image_root):
        raise CocoError(f"its image folder {image_root} does not exist")
    inspected, images = inspect_coco(content, source, wanted)
    files = find_files(image_root, [image["file_name"] for image in images], allow_outside)
    found = Findings()
    for name, path in files.outside.items():
        example = f"the image {name} leads to {path}, outside the image folder {image_root}"
        found.add(OUTSIDE, example, things="images", of=len(images))
    for path in files.missing:
        found.add("missing images", f"the image {path} does not exist", things="images", of=len(images))
    absent = {*files.missing}
    there = [
        image
        for image in images
        if image["file_name"] not in files.outside and os.path.join(image_root, image["file_name"]) not in absent
    ]
    return [*inspected, *found], there


def inspect_pixels(
    image_root: str, images: Sequence[dict[str, Any]], workers: int = 1, progress: bool = False
) -> list[Finding]:
    """Decode every image file of a set completely; returns errors and unusual properties.

    Args:
        image_root: the folder.
        images: json entries of the images whose files exist.
        workers: number of threads; decoding releases the GIL.
        progress: show a progress bar.
    """
    found = Findings()
    paths = [os.path.join(image_root, image["file_name"]) for image in images]
    facts = tqdm(
        inspected_images(paths, workers), total=len(paths), unit="image", desc="decoding", disable=not progress
    )
    for known, image, path in zip(facts, images, paths):  # facts first, so that the progress bar ends at its total
        if known.error:
            found.add(known.kind, f"{path} {known.error}", things="images", of=len(images))
            continue
        for note in known.notes:
            found.add(f"images: {note}", f"{path} {note}", severity=NOTE, things="images", of=len(images))
        difference = _size_difference(image, known)
        if difference:
            found.add(
                "images of another size than in the json", f"{path} {difference}", things="images", of=len(images)
            )
    return list(found)


def inspected_images(paths: Sequence[str | os.PathLike[str]], workers: int) -> Iterator[ImageFacts]:
    """Yield what :func:`inspect_image` finds in each file, with ``workers`` threads."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        # in portions: a queue of a million images would take memory and delay Ctrl-C
        for start in range(0, len(paths), _PORTION):
            yield from pool.map(inspect_image, paths[start : start + _PORTION])


def _size_difference(image: dict[str, Any], known: ImageFacts) -> str:
    listed = (image["width"], image["height"])
    if listed == known.size:
        return ""
    sentence = f"has {known.size[0]} x {known.size[1]} pixels, but {listed[0]} x {listed[1]} in the json"
    if listed == known.stored:
        sentence += ", its size before the EXIF orientation is applied: boxes refer to the upright image"
    return sentence
