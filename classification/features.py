"""Which features of a student and its teacher are compared: the table's, or those named on the command line.

Shape shorthand: S student channels, T teacher channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from classification.errors import UserError, user_errors
from classification.models import Feature, architecture
from d2_mgd.distill import Tap, batch_norm_margin

__all__ = ["FeaturePair", "margins", "pair_features", "published_factors"]

_BEFORE = "@pre"  # suffix of a module's path: tap before its last activation
_FORM = "NAME, NAME=STUDENT_MODULE or NAME=STUDENT_MODULE:TEACHER_MODULE[:TEACHER_NORM]"


@dataclass(frozen=True)
class FeaturePair:
    """One feature of both networks.

    Args:
        student: tap of the student.
        teacher: tap of the teacher.
        norm: dotted path of the teacher's batch-norm for the margins; None: the last one inside the tapped module.
        distilled: whether it is compared; features that are not still count in the published factors.
    """

    student: Tap
    teacher: Tap
    norm: str | None
    distilled: bool = True


def pair_features(student: str, teacher: str, specs: Sequence[str] | None = None) -> dict[str, FeaturePair]:
    """Name -> the pair, shallow to deep.

    Args:
        student: architecture.
        teacher: architecture.
        specs: what ``--features`` was given; None for the table's features, of which the student's ignored ones are not
            distilled. A bare name takes both modules from the table. ``MODULE@pre`` taps before the last activation.

    Raises:
        UserError: no features are known for a network, or a spec cannot be understood.
    """
    student_row, teacher_row = architecture(student), architecture(teacher)
    if specs is None:
        for name, row in ((student, student_row), (teacher, teacher_row)):
            if not row.features:
                raise UserError(f"where to tap {name} is not known: name its modules with --features {_FORM}.")
        return {
            name: FeaturePair(
                student_row.features[name].tap,
                teacher_row.features[name].tap,
                teacher_row.features[name].norm,
                name not in student_row.ignored,
            )
            for name in student_row.features
        }
    pairs: dict[str, FeaturePair] = {}
    for spec in specs:
        name, _, modules = spec.partition("=")
        parts = modules.split(":") if modules else []
        if not name or name in pairs or len(parts) > 3 or not all(parts):
            raise UserError(f"--features {spec}: expected a new {_FORM}.")
        student_tap = _tap(parts[0]) if parts else _known(name, student, student_row.features).tap
        if len(parts) > 1:
            teacher_tap, norm = _tap(parts[1]), parts[2] if len(parts) == 3 else None
        else:
            known = _known(name, teacher, teacher_row.features)
            teacher_tap, norm = known.tap, known.norm
        pairs[name] = FeaturePair(student_tap, teacher_tap, norm)
    return pairs


def _known(feature: str, name: str, features: Mapping[str, Feature]) -> Feature:
    if feature not in features:
        there = f"its features are: {', '.join(features)}" if features else "none of its features are known"
        raise UserError(f"--features {feature}: {name} has no such feature; {there}; name its module, as {_FORM}.")
    return features[feature]


def _tap(text: str) -> Tap:
    before = text.endswith(_BEFORE)
    return Tap(text[: -len(_BEFORE)] if before else text, before_activation=before)


def published_factors(pairs: dict[str, FeaturePair], loss_factor: float) -> dict[str, float]:
    """Distilled feature -> 1 / loss_factor / 2^(L - 1 - i), i of all L features, for losses summed over an image."""
    last = len(pairs) - 1
    return {
        name: 1.0 / loss_factor / 2.0 ** (last - index)
        for index, (name, pair) in enumerate(pairs.items())
        if pair.distilled
    }


def margins(name: str, teacher: nn.Module, pairs: dict[str, FeaturePair]) -> dict[str, Tensor]:
    """Distilled feature -> (T,) margins of the teacher's pre-activation.

    Raises:
        UserError: a tapped map that is no output of a batch-norm.
    """
    found: dict[str, Tensor] = {}
    for feature, pair in pairs.items():
        if pair.distilled:
            with user_errors(f"{name}, feature {feature}: "):
                found[feature] = batch_norm_margin(_norm(teacher, feature, pair))
    return found


def _norm(teacher: nn.Module, feature: str, pair: FeaturePair) -> nn.Module:
    modules = dict(teacher.named_modules())
    if pair.norm is not None:
        if pair.norm not in modules:
            raise ValueError(f"there is no module {pair.norm!r} to make margins from.")
        return modules[pair.norm]
    tapped = modules[pair.teacher.module]
    end = tapped
    while isinstance(end, nn.Sequential) and len(end):
        end = end[-1]
    norms = [module for module in tapped.modules() if hasattr(module, "running_mean")]
    if not norms or not (pair.teacher.before_activation or end is norms[-1]):
        raise ValueError(
            f"the output of {pair.teacher.module!r} is not known to be a batch-norm's, so there are no margins for "
            f"partial_l2: tap before an activation ({pair.teacher.module}{_BEFORE}), name the norm "
            f"({feature}=STUDENT_MODULE:{pair.teacher.module}:NORM), or use --loss mse or pearson."
        )
    return norms[-1]
