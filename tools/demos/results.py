"""The results of a demo: the report's title and bars, and the table of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from d2_mgd.visualize.report import Bar, Report

COLOURS = {"teacher": "#7F7F7F", "student": "#E69F00", "distilled": "#0072B2"}


def start_report(accuracies: Mapping[str, float | None], unit: str, data: str) -> Report:
    """A report that begins with what the teacher is worth.

    Args:
        accuracies: caption -> accuracy, the higher the better: the teacher, the student alone, then distilled ones.
        unit: of the accuracies.
        data: what was measured on, for the sentence below the title.
    """
    (teacher, alone), distilled = list(accuracies.items())[:2], dict(list(accuracies.items())[2:])
    best = max(distilled, key=lambda caption: distilled[caption] or 0.0)
    gain = round(distilled[best] or 0.0, 1) - round(alone[1] or 0.0, 1)  # of the numbers that are shown
    share = share_recovered(teacher[1], alone[1], distilled[best])
    recovered = "" if share is None else f" That is {share:.0%} of the gap between student and teacher."
    report = Report(
        f"The teacher is worth **{gain:+.1f} {unit}**",
        lead=f"The same student, from the same start, on the same images: {_shown(alone[1])} {unit} alone and "
        f"{_shown(distilled[best])} {unit} distilled, on {data}.{recovered}",
    )
    colours = [COLOURS["teacher"], COLOURS["student"], *[COLOURS["distilled"]] * len(distilled)]
    report.bars([Bar(caption, value, colour) for (caption, value), colour in zip(accuracies.items(), colours)], unit)
    return report


def share_recovered(teacher: float | None, alone: float | None, distilled: float | None) -> float | None:
    """Share of the gap between student and teacher that distillation closed; None where the gap is below 1."""
    if teacher is None or alone is None or distilled is None or teacher - alone < 1.0:
        return None
    return (distilled - alone) / (teacher - alone)


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first one aligned left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    first, rest = widths[0], widths[1:]
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], rest)]) for line in lines)


def _shown(value: float | None) -> str:
    return "no" if value is None else f"{value:.1f}"
