"""Runs a demo's trainings as child processes, in a folder where an interrupted demo continues."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from d2_mgd._warnings import ignore_deprecations
from d2_mgd.errors import UserError, reason
from d2_mgd.training import Interrupted, forwarded_signals, lasting_output, raised_signals

BAD_INPUT = 2  # exit status, as in argparse
MARK = "demo.json"  # in the output folder: a digest of what was asked for
_START = re.compile(r"Starting training from iteration (\d+)")
_ITERATION = re.compile(r"\biter: (\d+)\b.*?\btotal_loss: ([\d.]+|nan|inf)")


def prepare_folder(output: Path, asked: Sequence[object], names: Sequence[str], fresh: bool) -> None:
    """Create a demo's folder; remove the parts that an earlier demo with other settings left there.

    Args:
        output: the demo's folder.
        asked: the settings; equal ones continue.
        names: folders in ``output`` that the demo writes.
        fresh: start over in any case.

    Raises:
        UserError: a folder of one of the names exists and no demo made it.
    """
    digest = hashlib.sha256(json.dumps([str(part) for part in asked]).encode()).hexdigest()[:16]
    mark = output / MARK
    found = json.loads(mark.read_text(encoding="utf-8"))["asked"] if mark.exists() else None
    if found == digest and not fresh:
        return
    for folder in (output / name for name in names):
        if folder.exists():
            if found is None:
                raise UserError(f"{folder} is not of this demo: choose another --output, or remove it.")
            shutil.rmtree(folder)
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"asked": digest}), encoding="utf-8")


def train(caption: str, command: Sequence[str], iterations: int = 0) -> float:
    """Run a training and return its seconds.

    Args:
        caption: of the network that is trained.
        command: the whole command line.
        iterations: of a Detectron2 training, whose output becomes a progress bar; 0 leaves the output as it is.

    Raises:
        UserError: the training failed.
        Interrupted: by SIGTERM or Ctrl-C, after the training has saved.
    """
    begin = time.monotonic()
    last: deque[str] = deque(maxlen=40)
    options: dict[str, Any] = {"env": {"PYTHONWARNINGS": "ignore", **os.environ}}
    if iterations:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    with (
        forwarded_signals(f"Waiting for the training of the {caption} to save and exit.") as signals,
        signals.start(command, **options) as process,
    ):
        if process.stdout is not None:
            with progress_bar(caption, iterations) as bar:
                for line in process.stdout:  # to its end: a training blocks while its output is not read
                    last.append(line)
                    show_progress(line, bar)
        status = process.wait()
    signals.raise_received()
    if status != 0:
        sys.stderr.writelines(last)
        raise UserError(f"training the {caption} failed with status {status}; the same command continues from here.")
    return time.monotonic() - begin


def show_progress(line: str, bar: Any) -> None:
    """Move the bar as a line of Detectron2's log says."""
    start, found = _START.search(line), _ITERATION.search(line)
    if start:  # iterations of an earlier run do not count for this run's speed
        bar.initial = bar.n = bar.last_print_n = int(start.group(1))
        bar.refresh()
    elif found:
        bar.set_postfix_str(f"loss {float(found.group(2)):.2f}", refresh=False)
        bar.update(int(found.group(1)) + 1 - bar.n)
    elif "Start inference" in line:
        bar.set_postfix_str("evaluating")


def progress_bar(caption: str, total: int) -> Any:
    """A progress bar; a line every ten seconds where the output is no terminal."""
    every = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=f"{caption:<17}", mininterval=every, maxinterval=60.0, leave=True)


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The command line that all demos share."""
    built = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("--output", type=Path, default=Path(output), help="folder of everything that the demo writes")
    built.add_argument("--seed", type=int, default=0, help="of images, initial weights and the order of images")
    built.add_argument("--fresh", action="store_true", help="start over, whatever is there already")
    built.add_argument("--quick", action="store_true", help="a few images and steps, to see that it runs")
    return built


@lasting_output()
def run(program: str, demo: Callable[[], str], output: Path) -> int:
    """Run a demo and print what it returns; the exit status.

    Args:
        program: its name in error messages.
        demo: does all the work.
        output: the folder that it writes to.
    """
    ignore_deprecations()
    begin = time.monotonic()
    try:
        with raised_signals():
            text = demo()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        place = error.filename or output
        print(f"{program}: error: --output {output} cannot be used: {place}: {reason(error)}.", file=sys.stderr)
        return BAD_INPUT
    except Interrupted as stopped:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        return 128 + stopped.number
    print(f"\n{text}\nafter {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0
