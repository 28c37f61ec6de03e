#!/usr/bin/env python
"""Draw the demo's result as one picture: the AP of the student alone, of the distilled student, and of the teacher.

python tools/demos/result_figure.py demo_output/results.json result.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]  # works without an installation too

from matplotlib.figure import Figure

from d2_mgd.visualize.style import new_figure, style

COLOURS = {"teacher": "#7F7F7F", "student": "#E69F00", "distilled": "#0072B2"}
_CAPTIONS = {"student": "student alone", "distilled": "student, distilled", "teacher": "teacher"}
_DPI = 200


def result_figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Return horizontal bars of the three APs, with the gain of distillation.

    Args:
        results: stage (``teacher``, ``student``, ``distilled``) to a dict with ``AP`` in percent and ``parameters``.
    """
    scores = {name: results[name]["AP"] or 0.0 for name in _CAPTIONS}
    millions = {name: results[name]["parameters"] / 1e6 for name in _CAPTIONS}
    with style():
        figure = new_figure(7, 2.1)
        axes = figure.add_subplot()
        places = range(len(_CAPTIONS))
        axes.barh(places, list(scores.values()), color=[COLOURS[name] for name in scores], height=0.62)
        for place, (name, score) in zip(places, scores.items(), strict=True):
            gain = f"  ({score - scores['student']:+.1f})" if name == "distilled" else ""
            axes.text(score, place, f"  {score:.1f} AP{gain}", va="center", weight="bold")
        labels = [f"{caption}\n{millions[name]:.2g} M parameters" for name, caption in _CAPTIONS.items()]
        axes.set_yticks(places, labels)
        axes.set_xlim(0, 1.2 * max([*scores.values(), 1.0]))
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of a demo, or a file of benchmarks/results")
    parser.add_argument("output", type=Path, help="the PNG to write")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    result_figure(results.get("results", results)).savefig(arguments.output, dpi=_DPI)


if __name__ == "__main__":
    main()
