#!/usr/bin/env python
"""A teacher, a student alone, and the same student distilled, on rendered scenes; and a report of what came out.

Everything that trains is tools/train_net.py with the configs in configs/demo. Both students start from the same
weights, see the same images in the same order, and have the same schedule; only the teacher differs. What a stopped run
has finished is used again, and a training that was cut short goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works without an installation too

from tqdm import tqdm

from d2_mgd.training import Interrupted, forwarded_signals, lasting_output, raised_signals, system_reason
from demos import scenes

BAD_INPUT = 2  # exit status, as argparse has it
MARK = "stage.json"  # what a folder of ours holds: what was asked for, and what came out
TRAIN, TEST = "demo_train", "demo_test"
_START = re.compile(r"Starting training from iteration (\d+)")
_ITERATION = re.compile(r"\biter: (\d+)\b.*?\btotal_loss: ([\d.]+|nan|inf)")


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


SIDE = 96  # pixels of a scene
FULL = Size(train=1000, test=200)
QUICK = Size(
    train=16,
    test=6,
    overrides=(
        *("SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "1", "SOLVER.STEPS", "(3,)"),
        *("TEST.EVAL_PERIOD", "2", "MGD.REMATCH.NUM_IMAGES", "8", "MGD.REMATCH.PERIODS", "[2]"),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
    ),
)


@dataclass(frozen=True)
class Stage:
    """One training.

    Args:
        name: of its folder.
        caption: what the report calls it.
        config: file in configs/demo.
    """

    name: str
    caption: str
    config: str


TEACHER = Stage("teacher", "teacher", "teacher.yaml")
STUDENT = Stage("student", "student alone", "student.yaml")
DISTILLED = Stage("distilled", "student distilled", "distilled.yaml")
STAGES = (TEACHER, STUDENT, DISTILLED)


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one sentence."""


class Demo:
    """The stages of one run, in one folder.

    Args:
        output: where everything goes.
        seed: of scenes, weights and order.
        size: how much.
    """

    def __init__(self, output: Path, seed: int, size: Size) -> None:
        self.output = output
        self.seed = seed
        self.size = size

    # --- stages ---

    def make_scenes(self) -> None:
        """Draw the data set, unless it is there."""
        folder = self.folder("scenes")
        asked = _digest(self.seed, self.size.train, self.size.test, _source(scenes.__file__))
        if _finished(folder, asked):
            print(f"scenes: {folder} has them", flush=True)
            return
        _clear(folder)
        _begin(folder, asked)
        sizes = {"train": self.size.train, "test": self.size.test}
        with _bar("scenes", sum(sizes.values())) as bar:

            def show(done: int, total: int) -> None:
                bar.update(done - bar.n)

            scenes.write_scenes(folder, sizes, self.seed, side=SIDE, progress=show)
        _finish(folder, {})

    def train(self, stage: Stage) -> dict[str, Any]:
        """Train and evaluate, or go on, or do nothing where that is done.

        Returns:
            dict: ``AP``, ``AP50``, ``AP-<class>`` ... in percent; ``parameters``; ``seconds`` of all runs of the stage.

        Raises:
            DemoError: the training failed.
        """
        folder = self.folder(stage.name)
        asked = _digest(self.config(stage), _mark(self.folder("scenes"))["asked"], *self._teacher_digest(stage))
        if _finished(folder, asked):
            print(f"{stage.caption}: {folder} has it", flush=True)
            return _mark(folder)["result"]
        if _mark(folder).get("asked") != asked:
            _clear(folder)
            _begin(folder, asked)
        begin = time.monotonic()
        try:
            self._run_training(stage)
        finally:
            seconds = _mark(folder)["seconds"] + time.monotonic() - begin
            _write_mark(folder, {**_mark(folder), "seconds": seconds})
        result = {**self._metrics(stage), "parameters": _count_parameters(folder), "seconds": seconds}
        _finish(folder, result)
        return result

    @property
    def stages(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in STAGES}

    def folder(self, name: str) -> Path:
        return self.output / name

    def arguments(self, stage: Stage) -> list[str]:
        """Of tools/train_net.py, after ``--resume``."""
        data = self.folder("scenes")
        overrides = [*self.size.overrides, "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder(stage.name))]
        if stage is DISTILLED:
            overrides += ["MGD.TEACHER.WEIGHTS", str(self.folder(TEACHER.name) / "model_final.pth")]
        return [
            *("--config-file", str(config_file(stage))),
            *("--register-coco", TRAIN, str(data / "train.json"), str(data / "train")),
            *("--register-coco", TEST, str(data / "test.json"), str(data / "test")),
            *overrides,
        ]

    def config(self, stage: Stage) -> str:
        """The whole config that a stage trains with, as text, but for where its output goes."""
        return str(self.parsed_config(stage).dump())

    def parsed_config(self, stage: Stage) -> Any:
        from detectron2.config import get_cfg

        from d2_mgd.detection import add_mgd_config
        from d2_mgd.detection.config_files import merge_file

        cfg = get_cfg()
        add_mgd_config(cfg)
        merge_file(cfg, str(config_file(stage)))
        cfg.merge_from_list([*self.size.overrides, "SEED", str(self.seed)])
        return cfg

    def config_of(self, name: str) -> Any:
        """The config of the stage of that name."""
        return self.parsed_config(self.stages[name])

    def stored_config(self, name: str) -> Any:
        """The config that the stage of that name was trained with."""
        return _stored_config(self.folder(name))

    def command(self, stage: Stage) -> str:
        """What a user would type, from the root of the project."""
        words = ["python", "tools/train_net.py", *self.arguments(stage)]
        return shlex.join(str(Path(word).relative_to(ROOT)) if word.startswith(f"{ROOT}/") else word for word in words)

    def _teacher_digest(self, stage: Stage) -> list[str]:
        weights = self.folder(TEACHER.name) / "model_final.pth"
        return [hashlib.sha256(weights.read_bytes()).hexdigest()] if stage is DISTILLED else []

    def _run_training(self, stage: Stage) -> None:
        """tools/train_net.py in a process of its own, as a progress bar; what it said is shown if it fails."""
        command = [sys.executable, "-u", str(ROOT / "tools" / "train_net.py"), "--resume", *self.arguments(stage)]
        last: deque[str] = deque(maxlen=40)
        iterations = int(self.parsed_config(stage).SOLVER.MAX_ITER)
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        with (
            forwarded_signals(f"Waiting for the {stage.caption}'s training to save and leave.") as signals,
            signals.start(command, env=environment, **output) as process,
            _bar(stage.caption, iterations) as bar,
        ):
            assert process.stdout is not None
            for line in process.stdout:  # to its end: a training blocks while its output is not read
                last.append(line)
                _show(line, bar)
            status = process.wait()
            if status == 0:
                bar.update(iterations - bar.n)
        signals.raise_received()
        if status != 0:
            sys.stderr.writelines(last)
            log = self.folder(stage.name) / "log.txt"
            raise DemoError(f"training the {stage.caption} failed with status {status}; {log} has the whole log.")

    def _metrics(self, stage: Stage) -> dict[str, Any]:
        path = self.folder(stage.name) / "inference" / TEST / "results.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))["bbox"])


def config_file(stage: Stage) -> Path:
    return ROOT / "configs" / "demo" / stage.config


def _show(line: str, bar: Any) -> None:
    start, found = _START.search(line), _ITERATION.search(line)
    if start:  # what an earlier run did took no time of this one
        bar.initial = bar.n = bar.last_print_n = int(start.group(1))
        bar.refresh()
    elif found:
        bar.set_postfix_str(f"loss {float(found.group(2)):.2f}", refresh=False)
        bar.update(int(found.group(1)) + 1 - bar.n)
    elif "Start inference" in line:
        bar.set_postfix_str("evaluating")


def _bar(caption: str, total: int) -> Any:
    """A progress bar; where the output is no terminal, a line now and then."""
    every = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=f"{caption:<17}", mininterval=every, maxinterval=60.0, leave=True)


# ---- the marks of finished and unfinished stages


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:16]


def _source(path: str | None) -> str:
    """What the scenes are drawn by: a data set of an older version is drawn anew."""
    folder = Path(str(path)).parent
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("scenes.py", "scene_items.py"))


def _mark(folder: Path) -> dict[str, Any]:
    path = folder / MARK
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_mark(folder: Path, mark: dict[str, Any]) -> None:
    partial = folder / f"{MARK}.tmp"
    partial.write_text(json.dumps(mark, indent=2), encoding="utf-8")
    partial.replace(folder / MARK)


def _begin(folder: Path, asked: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_mark(folder, {"asked": asked, "seconds": 0.0})


def _finish(folder: Path, result: dict[str, Any]) -> None:
    _write_mark(folder, {**_mark(folder), "result": result})


def _finished(folder: Path, asked: str) -> bool:
    mark = _mark(folder)
    return mark.get("asked") == asked and "result" in mark


def _clear(folder: Path) -> None:
    """Remove a stage's folder, if it is one.

    Raises:
        DemoError: it is somebody else's.
    """
    if folder.exists():
        if not (folder / MARK).exists():
            raise DemoError(f"{folder} is not of this demo: choose another --output, or remove it yourself.")
        shutil.rmtree(folder)


def _count_parameters(folder: Path) -> int:
    """Of the network in a stage's final checkpoint, batch-norm statistics and the like left out."""
    from detectron2.modeling import build_model

    from d2_mgd.detection.config import student_config

    cfg = _stored_config(folder)
    cfg.MODEL.DEVICE = "cpu"
    return sum(parameter.numel() for parameter in build_model(student_config(cfg)).parameters())


def _stored_config(folder: Path) -> Any:
    from detectron2.config import get_cfg

    from d2_mgd.detection import add_mgd_config
    from d2_mgd.detection.config_files import merge_file

    cfg = get_cfg()
    add_mgd_config(cfg)
    merge_file(cfg, str(folder / "config.yaml"))
    return cfg


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of everything it writes")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and the order of images")
    parser.add_argument("--fresh", action="store_true", help="start over, whatever is there already")
    parser.add_argument("--quick", action="store_true", help="a few scenes and iterations, to see that it runs")
    options = parser.parse_args(argv)
    if options.seed < 0:
        parser.error(f"--seed must not be negative, got {options.seed}.")
    return options


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All stages and the report.

    Returns:
        dict: stage -> its result, as :meth:`Demo.train` gives it.

    Raises:
        DemoError: one sentence.
    """
    try:
        import d2_mgd.detection  # noqa: F401
    except ImportError as error:
        raise DemoError(
            f"{error} Without it, examples/torchvision_detection.py --demo distils torchvision's."
        ) from None
    from demos.detection_report import write_report  # imports Detectron2

    demo = Demo(options.output.resolve(), options.seed, QUICK if options.quick else FULL)
    if options.fresh:
        for name in ("scenes", *(stage.name for stage in STAGES)):
            _clear(demo.folder(name))
    begin = time.monotonic()
    demo.make_scenes()
    results = {stage.name: demo.train(stage) for stage in STAGES}
    report = write_report(demo, results)
    (demo.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(
        f"\n{report.summary}\n\n{report.markdown}\n{report.html}\nafter {(time.monotonic() - begin) / 60:.1f} minutes"
    )
    return results


@lasting_output()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    warnings.simplefilter("ignore")  # Detectron2's, of what PyTorch will drop some day
    try:
        with raised_signals():
            run(options)
    except DemoError as error:
        print(f"detection_demo.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        place, reason = error.filename or options.output, system_reason(error)
        print(
            f"detection_demo.py: error: --output {options.output} cannot be used: {place}: {reason}.", file=sys.stderr
        )
        return BAD_INPUT
    except Interrupted as stopped:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 128 + stopped.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
