"""A `jax.profiler` trace of some training steps, for TensorBoard's profile plugin or Perfetto."""

import pathlib
import re
from typing import Any

import jax

from topformer_jax.runtime.errors import UserError


def parse_steps(text: str | None) -> range:
    """The steps that `--profile FIRST:LAST` names, both included; none of them for None.

    >>> parse_steps("3:5")
    range(3, 6)

    Raises:
        UserError: the text has another form, or its first step is not from 1 to the last one.
    """
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile is {text!r}: expected FIRST:LAST, two steps from 1 on, for example 20:24")
    return range(int(match[1]), int(match[2]) + 1)


class StepProfiler:
    """Traces the chosen steps into a folder; call `before` and `after` around every step, and `close` at the end.

    Args:
        steps: to trace.
        folder: a local one.
        name: of the folder, as the user knows it.
    """

    def __init__(self, steps: range, folder: pathlib.Path, name: object):
        self._steps = steps
        self._name = name
        self._folder = folder
        self._is_tracing = False

    def before(self, step: int) -> None:
        """Starts the trace before the first chosen step, or before a later one where a run resumes among them."""
        if step in self._steps and not self._is_tracing:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace after the last chosen step, when the devices have computed its outputs."""
        if self._is_tracing and step == self._steps[-1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends the trace if one is running."""
        if self._is_tracing:
            self._is_tracing = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:
                raise UserError(f"cannot write the profile into {self._folder}: {error}") from None
            if jax.process_index() == 0:
                print(f"wrote the profile into {self._name}")
