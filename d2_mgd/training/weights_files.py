"""Reading weights files from any source without running code that they contain.

``.pth`` is read by ``torch.load(weights_only=True)``; ``.pkl`` of Detectron2's model zoo by an unpickler that accepts
only numpy arrays and plain containers; ``.safetensors`` contains only tensors and text. A file with other objects is
read only after :func:`trust`.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2_mgd.errors import UserError, reason
from d2_mgd.training.files import write_atomically

logger = logging.getLogger(__name__)

_TRUSTED: set[str] = set()


class UntrustedFileError(UserError):
    """A weights file was not read: ``problem`` is the message without the path at its start and the full stop."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path} {problem}.")
        self.problem = problem


def trust(path: str | os.PathLike[str]) -> None:
    """Let this process run code of a weights file when it reads the file. Only for files of a trusted author."""
    _TRUSTED.add(os.path.realpath(path))


def _is_trusted(path: str) -> bool:
    trusted = os.path.realpath(path) in _TRUSTED
    if trusted:
        logger.warning("%s is trusted: reading it runs any code that it contains", path)
    return trusted


def _refused(path: str, what: str) -> UntrustedFileError:
    return UntrustedFileError(
        path,
        f"{what}, which weights do not need, so it was not loaded; if you trust its author, --trust-weights {path} "
        "loads it and runs its code",
    )


def _unreadable(path: str, error: Exception) -> UntrustedFileError:
    first = reason(error).split(". ")[0]  # torch adds addresses and advice
    return UntrustedFileError(path, f"is damaged or cut short, or is not a weights file: {first}")


def _as_dict(path: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UntrustedFileError(path, f"holds a {type(data).__name__}, not a dict of weights")
    return data


def read_tensors(path: str) -> dict[str, Any]:
    """Read a ``.pth`` file of tensors and plain containers.

    Raises:
        UntrustedFileError: the file is damaged, or contains python objects; none of its code has run.
    """
    if path.endswith(".onnx"):
        raise UntrustedFileError(path, "is an exported network; give the weights it was exported from")
    trusted = _is_trusted(path)
    try:
        # PyTorch before 2.6 reads its oldest format without the restriction (CVE-2025-32434)
        old = not trusted and tarfile.is_tarfile(path)
        data = None if old else torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for the python object {asked.group(1)}" if asked else "is damaged or holds python objects"
        raise _refused(path, what) from error
    except Exception as error:  # torch raises errors of many types for damaged files
        raise _unreadable(path, error) from error
    if old:
        raise _refused(path, "is a tar archive, PyTorch's format of before 2017, and may ask for python objects")
    return _as_dict(path, data)


class _AskedForMore(pickle.UnpicklingError):
    """A pickle asks for a python object, which the message names."""


def _decode_latin1(text: str, encoding: str) -> bytes:
    """Replaces ``codecs.encode``, with which old pickles encode bytes; only latin1 is accepted."""
    if encoding != "latin1":
        raise _AskedForMore(f"codecs.{encoding}")
    return text.encode("latin1")


# name in pickles of numpy 1 and 2 -> the function of the installed version
_OF_NUMPY = {
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "_reconstruct": np.empty(0).__reduce__()[0],
    "scalar": np.float64(0).__reduce__()[0],
    "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
}
_NUMPY_MODULES = {f"numpy{core}{part}" for core in (".core", "._core") for part in (".multiarray", ".numeric")}


class _ArrayUnpickler(pickle.Unpickler):
    """Accepts numpy arrays and plain containers; refuses any other name before it is imported."""

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
        raise _AskedForMore(f"{module}.{name}")


def read_pickled_arrays(path: str) -> dict[str, Any]:
    """Read a ``.pkl`` file of numpy arrays and plain containers, the format of Detectron2's model zoo.

    Raises:
        UntrustedFileError: the file is damaged, or contains other objects; none of its code has run.
    """
    unpickler = pickle.Unpickler if _is_trusted(path) else _ArrayUnpickler
    try:
        with open(path, "rb") as file:
            data = unpickler(file, encoding="latin1").load()
    except _AskedForMore as error:
        raise _refused(path, f"asks for the python object {error}") from error
    except Exception as error:  # pickle raises errors of many types for damaged files
        raise _unreadable(path, error) from error
    return _as_dict(path, data)


def read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a ``.safetensors`` file, on the CPU, and its metadata.

    Raises:
        UntrustedFileError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def write_safetensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically; tensors that share memory are each written in full."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    data = safetensors.torch.save(plain, {"format": "pt", **(metadata or {})})
    write_atomically(path, lambda file: file.write(data))
