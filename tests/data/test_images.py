from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_images import HEIGHT, READABLE, UNREADABLE, WIDTH, ramp
from PIL import Image

from d2_mgd.data.images import inspect_image, needs_preparation, prepared, resized


@pytest.mark.parametrize("kind", READABLE)
def test_a_readable_image_is_upright_with_eight_bits_and_its_peculiarity_is_told(tmp_path: Path, kind: str) -> None:
    write, pixels, note = READABLE[kind]
    path = write(tmp_path)
    with path.open("rb") as file, Image.open(file) as image:
        assert np.array_equal(np.asarray(prepared(image).convert("RGB")), pixels)
    facts = inspect_image(path)
    assert facts.error == "" and facts.size == (WIDTH, HEIGHT)
    assert any(note in text for text in facts.notes) if note else not facts.notes


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_image_is_told_with_the_reason(tmp_path: Path, kind: str) -> None:
    write, counted_as, reason = UNREADABLE[kind]
    facts = inspect_image(write(tmp_path))
    assert counted_as in facts.kind and reason in facts.error and "\n" not in facts.error


def test_a_missing_image_is_told(tmp_path: Path) -> None:
    assert inspect_image(tmp_path / "none.png").error == "does not exist"


def test_broken_metadata_make_no_image_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "exif.jpg"
    Image.fromarray(ramp()).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert inspect_image(path).error == ""


def test_only_what_others_get_wrong_is_prepared(tmp_path: Path) -> None:
    for kind in ("CMYK", "CMYK jpeg", "two frames"):
        with Image.open(READABLE[kind][0](tmp_path)) as image:
            assert not needs_preparation(image)
    for kind in ("16-bit tiff", "16-bit pgm", "EXIF 6 tiff", "colour"):
        with Image.open(READABLE[kind][0](tmp_path)) as image:
            assert needs_preparation(image)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([64, 240, 800]), st.sampled_from([96, 1333]))
def test_the_size_after_resizing_is_detectron2s(height: int, width: int, shortest: int, longest: int) -> None:
    transforms = pytest.importorskip("detectron2.data.transforms", reason="Detectron2 is not installed")
    theirs = transforms.ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
    # a half may be rounded either way
    assert max(abs(a - b) for a, b in zip(resized(height, width, shortest, longest), theirs)) <= 1
    assert resized(height, width, 0, longest) == (height, width)
