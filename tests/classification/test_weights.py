"""Weights from files and from torchvision, heads of other classes, and files that are not what they should be."""

import pickle
from pathlib import Path

import pytest
import torch
import torchvision

from classification import weights
from classification.checkpoint import read_training_state, save_atomically
from classification.errors import UserError
from classification.models import build
from classification.weights import load_file, load_weights, network_from_file, pretrained_network, read_checkpoint


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


def test_shufflenet_of_width_one_has_two_names(tmp_path: Path) -> None:
    torch.save({"arch": "shufflenet_v2", "state_dict": build("shufflenet_v2", 3).state_dict()}, tmp_path / "a.pth")
    assert load_file(tmp_path / "a.pth", "shufflenet_v2_x1_0", "the file")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_file_cut_short_is_one_sentence(tmp_path: Path, share: float) -> None:
    path = tmp_path / "checkpoint.pth"
    save_atomically({"state_dict": build("resnet18", 3).state_dict()}, path)
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
    with pytest.raises(UserError, match=r"holds no training state.*--student-resume"):
        read_training_state(tmp_path / "student.pth", "resnet18", ["a", "b"])


def test_writing_leaves_the_old_file_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_atomically({"a": 1}, tmp_path / "x.pth")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("classification.checkpoint.os.fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*intact"):
        save_atomically({"a": 2}, tmp_path / "x.pth")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "x.pth", "x") == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_published_weights_are_taken_from_the_cache(pretrained: Path) -> None:
    file = next((pretrained / "hub" / "checkpoints").glob("mobilenet_v2*"))
    stored = torch.load(file, weights_only=True)
    whole = pretrained_network("mobilenet_v2", 3, new_head=False)
    assert same(whole.state_dict(), stored)
    network = pretrained_network("mobilenet_v2", 3)
    assert network.classifier[1].out_features == 3
    assert torch.equal(network.features[4].conv[1][0].weight, stored["features.4.conv.1.0.weight"])


def test_missing_weights_say_where_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.models.ResNet34_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/r34-0.pth")
    with pytest.raises(UserError, match=r"put r34-0\.pth from http://127.* into .*checkpoints, or name a file"):
        pretrained_network("resnet34", 1000)
    with pytest.raises(UserError, match="torchvision publishes no weights of mobilenet_v1"):
        pretrained_network("mobilenet_v1", 1000)


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert weights.digest(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
