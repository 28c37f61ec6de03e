"""Being asked to leave: SIGTERM, as schedulers send it before they take a machine away, and Ctrl-C.

The step in progress is finished, a pass over images broken off, a checkpoint written, and the process leaves with a
status that says why.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import NoReturn

from detectron2.engine import HookBase

from d2_mgd.training import StopRequest, received_signal
from d2_mgd.training.processes import largest

logger = logging.getLogger(__name__)


class PreemptionHook(HookBase):
    """Stops a training at the end of a step, in all processes the same, with status 143 (SIGTERM) or 130 (Ctrl-C).

    It comes before the hooks that rematch, save and evaluate: those would take time that there is not. A rematch that
    is due by then is done by the training that continues, at its begin. A second Ctrl-C leaves at once.

    Args:
        save: saves a checkpoint under a name; a collective.
    """

    def __init__(self, save: Callable[[str], None]) -> None:
        self.save = save
        self.stop = StopRequest()
        self._stepped = False

    def before_train(self) -> None:
        self._stepped = False
        self.stop.__enter__()

    def after_train(self) -> None:
        self.stop.__exit__()

    def after_step(self) -> None:
        self._stepped = True
        received = largest([received_signal()])[0]
        if (
            received and self.trainer.iter + 1 < self.trainer.max_iter
        ):  # else all is done but what follows the last step
            self.leave(received)

    def leave(self, number: int) -> NoReturn:
        """Save what was trained since the last start, and leave. A collective, after a step or before the first.

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
