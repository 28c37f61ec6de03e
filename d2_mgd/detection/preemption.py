"""Being asked to leave: SIGTERM, as schedulers send it before they take a machine away, and Ctrl-C.

The step in progress is finished, a checkpoint written, and the process leaves with a status that says why.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

from detectron2.engine import HookBase

from d2_mgd.detection.agreement import largest
from d2_mgd.reliability import StopRequest, forwarded_signals

__all__ = ["PreemptionHook", "forwarded_signals"]

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

    def before_train(self) -> None:
        self.stop.__enter__()

    def after_train(self) -> None:
        self.stop.__exit__()

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        received = largest(self.stop.received)
        if not received or finished >= self.trainer.max_iter:  # all is done but what follows the last step
            return
        name = f"model_{self.trainer.iter:07d}"
        self.save(name)
        logger.warning(
            "%s: stopped after %d of %d iterations and saved %s.pth; the same command with --resume continues.",
            signal.Signals(received).name,
            finished,
            self.trainer.max_iter,
            name,
        )
        raise SystemExit(128 + received)
