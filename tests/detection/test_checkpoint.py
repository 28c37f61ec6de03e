from __future__ import annotations

import os
import pickle
import resource
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model

from d2_mgd.detection.checkpoint import TrainingCheckpointer
from d2_mgd.detection.weights import file_digest, load_weights, local_weights_file, read_pickled_arrays, read_tensors
from d2_mgd.errors import CommonError, UserError
from d2_mgd.training import check_same_teacher, write_atomically


class Malice:
    """Runs a command when it is unpickled by anything that trusts it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


class Small(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)


# --- no file runs code ---


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_malicious_file_does_not_run_and_is_named(tmp_path: Path, suffix: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"weights{suffix}"
    data = {"model": {"conv.weight": Malice(trace)}, "__author__": "me"}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, path)
    with pytest.raises(
        ValueError, match=rf"{path} asks for the python object \w+\.system, .* was not loaded"
    ) as caught:
        load_weights(Small(), str(path))
    assert not trace.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"c_codecs\nencode\n(Vx\nVhex\ntR.",
        b"Pabc\n.",
    ],
)
def test_the_unpickler_admits_nothing_but_arrays_and_containers(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickled)
    with pytest.raises(ValueError, match="was not loaded"):
        read_pickled_arrays(str(path))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_pickle_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "weights.pkl"
    weight = np.random.rand(3, 2).astype(np.float32)
    path.write_bytes(pickle.dumps({"model": {"w": weight, "n": np.float64(2)}, "tags": ["a", None]}, protocol))
    read = read_pickled_arrays(str(path))
    assert np.array_equal(read["model"]["w"], weight) and read["model"]["n"] == 2 and read["tags"] == ["a", None]


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"model": [1]})[:-6], pickle.dumps([1, 2])])
def test_a_damaged_file_is_named_in_one_sentence(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)) as caught:
        load_weights(Small(), str(path))
    assert "\n" not in str(caught.value)


def test_a_cut_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": Small().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=str(path)):
        read_tensors(str(path))


# --- what fits ---


def test_a_zoo_file_loads(tmp_path: Path) -> None:
    source, target = Small(), Small()
    path = tmp_path / "zoo.pkl"
    arrays = {name: value.numpy() for name, value in source.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    left = load_weights(target, str(path))
    assert torch.equal(target.conv.weight, source.conv.weight) and not left.missing_keys


def test_weights_that_fit_nowhere_are_refused_and_others_say_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(Small(width=5).state_dict(), path)
    with pytest.raises(ValueError, match=r"no weight in .*weights\.pth fits the model"):
        load_weights(Small(), str(path))
    torch.save({"conv.weight": torch.zeros(3, 3, 1, 1), "other": torch.zeros(1)}, path)
    left = load_weights(Small(), str(path))
    assert left.missing_keys == ["conv.bias"] and left.unexpected_keys == ["other"]
    with pytest.raises(ValueError, match=r"holds 'conv' of type list, where weights hold an array"):
        torch.save({"conv": [1]}, path)
        load_weights(Small(), str(path))
    with pytest.raises(UserError, match="does not exist"):
        load_weights(Small(), str(tmp_path / "none.pth"))


# --- torchvision ---


def resnet(depth: int) -> Any:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", depth, "MODEL.DEVICE", "cpu", "MODEL.RESNETS.STRIDE_IN_1X1", False])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    holder = nn.Module()
    holder.backbone = build_backbone(cfg)
    return holder.eval()


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_weights_compute_the_same_maps(tmp_path: Path, depth: int) -> None:
    source = torchvision.models.get_model(f"resnet{depth}").eval()
    for name, value in source.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    path = tmp_path / "resnet.pth"
    torch.save(source.state_dict(), path)
    model = resnet(depth)
    left = load_weights(model, f"torchvision://{path}")
    assert not left.missing_keys and not left.unexpected_keys
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = source.maxpool(source.relu(source.bn1(source.conv1(images))))
        res2 = source.layer1(maps)
        res5 = source.layer4(source.layer3(source.layer2(res2)))
        out = model.backbone(images)
    torch.testing.assert_close(out["res2"], res2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["res5"], res5, rtol=1e-4, atol=1e-4)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    old = torch.hub._hub_dir
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert old is None or old != torch.hub.get_dir()
    return Path(torch.hub.get_dir()) / "checkpoints"


def test_a_torchvision_name_is_its_file_in_the_cache(hub: Path) -> None:
    hub.mkdir(parents=True)
    for name in ("resnet18-f37072fd.pth", "resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"):
        (hub / name).touch()
    assert local_weights_file("torchvision://resnet18") == str(hub / "resnet18-f37072fd.pth")
    assert local_weights_file("torchvision://resnet50") == str(hub / "resnet50-0676ba61.pth")
    assert local_weights_file("torchvision://resnet50/IMAGENET1K_V2") == str(hub / "resnet50-11ad3fa6.pth")


def test_offline_the_message_says_where_to_put_the_file(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=rf"put it at {hub / 'resnet18-f37072fd.pth'}"):
        local_weights_file("torchvision://resnet18")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("torchvision://resnet19", "no such ResNet; there are: .*resnet18"),
        ("torchvision://vgg16", "no such ResNet"),
        ("torchvision://resnet18/V9", "no weights 'V9'; there are: IMAGENET1K_V1"),
    ],
)
def test_unknown_torchvision_weights_are_listed(location: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_weights_file(location)


# --- writing ---


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(str(path), lambda file: file.write(b"old"))

    def disk_full(file: Any) -> None:
        file.write(b"half of the new")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(str(path), disk_full)
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process can grow beyond ``size`` bytes: the system refuses, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_in_the_middle_of_a_write_costs_no_earlier_checkpoint(tmp_path: Path) -> None:
    checkpointer = TrainingCheckpointer(Small(), str(tmp_path))
    checkpointer.save("model_0", iteration=0, training={})
    with pytest.raises(CommonError) as caught, files_up_to(20_000):
        checkpointer.save("model_1", iteration=1, training={"momentum": torch.zeros(100_000)})
    assert str(caught.value) == (
        f"{tmp_path}/model_1.pth could not be written (File too large); earlier checkpoints are intact, and "
        "--resume continues from the last of them."
    )
    assert (tmp_path / "last_checkpoint").read_text() == "model_0.pth"
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoints.json", "last_checkpoint", "model_0.pth"}
    assert checkpointer.resume()["iteration"] == 0


def three_checkpoints(folder: Path, keep: int = 0) -> TrainingCheckpointer:
    checkpointer = TrainingCheckpointer(Small(), str(folder), keep=keep)
    for iteration in range(3):
        checkpointer.save(f"model_{iteration}", iteration=iteration, training={})
    return checkpointer


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("harm", "message"), [(cut, "bytes of the"), (flip_a_bit, "SHA-256"), (Path.unlink, "gone")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, harm: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = three_checkpoints(tmp_path)
    harm(tmp_path / "model_2.pth")
    with caplog.at_level("WARNING", "d2_mgd"):
        assert checkpointer.resume()["iteration"] == 1
    assert "model_2.pth" in caplog.text and message in caplog.text
    cut(tmp_path / "model_1.pth")
    assert checkpointer.resume()["iteration"] == 0
    cut(tmp_path / "model_0.pth")
    with pytest.raises(ValueError, match=r"model_2\.pth"):
        checkpointer.resume()


def test_a_damaged_list_of_checkpoints_is_no_damage_to_the_checkpoints(tmp_path: Path) -> None:
    checkpointer = three_checkpoints(tmp_path)
    (tmp_path / "checkpoints.json").write_text("{")
    assert checkpointer.resume()["iteration"] == 2


def empty(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize("harm", [empty, Path.unlink], ids=["empty", "lost"])
def test_without_a_list_or_a_pointer_the_newest_that_can_be_read_is_used(
    tmp_path: Path, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = three_checkpoints(tmp_path)
    for iteration in range(3):
        os.utime(tmp_path / f"model_{iteration}.pth", (iteration, iteration))
    torch.save({"model": {}}, tmp_path / "weights.pth")
    harm(tmp_path / "checkpoints.json")
    cut(tmp_path / "model_2.pth")
    with caplog.at_level("WARNING", "d2_mgd"):
        assert checkpointer.resume()["iteration"] == 1
    assert "model_2.pth cannot be read" in caplog.text and "model_1.pth is used" in caplog.text
    harm(tmp_path / "last_checkpoint")
    with caplog.at_level("WARNING", "d2_mgd"):
        assert checkpointer.has_checkpoint() and checkpointer.resume()["iteration"] == 1
    assert "last_checkpoint names no checkpoint: model_1.pth, the newest intact one, is used" in caplog.text
    cut(tmp_path / "model_1.pth")
    cut(tmp_path / "model_0.pth")
    with pytest.raises(UserError, match="names no checkpoint, and the folder contains no intact one"):
        checkpointer.resume()


def test_older_checkpoints_that_a_new_list_does_not_have_are_used_after_those_that_it_has(tmp_path: Path) -> None:
    checkpointer = three_checkpoints(tmp_path)
    (tmp_path / "checkpoints.json").unlink()
    for iteration in (3, 4):
        checkpointer.save(f"model_{iteration}", iteration=iteration, training={})
    assert checkpointer.checkpoints.instead_of("model_4.pth") == [f"model_{number}.pth" for number in (3, 2, 1, 0)]


@pytest.mark.parametrize(("keep", "left"), [(0, {0, 1, 2}), (1, {2}), (2, {1, 2}), (9, {0, 1, 2})])
def test_old_checkpoints_are_pruned(tmp_path: Path, keep: int, left: set[int]) -> None:
    checkpointer = three_checkpoints(tmp_path, keep)
    assert {path.name for path in tmp_path.glob("*.pth")} == {f"model_{number}.pth" for number in left}
    assert set(checkpointer.checkpoints.read()) == {f"model_{number}.pth" for number in left}
    assert checkpointer.resume()["iteration"] == 2


def test_a_checkpoint_is_the_plain_model_for_detectron2(tmp_path: Path) -> None:
    from detectron2.checkpoint import DetectionCheckpointer

    source, target = Small(), Small()
    TrainingCheckpointer(source, str(tmp_path)).save("model_0", iteration=0, training={})
    DetectionCheckpointer(target, str(tmp_path)).resume_or_load("", resume=True)
    assert torch.equal(source.conv.weight, target.conv.weight)


# --- resuming ---


def test_resuming_gives_back_what_was_saved(tmp_path: Path) -> None:
    source, target = Small(), Small()
    TrainingCheckpointer(source, str(tmp_path)).save("model_0", iteration=4, training={"seed": 3})
    rest = TrainingCheckpointer(target, str(tmp_path)).resume()
    assert rest == {"iteration": 4, "training": {"seed": 3}}
    assert torch.equal(source.conv.weight, target.conv.weight)


def test_checkpoints_that_cannot_be_resumed_say_why(tmp_path: Path) -> None:
    checkpointer = TrainingCheckpointer(Small(), str(tmp_path))
    checkpointer.save("model_0", iteration=4, training={})
    with pytest.raises(ValueError, match=r"another student than the config describes: 2 weights .* 'conv\.weight'"):
        TrainingCheckpointer(Small(width=5), str(tmp_path)).resume()
    torch.save({"model": Small().state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "last_checkpoint").write_text("weights.pth")
    with pytest.raises(ValueError, match=r"no state of a training; give it as MODEL.WEIGHTS"):
        checkpointer.resume()
    (tmp_path / "weights.pth").unlink()
    (tmp_path / "model_0.pth").unlink()
    with pytest.raises(ValueError, match=r"weights\.pth is gone; no earlier checkpoint is intact"):
        checkpointer.resume()


def test_a_moved_teacher_is_the_same_and_another_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"two")):
        (tmp_path / name).write_bytes(content)

    def record(name: str) -> dict[str, str]:
        return {"weights": name, "digest": file_digest(str(tmp_path / name)), "precision": "float32"}

    check_same_teacher("model.pth", record("a.pth"), record("b.pth"))
    with pytest.raises(ValueError, match=r"trained with the teacher a\.pth .* but c\.pth differs"):
        check_same_teacher("model.pth", record("a.pth"), record("c.pth"))


def test_a_tiny_detector_round_trips_through_detectron2s_names(workplace: Any) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(workplace.teacher_config))
    model = build_model(cfg)
    left = load_weights(model, str(workplace.teacher_weights))
    assert not left.missing_keys and not left.unexpected_keys and not left.incorrect_shapes
