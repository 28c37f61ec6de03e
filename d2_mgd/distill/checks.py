"""What a distiller checks when it is made or continues from a state."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from d2_mgd.errors import UserError
from d2_mgd.matching import MODES

__all__ = ["check_names", "check_state", "check_weights", "checked_mode", "checked_ties"]


def checked_ties(
    tie: Sequence[Sequence[str]], channels: Mapping[str, tuple[int, int]], align: str
) -> list[tuple[str, ...]]:
    """Every feature once: in the tie that it was given in, or alone.

    Raises:
        ValueError: ties without a matching, of unknown features, of unequal widths, or of a feature twice.
    """
    if tie and align not in ("matching", "matched_projection"):
        raise UserError(f"features can be tied where they are matched, not with the alignment {align!r}.")
    if any(isinstance(names, str) for names in tie):
        raise UserError(f"ties are lists of features, got {list(tie)}.")
    tied = [name for names in tie for name in names]
    for name in tied:
        if name not in channels:
            raise UserError(f"feature {name} is tied, but the features are: {', '.join(channels)}.")
        if tied.count(name) > 1:
            raise UserError(f"feature {name} is tied twice.")
    for names in tie:
        widths = {name: channels[name] for name in names}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise UserError(f"tied features need the same widths (student, teacher), got {found}.")
    together = [tuple(names) for names in tie if names]
    return [*together, *((name,) for name in channels if name not in tied)]


def check_names(what: str, given: Mapping[str, Any], channels: Mapping[str, Any]) -> None:
    """Refuse a ``what`` that was given for something that is no feature (ValueError)."""
    unknown = [name for name in given if name not in channels]
    if unknown:
        raise UserError(f"a {what} was given for {', '.join(unknown)}, but the features are: {', '.join(channels)}.")


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that are negative or not finite (ValueError)."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"feature {name}: a weight must be finite and not negative, got {weight}.")


def checked_mode(mode: str | None, reducer: str, name: str, num_student: int, num_teacher: int, align: str) -> str:
    """The matching mode in force: the one given, or the one that the reducer needs.

    Raises:
        ValueError: an unknown mode, or one that does not go with the widths, the reducer or the alignment.
    """
    if align == "matched_projection":
        if mode not in (None, "balanced"):
            raise UserError(
                f"feature {name}: the alignment 'matched_projection' needs the matching mode 'balanced', which leaves "
                f"no teacher channel out, got {mode!r}: leave the mode out, or use the alignment 'matching'."
            )
        return "balanced"
    if mode is None:
        return "one_to_one" if reducer == "sm" and num_teacher >= num_student else "balanced"
    if mode not in MODES:
        raise UserError(f"unknown matching mode {mode!r}; there are: {', '.join(MODES)}.")
    if mode != "balanced" and num_teacher < num_student:
        raise UserError(
            f"feature {name}: mode {mode!r} needs T >= S, got {num_teacher} teacher channels for {num_student} student "
            "channels; use 'balanced'."
        )
    if reducer == "sm" and mode != "one_to_one" and num_teacher > num_student:
        raise UserError(f"feature {name}: reducer 'sm' goes with the mode 'one_to_one', not {mode!r}.")
    return mode


def check_state(stored: Collection[str], own: Collection[str]) -> None:
    """Check that the keys of a stored state are of the same features and balance as a distiller's ``own``.

    Raises:
        ValueError: they are of other features or another balance.
    """
    before, now = (
        sorted({key.split(".")[1].replace("/", ".") for key in keys if key.startswith("features.")})
        for keys in (stored, own)
    )
    mend = "use the same again, or start a new training."
    if before and before != now:
        raise UserError(f"the stored distiller is of the features {before}, this one of {now}: {mend}")
    balance, wanted = ("auto" if "balance.factors" in keys else "fixed" for keys in (stored, own))
    if stored and balance != wanted:
        raise UserError(f"the stored distiller has the balance {balance}, this one {wanted}: {mend}")
