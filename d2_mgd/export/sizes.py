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


Answers = list[tuple[Tensor, Sequence[Tensor]]]


def network_answers(student: Student) -> Answers:
    """The example and, if the size is dynamic, images of two other sizes, each with the outputs of the network.

    Raises:
        UserError: PyTorch cannot run the network on one of them.
    """
    found: Answers = []
    for images in student.signature.examples():
        try:
            with torch.no_grad():
                found.append((images, student.network(images)))
        except (AssertionError, RuntimeError) as error:  # vision transformers assert their size
            advice = "leave --size out, or name one size" if student.signature.dynamic_size else "name another --size"
            raise UserError(f"{_name(student)} cannot run on {_size(images)}: {reason(error)}; {advice}.") from error
    return found


def check_sizes(student: Student, answers: Answers, run: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Compare the file with :func:`network_answers`, where the number of outputs does not depend on the image.

    Args:
        student: has the signature.
        answers: of the network.
        run: runs the file.

    Raises:
        UserError: the file fails, or answers differently.
    """
    for images, expected in answers:
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
