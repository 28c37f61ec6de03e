"""The formats: how a file is written, and how it runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2_mgd.errors import UserError, reason
from d2_mgd.export.students import Signature

FORMATS = {"onnx": ".onnx", "torchscript": ".ts", "pt2": ".pt2"}  # name -> ending of the file
INPUT = "images"
OPSET = 17  # read by ONNX Runtime from 1.12, TensorRT from 8.5


def check_installed(format_name: str) -> None:
    """Check that the libraries of a format are there.

    Raises:
        UserError: an unknown format, or a library that is not installed.
    """
    if format_name not in FORMATS:
        raise UserError(f"there is no format {format_name!r}; there are: {', '.join(FORMATS)}.")
    for library in ("onnx", "onnxruntime") if format_name == "onnx" else ():
        try:
            importlib.import_module(library)
        except ImportError:
            raise UserError(
                f"--format onnx needs {library}, which is not installed: pip install 'd2_mgd[export]' (in a clone: pip "
                "install -e '.[export]')."
            ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without warnings and logs about traced code: its outputs are compared afterwards."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# ---- writing


def write(network: nn.Module, signature: Signature, format_name: str, path: Path) -> None:
    """Write a network in a format.

    Raises:
        UserError: the network uses an operator, or python code, that the format lacks.
    """
    with torch.no_grad(), quiet():
        if format_name == "onnx":
            _write_onnx(network, signature, path)
        elif format_name == "torchscript":
            _write_torchscript(network, signature, path)
        else:
            _write_pt2(network, signature, path)


def _write_onnx(network: nn.Module, signature: Signature, path: Path) -> None:
    try:
        torch.onnx.export(
            network,
            (signature.example,),
            str(path),
            dynamo=False,  # the other exporter cannot export detectors (pytorch/vision#9306)
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(signature.outputs),
            dynamic_axes={
                INPUT: signature.input_axes,
                **{name: dict(axes) for name, axes in signature.outputs.items()},
            },
        )
    except torch.onnx.errors.OnnxExporterError as error:
        operator = re.search(r"operator '?([\w:.]+)'?", str(error))
        lacking = f"opset {OPSET} has no operator for {operator[1]}" if operator else reason(error)
        advice = " Some operators exist for a fixed size alone: try one --size." if signature.dynamic_size else ""
        raise UserError(f"ONNX cannot express this student: {lacking}.{advice}") from error


def _write_torchscript(network: nn.Module, signature: Signature, path: Path) -> None:
    traced = network if signature.dynamic_size else _FixedSize(network, signature)
    torch.jit.trace(traced, (signature.example,), check_trace=False).save(str(path))


class _FixedSize(nn.Module):
    """A network that refuses images of another size in TorchScript too; tracing alone does not record the size."""

    def __init__(self, network: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.network = network
        self.height, self.width = signature.example.shape[-2:]
        self.checked = torch.jit.script(_of_size)

    def forward(self, images: Tensor) -> Any:
        return self.network(self.checked(images, self.height, self.width))


def _of_size(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2] != height or images.shape[-1] != width:
        message = "the file takes images of {} x {} px, and this one has {} x {}"
        raise ValueError(message.format(height, width, images.shape[-2], images.shape[-1]))
    return images


def _write_pt2(network: nn.Module, signature: Signature, path: Path) -> None:
    dim = torch.export.Dim
    if signature.dynamic_size and not hasattr(dim, "DYNAMIC"):
        raise UserError(f"--format pt2 with a dynamic size needs torch 2.6 or later, not {torch.__version__}.")
    try:
        # sizes have a least value, which torch.export finds for DYNAMIC only
        axes = {axis: dim(name) if name == "batch" else dim.DYNAMIC for axis, name in signature.input_axes.items()}
        with contextlib.redirect_stderr(io.StringIO()):  # where it prints the graph that it could not complete
            program = torch.export.export(network, (signature.example,), dynamic_shapes=(axes,))
    except Exception as error:  # torch.export raises errors of many types for code that it cannot export
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        place = re.search(r"Caused by: \((.+)\)", str(error))
        where = f" at {place[1]}" if place else ""
        raise UserError(
            f"torch.export cannot export this student{where}: {reason(ValueError(first))}. Use onnx or torchscript."
        ) from error
    torch.export.save(program, str(path))


def halved(network: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    """Make ``parts`` of a network compute in float16, in place; everything between them stays float32."""
    for part in parts:
        part.half()
        part.register_forward_pre_hook(lambda module, args: _cast(args, torch.float16))
        part.register_forward_hook(lambda module, args, output: _cast(output, torch.float32))
    return network


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, values
    )


# ---- running


class Runtime:
    """An exported file in the library that runs its format, on one thread of the CPU.

    Args:
        path: of the file.
        format_name: one of :data:`FORMATS`.
        signature: of the file.
    """

    def __init__(self, path: Path, format_name: str, signature: Signature) -> None:
        self._size = None if signature.dynamic_size else tuple(signature.example.shape[-2:])
        self._run: Any
        with quiet():
            if format_name == "onnx":
                self._run = _onnx_session(path)
            elif format_name == "torchscript":
                self._run = torch.jit.load(str(path))
            else:
                self._run = torch.export.load(path).module()

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The outputs for (3, H, W) or (N, 3, H, W) images, in the order of the signature.

        Raises:
            UserError: the images have another size than a file of fixed size takes.
        """
        size = tuple(images.shape[-2:])
        if self._size not in (None, size):
            raise UserError(
                f"the file takes images of {' x '.join(map(str, self._size))} px, and this one has "
                f"{' x '.join(map(str, size))}: export with --size dynamic, or resize all images to one size."
            )
        return list(self._run(images))


def _onnx_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(one) for one in session.run(None, {INPUT: images.numpy()})]
