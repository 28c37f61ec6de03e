"""Which features share one matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["checked_ties"]


def checked_ties(
    tie: Sequence[Sequence[str]], channels: Mapping[str, tuple[int, int]], align: str
) -> list[tuple[str, ...]]:
    """Every feature once: in the tie that it was given in, or alone.

    Raises:
        ValueError: ties without a matching, of unknown features, of unequal widths, or of a feature twice.
    """
    if tie and align != "matching":
        raise ValueError(f"features can be tied where they are matched, not with the alignment {align!r}.")
    if any(isinstance(names, str) for names in tie):
        raise ValueError(f"ties are lists of features, got {list(tie)}.")
    tied = [name for names in tie for name in names]
    for name in tied:
        if name not in channels:
            raise ValueError(f"feature {name} is tied, but the features are: {', '.join(channels)}.")
        if tied.count(name) > 1:
            raise ValueError(f"feature {name} is tied twice.")
    for names in tie:
        widths = {name: channels[name] for name in names}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ValueError(f"tied features need the same widths (student, teacher), got {found}.")
    together = [tuple(names) for names in tie if names]
    return [*together, *((name,) for name in channels if name not in tied)]
