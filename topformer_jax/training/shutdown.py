"""The early end of a training run: after a signal all processes save and end at the same step."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax._src import distributed

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
        """Waits until one of the processes is asked to end.

        It polls once a second: a thread that waits inside JAX crashes the process when Python ends.
        """
        client: Any = distributed.global_state.client
        while True:
            if client is None or self._stopped.wait(1):
                return
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # not yet, or no answer now
                client.key_value_try_get("RECEIVED_PREEMPTION_NOTICE")
                break
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
        if not self._do_all_agree("exit early", not self._has_computed()):
            return
        processes.exiting.set()
        # Each waits for the answers of all: one that ended earlier would look dead to the others.
        if self._do_all_agree("exiting", True):
            with contextlib.suppress(Exception):
                self._print_line("stopped before a step was computed; start the same command again")
            if not self._is_alone and jax.process_index() == 0:
                time.sleep(2)  # it serves the others
            processes.hard_exit(128 + self._received)

    def _do_all_agree(self, question: str, answer: bool) -> bool:
        """Whether every process answers yes; each must ask once. False if the run ends meanwhile.

        A thread may ask while the main thread computes: the answers go through JAX's coordination service, not
        through the devices.
        """
        client: Any = distributed.global_state.client
        if client is None:
            return answer
        client.key_value_set(f"{question}/{jax.process_index()}", str(answer))
        while not self._stopped.is_set():
            try:
                answers = [value for _, value in client.key_value_dir_get(f"{question}/")]
            except jax.errors.JaxRuntimeError:  # the first process has its answers, and is gone
                return answer
            if str(False) in answers or len(answers) == jax.process_count():
                return str(False) not in answers
            self._stopped.wait(0.1)
        return False

    def check(self) -> bool:
        """Whether the run ends here. Every process must call it at the same moments: each step, each scored batch."""
        processes.wait_if_exiting()
        if self._is_alone:
            self.signal = self.signal or self._received
        elif not self.signal:
            self._moment += 1
            # JAX chooses a moment that none of the processes has reached.
            self.signal = signal.SIGTERM if processes.preemption.reached_sync_point(self._moment) else 0
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
