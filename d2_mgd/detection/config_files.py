"""Config files and KEY VALUE overrides into a config, and the types of its values.

The config library accepts a value in place of a group, and shows both values, which may be whole configs, where types
differ. So types are checked here before it merges.
"""

from __future__ import annotations

import copy
import difflib
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from d2_mgd.errors import UserError, located, reason

_LISTS = {
    "FEATURES": "names",
    "REMATCH.PERIODS": "whole numbers",
    "REMATCH.MILESTONES": "whole numbers",
    "REMATCH.AT": "whole numbers",
    "REMATCH.LOG_SPACED": "whole numbers",
}
_KINDS = {"CfgNode": "group of keys", "str": "text", "int": "whole number", "float": "number", "NoneType": "null"}
_LARGEST = 2**53  # beyond which a float is no count
_PYTHON = "tag:yaml.org,2002:python/"  # yaml's prefix of tags that construct python objects


def merge_file(cfg: CfgNode, path: str, *, allow_unsafe: bool = False, what: str = "") -> None:
    """Merge a yaml file, and what its ``_BASE_`` names, into ``cfg``.

    Args:
        cfg: changed in place.
        path: of the file.
        allow_unsafe: run the python expressions that the file holds; for Detectron2's own files alone.
        what: how errors begin; the path by default.

    Raises:
        UserError: the file is no config of keys that ``cfg`` has, or it asks for python where that is not allowed;
            nothing of it has run then.
    """
    with located(f"{what or path}: "):
        try:
            with PathManager.open(path, "r") as file:
                document = yaml.compose(file, Loader=yaml.SafeLoader)  # its structure alone: nothing is constructed
            if not isinstance(document, yaml.MappingNode):
                raise UserError("it holds no keys.")
            _check_value("", cfg, CfgNode.load_yaml_with_base(path, allow_unsafe=allow_unsafe))
            cfg.merge_from_file(path, allow_unsafe=allow_unsafe)
        except UserError:
            raise
        except yaml.constructor.ConstructorError as error:
            if _PYTHON not in str(error.problem):
                raise UserError(f"{_text(error)}.") from error
            raise UserError(
                f"it (or a base of it) asks for python, {error.problem}: that is not run, so write the values out."
            ) from error
        except RecursionError:
            raise UserError("it is nested without end, or its _BASE_ leads back to it.") from None
        except (OSError, yaml.YAMLError, AssertionError, KeyError, ValueError) as error:
            raise UserError(f"{_text(error)}.") from error
        except (TypeError, AttributeError) as error:  # the config library expects names that are text
            raise UserError(f"a key or value in it is of the wrong kind ({_text(error)}).") from error


def merge_overrides(cfg: CfgNode, words: Sequence[Any], what: str) -> None:
    """Merge ``[KEY, VALUE, KEY, VALUE, ...]`` into ``cfg``; a VALUE is a python literal, or text.

    Args:
        cfg: changed in place.
        words: keys and values in turn.
        what: how errors begin.

    Raises:
        UserError: a key that ``cfg`` does not have, a value of another type, or a KEY without a VALUE.
    """
    with located(f"{what}: "):
        if len(words) % 2:
            raise UserError(f"{_key_without_value(cfg, words)} has no value.")
        for key, value in zip(words[::2], words[1::2]):
            if not isinstance(key, str) or not key.strip():
                raise UserError(f"{key!r} is no key.")
            try:
                if _is_key(cfg, key):
                    _check_value(key, _value(cfg, key), value)
                elif not cfg.key_is_deprecated(key) and not cfg.key_is_renamed(key):
                    near = difflib.get_close_matches(key, _keys(cfg), 3)
                    nearest = f" Nearest: {', '.join(near)}." if near else ""
                    raise UserError(f"Non-existent key: {key}.{nearest}")
                cfg.merge_from_list([key, value])
            except UserError:
                raise
            except (AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{_text(error)}.") from error
            except (RecursionError, MemoryError):
                raise UserError(f"the value of {key} is nested too deeply.") from None


def add_missing_keys(cfg: CfgNode, other: CfgNode) -> None:
    """Add the keys of ``other`` that ``cfg`` lacks, with their values."""
    for name, value in other.items():
        if name not in cfg:
            cfg[name] = copy.deepcopy(value)
        elif isinstance(value, CfgNode) and isinstance(cfg[name], CfgNode):
            add_missing_keys(cfg[name], value)
    cfg.defrost()


def changed_settings(cfg: CfgNode, path: str | os.PathLike[str]) -> list[str]:
    """``KEY old -> new`` for each key that has another value in an earlier dump; none if that cannot be read."""
    try:
        old = CfgNode(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        new = CfgNode(yaml.safe_load(cfg.dump()))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []
    both = [key for key in _keys(old) if _is_key(new, key)]
    return [f"{key} {_value(old, key)} -> {_value(new, key)}" for key in both if _value(old, key) != _value(new, key)]


def _key_without_value(cfg: CfgNode, words: Sequence[Any]) -> Any:
    """The first key of an odd list that is followed by a key, else the last word."""
    pairs = zip(words[::2], words[1::2])
    return next((key for key, value in pairs if isinstance(value, str) and _is_key(cfg, value)), words[-1])


def _is_key(cfg: CfgNode, word: str) -> bool:
    group, _, name = word.rpartition(".")
    return (not group or _is_key(cfg, group)) and isinstance(_value(cfg, group), CfgNode) and name in _value(cfg, group)


def _keys(cfg: CfgNode, group: str = "") -> list[str]:
    """The full names of all keys."""
    found: list[str] = []
    for name, value in cfg.items():
        found += _keys(value, f"{group}{name}.") if isinstance(value, CfgNode) else [f"{group}{name}"]
    return found


def _value(cfg: CfgNode, key: str) -> Any:
    """The value of a key that exists; the config itself for an empty one."""
    return functools.reduce(lambda node, name: node[name], key.split(".") if key else [], cfg)


def check_mgd_types(mgd: CfgNode, defaults: CfgNode) -> None:
    """Check that the values of the `MGD` node have the types of its defaults, and the elements of its lists too.

    Args:
        mgd: the node.
        defaults: the same with all values as they were.

    Raises:
        UserError: a value of another type; the message names the key.
    """
    _check_value("MGD", defaults, mgd, exact=False)
    for key, kind in _LISTS.items():
        _check_elements(f"MGD.{key}", _value(mgd, key), kind)
    for group in mgd.TIE:
        _check_elements("each list in MGD.TIE", group, "names")


def _check_value(key: str, old: Any, new: Any, exact: bool = True) -> None:
    """Check that ``new`` has a type that the config library takes in place of ``old``.

    If not ``exact``, a whole number may stand for a number. Keys that ``old`` lacks are left to the config library,
    which names them.
    """
    if isinstance(old, CfgNode) and isinstance(new, Mapping):
        for name in new:
            if name in old:
                _check_value(f"{key}.{name}" if key else name, old[name], new[name], exact)
        return
    if exact:
        new = CfgNode._decode_cfg_value(new)  # text may be a literal, such as "(1, 2)"
    if new is None and old is not None and not isinstance(old, CfgNode):
        raise UserError(f"{key} must be of the kind of {old!r}, not None.")
    if not _same_kind(old, new) and (exact or (type(old), type(new)) != (float, int)):
        wanted, given = (_KINDS.get(type(value).__name__, type(value).__name__) for value in (old, new))
        raise UserError(f"{key} must be a {wanted}, not a {given}.")
    if isinstance(new, str) and not new.isprintable():
        raise UserError(f"{key} holds characters that cannot be shown: {new!r}.")
    if isinstance(new, int) and abs(new) > _LARGEST:
        raise UserError(f"{key} is too large a number: {str(new)[:20]}.")


def _same_kind(old: Any, new: Any) -> bool:
    return type(old) is type(new) or old is None or {type(old), type(new)} == {list, tuple}


def _check_elements(key: str, values: Any, kind: str) -> None:
    fits = _is_name if kind == "names" else _is_whole
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{key} must be a list of {kind}, got {values!r}.")
    for value in values:
        if not fits(value):
            raise UserError(f"{key} must be a list of {kind}, and {value!r} is none.")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_whole(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        return False
    return value == int(value)


def _text(error: BaseException) -> str:
    """An error of the config library, of yaml or of the system as a clause."""
    if isinstance(error, OSError) and error.filename:
        return f"{reason(error)}: {error.filename}"
    return str(getattr(error, "problem", None) or reason(error))
