"""Parts of a training that do not depend on its task: ranks, checkpoints, optimiser steps, signals, file writing.

Imports neither detection nor classification.
"""

from d2_mgd.training.checkpoints import Checkpoints, check_same_teacher, disk_errors
from d2_mgd.training.claims import claimed_folder, claimed_for_all_ranks
from d2_mgd.training.files import file_digest, remove_leftovers, write_atomically
from d2_mgd.training.output import lasting_output
from d2_mgd.training.restarts import restarted
from d2_mgd.training.signals import (
    Interrupted,
    StopRequest,
    forwarded_signals,
    loader_process_signals,
    raised_signals,
    received_signal,
)

__all__ = [
    "Checkpoints",
    "Interrupted",
    "StopRequest",
    "check_same_teacher",
    "claimed_folder",
    "claimed_for_all_ranks",
    "disk_errors",
    "file_digest",
    "forwarded_signals",
    "lasting_output",
    "loader_process_signals",
    "raised_signals",
    "received_signal",
    "remove_leftovers",
    "restarted",
    "write_atomically",
]
