"""The features of a student and its teacher to distil: those of the table, or those of ``--features``.

Shape shorthand: S student channels, T teacher channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from classification.models import Feature, architecture
from d2_mgd.distill import Tap, batch_norm_margin
from d2_mgd.errors import UserError, located

_BEFORE = "@pre"  # suffix of a module's path, which taps before its last activation
_FORM = "NAME, NAME=STUDENT_MODULE or NAME=STUDENT_MODULE:TEACHER_MODULE[:TEACHER_NORM]"


@dataclass(frozen=True)
class FeaturePair:
    """One feature of both networks.

    Args:
        student: tap of the student.
        teacher: tap of the teacher.
        norm: dotted path of the teacher's batch-norm for the margins; None: the last one inside the tapped module.
        deeper: number of deeper features of the network, for the published factors.
    """

    student: Tap
    teacher: Tap
    norm: str | None
    deeper: int


def pair_features(student: str, teacher: str, specs: Sequence[str] | None = None) -> dict[str, FeaturePair]:
    """Name -> pair of the features to distil, in the order of the table or of ``specs``.

    Args:
        student: architecture.
        teacher: architecture.
        specs: values of ``--features``; None for the table's features without the ignored ones. A bare name takes both
            modules and the depth from the table; named modules go from shallow to deep. ``MODULE@pre`` taps before the
            last activation.

    Raises:
        UserError: the table has no features of a network, or a spec is malformed.
    """
    if specs is None:
        specs = _default_features(student, teacher)
    pairs: dict[str, FeaturePair] = {}
    for index, spec in enumerate(specs):
        name, _, modules = spec.partition("=")
        parts = modules.split(":") if modules else []
        if not name or name in pairs or len(parts) > 3 or not all(parts):
            raise UserError(f"--features {spec}: expected {_FORM}, with each NAME once.")
        pairs[name] = _named_pair(student, teacher, name, parts, deeper=len(specs) - 1 - index)
    return pairs


def _default_features(student: str, teacher: str) -> list[str]:
    for name in (student, teacher):
        if not architecture(name).features:
            raise UserError(f"{name} has no default features: name its modules with --features {_FORM}.")
    row = architecture(student)
    return [name for name in row.features if name not in row.ignored]


def _named_pair(student: str, teacher: str, name: str, parts: list[str], deeper: int) -> FeaturePair:
    """The pair of one spec, given as its name and modules; ``deeper`` is replaced if the table knows the student's."""
    student_row, teacher_row = architecture(student), architecture(teacher)
    if parts:
        student_tap = _tap(parts[0])
    else:
        student_tap = _known(name, student, student_row.features).tap
        deeper = _deeper(name, student_row.features)
    if len(parts) > 1:
        return FeaturePair(student_tap, _tap(parts[1]), parts[2] if len(parts) == 3 else None, deeper)
    known = _known(name, teacher, teacher_row.features)
    return FeaturePair(student_tap, known.tap, known.norm, deeper)


def _deeper(name: str, features: Mapping[str, Feature]) -> int:
    return len(features) - 1 - list(features).index(name)


def _known(feature: str, name: str, features: Mapping[str, Feature]) -> Feature:
    if feature not in features:
        there = f"Available: {', '.join(features)}" if features else "It has no default features"
        raise UserError(f"--features {feature}: {name} has no such feature. {there}, or name its module as {_FORM}.")
    return features[feature]


def _tap(text: str) -> Tap:
    before = text.endswith(_BEFORE)
    return Tap(text[: -len(_BEFORE)] if before else text, before_activation=before)


def published_factors(pairs: dict[str, FeaturePair], loss_factor: float) -> dict[str, float]:
    """Feature -> 1 / loss_factor / 2^(number of deeper features), for losses summed over an image."""
    return {name: 1.0 / loss_factor / 2.0**pair.deeper for name, pair in pairs.items()}


def margins(name: str, teacher: nn.Module, pairs: dict[str, FeaturePair]) -> dict[str, Tensor]:
    """Feature -> (T,) margins of the teacher's pre-activation.

    Raises:
        UserError: a tapped map is not the output of a batch-norm.
    """
    found: dict[str, Tensor] = {}
    for feature, pair in pairs.items():
        with located(f"{name}, feature {feature}: "):
            found[feature] = batch_norm_margin(_norm(teacher, feature, pair))
    return found


def _norm(teacher: nn.Module, feature: str, pair: FeaturePair) -> nn.Module:
    modules = dict(teacher.named_modules())
    if pair.norm is not None:
        if pair.norm not in modules:
            raise UserError(f"there is no module {pair.norm!r} to compute margins from.")
        return modules[pair.norm]
    tapped = modules[pair.teacher.module]
    end = tapped
    while isinstance(end, nn.Sequential) and len(end):
        end = end[-1]
    norms = [module for module in tapped.modules() if hasattr(module, "running_mean")]
    if not norms or not (pair.teacher.before_activation or end is norms[-1]):
        raise UserError(
            f"the output of {pair.teacher.module!r} does not come from a batch-norm, so there are no margins for "
            f"partial_l2: tap before an activation ({pair.teacher.module}{_BEFORE}), name the norm "
            f"({feature}=STUDENT_MODULE:{pair.teacher.module}:NORM), or use --loss mse or pearson."
        )
    return norms[-1]
