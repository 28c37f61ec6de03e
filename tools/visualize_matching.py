#!/usr/bin/env python
"""Shows the matchings of a training as pictures: PNGs, and one HTML page that needs no other file.

    python tools/visualize_matching.py output/fish
    python tools/visualize_matching.py output/fish --image fish/images/12.jpg --feature p4 --channels 3 17

The folder is that of a training with tools/train_net.py or with classification/main_mgd.py. Shown are the matching cost
of each feature, ordered by the matching; how far matched pairs are below all pairs; what changed from rematch to
rematch; and for some student channels the maps that are paired, on a picture. For the last of these the checkpoint, the
teacher and the picture must be there; without them the page has the rest, and says so.

Shape shorthand: S student channels, T teacher channels, H, W pixels of a map.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works without an installation too

import torch
from matplotlib.figure import Figure
from run_folder import History, Maps, Run, open_run, read_image

from d2_mgd import visualize
from d2_mgd._warnings import ignore_deprecations
from d2_mgd.distill import REDUCERS, RematchReport
from d2_mgd.errors import UserError
from d2_mgd.visualize.report import Report

__all__ = ["add_costs", "add_rematches", "group_figure", "group_members"]

BAD_INPUT = 2  # exit status, as argparse has it
Reports = Mapping[str, RematchReport]


def add_costs(report: Report, newest: Reports) -> None:
    """The heat map of each feature's cost, with a caption.

    Args:
        report: gets them.
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
    """How the matchings moved.

    Args:
        report: gets it.
        history: of all rematches.
        steps: what its numbers count.
    """
    report.figure(
        "rematches",
        visualize.draw_rematches(history, steps),
        "The matching is solved anew as the student changes. Left: the mean cost of the matched pairs, and of all "
        "pairs. Right: the share of student channels that got another group than before.",
    )


def group_members(found: RematchReport, channel: int) -> list[int]:
    """The teacher channels that guide a student channel, the nearest first."""
    members = [int(member) for member in found.matching.groups[channel] if member >= 0]
    return sorted(members, key=lambda member: float(found.cost[channel, member]))


def group_figure(found: RematchReport, maps: Maps, channel: int, reducer: str, title: str = "") -> Figure:
    """One student channel on one image: its map, those of its group, and what the reducer makes of them.

    Args:
        found: the feature's rematch.
        maps: of both networks on the image.
        channel: of the student.
        reducer: name in ``REDUCERS``; one that draws random numbers draws the same every time.
        title: of the picture.
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


# ---- the page


@dataclass(frozen=True)
class Shown:
    """What of a run is shown.

    Args:
        run: its folder.
        history: all rematches, of the chosen features.
        steps: what its numbers count.
        channels: student channels whose groups are shown; the best matched, the median and the worst by default.
    """

    run: Run
    history: History
    steps: str
    channels: Sequence[int] | None = None

    @property
    def last(self) -> int:
        return max(self.history)

    @property
    def newest(self) -> Reports:
        return self.history[self.last]

    def places(self, found: RematchReport) -> dict[int, str]:
        """Student channel -> what it is among its like, in the order in which they are shown."""
        rows, _ = visualize.matching_order(found.cost, found.matching)
        if self.channels is None:
            chosen = [int(rows[index]) for index in (0, len(rows) // 2, len(rows) - 1)]
        else:
            chosen = list(self.channels)
        rank = {int(row): index + 1 for index, row in enumerate(rows)}
        return {channel: f"number {rank[channel]} of {len(rows)} from best to worst matched" for channel in chosen}


def build_report(shown: Shown, image: Path | None) -> tuple[Report, str]:
    """The page, and what it lacks: a sentence, or nothing."""
    newest = shown.newest
    features = ", ".join(f"`{name}`" for name in newest)
    report = Report(
        f"Matchings of {shown.run.folder.resolve().name}",
        lead=f"Who guides whom at {features}, after {_count(len(shown.history), 'rematch', 'rematches')}; the last one "
        f"after {shown.last:,} {shown.steps}.",
    )
    report.table(_HEADER, [_row(name, found) for name, found in newest.items()])
    report.text(
        "Cost is the distance of two channels' maps: 0 for the same map but for its scale, 2 for unrelated ones, 4 for "
        "opposite ones. The mean over all pairs is what a matching by chance would cost."
    )
    report.heading("Cost, ordered by the matching")
    report.text(
        "A row is a student channel, a column a teacher channel. Channels are ordered by the matching, so its pairs, "
        "framed, run down the diagonal: the better the matching, the darker it is against its surroundings."
    )
    add_costs(report, newest)
    report.heading("From rematch to rematch")
    add_rematches(report, shown.history, shown.steps)
    report.heading("Groups on a picture")
    try:
        _add_groups(report, shown, image)
    except UserError as error:
        left_out = f"The groups are not shown on a picture: {error}"
        report.text(left_out)
        return report, left_out
    return report, ""


def _add_groups(report: Report, shown: Shown, image: Path | None) -> None:
    maps, image = _maps(shown.run, image)
    reducer = shown.run.reducer
    report.text(
        f"Some student channels on `{image.name}`, as the student of `{maps.weights.name}` sees it: the student's map, "
        f"those of its group of teacher channels, the nearest first, and the one map that the reducer `{reducer}` "
        "makes of them. Every map has a scale of its own, from dark (least) to bright (most)."
    )
    for name, found in shown.newest.items():
        for channel, place in shown.places(found).items():
            report.figure(
                f"group_{name}_{channel}",
                group_figure(found, maps, channel, reducer, title=f"{name}, student channel {channel}"),
                f"Student channel {channel} of `{name}`, {place}; maps of "
                f"{' x '.join(map(str, maps.student[name].shape[2:]))} pixels.",
            )


def _maps(run: Run, image: Path | None) -> tuple[Maps, Path]:
    """Both networks' maps, and the picture.

    Raises:
        UserError: something that they need is gone.
    """
    networks: Any
    if run.kind == "matchings":
        raise UserError(f"{run.folder} has only matchings, no config and no checkpoint.")
    if run.kind == "classification":
        import classification_run as networks
    else:
        import detection_run as networks
    image = image or networks.first_image(run)
    return networks.feature_maps(run, image), image


_HEADER = (
    "feature",
    "student channels",
    "teacher channels",
    "images",
    "mean cost, matched",
    "mean cost, all",
    "changed",
    "solved in",
)


def _row(name: str, found: RematchReport) -> list[str]:
    return [
        name,
        str(found.matching.num_student),
        str(found.matching.num_teacher),
        f"{found.num_images:,}",
        f"{found.mean_cost:.3f}",
        f"{found.cost.mean():.3f}",
        f"{found.changed:.0%}",
        f"{found.seconds:.2f} s",
    ]


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


# ---- the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="OUTPUT_DIR", help="output folder of a training with a teacher")
    parser.add_argument("--image", type=Path, metavar="FILE", help="picture (the first that the run was evaluated on)")
    parser.add_argument("--feature", metavar="NAME", help="show this feature alone")
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        metavar="NUMBER",
        help="student channels whose groups are shown (the best matched, the one in the middle, the worst)",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (OUTPUT_DIR/matching_pictures)")
    return parser.parse_args(argv)


def choose(options: argparse.Namespace) -> Shown:
    """What the options ask for.

    Raises:
        UserError: one sentence.
    """
    run = open_run(options.run)
    history, steps = run.history()
    newest = history[max(history)]
    if options.feature is not None:
        if options.feature not in newest:
            raise UserError(f"--feature {options.feature}: {options.run} has matchings of: {', '.join(newest)}.")
        history = {number: {options.feature: reports[options.feature]} for number, reports in history.items()}
        newest = history[max(history)]
    for channel in options.channels or ():
        for name, found in newest.items():
            if not 0 <= channel < found.matching.num_student:
                raise UserError(
                    f"--channels {channel}: the student channels of {name} are 0 to {found.matching.num_student - 1}."
                )
    if options.image is not None:
        read_image(options.image)
    return Shown(run, history, steps, options.channels)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    ignore_deprecations()
    output = options.output or options.run / "matching_pictures"
    try:
        report, left_out = build_report(choose(options), options.image)
        try:
            _, page = report.write(output)
        except OSError as error:
            raise UserError(f"--output {output} cannot be written to: {error.strerror}.") from error
    except UserError as error:
        print(f"visualize_matching.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{page}\n{left_out}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
