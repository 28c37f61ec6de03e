"""Config files and KEY VALUE overrides into a config, and what the config library lets pass: groups and types of keys.

Whatever is wrong is a ``ValueError`` whose message is a clause: the caller says of which file or command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

__all__ = ["check_mgd_types", "merge_file", "merge_overrides"]

_LISTS = {
    "FEATURES": "names",
    "REMATCH.PERIODS": "whole numbers",
    "REMATCH.MILESTONES": "whole numbers",
    "REMATCH.AT": "whole numbers",
    "REMATCH.LOG_SPACED": "whole numbers",
}
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(?:\w+\.)*(\w+)'> vs\. <class '(?:\w+\.)*(\w+)'>\).* for config key: (\S+)"
)
_KINDS = {"CfgNode": "group of keys", "str": "text", "int": "whole number", "float": "number", "NoneType": "null"}
_LARGEST = 2**53  # beyond which a float is no count


def merge_file(cfg: CfgNode, path: str, allow_unsafe: bool) -> None:
    """Merge a yaml file, and what its ``_BASE_`` names, into ``cfg``.

    Args:
        cfg: changed in place.
        path: of the file.
        allow_unsafe: run the python expressions that the file holds; for Detectron2's own files alone.

    Raises:
        yaml.constructor.ConstructorError: it asks for python, and that is not allowed; nothing of it has run.
        ValueError: it is no config of keys that ``cfg`` has.
    """
    before = cfg.clone()
    try:
        with PathManager.open(path, "r") as file:
            document = yaml.compose(file, Loader=yaml.SafeLoader)  # its structure alone: nothing is constructed
        if not isinstance(document, yaml.MappingNode):
            raise ValueError("it holds no keys")
        cfg.merge_from_file(path, allow_unsafe=allow_unsafe)
    except yaml.constructor.ConstructorError as error:
        if "python" in (error.problem or ""):
            raise
        raise ValueError(_text(error)) from error
    except RecursionError:
        raise ValueError("it is nested without end, or its _BASE_ leads back to it") from None
    except (OSError, yaml.YAMLError, AssertionError, KeyError, ValueError) as error:
        raise ValueError(_text(error)) from error
    except (TypeError, AttributeError) as error:  # the config library relies on groups being groups, and names text
        raise ValueError(f"a key or value in it is of the wrong kind ({_text(error)})") from error
    _check_structure(cfg, before)


def merge_overrides(cfg: CfgNode, words: Sequence[Any]) -> None:
    """Merge ``[KEY, VALUE, KEY, VALUE, ...]`` into ``cfg``; a VALUE is a python literal, or text.

    Raises:
        ValueError: a key that ``cfg`` does not have, a value of another type, or a KEY without a VALUE.
    """
    before = cfg.clone()
    if len(words) % 2:
        raise ValueError(f"{_key_without_value(cfg, words)} has no value")
    for key in words[::2]:
        if not isinstance(key, str) or not key.strip():
            raise ValueError(f"{key!r} is no key")
    try:
        cfg.merge_from_list(list(words))
    except (AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(_text(error)) from error
    except (RecursionError, MemoryError):
        raise ValueError("a value is nested too deeply") from None
    _check_structure(cfg, before)


def _key_without_value(cfg: CfgNode, words: Sequence[Any]) -> Any:
    """The first key of an odd list that is followed by a key, else the last word."""
    pairs = zip(words[::2], words[1::2])
    return next((key for key, value in pairs if isinstance(value, str) and _is_key(cfg, value)), words[-1])


def _is_key(cfg: CfgNode, word: str) -> bool:
    node: Any = cfg
    for name in word.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            return False
        node = node[name]
    return True


def check_mgd_types(mgd: CfgNode, defaults: CfgNode) -> None:
    """The values of the `MGD` node have the types that its defaults have, and its lists hold what they are lists of.

    Args:
        mgd: the node.
        defaults: the same with all values as they were.

    Raises:
        ValueError: a sentence that names the key.
    """
    try:
        _check_structure(mgd, defaults, "MGD.")
        for key, kind in _LISTS.items():
            values: Any = mgd
            for name in key.split("."):
                values = values[name]
            _check_elements(f"MGD.{key}", values, kind)
        for group in mgd.TIE:
            _check_elements("each list in MGD.TIE", group, "names")
    except ValueError as error:
        raise ValueError(f"{error}.") from None


def _check_structure(cfg: CfgNode, known: CfgNode, prefix: str = "") -> None:
    """Every key of ``known`` is still there, groups are groups, and values have types that go together."""
    for name, old in known.items():
        key, new = f"{prefix}{name}", cfg.get(name)
        if isinstance(old, CfgNode):
            if not isinstance(new, CfgNode):
                raise ValueError(f"{key} is a group of keys, not {new!r}")
            _check_structure(new, old, f"{key}.")
        elif new is None and old is not None:
            raise ValueError(f"{key} must be of the kind of {old!r}, not None")
        elif isinstance(new, str) and not new.isprintable():
            raise ValueError(f"{key} holds characters that cannot be shown: {new!r}")
        elif isinstance(new, int) and isinstance(old, (int, float)) and abs(new) > _LARGEST:
            raise ValueError(f"{key} is too large a number: {str(new)[:20]}")


def _check_elements(key: str, values: Any, kind: str) -> None:
    fits = _is_name if kind == "names" else _is_whole
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{key} must be a list of {kind}, got {values!r}")
    for value in values:
        if not fits(value):
            raise ValueError(f"{key} must be a list of {kind}, and {value!r} is none")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_whole(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        return False
    return value == int(value)


def _text(error: BaseException) -> str:
    """An error's message as a clause."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    message = getattr(error, "problem", None)
    if not message:  # the config library raises KeyError, whose text is in quotes
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(message).split()).rstrip(".")
    mismatch = _MISMATCH.match(text)  # it would show both values, which may be whole configs
    if mismatch:
        wanted, given = (_KINDS.get(name, name) for name in mismatch.groups()[:2])
        return f"{mismatch[3]} must be a {wanted}, not a {given}"
    return text or type(error).__name__
