"""docs/results.md: the overview, then a table for each study, written from its JSON lines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.loading import load_study
from benchmarks.accuracy.results import Results, projection_table, rematch_table, table
from benchmarks.accuracy.study import AnyStudy, Study

_OVERVIEW = Path(__file__).with_name("overview.md")  # the first part of the page, written by hand


def write_report(studies: Path, results: Path, output: Path) -> None:
    """Write the page in one rename, so that a failure leaves the old one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(report(studies, results), encoding="utf-8")
    os.replace(temporary, output)


def report(studies: Path, results: Path) -> str:
    """Return the page: a section for each study that has results, and a line for each that is prepared."""
    loaded = [load_study(path) for path in sorted(studies.glob("*.yaml"))]
    found = {study.name: Results(results / f"{study.name}.jsonl") for study in loaded}
    done = [study for study in loaded if _lines(study, found[study.name])]
    sections = [_section(study, found[study.name]) for study in done]
    parts = [_OVERVIEW.read_text(encoding="utf-8"), *sections]
    prepared = [f"- {study.title}: {_command(study)}\n" for study in loaded if study not in done]
    if prepared:
        parts.append("## Prepared, without results\n\n" + "".join(prepared))
    return "\n".join(parts)


def _lines(study: AnyStudy, results: Results) -> list[dict[str, Any]]:
    return [line for run in study.runs() if (line := results.of(run)) is not None]


def _section(study: AnyStudy, results: Results) -> str:
    lines = _lines(study, results)
    text = [f"## {study.title}\n"]
    if study.note:
        text.append(f"{study.note.strip()}\n")
    if not isinstance(study, Study):
        text.append(f"Numbers are {study.metric.name} of the pipeline itself.\n")
        if study.without_kd:
            text.append(f"Without `kd`: {study.without_kd}\n")
    if study.aims:
        text.append("To reach: " + "; ".join(study.aims) + ".\n")
    text.append(table(study, results))
    matchings = rematch_table(study, results)
    if matchings:
        text.append(
            "What the last rematch found, mean over seeds. *Cost over chance* is the matched pairs' mean cost over\n"
            "that of a random matching; *changed* the share of student channels whose group changed; *lost by\n"
            f"keeping* how much more the old matching would cost.\n\n{matchings}"
        )
    projections = projection_table(study, results)
    if projections:
        text.append(
            "How far learned projections agree with the matching of the same two networks, mean over seeds: the\n"
            "share of a teacher channel's contributions that comes from its student channel; the same for a random\n"
            f"matching, and for the one that the projection itself would choose.\n\n{projections}"
        )
    text.append(_provenance(study, lines))
    return "\n".join(text)


def _provenance(study: AnyStudy, lines: Sequence[dict[str, Any]]) -> str:
    devices, commits = (sorted({str(line[key]) for line in lines}) for key in ("device", "commit"))
    torches = sorted({line["versions"]["torch"] for line in lines})
    seconds = sum(line["seconds"] for line in lines)
    return (
        f"{_command(study)}: {len(lines)} runs, {seconds / 60:.0f} minutes in all; {', '.join(devices)}; torch "
        f"{', '.join(torches)}; commit {', '.join(commits)}.\n"
    )


def _command(study: AnyStudy) -> str:
    data = "cifar100.npz" if isinstance(study, Study) else "FOLDER"
    return f"`python -m benchmarks.accuracy run {study.name} --data {data}`"
