"""The stages of a network: the deepest map of each stride, found by one forward pass with hooks.

Shape shorthand: N images, C channels, H, W of a map, L tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2_mgd.distill.activations import ActivationWatch
from d2_mgd.distill.map_shapes import map_of_tokens
from d2_mgd.distill.margins import is_batch_norm, tap_margins
from d2_mgd.distill.taps import FeatureTaps, Tap
from d2_mgd.errors import UserError, located, reason
from d2_mgd.training.modules import preserved_modes
from d2_mgd.training.randomness import preserved_randomness

_MOST = 4  # stages of a pair, the deepest
_SHALLOW = 6  # levels of submodules that are searched
_USUAL_SIZE = 224


@dataclass(frozen=True)
class Stage:
    """The deepest map of one stride.

    Args:
        module: dotted path of the module that returns it.
        channels: C.
        block: path of the innermost module with a batch-norm that returns it, if the map is the output of a ReLU. The
            map before that ReLU can be tapped there, and has margins.
    """

    module: str
    channels: int
    block: str | None

    def tap(self, before_activation: bool) -> Tap:
        """The tap of this map, or of the map before its ReLU if there is one."""
        if before_activation and self.block is not None:
            return Tap(self.block, before_activation=True)
        return Tap(self.module)


def example_image(network: nn.Module) -> Tensor:
    """(1, 3, H, W) zeros of the size that a network of timm or torchvision is made for, else of 224 px."""
    parameter = next(network.parameters())
    size: Any = image_size(network) or _USUAL_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)


def image_size(network: nn.Module) -> Any:
    """The image size, H = W or (H, W), that a network of timm or torchvision is made for; None if it has none."""
    of_tokens = getattr(getattr(network, "patch_embed", network), "img_size", None)
    config = getattr(network, "default_cfg", None) or {}
    return of_tokens or getattr(network, "image_size", None) or tuple(config.get("input_size", ())[1:]) or None


def find_stages(name: str, network: nn.Module, images: Tensor) -> dict[int, Stage]:
    """Stride (a power of two, to which the measured one is rounded) -> stage, from shallow to deep.

    Candidates are the modules of timm's ``feature_info``. Without it, or if these return no maps, they are the
    submodules of the depth at which most strides appear. A map whose stride is smaller than that of an earlier one
    belongs to a decoder or to attention, and is not used.

    Args:
        name: of the network, for messages.
        network: its modes and the global RNG are preserved.
        images: (N, C, H, W) to measure with.

    Raises:
        UserError: the network cannot run on them.
    """
    trace = _Trace(network)
    with running(name, network, images), trace:
        network(images)
    modules = [path for path in trace.runs if trace.runs[path] == 1]
    listed = {entry["module"] for entry in _feature_info(network)}.intersection(modules)
    if listed and (found := _deepest(trace, listed, images)):
        return found
    depths = [{path for path in modules if path.count(".") < depth} for depth in range(1, _SHALLOW + 1)]
    return max((_deepest(trace, paths, images) for paths in depths), key=len)


def common_stages(
    names: Sequence[str], networks: Sequence[nn.Module], images: Sequence[Tensor]
) -> dict[str, tuple[Tap, Tap]]:
    """:func:`pair_stages` of the stages of two networks, student and teacher. Arguments as :func:`find_stages`."""
    student, teacher = (find_stages(*one) for one in zip(names, networks, images))
    return pair_stages(student, teacher)


def pair_stages(student: Mapping[int, Stage], teacher: Mapping[int, Stage]) -> dict[str, tuple[Tap, Tap]]:
    """``stride8`` and so on -> taps of student and teacher, for the deepest strides (at most four) that both have.

    Maps are taken before the ReLU where the teacher's stage ends in a batch-norm and ReLU.

    Raises:
        UserError: there is no common stride.
    """
    common = sorted(student.keys() & teacher.keys())[-_MOST:]
    if not common:
        raise UserError(
            f"student and teacher have no maps of a common stride: the student's strides are {_listed(student)}, the "
            f"teacher's {_listed(teacher)}. Name the modules to compare."
        )
    before = {stride: teacher[stride].block is not None for stride in common}
    return {
        f"stride{stride}": (student[stride].tap(before[stride]), teacher[stride].tap(before[stride]))
        for stride in common
    }


def measure_maps(
    name: str, network: nn.Module, taps: Mapping[str, Tap], images: Tensor
) -> dict[str, tuple[int, int, int]]:
    """Measure (C, H, W) of every tapped map; tokens are maps of their patches.

    Args:
        name: of the network, for messages.
        network: its modes and the global RNG are preserved.
        taps: feature name -> tap.
        images: (N, C, H, W) to measure with.

    Raises:
        UserError: a path is not in the network, a map has another shape, or the network cannot run on the images.
    """
    with running(name, network, images), located(f"{name}: "), FeatureTaps(network, taps) as feature_taps:
        maps = feature_taps.run(images)
    grids = _grids([tuple(found.shape) for found in maps.values()], images)
    for (feature, found), grid in zip(maps.items(), grids):
        if grid is None:
            raise UserError(
                f"{name}: the map of {feature} ({taps[feature].module}) has shape {tuple(found.shape)}, not "
                "(N, C, H, W), (N, H, W, C) or (N, 1 + H W, C)."
            )
    return {feature: grid for feature, grid in zip(maps, grids) if grid is not None}


def fitting_loss(
    teacher: nn.Module,
    taps: Mapping[str, Tap],
    norms: Mapping[str, str | None] | None = None,
    channels: Mapping[str, int] | None = None,
) -> str:
    """``partial_l2`` if every tapped map of the teacher has margins, else ``pearson``. Arguments as `tap_margins`."""
    try:
        tap_margins(teacher, taps, norms, channels)
    except UserError:
        return "pearson"
    return "partial_l2"


def fitting_metric(loss: str) -> str:
    """The matching cost that goes with a loss: ``pearson`` with ``pearson``, else ``cosine``."""
    return "pearson" if loss == "pearson" else "cosine"


def describe(tap: Tap) -> str:
    """The path of a tap, for logs; ``@pre`` is before the activation."""
    return f"{tap.module}@pre" if tap.before_activation else tap.module


@contextmanager
def running(name: str, network: nn.Module, images: Tensor) -> Iterator[None]:
    """Context for a forward pass in evaluation mode that leaves no traces.

    Raises:
        UserError: the network cannot run on the images.
    """
    try:
        with torch.no_grad(), preserved_randomness(), preserved_modes(network):
            network.eval()
            yield
    except (AssertionError, RuntimeError) as error:
        raise UserError(cannot_run(name, network, images, error)) from error


def cannot_run(name: str, network: nn.Module, images: Any, error: BaseException) -> str:
    """The message about a network that fails on images of this shape, with the size that it is made for."""
    shape = tuple(images.shape[1:]) if isinstance(images, Tensor) else type(images).__name__
    size = image_size(network)
    made_for = "" if size is None else f" It is made for images of {size if isinstance(size, int) else size[-1]} px."
    return f"{name} cannot run on images of shape {shape}: {reason(error)}.{made_for}"


def _feature_info(network: nn.Module) -> Sequence[Any]:
    found: Any = getattr(network, "feature_info", ())
    return found.get_dicts() if hasattr(found, "get_dicts") else found


class _Trace:
    """What each module returns in one forward pass, in the order in which modules end."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.runs: Counter[str] = Counter()
        self.maps: list[tuple[str, tuple[int, ...], str | None]] = []  # path, shape, Stage.block
        self._same: list[str] = []  # modules that returned the newest tensor, from the innermost
        self._newest: Tensor | None = None
        self._watch = ActivationWatch()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for path, module in self.network.named_modules():
                if path:
                    stack.callback(module.register_forward_hook(self._hook(path)).remove)
            stack.enter_context(self._watch)
            self._leave = stack.pop_all()

    def __exit__(self, *exception: Any) -> None:
        self._leave.__exit__(*exception)
        self._newest, self._watch = None, ActivationWatch()

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.runs[path] += 1
            if not isinstance(output, Tensor):
                return
            if output is not self._newest:
                self._newest, self._same = output, []
            self._same.append(path)
            block = None
            if self._watch.after is output and self._watch.rectified:
                block = next((inner for inner in self._same if self._has_batch_norm(inner)), None)
            self.maps.append((path, tuple(output.shape), block))

        return hook

    def _has_batch_norm(self, path: str) -> bool:
        once = self.runs[path] == 1
        return once and any(map(is_batch_norm, self.network.get_submodule(path).modules()))


def _deepest(trace: _Trace, paths: set[str], images: Tensor) -> dict[int, Stage]:
    """Stride -> the last of the modules that returns a map of it."""
    found = [entry for entry in trace.maps if entry[0] in paths]
    stages: dict[int, Stage] = {}
    for (path, _, block), grid in zip(found, _grids([shape for _, shape, _ in found], images)):
        if grid is None or grid[1] == 1 or grid[2] == 1 or grid[1] > images.shape[-2]:
            continue
        stride = 2 ** round(math.log2(images.shape[-2] / grid[1]))
        if stride >= max(stages, default=1):
            stages[stride] = Stage(path, grid[0], block)
    return stages


def _grids(shapes: Sequence[tuple[int, ...]], images: Tensor) -> list[tuple[int, int, int] | None]:
    """(C, H, W) of each map or token shape of one network; None for another shape.

    A map of C = H = W may have its channels first or last; then the network's other maps decide.
    """
    height, width = images.shape[-2:]

    def alike(rows: int, columns: int) -> bool:
        return abs(rows * width - columns * height) < max(height, width)

    last = any(len(shape) == 4 and alike(*shape[1:3]) and not alike(*shape[2:]) for shape in shapes)
    grids: list[tuple[int, int, int] | None] = []
    for shape in shapes:
        if len(shape) == 3:
            grids.append(_grid_of_tokens(shape, height / width))
        elif len(shape) != 4:
            grids.append(None)
        elif last and alike(*shape[1:3]):
            grids.append((shape[3], shape[1], shape[2]))
        else:
            grids.append((shape[1], shape[2], shape[3]))
    return grids


def _grid_of_tokens(shape: tuple[int, ...], ratio: float) -> tuple[int, int, int] | None:
    try:
        _, channels, height, width = map_of_tokens(torch.empty(shape, device="meta"), ratio).shape
    except UserError:
        return None
    return channels, height, width


def _listed(stages: Mapping[int, Stage]) -> str:
    return ", ".join(map(str, stages)) or "none"
