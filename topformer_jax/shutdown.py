"""Ending a training run early without losing anything: SIGTERM and Ctrl-C ask for it, the loop decides when."""

import signal
from types import FrameType

import jax
import numpy as np

from topformer_jax.sharding import gather_processes


class GracefulShutdown:
    """Remembers that SIGTERM or SIGINT asked the run to end; a second SIGINT interrupts at once.

    Handlers are installed by the constructor and removed by `restore_handlers`.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def requested_alone(self) -> bool:
        """Whether this process may stop right away: it was asked to, and there is no other that would wait for it."""
        return bool(self._signal) and jax.process_count() == 1

    def agree(self) -> int:
        """The signal that any of the processes received, or 0. All processes must call it at the same step."""
        return int(gather_processes(np.int32(self._signal)).max())

    def restore_handlers(self) -> None:
        """Puts the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
