"""Weights from files and from torchvision, heads of other classes, and files that are not what they should be."""

import functools
import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision

from classification.checkpoint import read_training_state, save_student
from classification.models import build
from classification.weights import (
    load_file,
    load_weights,
    network_from_file,
    pretrained_network,
    published_weights,
    read_checkpoint,
)
from d2_mgd.errors import UserError


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "arch": "resnet18"}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_files_of_every_usual_form_are_read(tmp_path: Path, wrap, prefix: str) -> None:
    state = build("resnet18", 4).state_dict()
    torch.save(wrap({prefix + key: value for key, value in state.items()}), tmp_path / "a.pth")
    network, classes = network_from_file("resnet18", tmp_path / "a.pth", 4, "the file", other_classes=False)
    assert classes == 4
    assert same(network.state_dict(), state)


def test_head_of_other_classes_starts_anew_or_is_refused() -> None:
    state = build("mobilenet_v1", 7).state_dict()
    network = build("mobilenet_v1", 3)
    with pytest.raises(UserError, match="the file has 7 classes, and 3 are needed"):
        load_weights(network, state, "mobilenet_v1", "the file")
    head = network.fc.weight.clone()
    load_weights(network, state, "mobilenet_v1", "the file", new_head=True)
    assert torch.equal(network.fc.weight, head)
    assert torch.equal(network.model[3][0].weight, state["model.3.0.weight"])


def test_teacher_keeps_its_own_classes_where_only_features_matter(tmp_path: Path) -> None:
    torch.save(build("resnet18", 7).state_dict(), tmp_path / "t.pth")
    network, classes = network_from_file("resnet18", tmp_path / "t.pth", 3, "the file", other_classes=True)
    assert (classes, network.fc.out_features) == (7, 7)
    with pytest.raises(UserError, match="7 classes, and 3 are needed"):
        network_from_file("resnet18", tmp_path / "t.pth", 3, "the file", other_classes=False)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    torch.save({"arch": "resnet34", "state_dict": build("resnet34", 3).state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="is of resnet34, not of resnet18"):
        load_file(tmp_path / "a.pth", "resnet18", "the file")
    with pytest.raises(UserError, match=r"is not of resnet18: weights .* unexpected \(such as layer1\.2"):
        load_weights(build("resnet18", 3), build("resnet34", 3).state_dict(), "resnet18", "the file")
    with pytest.raises(UserError, match="of another shape"):
        load_weights(build("resnet50", 3), build("wide_resnet50_2", 3).state_dict(), "resnet50", "the file")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = build("resnet18", 3).state_dict()
    state["layer2.0.bn1.running_var"][1] = value
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"a\.pth holds weights that are not finite, first layer2\.0\.bn1\.running_var\.$"
    ):
        network_from_file("resnet18", tmp_path / "a.pth", 3, "the teacher's file", other_classes=False)


def test_shufflenet_of_width_one_has_two_names(tmp_path: Path) -> None:
    torch.save({"arch": "shufflenet_v2", "state_dict": build("shufflenet_v2", 3).state_dict()}, tmp_path / "a.pth")
    assert load_file(tmp_path / "a.pth", "shufflenet_v2_x1_0", "the file")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_file_cut_short_is_one_sentence(tmp_path: Path, share: float) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": build("resnet18", 3).state_dict()}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"checkpoint\.pth is damaged or cut short"):
        read_checkpoint(path, "the checkpoint")


def test_file_with_code_does_not_run_it(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Malicious()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"state_dict": Malicious()}))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name, "the file")
    assert not (tmp_path / "ran").exists()


def test_files_without_weights(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds a list"):
        load_file(tmp_path / "list.pth", "resnet18", "the file")
    with pytest.raises(UserError, match="holds no weights"):
        load_file(tmp_path / "empty.pth", "resnet18", "the file")
    with pytest.raises(UserError, match="does not exist"):
        load_file(tmp_path / "none.pth", "resnet18", "the file")
    torch.save({"state_dict": {}, "arch": "resnet18"}, tmp_path / "student.pth")
    with pytest.raises(UserError, match=r"contains no training state.*--student-resume"):
        read_training_state(tmp_path / "student.pth", "resnet18", ["a", "b"])


def test_writing_leaves_the_old_file_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_student({"a": 1}, tmp_path / "x.pth", as_safetensors=False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*intact"):
        save_student({"a": 2}, tmp_path / "x.pth", as_safetensors=False)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "x.pth", "x") == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_published_weights_are_taken_from_the_cache(pretrained: Path) -> None:
    file = next((pretrained / "hub" / "checkpoints").glob("mobilenet_v2*"))
    stored = torch.load(file, weights_only=True)
    whole, classes, source = pretrained_network("mobilenet_v2")
    assert same(whole.state_dict(), stored)
    assert (classes, source) == (1000, "torchvision IMAGENET1K_V1")
    network = pretrained_network("mobilenet_v2", 3)[0]
    assert network.classifier[1].out_features == 3
    assert torch.equal(network.features[4].conv[1][0].weight, stored["features.4.conv.1.0.weight"])


def test_missing_weights_say_where_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.models.ResNet34_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/r34-0.pth")
    with pytest.raises(UserError, match=r"put r34-0\.pth from http://127.* into .*checkpoints, or name another file"):
        pretrained_network("resnet34", 1000)
    with pytest.raises(UserError, match="torchvision publishes no weights of mobilenet_v1"):
        pretrained_network("mobilenet_v1", 1000)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("vit_h_14", "IMAGENET1K_SWAG_LINEAR_V1"),  # its default takes 518 px, and the network is built for 224
        ("regnet_y_128gf", "IMAGENET1K_SWAG_E2E_V1"),
        ("vit_b_16", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V1"),
    ],
)
def test_every_network_has_its_published_weights(name: str, key: str) -> None:
    assert published_weights(name).name == key


def test_published_files_with_keys_of_an_older_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DenseNet's have ``norm.1`` where the network has ``norm1``."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = torchvision.models.densenet121()
    state = {key: value for key, value in published.state_dict().items() if "num_batches" not in key}
    old = {re.sub(r"(layer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(old, tmp_path / "hub" / "checkpoints" / published_weights("densenet121").url.rpartition("/")[2])
    torch.manual_seed(5)
    expected = build("densenet121", 3).classifier.weight
    torch.manual_seed(5)
    network = pretrained_network("densenet121", 3)[0]
    assert torch.equal(
        network.features.denseblock4.denselayer1.conv2.weight, published.features.denseblock4.denselayer1.conv2.weight
    )
    assert torch.equal(network.classifier.weight, expected)
    torch.save(build("resnet18", 3).state_dict(), next((tmp_path / "hub" / "checkpoints").iterdir()))
    with pytest.raises(UserError, match=r"densenet121-a639ec97\.pth is not torchvision's file of densenet121: remove"):
        pretrained_network("densenet121", 3)


def test_published_files_with_code_do_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(Malicious(), tmp_path / "hub" / "checkpoints" / published_weights("resnet18").url.rpartition("/")[2])
    with pytest.raises(
        UserError, match=r"asks for python objects or is damaged, so it is not torchvision's: remove it"
    ):
        pretrained_network("resnet18", 3)
    assert not (tmp_path / "ran").exists()


def test_networks_that_know_the_version_of_their_weights(tmp_path: Path) -> None:
    """torchvision's MNASNet refuses weights without one."""
    state = build("mnasnet0_5", 3).state_dict()
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    network, _ = network_from_file("mnasnet0_5", tmp_path / "a.pth", 3, "the file", other_classes=False)
    assert same(network.state_dict(), state)


def test_a_timm_teacher_has_its_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    name = "mobilenetv3_small_050.lamb_in1k"
    published = timm.create_model(name, num_classes=7)
    torch.save(published.state_dict(), tmp_path / "t.pth")
    overlay = {"file": str(tmp_path / "t.pth"), "num_classes": 7}  # in place of a download
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, pretrained_cfg_overlay=overlay))
    network, classes, source = pretrained_network(f"timm:{name}")
    assert (classes, source) == (7, "timm")
    assert same(network.state_dict(), published.state_dict())
    assert pretrained_network(f"timm:{name}", 3)[1] == 3
