"""Weights into Detectron2's models, from ``.pth``, ``.pkl`` and ``.safetensors`` files, read as data and never as code.

``torchvision://resnet18`` names torchvision's file, and any file with torchvision's ResNet names is renamed to
Detectron2's on the way in.
"""

from __future__ import annotations

import logging
import os
import re
from http.client import HTTPException
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathHandler, PathManager
from torch import Tensor, nn

from d2_mgd.errors import UserError, missing, reason
from d2_mgd.training import file_digest
from d2_mgd.training.weights_files import read_pickled_arrays, read_safetensors, read_tensors

__all__ = [
    "SafeCheckpointer",
    "file_digest",
    "fresh_parameters",
    "load_weights",
    "local_weights_file",
    "read_model",
    "read_pickled_arrays",
    "read_tensors",
]

logger = logging.getLogger(__name__)

TORCHVISION_PREFIX = "torchvision://"
_TORCHVISION_FAMILY = re.compile(r"^(resnet|resnext|wide_resnet)\d")


# --- where a file is ---


class _TorchvisionHandler(PathHandler):
    """``torchvision://resnet50[/IMAGENET1K_V2]`` or ``torchvision:///folder/file.pth`` -> a local file."""

    def _get_supported_prefixes(self) -> list[str]:
        return [TORCHVISION_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path[len(TORCHVISION_PREFIX) :]
        return name if name.startswith("/") else _torchvision_file(path, name)


def _torchvision_file(location: str, name: str) -> str:
    """The file of a torchvision model in the torch hub cache, downloaded if it is not there."""
    import torchvision

    names = [known for known in torchvision.models.list_models() if _TORCHVISION_FAMILY.match(known)]
    name, _, version = name.partition("/")
    if name not in names:
        raise UserError(f"{location}: torchvision has no such ResNet; there are: {', '.join(names)}.")
    versions = torchvision.models.get_model_weights(name).__members__
    # Version 1 is what detectors are trained from; version 2 was tuned for classification.
    version = version or next(iter(versions))
    if version not in versions:
        raise UserError(f"{location}: {name} has no weights {version!r}; there are: {', '.join(versions)}.")
    return cached_download(versions[version].url, location)


def cached_download(url: str, location: str) -> str:
    """The file of one of torchvision's URLs in the torch hub cache, downloaded if it is not there.

    Raises:
        UserError: it cannot be downloaded; the message begins with ``location``.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        logger.info("Downloading %s to %s", url, path)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=path[: -len(".pth")].rsplit("-", 1)[-1])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{location}: cannot download {url} ({error}); fetch it elsewhere and put it at {path}."
            ) from error
    return path


PathManager.register_handler(_TorchvisionHandler())


def local_weights_file(location: str) -> str:
    """Local path of a weights file given as a path, a URL, ``detectron2://...`` or ``torchvision://...``.

    Raises:
        UserError: it does not exist, cannot be downloaded (with the reason), or torchvision has no such model.
    """
    try:
        path = PathManager.get_local_path(location)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot get the weights {location}: {reason(error)}.") from error
    if not os.path.isfile(path):
        raise missing("the weights file", location)
    return path


# --- what is in a file ---


def _is_torchvision_resnet(names: Any) -> bool:
    return {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.bn1.weight"} <= set(names)


def _detectron2_name(name: str) -> str:
    """``layer3.1.bn2.weight`` -> ``res4.1.conv2.norm.weight``."""
    stage = re.match(r"layer(\d)\.(\d+)\.(.*)", name)
    prefix, rest = (f"res{int(stage[1]) + 1}.{stage[2]}.", stage[3]) if stage else ("stem.", name)
    rest = re.sub(r"^bn(\d)\.", r"conv\1.norm.", rest)
    return prefix + rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def _from_torchvision(state: dict[str, Any]) -> dict[str, Any]:
    """torchvision's ResNet names to Detectron2's, less the classifier."""
    kept = {name: value for name, value in state.items() if not name.startswith("fc.")}
    return {_detectron2_name(name): value for name, value in kept.items() if "num_batches_tracked" not in name}


def read_model(path: str) -> dict[str, Any]:
    """A file of any of the supported kinds -> {"model": {name: array}, "matching_heuristics": bool, ...}.

    Raises:
        UserError: it cannot be read, or holds no weights.
    """
    if path.endswith(".pkl"):
        data = read_pickled_arrays(path)
        if "model" not in data or "__author__" not in data:  # Caffe2, Detectron 1
            data = {"model": data.get("blobs", data), "__author__": "Caffe2", "matching_heuristics": True}
    elif path.endswith(".safetensors"):
        data = {"model": read_safetensors(path)[0]}
    else:
        data = read_tensors(path)
        if "model_state" in data and path.endswith(".pyth"):  # pycls
            data = {"model": data["model_state"], "matching_heuristics": True}
        elif "model" not in data:
            data = {"model": data}
    model = data["model"]
    if not isinstance(model, dict) or not model or not all(isinstance(name, str) for name in model):
        raise UserError(f"{path} holds no weights by name.")
    if data.get("__author__") == "Caffe2":
        model = data["model"] = {name: value for name, value in model.items() if not name.endswith("_momentum")}
    for name, value in model.items():
        plain = isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object)
        if not plain:
            raise UserError(f"{path} holds {name!r} of type {type(value).__name__}, where weights hold an array.")
    if _is_torchvision_resnet(model):
        data = {**data, "model": _from_torchvision(model), "__author__": "torchvision", "matching_heuristics": True}
    return data


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, reading every file by the rules of this module.

    :attr:`incompatible` holds what the newest load left over: ``missing_keys``, ``unexpected_keys``,
    ``incorrect_shapes``.
    """

    incompatible: Any = None
    used = 0  # weights of the file that the newest load took

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint as Detectron2 does; ``path`` may end in ``?matching_heuristics=True``."""
        location, mark, query = path.partition("?")
        return super().load(local_weights_file(location) + mark + query if path else path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = read_model(filename)
        query = parse_qs(self._parsed_url_during_load.query if self._parsed_url_during_load else "")
        if query.pop("matching_heuristics", [""]) == ["True"]:
            data["matching_heuristics"] = True
        if query:
            raise UserError(f"{filename}: unknown query {', '.join(query)}; there is matching_heuristics=True.")
        return data

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        given = [name for name in checkpoint["model"] if "cell_anchors" not in name]  # constants, in old files
        self.incompatible = super()._load_model(checkpoint)
        self.used = len(given) - len(self.incompatible.unexpected_keys) - len(self.incompatible.incorrect_shapes)
        return self.incompatible


def load_weights(model: nn.Module, location: str) -> Any:
    """Load weights into a Detectron2 model, in place.

    What does not fit is logged, as in Detectron2: new heads on a pre-trained backbone are missing by intention.

    Args:
        model: a plain Detectron2 model.
        location: a path, a URL, ``detectron2://...`` or ``torchvision://...``.

    Returns:
        An object with ``missing_keys``, ``unexpected_keys`` and ``incorrect_shapes``.

    Raises:
        UserError: there is no such file, or it cannot be read, fits the model nowhere, or holds weights that are not
            finite.
    """
    checkpointer = SafeCheckpointer(model)
    checkpointer.load(location, checkpointables=[])
    left = checkpointer.incompatible
    if checkpointer.used < 1:
        theirs = next(iter([*left.unexpected_keys, *(name for name, *_ in left.incorrect_shapes)]), "nothing")
        ours = next(iter(model.state_dict()))
        raise UserError(
            f"no weight in {location} fits the model by name and shape: it has {theirs!r}, the model {ours!r}."
        )
    _check_finite(model, {*left.missing_keys, *(name for name, *_ in left.incorrect_shapes)}, location)
    logger.info(
        "The model takes %d weights from %s and has %d others", checkpointer.used, location, len(left.missing_keys)
    )
    return left


def fresh_parameters(model: nn.Module, left: Any) -> list[str]:
    """Names of the parameters that a load, of which ``left`` is the result, has not set."""
    not_taken = {*left.missing_keys, *(name for name, *_ in left.incorrect_shapes)}
    return [name for name, _ in model.named_parameters() if name in not_taken]


def _check_finite(model: nn.Module, not_taken: set[str], location: str) -> None:
    for name, value in model.state_dict().items():
        if name not in not_taken and not torch.isfinite(value).all():
            raise UserError(f"{location} holds weights that are not finite, first {name}.")
