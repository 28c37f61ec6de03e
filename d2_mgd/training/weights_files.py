"""Weights files of strangers: what a file holds is data, never code.

``.pth`` is read by ``torch.load(weights_only=True)``; ``.pkl`` of Detectron2's model zoo by an unpickler that admits
numpy arrays and plain containers; ``.safetensors`` can hold nothing but tensors and text. A file that needs more is
read only if a person has named it by :func:`trust`.
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

__all__ = [
    "UntrustedFileError",
    "read_pickled_arrays",
    "read_safetensors",
    "read_tensors",
    "trust",
    "write_safetensors",
]

logger = logging.getLogger(__name__)

_TRUSTED: set[str] = set()


class UntrustedFileError(UserError):
    """A weights file that was not read; the message is one sentence that begins with its path."""


def trust(path: str | os.PathLike[str]) -> None:
    """From now on this process runs whatever code a weights file asks for. For files whose maker one knows."""
    _TRUSTED.add(os.path.realpath(path))


def _is_trusted(path: str) -> bool:
    trusted = os.path.realpath(path) in _TRUSTED
    if trusted:
        logger.warning("%s is trusted: it is read as a program of whoever made it, which may do anything", path)
    return trusted


def _refused(path: str, what: str) -> UntrustedFileError:
    return UntrustedFileError(
        f"{path} {what}, which weights do not need: it was not loaded; if you know who made it, --trust-weights {path} "
        "loads it all the same and runs what it asks for."
    )


def _unreadable(path: str, error: Exception) -> UntrustedFileError:
    first = reason(error).split(". ")[0]  # torch goes on with addresses and advice
    return UntrustedFileError(f"{path} is damaged or cut short, or no weights file at all: {first}.")


def _as_dict(path: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UntrustedFileError(f"{path} holds a {type(data).__name__}, not a dict of weights.")
    return data


def read_tensors(path: str) -> dict[str, Any]:
    """Read a ``.pth`` file of tensors and plain containers.

    Raises:
        UntrustedFileError: the file is damaged, or asks for python objects; nothing of it has run.
    """
    trusted = _is_trusted(path)
    try:
        # PyTorch before 2.6 reads its oldest format without the restriction (CVE-2025-32434)
        if not trusted and tarfile.is_tarfile(path):
            raise _refused(path, "is a tar archive, PyTorch's format of before 2017, and may ask for python objects")
        data = torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for the python object {asked.group(1)}" if asked else "is damaged or holds python objects"
        raise _refused(path, what) from error
    except UntrustedFileError:
        raise
    except Exception as error:  # a damaged file fails in any way
        raise _unreadable(path, error) from error
    return _as_dict(path, data)


class _AskedForMore(pickle.UnpicklingError):
    """The name of the python object that a pickle asks for."""


def _decode_latin1(text: str, encoding: str) -> bytes:
    """Stands for ``codecs.encode``, by which old pickles spell bytes; other codecs are refused."""
    if encoding != "latin1":
        raise _AskedForMore(f"codecs.{encoding}")
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
        raise _AskedForMore(f"{module}.{name}")


def read_pickled_arrays(path: str) -> dict[str, Any]:
    """Read a ``.pkl`` file of numpy arrays and plain containers, as Detectron2's model zoo has them.

    Raises:
        UntrustedFileError: the file is damaged, or asks for anything else; nothing of it has run.
    """
    unpickler = pickle.Unpickler if _is_trusted(path) else _ArrayUnpickler
    try:
        with open(path, "rb") as file:
            data = unpickler(file, encoding="latin1").load()
    except _AskedForMore as error:
        raise _refused(path, f"asks for the python object {error}") from error
    except Exception as error:  # a damaged pickle fails in any way
        raise _unreadable(path, error) from error
    return _as_dict(path, data)


def read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a ``.safetensors`` file, on the CPU, and the text beside them.

    Raises:
        UntrustedFileError: it is damaged or no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def write_safetensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, whole or not at all; those that share memory are written once each."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    data = safetensors.torch.save(plain, {"format": "pt", **(metadata or {})})
    write_atomically(path, lambda file: file.write(data))
