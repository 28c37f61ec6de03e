"""How the threads of a training wait for each other."""

import os


def let_waiting_threads_sleep() -> None:
    """Set OpenMP's policy for this process and the ranks that it starts, unless the user has. Before PyTorch's import.

    By default they spin, and dataloader workers and other ranks lack those cores: on two busy cores a training step
    takes 1.35 s instead of 0.43 s.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
