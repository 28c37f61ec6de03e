"""Loading weights of torchvision, timm or a file into networks, with a head for the data's classes."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from classification.models import architecture, build
from d2_mgd.errors import UserError, located, missing, reason
from d2_mgd.training.timm_networks import TIMM, resampled, timm_network_for
from d2_mgd.training.weights_files import read_safetensors, read_tensors

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]

_LARGEST = 224  # px; published weights that need larger images are not used


def read_checkpoint(path: Path, what: str) -> dict[str, Any]:
    """Read a ``.pth`` or ``.safetensors`` file without running any code of it.

    Args:
        path: the file.
        what: name of the file in error messages.

    Raises:
        UserError: the file is missing or damaged, contains code, or is not a dictionary.
    """
    if not path.is_file():
        raise missing(what, path)
    with located(f"{what} "):
        if path.suffix != ".safetensors":
            return read_tensors(str(path))
        tensors, metadata = read_safetensors(str(path))
        return {**{name: _plain(text) for name, text in metadata.items()}, "state_dict": tensors}


def _plain(text: str) -> Any:
    """A value of a safetensors file's metadata: parsed if it is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def load_file(path: Path, name: str, what: str) -> dict[str, Tensor]:
    """Read a network's state dict from a file of this project, of the published code, or of torchvision.

    Raises:
        UserError: as in :func:`read_checkpoint`; or the file is of another architecture, or without weights.
    """
    content = read_checkpoint(path, what)
    stored = content.get("arch")
    if isinstance(stored, str) and architecture_name(stored) != architecture_name(name):
        raise UserError(f"{what} {path} is of {stored}, not of {name}.")
    state = content
    for key in ("state_dict", "student", "model"):
        if isinstance(content.get(key), dict):
            state = content[key]
            break
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{what} {path} holds no weights.")
    return state


def architecture_name(name: str) -> str:
    """The name of an architecture; of the two names of ShuffleNet-V2 with width 1, torchvision's."""
    return "shufflenet_v2_x1_0" if name == "shufflenet_v2" else name


def load_weights(model: nn.Module, state: State, name: str, what: str, new_head: bool = False) -> None:
    """Load a state dict; with ``new_head``, without a head that has another number of classes.

    Raises:
        UserError: the weights are of another network, or are not finite.
    """
    own = model.state_dict()
    state = resampled(model, state) if name.startswith(TIMM) else state
    head = head_mismatch(own, state)
    if head and not new_head:
        raise UserError(
            f"{what} has {state[head[0]].shape[0]} classes, and {own[head[0]].shape[0]} are needed, one per folder of "
            "the data's train/."
        )
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and key not in head and own[key].shape != state[key].shape]
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {kind} (such as {keys[0]})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise UserError(f"{what} is not of {name}: weights {', '.join(parts)}.")
    if head:
        logger.info(
            "%s: its head of %d classes is replaced by a new head of %d.",
            what,
            state[head[0]].shape[0],
            own[head[0]].shape[0],
        )
    own.update({key: value for key, value in state.items() if key not in head})
    model.load_state_dict(own)  # keeps its metadata, from which some networks read the version of their weights
    broken = next((key for key, value in model.state_dict().items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise UserError(f"{what} holds weights that are not finite, first {broken}.")


def head_mismatch(own: State, state: State) -> list[str]:
    """Keys of the head if the number of its classes is the only difference; otherwise an empty list."""
    differ = [key for key in own if key in state and own[key].shape != state[key].shape]
    modules = {key.rpartition(".")[0] for key in differ}
    same_inputs = all(own[key].shape[1:] == state[key].shape[1:] for key in differ)
    return differ if len(modules) == 1 and same_inputs else []


def pretrained_network(name: str, num_classes: int | None = None, image_size: int = 224) -> tuple[nn.Module, int, str]:
    """Build a network with the ImageNet weights that torchvision (or timm) publishes.

    Args:
        name: architecture.
        num_classes: of the head, which is new if this is not the published number; None: the published number.
        image_size: in px; timm's position embeddings are resampled to it.

    Returns:
        The network, its number of classes, and the source of the weights.

    Raises:
        UserError: no weights are published, or they are not on this machine and cannot be downloaded.
    """
    if name.startswith(TIMM):
        try:
            head = {} if num_classes is None else {"num_classes": num_classes}
            network: Any = timm_network_for(image_size, name, pretrained=True, **head)
        except (OSError, RuntimeError) as error:
            raise UserError(f"the weights of {name} could not be loaded: {reason(error)}.") from error
        return network, int(network.num_classes), "timm"
    weights = published_weights(name)
    classes = num_classes or len(weights.meta["categories"])
    network = build(name, classes)
    load_weights(network, _published_state(name, weights), name, f"torchvision's file of {name}", new_head=True)
    return network, classes, f"torchvision {weights.name}"


def published_weights(name: str) -> WeightsEnum:
    """Choose among torchvision's weights of a network: its first, else its default, else any for images of 224 px.

    Raises:
        UserError: torchvision publishes none.
    """
    published = architecture(name).torchvision
    if published is None:
        raise UserError(
            f"torchvision publishes no weights of {name}: name a file with --student-resume or --teacher-resume."
        )
    there = torchvision.models.get_model_weights(published).__members__  # DEFAULT is an alias of one of them
    order = [there[key] for key in ("IMAGENET1K_V1", "DEFAULT") if key in there] + list(there.values())
    return next(weights for weights in order if max(weights.meta["min_size"]) <= _LARGEST)


def _published_state(name: str, weights: WeightsEnum) -> State:
    """State dict of torchvision's network after loading its file, whose keys may be of an older version.

    torchvision would run code of a damaged or replaced file, so the file is first loaded with ``weights_only``.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = weights.url.rpartition("/")[2]
    try:
        weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{folder / file} asks for python objects or is damaged, so it is not torchvision's: remove it."
        ) from error
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"the ImageNet weights of {name} are not on this machine and cannot be downloaded ({reason(error)}): "
            f"put {file} from {weights.url} into {folder}, or name another file with --teacher-resume (or "
            "--student-resume for the student)."
        ) from error
    try:
        with torch.random.fork_rng(devices=[]):  # its initial weights do not advance the global RNG
            network = torchvision.models.get_model(architecture(name).torchvision, weights=weights, progress=False)
    except RuntimeError as error:
        raise UserError(f"{folder / file} is not torchvision's file of {name}: remove it.") from error
    return network.state_dict()


def network_from_file(
    name: str, path: Path, num_classes: int, what: str, other_classes: bool, image_size: int = 224
) -> tuple[nn.Module, int]:
    """Build a network with the weights of a file; returns it and its number of classes.

    Args:
        name: architecture.
        path: the file.
        num_classes: of the data.
        what: name of the file in error messages.
        other_classes: whether a head with another number of classes is allowed.
        image_size: in px.

    Raises:
        UserError: as in :func:`load_file` and :func:`load_weights`.
    """
    state = load_file(path, name, what)
    model = build(name, num_classes, image_size)
    head = head_mismatch(model.state_dict(), state)
    if head and other_classes:
        num_classes = int(state[head[0]].shape[0])
        model = build(name, num_classes, image_size)
    load_weights(model, state, name, f"{what} {path}")
    return model, num_classes
