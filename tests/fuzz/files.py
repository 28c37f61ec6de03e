"""Targets for files that others made: weights files, images, file names, and json in COCO's format."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st
from PIL import Image

from d2_mgd.data.coco import ERROR, CocoError, Inspection, inspect_coco, read_coco
from d2_mgd.data.files import find_files
from d2_mgd.data.images import inspect_image
from d2_mgd.training.weights_files import UntrustedFileError, read_pickled_arrays, read_safetensors, read_tensors
from tests.fuzz.target import Target, check_sentence


@contextlib.contextmanager
def _file(data: bytes, suffix: str = "") -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(data)
        yield path


@st.composite
def _damaged(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """A file that is cut, changed in some bytes, or has some more; or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(data)))
        data[place:place] = draw(st.binary(max_size=20))
    return bytes(data)


# --- weights ---


class _Program:
    """Leaves a trace if it is unpickled as python unpickles."""

    def __reduce__(self) -> Any:
        return _leave_trace, ()


_TRACES: list[int] = []


def _leave_trace() -> None:
    _TRACES.append(1)


def _saved(save: Callable[[Any, Any], None], data: Any) -> bytes:
    stream = io.BytesIO()
    save(data, stream)
    return stream.getvalue()


@cache
def _weights_files() -> list[bytes]:
    tensors = {"conv.weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}
    arrays = {"model": {"w": np.ones((2, 2), np.float32), "n": np.float64(2)}, "__author__": "me", "tags": [1, None]}
    programs = {"model": {"w": _Program()}}

    def old(data: Any, stream: Any) -> None:
        torch.save(data, stream, _use_new_zipfile_serialization=False)

    pickles = [pickle.dumps(data, protocol) for data in (arrays, programs) for protocol in range(6)]
    torches = [_saved(save, data) for save in (torch.save, old) for data in (tensors, {"model": tensors}, programs)]
    return [*pickles, *torches, safetensors.torch.save(tensors, {"format": "pt"})]


def _check_weights(data: bytes) -> None:
    _TRACES.clear()
    with _file(data) as path:
        for read in (read_tensors, read_pickled_arrays, read_safetensors):
            try:
                read(str(path))
            except UntrustedFileError as error:
                check_sentence(str(error))
                assert str(path) in str(error)
    assert not _TRACES, "the file ran code"


# --- images ---


@cache
def _image_files() -> list[bytes]:
    pixels = (np.mgrid[:24, :32].sum(axis=0) * 4).astype(np.uint8)
    plain = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("PNG", plain.convert("RGB"), {}),
        ("PNG", plain, {"exif": exif}),
        ("PNG", Image.fromarray(pixels.astype(np.uint16) * 256), {}),
        ("PNG", plain.convert("RGBA"), {}),
        ("JPEG", plain.convert("RGB"), {"exif": exif}),
        ("JPEG", plain.convert("CMYK"), {}),
        ("TIFF", plain, {"exif": exif}),
        ("TIFF", plain.convert("RGB"), {"compression": "tiff_lzw"}),
        ("GIF", plain, {}),
        ("BMP", plain.convert("RGB"), {}),
        ("WEBP", plain.convert("RGB"), {"exif": exif}),
        ("PPM", plain, {}),
    ]
    files = []
    for kind, image, options in kinds:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        files.append(stream.getvalue())
    return files


def _check_image(data: bytes) -> None:
    with _file(data) as path:
        facts = inspect_image(path)
        if facts.error:
            check_sentence(f"{path} {facts.error}")
            assert facts.kind
        else:
            assert min(facts.size) > 0


def _check_mapped_image(data: bytes) -> None:
    """What is said to be readable is read by training, at the size that was said."""
    mapper, fine = _mapper()
    with _file(data) as path:
        facts = inspect_image(path)
        record = {"file_name": str(path), "width": facts.size[0], "height": facts.size[1]}
        try:
            sample = mapper(record)
        except Exception:  # the loader names the file and the reason
            assert facts.error or not fine(facts.size), "said to be readable, and is not"
            return
        assert not facts.error, f"read, though it {facts.error}"
        assert sample["image"].shape[0] == 3


@cache
def _mapper() -> tuple[Any, Callable[[tuple[int, int]], bool]]:
    from detectron2.config import get_cfg

    from d2_mgd.data.images import resized
    from d2_mgd.detection.images import ImageMapper

    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 32, 64
    return ImageMapper(cfg, is_train=False), lambda size: min(resized(size[1], size[0], 32, 64)) > 0


# --- file names ---

_NAMES = st.lists(
    st.one_of(
        st.sampled_from(["..", ".", "", "a", "deep", "out", "inside", "loop", "a.png", "b.png", "images", "/", "~"]),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4),
    ),
    max_size=5,
).map("/".join)


@cache
def _folder() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    held = tempfile.TemporaryDirectory()
    root = Path(held.name) / "set" / "images"
    (root / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png", "../secret.png"):
        (root / name).write_text(name)
    (root / "out").symlink_to(root.parent)
    (root / "inside").symlink_to(root / "deep")
    (root / "loop").symlink_to(root / "loop")
    return held, root


def _check_names(names: list[str]) -> None:
    root = _folder()[1]
    found = find_files(str(root), names)
    for name in names:
        path = os.path.join(root, name)
        if name in found.outside or path in found.missing:
            continue
        assert os.path.exists(path), f"{name!r} does not exist"
        real = Path(os.path.realpath(path))
        assert real == root or root in real.parents, f"{name!r} leads to {real}"


# --- json in COCO's format ---

_ANY = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 200),
        st.integers(10**300, 10**310),
        st.floats(),
        st.text(max_size=3),
        st.sampled_from(["a.png", "0.png", 1, 0]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
_KEYS = ["id", "file_name", "width", "height", "bbox", "category_id", "image_id", "iscrowd", "area", "segmentation"]


def _coco(images: int = 3) -> dict[str, Any]:
    box = {"bbox": [2, 3, 8, 9], "area": 72, "iscrowd": 0, "segmentation": [[2, 3, 10, 3, 10, 12]]}
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 32, "height": 24} for n in range(1, images + 1)],
        "annotations": [{"id": n, "image_id": n % images + 1, "category_id": n % 2 + 1, **box} for n in range(1, 6)],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }


@st.composite
def _changed_coco(draw: st.DrawFn) -> Any:
    """A valid set in which some entries were replaced, added or taken away."""
    content = _coco()
    for _ in range(draw(st.integers(0, 4))):
        part = draw(st.sampled_from(["images", "annotations", "categories"]))
        entries = content[part]
        what = draw(st.integers(0, 11))
        if what == 0:
            content[part] = draw(_ANY)
        elif not isinstance(entries, list):
            continue
        elif what == 1:
            entries.append(draw(_ANY))
        elif entries and what == 2:
            entries.append(draw(st.sampled_from(entries)))
        elif entries:
            entry = draw(st.sampled_from(entries))
            if isinstance(entry, dict):
                key = draw(st.sampled_from(sorted(set(entry) & {*_KEYS, "name"}) + _KEYS))
                if what == 3:
                    entry.pop(key, None)
                elif key == "bbox" and draw(st.booleans()):
                    entry[key] = draw(st.lists(st.floats(-5, 40) | st.floats(), min_size=4, max_size=4))
                else:
                    entry[key] = draw(_ANY)
    return content


_ALL = Inspection(train=True, evaluate=True, masks=True, sizes=((32, 64),))


def _check_coco(content: Any) -> None:
    """Nothing in a json raises anything else than what says that it is none."""
    _accepted(content)


def _accepted(content: Any) -> bool:
    """Whether a set is; all that is said of it is checked."""
    with _file(json.dumps(content).encode()) as path:
        try:
            read = read_coco(str(path))
        except CocoError as error:
            check_sentence(str(error))
            return False
        findings, _ = inspect_coco(read, str(path), _ALL)
    for finding in findings:
        check_sentence(str(finding))
        assert finding.count > 0 and finding.examples
    return all(finding.severity != ERROR for finding in findings)


def _check_loaded_coco(content: Any) -> None:
    """What is accepted is loaded, trained on and evaluated by Detectron2 and pycocotools."""
    if not _accepted(content):
        return
    from detectron2.data.datasets import load_coco_json
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    logging.disable(logging.WARNING)
    try:
        with _file(json.dumps(content).encode()) as path, contextlib.redirect_stdout(io.StringIO()):
            records = load_coco_json(str(path), str(path.parent))
            for record in records:
                _training_mapper()._transform_annotations(*_transformed(record))
            truth = COCO(str(path))
            found = [{"image_id": records[0]["image_id"], "category_id": key, "bbox": [1, 2, 3, 4], "score": 0.5}
                     for key in truth.cats]  # fmt: skip
            evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
    finally:
        logging.disable(logging.NOTSET)


@cache
def _training_mapper() -> Any:
    from detectron2.config import get_cfg

    from d2_mgd.detection.images import ImageMapper

    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    return ImageMapper(cfg, is_train=True)


def _transformed(record: dict[str, Any]) -> tuple[dict[str, Any], Any, tuple[int, int]]:
    from detectron2.data.transforms import HFlipTransform, TransformList

    return record, TransformList([HFlipTransform(record["width"])]), (record["height"], record["width"])


TARGETS = [
    Target("weights files", st.deferred(lambda: _damaged(_weights_files())), _check_weights, cost=2),
    Target("images", st.deferred(lambda: _damaged(_image_files())), _check_image),
    Target("file names", st.lists(_NAMES, max_size=4), _check_names),
    Target("json in COCO's format", st.one_of(_changed_coco(), _ANY), _check_coco, cost=2),
]
DETECTRON2_TARGETS = [
    Target("images through the mapper", st.deferred(lambda: _damaged(_image_files())), _check_mapped_image, cost=2),
    Target("json through Detectron2", _changed_coco(), _check_loaded_coco, cost=4),
]
