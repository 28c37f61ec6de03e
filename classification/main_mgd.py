"""Train a student with the features, and optionally the logits, of a teacher.

    python classification/main_mgd.py DATA --arch mobilenet_v1 --distiller mgd --mgd-reducer amp --mgd-update-freq 1
    torchrun --nproc-per-node 8 classification/main_mgd.py DATA --arch mobilenet_v1 --mgd-with-kd 1

DATA has train/ and valid/ (or val/) with a folder per class. docs/classification.md has recipes and all options.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script of a repository that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classification.options import parse_mgd
from classification.run import main as run

main = functools.partial(run, parse_mgd)

if __name__ == "__main__":
    sys.exit(main())
