"""The verdict on a teacher: whether it is better than chance, and better than its student."""

from __future__ import annotations

_CHANCE = 1.2  # times chance: below, a teacher has learned nothing of these classes


def verdict(metric: str, teacher: float, student: float | None, chance: float) -> str:
    """A warning about a teacher that has little to teach; "" for a good one.

    Args:
        metric: what is measured, such as ``bbox/AP``; the higher the better, in percent.
        teacher: of the teacher.
        student: of the student at its best evaluation; None before the first.
        chance: of guessing.
    """
    if not teacher > _CHANCE * chance:  # NaN too
        return (
            f"the teacher is hardly better than chance ({metric} {teacher:.2f}): check that its weights are of this "
            "data and these classes."
        )
    if student is not None and student >= teacher:
        return (
            f"the teacher ({metric} {teacher:.2f}) is not better than the student ({student:.2f}) and may have little "
            "to teach: compare with the student alone, or choose a better teacher."
        )
    return ""
