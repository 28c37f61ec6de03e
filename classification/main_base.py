"""Train or evaluate a network without a teacher.

    python classification/main_base.py DATA --arch mobilenet_v1
    python classification/main_base.py DATA --arch mobilenet_v1 --teacher-resume T --student-resume S --evaluate

DATA has train/ and valid/ (or val/) with a folder per class. docs/classification.md has recipes and all options.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script of a repository that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classification.options import parse_base
from classification.run import main as run

main = functools.partial(run, parse_base)

if __name__ == "__main__":
    sys.exit(main())
