"""Static quantisation of an ONNX file to int8 by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor

from d2_mgd.export.formats import INPUT, quiet


class _Images(CalibrationDataReader):
    def __init__(self, images: Iterator[Tensor]) -> None:
        self._images = images

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT: image.numpy()}


def quantize(source: Path, target: Path, images: Iterator[Tensor]) -> None:
    """Quantise convolutions and matrix products: int8 weights per channel, uint8 activations.

    Box arithmetic stays float32, because 8 bits cannot hold coordinates.

    Args:
        source: an ONNX file.
        target: file to write.
        images: inputs; the ranges of the activations are measured on them.
    """
    with quiet():
        quantize_static(
            str(source),
            str(target),
            _Images(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    # Quantisation adds inferred shapes. ONNX Runtime simplifies by them, and then fails where a level has no candidate.
    model = onnx.load(str(target))
    del model.graph.value_info[:]
    onnx.save(model, str(target))
