"""The features of a student and its teacher to distil: those of the table, of ``--features``, or the common stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from classification.models import Feature, architecture
from d2_mgd.distill import Tap
from d2_mgd.errors import UserError

Stages = Callable[[], Mapping[str, tuple[Tap, Tap]]]

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


def pair_features(
    student: str, teacher: str, specs: Sequence[str] | None = None, stages: Stages | None = None
) -> dict[str, FeaturePair]:
    """Name -> pair of the features to distil, in the order of the table or of ``specs``.

    Args:
        student: architecture.
        teacher: architecture.
        specs: values of ``--features``; None for the table's features without the ignored ones. A bare name takes both
            modules and the depth from the table; named modules go from shallow to deep. ``MODULE@pre`` taps before the
            last activation.
        stages: finds the common stages of both networks, which stand in for the table if a network is not in it.

    Raises:
        UserError: the table has no features of a network, there are no common stages, or a spec is malformed.
    """
    row = architecture(student)
    known: list[Mapping[str, Feature]] = [row.features, architecture(teacher).features]
    if stages is not None and needs_stages(student, teacher, specs):
        found = stages()
        known = [{name: Feature(taps[side], None) for name, taps in found.items()} for side in (0, 1)]
    if specs is None:
        specs = [name for name in known[0] if name not in row.ignored]
    pairs: dict[str, FeaturePair] = {}
    for index, spec in enumerate(specs):
        name, _, modules = spec.partition("=")
        parts = modules.split(":") if modules else []
        if not name or name in pairs or len(parts) > 3 or not all(parts):
            raise UserError(f"--features {spec}: expected {_FORM}, with each NAME once.")
        deeper = len(specs) - 1 - index
        if parts:
            student_tap = _tap(parts[0])
        else:
            student_tap = _known(name, student, known[0]).tap
            deeper = _deeper(name, known[0])
        if len(parts) > 1:
            of_teacher = Feature(_tap(parts[1]), parts[2] if len(parts) == 3 else None)
        else:
            of_teacher = _known(name, teacher, known[1])
        pairs[name] = FeaturePair(student_tap, of_teacher.tap, of_teacher.norm, deeper)
    return pairs


def needs_stages(student: str, teacher: str, specs: Sequence[str] | None) -> bool:
    """Whether features must be found in the networks: one is not in the table, and not all modules are named."""
    in_table = architecture(student).features and architecture(teacher).features
    return not in_table and (specs is None or any(":" not in spec for spec in specs))


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
