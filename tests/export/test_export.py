"""Writing, checking and rejecting files of a tiny classifier."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2_mgd.errors import UserError
from d2_mgd.export import Comparison, Options, Runtime, Signature, Student, export
from d2_mgd.export.formats import halved, write
from d2_mgd.training.weights_files import read_safetensors

FORMATS = ["onnx", "torchscript", "pt2"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.body(images / 255),)


class Agreement(Comparison):
    """Percent of images with the class of the network; 0 where ``worst`` says so."""

    def __init__(self, worst: bool) -> None:
        self.same: list[bool] = []
        self.worst = worst

    def add(self, target: Any, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        self.same.append(bool((expected[0].argmax() == found[0].argmax()) and not self.worst))

    def accuracy(self) -> dict[str, tuple[float, float]]:
        return {"agreement, %": (100.0, 100 * sum(self.same) / len(self.same))}

    def differences(self) -> dict[str, float]:
        return {"images": len(self.same)}


class Toy(Student):
    def __init__(self, folder: Path, worst: bool = False) -> None:
        self.network = Network().eval()
        self.signature = Signature(torch.rand(2, 3, 12, 12) * 255, {"logits": {0: "batch"}}, dynamic_size=False)
        self.file = folder / "weights.pth"
        self.file.write_bytes(b"weights")
        self.facts = {"teacher": "a | larger one"}
        self.description = {
            "architecture": "Toy",
            "library": "torch",
            "task": "image-classification",
            "channels": "RGB",
        }
        self.worst = worst

    def half_parts(self, network: nn.Module) -> list[nn.Module]:
        return [network.get_submodule("body")]

    def weights(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def training_images(self, count: int) -> Iterator[Tensor]:
        return (image for image, _ in self.validation(count))

    def validation(self, count: int | None) -> Iterator[tuple[Tensor, None]]:
        generator = torch.Generator().manual_seed(1)
        return ((255 * torch.rand(1, 3, 12, 12, generator=generator), None) for _ in range(count or 4))

    def comparison(self) -> Comparison:
        return Agreement(self.worst)


@pytest.fixture
def onnx() -> Any:
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


def needs(format_name: str) -> None:
    for library in ("onnx", "onnxruntime") if format_name == "onnx" else ():
        pytest.importorskip(library)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_file_answers_as_the_network_for_any_number_of_images(format_name: str, half: bool, tmp_path: Path) -> None:
    needs(format_name)
    student = Toy(tmp_path)
    network = copy.deepcopy(student.network)
    if half:
        halved(network, student.half_parts(network))
    write(network, student.signature, format_name, tmp_path / "file")
    run = Runtime(tmp_path / "file", format_name, student.signature)
    for number in (1, 5):
        images = 255 * torch.rand(number, 3, 12, 12)
        (found,), (expected,) = run(images), student.network(images)
        torch.testing.assert_close(found, expected, atol=2e-3 if half else 1e-5, rtol=0)
        assert found.dtype == torch.float32 and not (half and torch.equal(found, expected))
    with pytest.raises(UserError, match="takes images of 12 x 12 px, and this one has 12 x 16"):
        run(torch.zeros(1, 3, 12, 16))
    with pytest.raises(Exception, match=r"has 12 x 16|Got: 16 Expected: 12|images\.size\(\)\[3\] == 12"):
        run._run(torch.zeros(1, 3, 12, 16))  # the file itself


class OneSize(Network):
    """Has a position embedding of 12 x 12 px: PyTorch resamples it, and the files contain the size of the example."""

    def __init__(self, resample: bool) -> None:
        super().__init__()
        self.embedding, self.resample = nn.Parameter(torch.rand(1, 3, 12, 12)), resample

    def forward(self, images: Tensor) -> tuple[Tensor]:
        size = [int(side) for side in images.shape[-2:]]
        embedding = nn.functional.interpolate(self.embedding, size) if self.resample else self.embedding
        return super().forward(images + embedding)


class Wrong(Network):
    """Pools its sums over the number of pixels of the example."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.body(images / 255) * int(images.shape[-1]) / 12,)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (OneSize(resample=False), r"^the student Toy cannot run on images of 24 x 12 px: .*; leave --size out"),
        (OneSize(resample=True), r"^the file of the student Toy cannot have a dynamic size, because it does not"),
        (Wrong(), r"on images of 12 x 24 px as PyTorch does: its output differs from PyTorch's; leave --size out"),
    ],
)
@pytest.mark.parametrize("format_name", ["onnx", "torchscript"])
def test_a_dynamic_size_is_an_error_if_the_file_would_take_one_size(
    format_name: str, network: nn.Module, message: str, tmp_path: Path
) -> None:
    needs(format_name)
    student = Toy(tmp_path)
    student.network, student.signature = network.eval(), dataclasses.replace(student.signature, dynamic_size=True)
    with pytest.raises(UserError, match=message):
        export(student, tmp_path / "out", Options(format_name))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_dynamic_size_of_a_convolutional_network(format_name: str, tmp_path: Path) -> None:
    needs(format_name)
    student = Toy(tmp_path)
    student.signature = dataclasses.replace(student.signature, dynamic_size=True)
    file = export(student, tmp_path / "out", Options(format_name)).file
    images = torch.rand(2, 3, 20, 15)
    found = Runtime(file, format_name, student.signature)(images)[0]
    torch.testing.assert_close(found, student.network(images)[0], atol=1e-5, rtol=0)


def test_the_folder_of_an_accepted_file(onnx: Any, tmp_path: Path) -> None:
    done = export(Toy(tmp_path), tmp_path / "out", Options(images=3, safetensors=True, licence="mit"))
    assert done.file == tmp_path / "out" / "student.onnx" and not done.problem
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "check.json",
        "hub",
        "model_card.md",
        "student.onnx",
    ]
    record = json.loads((tmp_path / "out" / "check.json").read_text())
    assert record["images"] == record["differences"]["images"] == 3
    card = (tmp_path / "out" / "model_card.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and record["sha256"] in card
    assert r"a \| larger one" in card and "float32 (batch, 3, 12, 12), RGB" in card
    hub = tmp_path / "out" / "hub"
    assert (hub / "README.md").read_text() == card
    assert json.loads((hub / "config.json").read_text())["architecture"] == "Toy"
    weights, own = read_safetensors(str(hub / "model.safetensors"))[0], Toy(tmp_path).weights()
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)


def test_a_file_that_answers_differently_has_another_name(tmp_path: Path) -> None:
    done = export(Toy(tmp_path, worst=True), tmp_path / "out", Options("torchscript"))
    assert done.problem == "agreement, % of the file is 0.00 and PyTorch's 100.00, which --tolerance 0.1 does not allow"
    assert done.file == tmp_path / "out" / "rejected_student.ts"
    rejected = ["rejected_check.json", "rejected_student.ts"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == rejected
    assert not export(Toy(tmp_path, worst=True), tmp_path / "out", Options("torchscript", tolerance=100)).problem
    assert not [path for name in rejected if (path := tmp_path / "out" / name).exists()]


class Unreadable(Toy):
    def validation(self, count: int | None) -> Iterator[tuple[Tensor, None]]:
        raise PermissionError(13, "Permission denied", "image.png")


def test_an_earlier_export_stays_until_the_new_one_is_accepted(tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        found = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith("rejected_")]
        return {str(path.relative_to(out)): path.read_bytes() for path in found}

    out = tmp_path / "out"
    export(Toy(tmp_path), out, Options("torchscript", safetensors=True))
    earlier = files()
    assert export(Toy(tmp_path, worst=True), out, Options("torchscript")).problem
    assert (out / "rejected_check.json").is_file() and files() == earlier
    with pytest.raises(PermissionError):
        export(Unreadable(tmp_path), out, Options("torchscript"))
    assert files() == earlier and len(earlier) == 6
    other = Toy(tmp_path)
    nn.init.ones_(other.network.get_submodule("body.0").weight)
    assert not export(other, out, Options("torchscript")).problem
    assert sorted(path.name for path in out.rglob("*")) == ["check.json", "hub", "model_card.md", "student.ts"]
    assert files()["student.ts"] != earlier["student.ts"]


def test_an_image_that_cannot_be_read_is_not_an_error_of_the_output_folder(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match=r"image\.png"):
        export(Unreadable(tmp_path), tmp_path / "out", Options(format="torchscript"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file cannot be written: "):
        export(Toy(tmp_path), tmp_path / "file", Options(format="torchscript"))


def test_int8_quantises_convolutions_and_products(onnx: Any, tmp_path: Path) -> None:
    done = export(Toy(tmp_path), tmp_path / "out", Options(int8=4, tolerance=100))
    model = onnx.load(str(done.file))
    quantised = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    weights = {one.name: one.data_type for one in model.graph.initializer if one.name in quantised}
    assert list(weights.values()).count(onnx.TensorProto.INT8) == 2
    images = next(Toy(tmp_path).validation(1))[0]
    found = Runtime(done.file, "onnx", Toy(tmp_path).signature)(images)[0]
    torch.testing.assert_close(found, Toy(tmp_path).network(images)[0], atol=0.05, rtol=0)


class Spectrum(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (torch.linalg.svdvals(images),)


class Branch(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images * 2 if images.sum() > 0 else images,)


def test_what_a_format_lacks_is_one_sentence(onnx: Any, tmp_path: Path) -> None:
    signature = Signature(torch.rand(2, 3, 4, 4), {"values": {0: "batch"}}, dynamic_size=False)
    with pytest.raises(
        UserError, match=r"^ONNX cannot express this student: opset 17 has no operator for aten::\w*svd"
    ):
        write(Spectrum(), signature, "onnx", tmp_path / "file")
    dynamic = dataclasses.replace(signature, dynamic_size=True)
    with pytest.raises(UserError, match=r"adaptive_avg_pool2d.*try one --size\.$"):
        write(nn.AdaptiveAvgPool2d(2), dynamic, "onnx", tmp_path / "file")
    with pytest.raises(UserError, match=r"^torch.export cannot export .*data-dependent.* Use onnx or torchscript\.$"):
        write(Branch(), signature, "pt2", tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "coreml"}, "there is no format 'coreml'; there are: onnx, torchscript, pt2."),
        ({"format": "pt2", "int8": 5}, "--int8 needs --format onnx, without --half"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_a_missing_library_comes_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"--format onnx needs onnx, which is not installed: pip install 'd2_mgd\[ex"):
        Options()
