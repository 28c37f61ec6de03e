"""What long runs need whatever they train: files that are whole or absent, a list of checkpoints, being told to leave.

Knows no network, no Detectron2.
"""

from d2_mgd.training.claims import FolderInUse, claimed_folder
from d2_mgd.training.files import file_digest, remove_leftovers, system_reason, write_atomically
from d2_mgd.training.manifest import CheckpointManifest
from d2_mgd.training.output import lasting_output
from d2_mgd.training.restarts import join_processes, restarted
from d2_mgd.training.signals import (
    StopRequest,
    ToldToLeave,
    forwarded_signals,
    leaving_when_told,
    loader_process_signals,
)

__all__ = [
    "CheckpointManifest",
    "FolderInUse",
    "StopRequest",
    "ToldToLeave",
    "claimed_folder",
    "file_digest",
    "forwarded_signals",
    "join_processes",
    "lasting_output",
    "leaving_when_told",
    "loader_process_signals",
    "remove_leftovers",
    "restarted",
    "system_reason",
    "write_atomically",
]
