"""The early end of a training run: after a signal all processes save and end at the same step."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import jax

from topformer_jax.runtime import processes


class GracefulShutdown:
    """Notices SIGTERM and Ctrl-C; a second Ctrl-C ends the process at once.

    With several processes, a signal to one of them ends all. JAX then catches SIGTERM and agrees with the other
    processes on a step that none has reached, without a message at each step (Ctrl-C becomes a SIGTERM). The
    constructor installs handlers, and `restore_handlers` removes them.

    Attributes:
        signal: the number of the signal that ends the run, 0 while it goes on; the same on all processes.
    """

    def __init__(self) -> None:
        self.signal = self._received = self._moment = 0
        self._has_computed: Callable[[], bool] | None = None
        self._print_line: Callable[[str], None] = print
        self._stopped = threading.Event()
        self._is_alone = jax.process_count() == 1
        numbers = (signal.SIGTERM, signal.SIGINT) if self._is_alone else (signal.SIGINT,)
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        # Python calls handlers between two of its instructions only, but writes to this pipe at once.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._previous_pipe = signal.set_wakeup_fd(self._writing)
        threading.Thread(target=self._watch_pipe, args=(reading,), daemon=True).start()
        if not self._is_alone:
            self._watcher = threading.Thread(target=self._watch_others, daemon=True)
            self._watcher.start()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """Does nothing, since `_watch_pipe` sees the signal; without a handler it would end the process."""

    def _watch_pipe(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as signals:
            while number := signals.read(1):
                self._note(number[0])

    def _note(self, number: int) -> None:
        if number not in self._previous:
            return
        if self._received and number == signal.SIGINT:
            print("interrupted", file=sys.stderr)
            processes.hard_exit(128 + number)
        self._received = number
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._has_computed is not None:
            self._exit_early()

    def _watch_others(self) -> None:
        if not processes.wait_for_preemption(self._stopped):
            return
        self._received = signal.SIGTERM
        while self._has_computed is None and not self._stopped.wait(0.1):
            pass
        if not self._stopped.is_set():
            self._exit_early()

    def set_early_exit_callback(self, has_computed: Callable[[], bool], print_line: Callable[[str], None]) -> None:
        """From now on, a signal ends all processes at once if none has computed a step, so that nothing is lost.

        A thread does it, so that a signal need not wait for minutes of compilation.
        """
        self._has_computed, self._print_line = has_computed, print_line
        if self._received and self._is_alone:
            self._exit_early()

    def _exit_early(self) -> None:
        assert self._has_computed is not None
        if processes.do_all_agree("exit early", not self._has_computed(), self._stopped):
            processes.hard_exit_all(
                128 + self._received,
                lambda: self._print_line("stopped before a step was computed; start the same command again"),
                self._stopped,
            )

    def check(self) -> bool:
        """Whether the run ends here. Every process must call it at the same moments: each step, each scored batch."""
        processes.wait_if_exiting()
        if self._is_alone:
            self.signal = self.signal or self._received
        elif not self.signal:
            self._moment += 1
            self.signal = signal.SIGTERM if processes.has_reached_stop(self._moment) else 0
        return bool(self.signal)

    def restore_handlers(self) -> None:
        """Puts the previous signal handlers back."""
        signal.set_wakeup_fd(self._previous_pipe)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writing)
        self._stopped.set()
        if not self._is_alone:
            self._watcher.join()
