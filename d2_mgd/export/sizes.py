"""Checks that a student and its file take the image sizes that the file's signature names.

Shape shorthand: (H, W) of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2_mgd.errors import UserError, reason
from d2_mgd.export.students import Student

_DIFFERENT = 0.1  # relative difference of an output; float16 causes less


def check_network(student: Student) -> None:
    """Run the network on the example and, if the size is dynamic, on images of two other sizes.

    Raises:
        UserError: PyTorch cannot run it.
    """
    for images in student.signature.examples():
        try:
            with torch.no_grad():
                student.network(images)
        except (AssertionError, RuntimeError) as error:  # vision transformers assert their size
            advice = "leave --size out, or name one size" if student.signature.dynamic_size else "name another --size"
            raise UserError(f"{_name(student)} cannot run on {_size(images)}: {reason(error)}; {advice}.") from error


def check_sizes(student: Student, run: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Compare the file with the network on images of three sizes, where the number of answers is fixed.

    Args:
        student: has the network.
        run: runs the file.

    Raises:
        UserError: the file fails, or answers differently.
    """
    for images in student.signature.examples():
        with torch.no_grad():
            expected = student.network(images)
        try:
            found = run(images)
        except Exception as error:  # the errors of ONNX Runtime have no type in common
            raise UserError(_fixed(student, images, reason(error))) from error
        for network, file, axes in zip(expected, found, student.signature.outputs.values()):
            if set(axes.values()) <= {"batch"} and not _alike(network.float(), file.float()):
                raise UserError(_fixed(student, images, "its output differs from PyTorch's"))


def _alike(network: Tensor, file: Tensor) -> bool:
    return network.shape == file.shape and bool((network - file).norm() <= _DIFFERENT * network.norm())


def _fixed(student: Student, images: Tensor, why: str) -> str:
    return (
        f"the file of {_name(student)} cannot have a dynamic size, because it does not run on {_size(images)} as "
        f"PyTorch does: {why}; leave --size out, or name one size."
    )


def _name(student: Student) -> str:
    return f"the student {student.description['architecture']}"


def _size(images: Tensor) -> str:
    return f"images of {images.shape[-2]} x {images.shape[-1]} px"
