"""SIGTERM and Ctrl-C in a training: finish the step or stop the pass over images, save a checkpoint, and exit."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import NoReturn

from detectron2.engine import HookBase

from d2_mgd.training import StopRequest

logger = logging.getLogger(__name__)


class PreemptionHook(HookBase):
    """Stops a training at the end of a step, on every rank, with status 143 (SIGTERM) or 130 (Ctrl-C).

    It comes before the hooks that rematch, save and evaluate, which take time. The training that continues does a
    rematch that is due at its start. A second Ctrl-C exits at once.

    Args:
        save: saves a checkpoint under a name; a collective.
        received: number of the signal that the ranks agreed on in this step; 0 for none.
    """

    def __init__(self, save: Callable[[str], None], received: Callable[[], int]) -> None:
        self.save = save
        self.received = received
        self.stop = StopRequest()
        self._stepped = False

    def before_train(self) -> None:
        self._stepped = False
        self.stop.__enter__()

    def after_train(self) -> None:
        self.stop.__exit__()

    def after_step(self) -> None:
        self._stepped = True
        if self.received() and self.trainer.iter + 1 < self.trainer.max_iter:  # the last step is followed by its hooks
            self.leave(self.received())

    def leave(self, number: int) -> NoReturn:
        """Save what was trained since the last start, and exit (collective), after a step or before the first.

        Args:
            number: of the signal.
        """
        name = signal.Signals(number).name
        if not self._stepped:
            logger.warning("%s: stopped before a step; the same command with --resume continues.", name)
            raise SystemExit(128 + number)
        checkpoint = f"model_{self.trainer.iter:07d}"
        self.save(checkpoint)
        logger.warning(
            "%s: stopped after %d of %d iterations and saved %s.pth; the same command with --resume continues.",
            name,
            self.trainer.iter + 1,
            self.trainer.max_iter,
            checkpoint,
        )
        raise SystemExit(128 + number)
