"""Threads and dataloader workers leave the cores to each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from d2_mgd.training.loading import keyed_loader

ROOT = Path(__file__).resolve().parents[1]
STOP_AT_TORCH = """
import os, runpy, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            sys.exit(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv[1])
"""


@pytest.mark.parametrize("user", [None, "ACTIVE"])
@pytest.mark.parametrize(
    "script",
    [
        "tools/train_net.py",
        "tools/lazyconfig_train_net.py",
        "classification/main_base.py",
        "classification/main_mgd.py",
    ],
)
def test_the_policy_is_set_before_pytorch_reads_it(script: str, user: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": user} if user else {}
    command = [sys.executable, "-c", STOP_AT_TORCH, str(ROOT / script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stderr.strip() == (user or "PASSIVE")


def test_a_dataloader_worker_runs_one_thread() -> None:
    torch.set_num_threads(2)
    assert list(keyed_loader(TensorDataset(torch.zeros(1)), [[0]], 1, lambda _: torch.get_num_threads())) == [1]
