#!/usr/bin/env python
"""Trains a teacher, a student alone and the same student distilled on rendered scenes, and writes a report.

Every training is tools/train_net.py with a config of configs/demo. Both students start from the same weights, see the
same images in the same order and have the same schedule; only the teacher differs. After an interruption the same
command continues.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works without an installation too

from d2_mgd.errors import UserError
from demos import running
from demos.detection_stages import FULL, QUICK, STAGES, Demo


def run(demo: Demo, fresh: bool) -> str:
    """All trainings and the report; what to print in the end."""
    try:
        import d2_mgd.detection  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error} Without it, examples/torchvision_detection.py --demo distils torchvision's."
        ) from None
    from demos.detection_report import write_report  # imports Detectron2

    demo.prepare(fresh)
    results = {stage.name: demo.train(stage) for stage in STAGES}
    (demo.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    return write_report(demo, results)


def main(argv: list[str] | None = None) -> int:
    parser = running.parser(__doc__, "demo_output")
    options = parser.parse_args(argv)
    if options.seed < 0:
        parser.error(f"--seed must not be negative, got {options.seed}.")
    demo = Demo(options.output.resolve(), options.seed, QUICK if options.quick else FULL)
    return running.run("detection_demo.py", lambda: run(demo, options.fresh), options.output)


if __name__ == "__main__":
    sys.exit(main())
