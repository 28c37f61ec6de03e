"""Named maps out of modules: after and before activations, in place or not, with early stop, in wrappers."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2_mgd.distill import FeatureTaps, Tap

IMAGES = torch.randn(2, 3, 32, 32)


class Functional(nn.Module):
    """A residual block that calls its activation as an in-place function, as Detectron2's do."""

    def __init__(self, activation: Any = torch.relu_) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.activation = activation
        self.pre: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu_(self.conv(x))
        out += x
        self.pre = out.detach().clone()
        return self.activation(out)


def tiny_network(inplace: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace), nn.Conv2d(4, 6, 3, stride=2)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_map_that_is_overwritten_later_is_kept(inplace: bool, training: bool) -> None:
    model = tiny_network(inplace).train(training)
    expected = model[1](model[0](IMAGES)).detach()
    model[1].reset_running_stats()
    expected = nn.Sequential(model[0], model[1])(IMAGES).detach()
    taps = FeatureTaps(model, {"norm": "1", "relu": "2", "before": Tap("2", before_activation=True)})
    for _ in range(3):
        if not training:
            model[1].reset_running_stats()
        maps_of_no_interest = model(IMAGES)
        maps = taps.collect()
        torch.testing.assert_close(maps["norm"], expected if training else maps["norm"])
        torch.testing.assert_close(maps["before"], maps["norm"])
        torch.testing.assert_close(maps["relu"], maps["norm"].relu())
        assert (maps["norm"] < 0).any()
        (maps_of_no_interest.sum() + maps["norm"].square().sum() + maps["before"].sum()).backward()


def test_gradients_through_taps_are_those_of_plain_code() -> None:
    model = tiny_network()
    taps = FeatureTaps(model, {"before": Tap("2", before_activation=True)})
    output = model(IMAGES)
    (output.sum() + taps.collect()["before"].square().sum()).backward()
    tapped = model[0].weight.grad.clone()
    model.zero_grad()
    taps.remove()
    before = model[1](model[0](IMAGES))
    (model[3](before.relu()).sum() + before.square().sum()).backward()
    torch.testing.assert_close(tapped, model[0].weight.grad)


@pytest.mark.parametrize(
    "activation",
    [
        *(torch.relu_, torch.relu, Tensor.relu_, torch.sigmoid_, torch.tanh),
        *(nn.ReLU(inplace=True), nn.ReLU6(True), nn.LeakyReLU(0.1, True), nn.ELU(inplace=True)),
        *(nn.SiLU(True), nn.Hardswish(True), nn.GELU()),
    ],
    ids=lambda a: getattr(a, "__name__", type(a).__name__),
)
def test_before_any_activation_of_a_block(activation: Any) -> None:
    block = Functional(activation)
    taps = FeatureTaps(block, {"pre": Tap("", before_activation=True)})
    x = torch.randn(2, 4, 5, 5)
    output = block(x)
    pre = taps.collect()["pre"]
    assert torch.equal(pre, block.pre)
    taps.remove()
    assert torch.equal(block(x), output)


@pytest.mark.parametrize(("name", "last_norm"), [("resnet18", "layer3.1.bn2"), ("resnet50", "layer3.5.bn3")])
def test_pre_activation_of_torchvision_resnets(name: str, last_norm: str) -> None:
    model = torchvision.models.get_model(name).eval()
    block = last_norm.rsplit(".", 1)[0]
    seen: dict[str, Tensor] = {}
    model.get_submodule(block).register_forward_pre_hook(lambda _, args: seen.update(shortcut=args[0].clone()))
    model.get_submodule(last_norm).register_forward_hook(lambda _, __, out: seen.update(norm=out.clone()))
    with torch.no_grad():
        plain = model(IMAGES)
        taps = FeatureTaps(model, {"pre": Tap(block, before_activation=True), "post": block})
        assert torch.equal(model(IMAGES), plain)
    maps = taps.collect()
    torch.testing.assert_close(maps["pre"], seen["norm"] + seen["shortcut"])
    torch.testing.assert_close(maps["post"], maps["pre"].relu())


def test_run_stops_at_the_deepest_tap_and_a_plain_forward_does_not() -> None:
    model = torchvision.models.resnet18().eval()
    ran: list[str] = []
    for name in ("layer2", "layer3", "layer4", "fc"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    taps = FeatureTaps(model, {"b": Tap("layer3.1", before_activation=True), "a": "layer2"})
    with torch.no_grad():
        stopped = taps.run(IMAGES)
        assert ran == ["layer2"]
        ran.clear()
        model(IMAGES)
    assert ran == ["layer2", "layer3", "layer4", "fc"]
    whole = taps.collect()
    assert list(stopped) == ["b", "a"]
    for name in whole:
        assert torch.equal(stopped[name], whole[name])


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    block = Functional()
    taps = FeatureTaps(block, {"pre": Tap("", before_activation=True)})
    with pytest.raises(RuntimeError, match="channels"):
        block(torch.randn(1, 3, 4, 4))
    x = torch.zeros(1).sub_(1).relu_()  # activations outside are in place again
    assert x.item() == 0.0
    y = torch.full((1,), -1.0)
    assert torch.relu_(y) is y
    block(torch.randn(1, 4, 4, 4))
    assert torch.equal(taps.collect()["pre"], block.pre)


def test_inference_mode() -> None:
    model = tiny_network()
    taps = FeatureTaps(model, {"norm": "1", "before": Tap("2", before_activation=True)})
    with torch.inference_mode():
        for _ in range(2):
            model(IMAGES)
            maps = taps.collect()
            assert (maps["norm"] < 0).any() and torch.equal(maps["norm"], maps["before"])


def test_entries_of_dicts_and_sequences() -> None:
    class Pyramid(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"p3": x, "p4": x[:, :, ::2, ::2], "list": [x]}

    model = nn.Sequential(Pyramid())
    taps = FeatureTaps(model, {"p4": Tap("0", key="p4"), "p3": Tap("0", key="p3")})
    model(IMAGES)
    maps = taps.collect()
    assert maps["p4"].shape == (2, 3, 16, 16) and maps["p3"] is IMAGES
    taps.remove()
    FeatureTaps(model, {"p9": Tap("0", key="p9")})
    with pytest.raises(ValueError, match=r"feature p9.*no entry 'p9' \(it has: p3, p4, list\)"):
        model(IMAGES)


def test_output_that_is_no_tensor() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    FeatureTaps(model, {"a": "0"})
    with pytest.raises(ValueError, match="feature a: the output of '0' is a tuple"):
        model(torch.randn(2, 3))


def test_unknown_paths_say_what_is_there() -> None:
    model = torchvision.models.resnet18()
    with pytest.raises(ValueError, match=r"no module 'layer3\.7'.*in 'layer3' there are: 0, 1"):
        FeatureTaps(model, {"a": "layer2", "b": "layer3.7"})
    with pytest.raises(ValueError, match=r"no module 'stage1'.*conv1, bn1, relu"):
        FeatureTaps(model, {"a": "stage1"})
    with pytest.raises(ValueError, match="no feature"):
        FeatureTaps(model, {})
    with pytest.raises(ValueError, match="exclude each other"):
        Tap("a", key="p3", before_activation=True)
    assert not model._forward_hooks and not model.layer2._forward_hooks  # a refused tap leaves no hook


def test_a_block_without_a_last_activation_is_refused() -> None:
    model = tiny_network()
    FeatureTaps(model, {"a": Tap("", before_activation=True)})
    with pytest.raises(RuntimeError, match="does not end in an activation"):
        model(IMAGES)
    assert torch.relu_(torch.tensor([-1.0])).item() == 0.0


def test_collecting_without_a_forward_and_twice() -> None:
    model = tiny_network()
    taps = FeatureTaps(model, {"a": "1"})
    with pytest.raises(RuntimeError, match=r"no map of a \(1\)"):
        taps.collect()
    model(IMAGES)
    taps.collect()
    with pytest.raises(RuntimeError, match="did not run"):
        taps.collect()


def test_modules_that_run_twice_are_refused() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.Conv2d(3, 3, 1), relu)
    FeatureTaps(model, {"a": "1"})
    with pytest.raises(RuntimeError, match="ran several times"):
        model(IMAGES)


def test_removed_taps_take_nothing() -> None:
    model = tiny_network()
    with FeatureTaps(model, {"a": "1", "b": Tap("2", before_activation=True)}) as taps:
        model(IMAGES)
        taps.collect()
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_two_taps_on_one_model() -> None:
    model = tiny_network()
    first, second = FeatureTaps(model, {"a": "1"}), FeatureTaps(model, {"b": "2"})
    first.run(IMAGES)
    second.run(IMAGES)
    model(IMAGES)
    torch.testing.assert_close(first.collect()["a"].relu(), second.collect()["b"])


def test_two_taps_before_one_activation() -> None:
    model, tap = tiny_network(), {"a": Tap("2", before_activation=True)}
    plain, first, second = FeatureTaps(model, {"a": "1"}), FeatureTaps(model, tap), FeatureTaps(model, tap)
    for taps in (first, second):
        torch.testing.assert_close(taps.run(IMAGES)["a"], plain.run(IMAGES)["a"])
    model(IMAGES)
    torch.testing.assert_close(first.collect()["a"], second.collect()["a"])


def test_under_mixed_precision_and_activation_checkpointing() -> None:
    model = tiny_network()
    taps = FeatureTaps(model, {"conv": "0", "before": Tap("2", before_activation=True)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IMAGES)
    assert taps.collect()["conv"].dtype == torch.bfloat16

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_network()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    outer = Checkpointed()
    taps = FeatureTaps(outer, {"before": Tap("inner.2", before_activation=True)})
    output = outer(IMAGES)
    taps.collect()
    output.sum().backward()  # runs the hooks again, without harm


@pytest.mark.parametrize("before", [False, True])
def test_under_torch_compile(before: bool) -> None:
    model = torchvision.models.resnet18().eval()
    taps = FeatureTaps(model, {"a": Tap("layer2.1", before_activation=before)})
    with torch.no_grad():
        model(IMAGES)
        plain = taps.collect()["a"]
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            compiled(IMAGES)
            torch.testing.assert_close(taps.collect()["a"], plain)
    assert (plain.min() < 0) == before


def test_under_ddp(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_network()
        taps = FeatureTaps(model, {"before": Tap("2", before_activation=True)})
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            output = wrapped(IMAGES)
            (output.sum() + taps.collect()["before"].square().sum()).backward()
        assert model[0].weight.grad is not None
    finally:
        dist.destroy_process_group()


def test_a_forward_after_a_failed_run_is_whole():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    taps = FeatureTaps(model, {"first": "0"})
    with pytest.raises(RuntimeError):
        taps.run(torch.zeros(1, 2, 4, 4))
    assert model(torch.zeros(1, 3, 4, 4)).shape == (1, 5, 4, 4)
    assert list(taps.collect()) == ["first"]


@pytest.mark.parametrize("before", [True, False])
def test_each_map_is_given_as_it_comes_and_none_is_kept(before: bool) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)) for _ in "ab"))
    images = torch.randn(2, 3, 4, 4)
    taps = FeatureTaps(model, {name: Tap(name, before_activation=before) for name in "01"})
    model(images)
    wanted = {name: found.detach().clone() for name, found in taps.collect().items()}
    order: list[str] = []
    handle = model[1].register_forward_pre_hook(lambda *_: order.append("second block"))
    given: dict[str, torch.Tensor] = {}

    def use(name: str, found: torch.Tensor) -> None:
        order.append(name)
        given[name] = found.detach().clone()

    for _ in range(2):
        order.clear()
        with taps.each(use):
            model(images)
        assert order == ["0", "second block", "1"]
        for name in "01":
            torch.testing.assert_close(given[name], wanted[name], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no map of 0"):
        taps.collect()
    with pytest.raises(KeyError), taps.each(lambda name, found: {}[name]):
        model(images)
    order.clear()
    model(images)  # an ordinary forward again
    assert order == ["second block"] and set(taps.collect()) == {"0", "1"}
    with pytest.raises(RuntimeError, match="no map of 0"), taps.each(use):
        pass
    handle.remove()


def test_copies_of_a_model_are_not_tapped_and_copies_of_the_taps_tap_them() -> None:
    model = tiny_network()
    taps = FeatureTaps(model, {"a": "1", "b": Tap("2", before_activation=True)})
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(1.0)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    model(IMAGES)
    for other in (average, torch.load(stored, weights_only=False)):
        other(IMAGES)
    found = taps.collect()
    assert not torch.allclose(found["a"], average.module[1](average.module[0](IMAGES)))
    torch.testing.assert_close(found["a"], taps.run(IMAGES)["a"])

    copied = copy.deepcopy(taps)
    with torch.no_grad():
        copied.model[0].weight.zero_()
    assert not torch.allclose(copied.run(IMAGES)["b"], taps.run(IMAGES)["b"])


def test_ctrl_c_in_a_tapped_block_leaves_activations_as_they_were() -> None:
    class Interrupted(nn.Module):
        pressed = True

        def forward(self, x: Tensor) -> Tensor:
            if self.pressed:
                raise KeyboardInterrupt
            return torch.relu(x)

    def in_place_works() -> bool:
        probe = torch.tensor([-1.0])
        torch.relu_(probe)
        return bool(probe == 0)

    model = nn.Sequential(Interrupted())
    taps = FeatureTaps(model, {"a": Tap("0", before_activation=True)})
    for forward in (model, taps.run):
        with pytest.raises(KeyboardInterrupt):
            forward(IMAGES)
        Interrupted.pressed = False
        torch.testing.assert_close(taps.run(IMAGES)["a"], IMAGES)
        assert in_place_works()
        Interrupted.pressed = True
    with pytest.raises(KeyboardInterrupt):
        model(IMAGES)
    taps.remove()
    assert in_place_works()
