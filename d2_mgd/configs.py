"""The project's configs by name, such as ``RetinaNet/mgd_levels_R_50_R_18_FPN_1x.yaml``, in a checkout or a wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

from d2_mgd.errors import UserError

__all__ = ["FOLDER", "WITHOUT_TEACHER", "find", "get", "names"]

_IN_WHEEL = Path(__file__).resolve().parent / "_configs"
FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).resolve().parents[1] / "configs"

# keys of the MGD node that have an effect in a training without a teacher too
WITHOUT_TEACHER = ("DATA", "ACCUMULATE", "PRECISION", "NONFINITE", "CHECKPOINT", "EARLY_STOP")

_NEAREST = 3


def names() -> list[str]:
    """All names, sorted."""
    return sorted(
        path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.*") if path.suffix in (".yaml", ".py")
    )


def get(name: str) -> str:
    """The path of a config, for ``cfg.merge_from_file`` or ``MGD.TEACHER.CONFIG_FILE``.

    Args:
        name: its path below ``configs``; ``.yaml`` may be left out.

    Raises:
        UserError: there is none of that name; the sentence has the nearest names.
    """
    known = names()
    wanted = name if name.endswith((".yaml", ".py")) else f"{name}.yaml"
    if wanted not in known:
        by_file_name = {one.rpartition("/")[2]: one for one in known}
        folder = wanted.rpartition("/")[0]
        near = difflib.get_close_matches(wanted, known, _NEAREST)
        near = near or [one for one in known if folder and one.rpartition("/")[0] == folder]
        near = near or [by_file_name[one] for one in difflib.get_close_matches(wanted, by_file_name, _NEAREST)]
        raise UserError(f"there is no config {name}. {'Nearest' if near else 'Available'}: {', '.join(near or known)}.")
    return str(FOLDER / wanted)


def find(path: str) -> str:
    """``path`` where it is a file or URL, else the config of that name, which may begin with ``configs/``.

    Raises:
        UserError: neither; the sentence has the nearest names.
    """
    if Path(path).is_file() or "://" in path:
        return path
    if Path(path).is_absolute():
        raise UserError(f"the config {path} does not exist.")
    return get(path.removeprefix("./").removeprefix("configs/"))
