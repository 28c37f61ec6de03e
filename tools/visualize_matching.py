#!/usr/bin/env python
"""Show the matchings of a training: PNGs, and one HTML page that needs no other file.

    python tools/visualize_matching.py output/fish
    python tools/visualize_matching.py output/fish --image fish/images/12.jpg --feature p4 --channels 3 17

The folder is that of a training with tools/train_net.py or classification/main_mgd.py. The page shows the matching cost
of each feature, ordered by the matching; the cost of matched pairs and of all pairs; the changes from rematch to
rematch; and for some student channels the paired maps on an image. The maps need the checkpoint, the teacher and the
image. Without them the page says so and has the rest.

Shape shorthand: S student channels, T teacher channels, H, W pixels of a map.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works without an installation too

import torch
from matplotlib.figure import Figure
from run_folder import History, Maps, Run, open_run, read_image, write_page

from d2_mgd import visualize
from d2_mgd.distill import REDUCERS, RematchReport
from d2_mgd.errors import UserError
from d2_mgd.visualize.report import Report

Reports = Mapping[str, RematchReport]


def add_costs(report: Report, newest: Reports) -> None:
    """Add the heat map of each feature's cost.

    Args:
        report: the page.
        newest: feature -> its last rematch.
    """
    for name, found in newest.items():
        report.figure(
            f"matching_{name}",
            visualize.draw_matching(found.cost, found.matching, title=f"{name}: cost after the last rematch"),
            f"`{name}`: {found.matching.num_student} student channels, {found.matching.num_teacher} teacher channels, "
            f"{found.num_images} images. Mean cost of the matched pairs {found.mean_cost:.2f}, of all pairs "
            f"{found.cost.mean():.2f}.",
        )


def add_rematches(report: Report, history: History, steps: str) -> None:
    """Add the changes from rematch to rematch.

    Args:
        report: the page.
        history: all rematches.
        steps: the unit of its keys, ``iterations`` or ``epochs``.
    """
    report.figure(
        "rematches",
        visualize.draw_rematches(history, steps),
        "The matching is solved anew as the student changes. Left: the mean cost of the matched pairs, and of all "
        "pairs. Right: the share of student channels whose group changed.",
    )


def group_members(found: RematchReport, channel: int) -> list[int]:
    """Return the teacher channels that guide a student channel, in ascending order of cost."""
    members = [int(member) for member in found.matching.groups[channel] if member >= 0]
    return sorted(members, key=lambda member: float(found.cost[channel, member]))


def group_figure(found: RematchReport, maps: Maps, channel: int, reducer: str, title: str = "") -> Figure:
    """Draw one student channel on one image: its map, those of its group, and the reduced map.

    Args:
        found: the feature's rematch.
        maps: of both networks on the image.
        channel: of the student.
        reducer: name in ``REDUCERS``. Random reducers draw the same numbers every time.
        title: of the figure.
    """
    teacher = maps.teacher[found.feature].float()
    groups = torch.from_numpy(found.matching.groups[channel : channel + 1].copy())
    guided, _ = REDUCERS.get(reducer)(teacher, groups, None, torch.Generator().manual_seed(0))
    members = group_members(found, channel)
    return visualize.draw_group(
        maps.student[found.feature][0, channel].float().numpy(),
        [teacher[0, member].numpy() for member in members],
        guided[0, 0].numpy(),
        maps.image,
        title=title,
        names=[f"teacher {member}\ncost {found.cost[channel, member]:.2f}" for member in members],
    )


def build_report(options: argparse.Namespace) -> tuple[Report, str]:
    """Return the page, and a sentence on what it lacks, or an empty string.

    Raises:
        UserError: the folder or an option cannot be used.
    """
    run = open_run(options.run)
    history, steps = run.history()
    history = _chosen(history, options)
    if options.image is not None:
        read_image(options.image)
    newest = history[max(history)]
    rematches = f"{len(history):,} {'rematch' if len(history) == 1 else 'rematches'}"
    report = Report(
        f"Matchings of {run.folder.resolve().name}",
        lead=f"Groups of teacher channels at {', '.join(f'`{name}`' for name in newest)}, after {rematches}; "
        f"the last one after {max(history):,} {steps}.",
    )
    header = "feature|student channels|teacher channels|images|mean cost, matched|mean cost, all|changed|solved in"
    report.table(header.split("|"), [_row(name, found, len(history) == 1) for name, found in newest.items()])
    report.text(
        "Cost is the distance of two channels' maps: 0 for maps that differ by a scale only, 2 for unrelated ones, 4 "
        "for opposite ones. The mean over all pairs is what a matching by chance would cost."
    )
    report.heading("Cost, ordered by the matching")
    report.text(
        "A row is a student channel, a column a teacher channel. Channels are ordered by the matching, so its pairs, "
        "framed, run down the diagonal: the better the matching, the darker it is against its surroundings."
    )
    add_costs(report, newest)
    report.heading("From rematch to rematch")
    add_rematches(report, history, steps)
    report.heading("Groups on an image")
    try:
        _add_groups(report, run, newest, options)
    except UserError as error:
        left_out = f"The groups are not shown on an image: {error}"
        report.text(left_out)
        return report, left_out
    return report, ""


def _chosen(history: History, options: argparse.Namespace) -> History:
    """Return the rematches of ``--feature``; check it and ``--channels``."""
    names = list(history[max(history)])
    if options.feature is not None:
        if options.feature not in names:
            raise UserError(f"--feature {options.feature}: {options.run} has matchings of: {', '.join(names)}.")
        history = {number: {options.feature: reports[options.feature]} for number, reports in history.items()}
    for channel in options.channels or ():
        for name, found in history[max(history)].items():
            if not 0 <= channel < found.matching.num_student:
                raise UserError(
                    f"--channels {channel}: the student channels of {name} are 0 to {found.matching.num_student - 1}."
                )
    return history


def _row(name: str, found: RematchReport, first: bool) -> list[str]:
    matching = found.matching
    cells = [str(matching.num_student), str(matching.num_teacher), f"{found.num_images:,}", f"{found.mean_cost:.3f}"]
    changed = "-" if first else f"{found.changed:.0%}"
    return [name, *cells, f"{found.cost.mean():.3f}", changed, f"{found.seconds:.2f} s"]


def _add_groups(report: Report, run: Run, newest: Reports, options: argparse.Namespace) -> None:
    networks: Any
    if run.kind == "matchings":
        raise UserError(f"{run.folder} has only matchings, no config and no checkpoint.")
    if run.kind == "classification":
        import classification_run as networks
    else:
        import detection_run as networks
    image = options.image or networks.first_image(run)
    maps = networks.feature_maps(run, image)
    report.text(
        f"Some student channels on `{image.name}`, as the student of `{maps.weights.name}` sees it: the student's map, "
        f"those of its group of teacher channels in ascending order of cost, and the map that the reducer "
        f"`{run.reducer}` makes of them. Each map is scaled from dark (minimum) to bright (maximum)."
    )
    for name, found in newest.items():
        size = " x ".join(map(str, maps.student[name].shape[2:]))
        for channel, rank in _ranks(found, options.channels).items():
            report.figure(
                f"group_{name}_{channel}",
                group_figure(found, maps, channel, run.reducer, title=f"{name}, student channel {channel}"),
                f"Student channel {channel} of `{name}`, number {rank} of {found.matching.num_student} from best to "
                f"worst matched; maps of {size} pixels.",
            )


def _ranks(found: RematchReport, channels: Sequence[int] | None) -> dict[int, int]:
    """Return student channel -> rank by cost; of the best, the median and the worst channel by default."""
    rows = [int(row) for row in visualize.matching_order(found.cost, found.matching)[0]]
    chosen = (rows[0], rows[len(rows) // 2], rows[-1]) if channels is None else channels
    return {channel: rows.index(channel) + 1 for channel in chosen}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="OUTPUT_DIR", help="output folder of a training with a teacher")
    parser.add_argument("--image", type=Path, metavar="FILE", help="default: the first image of the run's evaluation")
    parser.add_argument("--feature", metavar="NAME", help="show only this feature")
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        metavar="NUMBER",
        help="student channels whose groups are shown (default: the best matched, the median, the worst)",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: OUTPUT_DIR/matching_pictures")
    options = parser.parse_args(argv)
    output = options.output or options.run / "matching_pictures"
    return write_page(lambda: build_report(options), output)


if __name__ == "__main__":
    sys.exit(main())
