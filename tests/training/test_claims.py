"""One training at a time in a folder, however the one before it ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2_mgd.errors import UserError
from d2_mgd.training import claimed_folder

HOLDER = """
import sys, time
from d2_mgd.training import claimed_folder
with claimed_folder(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(100)
"""


def test_another_process_is_named_and_its_end_frees_the_folder(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "claimed\n"
        named = pytest.raises(UserError, match=f"is in use by process {holder.pid} on .*: two trainings")
        with named, claimed_folder(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with claimed_folder(tmp_path):
        pass


def _sleep() -> None:
    signal.pause()


def test_a_forked_loading_process_does_not_keep_it(tmp_path: Path) -> None:
    with claimed_folder(tmp_path):
        loader = multiprocessing.get_context("fork").Process(target=_sleep)
        loader.start()
    code = "import sys; from d2_mgd.training import claimed_folder\nwith claimed_folder(sys.argv[1]): print('mine')"
    try:
        answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert answer.stdout == "mine\n"
    finally:
        os.kill(loader.pid or 0, signal.SIGKILL)
        loader.join()
