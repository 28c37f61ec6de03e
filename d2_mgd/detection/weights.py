"""Reading weights from files of strangers: what a file holds is data, never code.

``.pth`` is read by ``torch.load(weights_only=True)``; ``.pkl`` of Detectron2's model zoo by an unpickler that admits
numpy arrays and plain containers. ``torchvision://resnet18`` names torchvision's file, and any file with torchvision's
ResNet names is renamed to Detectron2's on the way in.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections import OrderedDict
from typing import Any, NoReturn
from urllib.parse import parse_qs

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathHandler, PathManager
from torch import Tensor, nn

from d2_mgd.reliability import file_digest

__all__ = [
    "SafeCheckpointer",
    "file_digest",
    "load_weights",
    "local_weights_file",
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
        raise ValueError(f"{location}: torchvision has no such ResNet; there are: {', '.join(names)}.")
    versions = torchvision.models.get_model_weights(name).__members__
    # Version 1 is what detectors are trained from; version 2 was tuned for classification.
    version = version or next(iter(versions))
    if version not in versions:
        raise ValueError(f"{location}: {name} has no weights {version!r}; there are: {', '.join(versions)}.")
    url = versions[version].url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        logger.info("Downloading %s to %s", url, path)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=path[: -len(".pth")].rsplit("-", 1)[-1])
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{location}: cannot download {url} ({error}); fetch it elsewhere and put it at {path}."
            ) from error
    return path


PathManager.register_handler(_TorchvisionHandler())


def local_weights_file(location: str) -> str:
    """Local path of a weights file given as a path, a URL, ``detectron2://...`` or ``torchvision://...``.

    Raises:
        FileNotFoundError: it does not exist, or cannot be downloaded (with the reason).
        ValueError: torchvision has no such model.
    """
    try:
        path = PathManager.get_local_path(location)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # whatever the download library of that kind of URL raises
        raise FileNotFoundError(f"cannot get the weights {location}: {error}.") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the weights file {location} does not exist.")
    return path


# --- what is in a file ---


def read_tensors(path: str) -> dict[str, Any]:
    """Read a ``.pth`` file of tensors and plain containers.

    Raises:
        ValueError: the file is damaged, or asks for python objects; nothing of it has run.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for the python object {asked.group(1)}" if asked else "is damaged or holds python objects"
        raise ValueError(f"{path} {what}, which weights do not need: it was not loaded.") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable weights file: {_reason(error)}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not a dict of weights.")
    return data


def _reason(error: Exception) -> str:
    """The first line of an error's message, or what kind of error it is."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _decode_latin1(text: str, encoding: str) -> bytes:
    """Stands for ``codecs.encode``, by which old pickles spell bytes; other codecs are refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode("latin1")


# numpy's own names in pickles, where versions 1 and 2 keep them -> the same function of this version
_OF_NUMPY = {
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "_reconstruct": np.empty(0).__reduce__()[0],
    "scalar": np.float64(0).__reduce__()[0],
    "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
}
_NUMPY_MODULES = {f"numpy{core}{part}" for core in (".core", "._core") for part in (".multiarray", ".numeric")}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers; any other name is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module in {"numpy", *_NUMPY_MODULES} and name in _OF_NUMPY:
            return _OF_NUMPY[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return _decode_latin1
        self._refuse(module, name)

    def persistent_load(self, pid: Any) -> NoReturn:
        self._refuse("persistent", str(pid))

    def _refuse(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_pickled_arrays(path: str) -> dict[str, Any]:
    """Read a ``.pkl`` file of numpy arrays and plain containers, as Detectron2's model zoo has them.

    Raises:
        ValueError: the file is damaged, or asks for anything else; nothing of it has run.
    """
    try:
        with open(path, "rb") as file:
            data = _ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} asks for the python object {error}, which weights do not need: it was not loaded."
        ) from error
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(f"{path} is not a readable weights file: {_reason(error)}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not a dict of weights.")
    return data


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


def _read_model(path: str) -> dict[str, Any]:
    """A file of any of the supported kinds -> {"model": {name: array}, "matching_heuristics": bool, ...}."""
    if path.endswith(".pkl"):
        data = read_pickled_arrays(path)
        if "model" not in data or "__author__" not in data:  # Caffe2, Detectron 1
            blobs = data.get("blobs", data)
            blobs = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
            data = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
    else:
        data = read_tensors(path)
        if "model_state" in data and path.endswith(".pyth"):  # pycls
            data = {"model": data["model_state"], "matching_heuristics": True}
        elif "model" not in data:
            data = {"model": data}
    model = data["model"]
    if not isinstance(model, dict) or not model:
        raise ValueError(f"{path} holds no weights.")
    for name, value in model.items():
        plain = isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object)
        if not plain:
            raise ValueError(f"{path} holds a {type(value).__name__} at {name!r}, where weights hold an array.")
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
        """As in Detectron2; a path may end in ``?matching_heuristics=True``."""
        location, mark, query = path.partition("?")
        return super().load(local_weights_file(location) + mark + query if path else path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = _read_model(filename)
        query = parse_qs(self._parsed_url_during_load.query if self._parsed_url_during_load else "")
        if query.pop("matching_heuristics", [""]) == ["True"]:
            data["matching_heuristics"] = True
        if query:
            raise ValueError(f"{filename}: unknown query {', '.join(query)}; there is matching_heuristics=True.")
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
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or fits the model nowhere.
    """
    checkpointer = SafeCheckpointer(model)
    checkpointer.load(location, checkpointables=[])
    left = checkpointer.incompatible
    if checkpointer.used < 1:
        theirs = next(iter([*left.unexpected_keys, *(name for name, *_ in left.incorrect_shapes)]), "nothing")
        ours = next(iter(model.state_dict()))
        raise ValueError(
            f"no weight in {location} fits the model by name and shape: it has {theirs!r}, the model {ours!r}."
        )
    logger.info(
        "The model takes %d weights from %s and has %d others", checkpointer.used, location, len(left.missing_keys)
    )
    return left
