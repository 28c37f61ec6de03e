"""The pipeline where Detectron2 cannot be imported."""

import sys
from pathlib import Path

from tests.classification.conftest import REPOSITORY, SMALL, run_command

BLOCKER = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("detectron2", "pycocotools"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import detectron2
    raise SystemExit("the blocker does not block")
except ModuleNotFoundError:
    pass
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_distilling_needs_no_detectron2(data: Path, resnet18_file: Path, tmp_path: Path) -> None:
    script = REPOSITORY / "classification" / "main_mgd.py"
    teacher = ["--teacher-arch", "resnet18", "--teacher-resume", resnet18_file, "--mgd-with-kd", 1]
    words = [sys.executable, "-c", BLOCKER, script, data, *SMALL, "--arch", "shufflenet_v2_x0_5", *teacher]
    done = run_command([str(word) for word in words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "shufflenet_v2_x0_5 (best)" in done.stdout
    # without --output-dir, the published way: named after data, network and method, below where it was started
    assert (
        tmp_path
        / "output"
        / "classification"
        / f"{data.name}.shufflenet_v2_x0_5.matched_projection-kd"
        / "metrics.json"
    ).exists()
