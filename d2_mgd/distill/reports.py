"""What a rematch found, as a value and as a file.

Shape shorthand: S student channels, T teacher channels, G the size of the largest group.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d2_mgd.errors import UserError
from d2_mgd.matching import ChannelMatching
from d2_mgd.training import write_atomically

__all__ = ["RematchReport", "load_reports", "save_reports"]


@dataclass(frozen=True, eq=False)
class RematchReport:
    """One feature's rematch.

    Args:
        feature: its name.
        matching: the matching in force from now on.
        cost: (S, T) float64, the mean cost over all images of all processes.
        changed: share of student channels whose group changed; 1 for the first matching.
        seconds: what solving took.
        num_images: images that the cost is a mean over.
        agreement: of a trained projection with this matching, see
            :class:`~d2_mgd.matching.ProjectionAgreement`; None for the first matching and where there is no projection.
    """

    feature: str
    matching: ChannelMatching
    cost: np.ndarray
    changed: float
    seconds: float
    num_images: int
    agreement: float | None = None

    @property
    def mean_cost(self) -> float:
        """Mean cost of the matched pairs."""
        return float(self.cost[self.matching.pairs].mean())


_FIELDS = ("cost", "groups", "changed", "seconds", "num_images")


def save_reports(path: str | os.PathLike[str], reports: Mapping[str, RematchReport]) -> None:
    """Write all features' reports to one ``.npz``: arrays ``<feature>/cost``, ``<feature>/groups`` and scalars.

    The file appears whole or not at all.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, report in reports.items():
        values = (report.cost, report.matching.groups, report.changed, report.seconds, report.num_images)
        arrays.update({f"{name}/{field}": np.asarray(value) for field, value in zip(_FIELDS, values)})
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def load_reports(path: str | os.PathLike[str]) -> dict[str, RematchReport]:
    """Read :func:`save_reports`' file.

    Raises:
        ValueError: the file holds no reports.
    """
    with np.load(path, allow_pickle=False) as arrays:
        names = [key[: -len("/groups")] for key in arrays.files if key.endswith("/groups")]
        if not names:
            raise UserError(f"{path} holds no matching reports.")
        return {name: _report(name, {field: arrays[f"{name}/{field}"] for field in _FIELDS}) for name in names}


def _report(name: str, fields: Mapping[str, np.ndarray]) -> RematchReport:
    cost = fields["cost"]
    matching = ChannelMatching(fields["groups"], num_teacher=cost.shape[1])
    matching = ChannelMatching(matching.groups, matching.num_teacher, float(cost[matching.pairs].sum()))
    return RematchReport(
        feature=name,
        matching=matching,
        cost=cost,
        changed=float(fields["changed"]),
        seconds=float(fields["seconds"]),
        num_images=int(fields["num_images"]),
    )
