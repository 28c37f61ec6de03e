"""The trainings of the detection demo: each is tools/train_net.py with a config of configs/demo."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demos import running, scene_items, scenes

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST = "demo_train", "demo_test"
RESULT = "result.json"  # in the folder of a finished training
SIDE = 64  # pixels of a scene


@dataclass(frozen=True)
class Size:
    """How much the demo does.

    Args:
        train: scenes to learn from.
        test: scenes to be measured on.
        overrides: KEY VALUE pairs for all trainings.
    """

    train: int
    test: int
    overrides: tuple[str, ...] = ()


FULL = Size(train=1500, test=200)
QUICK = Size(
    train=16,
    test=6,
    overrides=(
        *("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "1", "SOLVER.STEPS", "(3,)"),
        *("TEST.EVAL_PERIOD", "2", "MGD.REMATCH.NUM_IMAGES", "8", "MGD.REMATCH.PERIODS", "[2]"),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MGD.TEACHER.EVALUATE", "False"),
    ),
)


@dataclass(frozen=True)
class Stage:
    """One training.

    Args:
        name: of its folder, and of its config in configs/demo.
        caption: in the report.
    """

    name: str
    caption: str

    @property
    def config_file(self) -> Path:
        return ROOT / "configs" / "demo" / f"{self.name}.yaml"


TEACHER, STUDENT = Stage("teacher", "teacher"), Stage("student", "student alone")
DISTILLED = Stage("distilled", "student distilled")
STAGES = (TEACHER, STUDENT, DISTILLED)


@dataclass(frozen=True)
class Demo:
    """The trainings of one demo, in one folder.

    Args:
        output: of everything.
        seed: of scenes, weights and order.
        size: how much.
    """

    output: Path
    seed: int
    size: Size

    def prepare(self, fresh: bool) -> None:
        """Create the folder and draw the scenes, unless both are there."""
        drawn_by = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (scenes, scene_items)]
        asked = [self.seed, self.size, SIDE, *drawn_by, *(self.config(stage).dump() for stage in STAGES)]
        running.prepare_folder(self.output, asked, ["scenes", *(stage.name for stage in STAGES)], fresh)
        folder = self.output / "scenes"
        if (folder / "test.json").exists():  # written last
            return
        sizes = {"train": self.size.train, "test": self.size.test}
        with running.progress_bar("scenes", sum(sizes.values())) as bar:
            scenes.write_scenes(folder, sizes, self.seed, SIDE, progress=lambda done, _: bar.update(done - bar.n))

    def train(self, stage: Stage) -> dict[str, Any]:
        """Train and evaluate, or continue, or read the result of a finished training.

        Returns:
            dict: ``AP``, ``AP50``, ``AP-<class>`` ... in percent; ``parameters``; ``seconds`` of the last run.
        """
        folder = self.output / stage.name
        finished = folder / RESULT
        if finished.exists():
            print(f"{stage.caption}: {folder} is finished", flush=True)
            return dict(json.loads(finished.read_text(encoding="utf-8")))
        command = [sys.executable, "-u", str(ROOT / "tools" / "train_net.py"), "--resume", *self.arguments(stage)]
        seconds = running.train(stage.caption, command, int(self.config(stage).SOLVER.MAX_ITER))
        measured = json.loads((folder / "inference" / TEST / "results.json").read_text(encoding="utf-8"))["bbox"]
        result = {**measured, "parameters": self._count_parameters(stage), "seconds": seconds}
        finished.write_text(json.dumps(result, indent=2), encoding="utf-8")
        return result

    def arguments(self, stage: Stage) -> list[str]:
        """Of tools/train_net.py."""
        data = self.output / "scenes"
        overrides = [*self.size.overrides, "SEED", str(self.seed), "OUTPUT_DIR", str(self.output / stage.name)]
        if stage is DISTILLED:
            overrides += ["MGD.TEACHER.WEIGHTS", str(self.output / TEACHER.name / "model_final.pth")]
        return [
            *("--config-file", str(stage.config_file)),
            *("--register-coco", TRAIN, str(data / "train.json"), str(data / "train")),
            *("--register-coco", TEST, str(data / "test.json"), str(data / "test")),
            *overrides,
        ]

    def config(self, stage: Stage) -> Any:
        """The config that a stage trains with, but for its folder and the teacher's weights."""
        from detectron2.config import get_cfg

        from d2_mgd.detection import add_mgd_config
        from d2_mgd.detection.config_files import merge_file

        cfg = get_cfg()
        add_mgd_config(cfg)
        merge_file(cfg, str(stage.config_file))
        cfg.merge_from_list([*self.size.overrides, "SEED", str(self.seed)])
        return cfg

    def command(self, stage: Stage) -> str:
        """The command of a training, as typed in the root of the project."""
        words = ["python", "tools/train_net.py", *self.arguments(stage)]
        return shlex.join(word.removeprefix(f"{ROOT}/") for word in words)

    def _count_parameters(self, stage: Stage) -> int:
        from detectron2.modeling import build_model

        from d2_mgd.detection.config import student_config

        return sum(parameter.numel() for parameter in build_model(student_config(self.config(stage))).parameters())
