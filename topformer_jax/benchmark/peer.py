"""PyTorch's variants as peers, each in a process of its own, as its user runs it.

What a process sets up (glibc's allocator, threads, what it has loaded) touches no other's times then. The process
calls the functions of `torch_programs`, and times the calls itself: the pipe to it is no part of its seconds.

A variant is words joined by "+": eager (nothing else), channels_last, compile (`torch.compile`), kept_memory (glibc
keeps what is freed, as in our own commands: `cli.keep_freed_memory`; without it glibc is as it comes).
"""

import contextlib
import functools
import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from topformer_jax import cli
from topformer_jax.benchmark import measure
from topformer_jax.benchmark.measure import Options, Program, Stopped
from topformer_jax.data import loader
from topformer_jax.errors import UserError

WORDS = ("eager", "channels_last", "compile", "kept_memory")
# What suits a device: for most measurements, and for a slow one.
SUITABLE = {
    "cpu": (
        "eager",
        "channels_last",
        "channels_last+compile",
        "eager+kept_memory",
        "channels_last+kept_memory",
    ),
    "cuda": ("channels_last+compile",),
}
ONE = {"cpu": ("eager",), "cuda": ("channels_last",)}
LOOK = 1.0  # seconds between looks whether a process that says nothing is still there
GRACE = 2.0  # seconds that a process has to end by itself


class Peers:
    """PyTorch in the variants that are asked for, else in those that suit the device; none without `--peer torch`.

    The processes start when they have something to do and end with the `with` block. `notes` says which variants do
    not work here. `results` is what each variant returned last, where that is one array of at most a megabyte.
    """

    def __init__(self, config: ConfigDict, options: Options, *, one: bool = False):
        self.notes: list[str] = []
        self.results: dict[str, np.ndarray] = {}
        self._processes: dict[str, _Process] = {}
        if options.peer:
            measure.require_torch()
            device = _device()
            for variant in options.variants or (ONE if one else SUITABLE)[device]:
                _check(variant, config)
                self._processes[f"torch {variant}"] = _Process(variant, device, config)

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.close()
        for process in self._processes.values():
            process.end()

    def make(self, function: str, *arguments: Any) -> dict[str, Program]:
        """Each variant's program by name, called once: what a function of `torch_programs` makes of the arguments.

        Raises:
            UserError: the function raised it.
        """
        programs = {}
        for name in list(self._processes):
            with contextlib.suppress(Stopped):
                place, first, memory = self._answer(name, _Make(function, arguments))
                programs[name] = Program(functools.partial(self._run, name, place), first, memory)
        return programs

    def _run(self, name: str, place: int, calls: int) -> float:
        return self._answer(name, _Run(place, calls))

    def _answer(self, name: str, question: "_Make | _Run") -> Any:
        """The answer of a variant's process; one that fails ends, with a note."""
        if name not in self._processes:
            raise Stopped
        answer = self._processes[name].ask(question)
        if isinstance(answer, _Failure):
            self.notes.append(f"{name} does not work here: {answer.reason}")
            process = self._processes.pop(name)
            process.close()
            process.end()
            raise Stopped
        found, result = answer
        if result is not None:
            self.results[name] = result
        return found


class _Make(NamedTuple):
    """Asks for a program: its place, the seconds of the first call, and its memory."""

    function: str
    arguments: tuple[Any, ...]


class _Run(NamedTuple):
    """Asks for the seconds of so many calls of the program in this place."""

    place: int
    calls: int


class _Failure(NamedTuple):
    """Answers why a question has no answer."""

    reason: str


class _Process:
    """A variant's process, which starts with the first question, and our end of the pipe to it."""

    def __init__(self, variant: str, device: str, config: ConfigDict):
        context = multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        arguments = (self._theirs, variant, device, config)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def ask(self, question: _Make | _Run) -> Any:
        """The answer, or a `_Failure`; a UserError is raised here."""
        try:
            if self._process.pid is None:
                self._start()
            self._pipe.send(question)
            # Processes that a dead one has started may hold its end of the pipe open.
            while not self._pipe.poll(LOOK):
                if not self._process.is_alive() and not self._pipe.poll():
                    raise EOFError
            answer = self._pipe.recv()
        except (EOFError, OSError):
            return _Failure(f"its process {self._end()}")
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _start(self) -> None:
        # A Ctrl-C reaches all processes of a terminal: this one ignores it from the start, and ends with its parent.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        self._theirs.close()  # so that the pipe ends when the process does

    def _end(self) -> str:
        self._process.join(GRACE)
        status = self._process.exitcode
        if status is None:
            return "does not answer"
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def close(self) -> None:
        """Tells the process to end."""
        self._pipe.close()
        self._theirs.close()

    def end(self) -> None:
        """Sees to it that the process has ended."""
        if self._process.pid is not None:
            self._process.join(GRACE)
            self._process.kill()  # where it is in the middle of something
            self._process.join()
        self._process.close()


class _Server:
    """The programs of a peer's process."""

    def __init__(self, variant: str, device: str, config: ConfigDict):
        self._settings = (variant, device, config)
        self._torch: Any = None
        self._programs: list[Program] = []

    def answer(self, question: _Make | _Run) -> Any:
        """What was asked for beside the program's last result, or why there is none."""
        try:
            found = self._make(question) if isinstance(question, _Make) else self._run(question)
            return found, self._torch.result()
        except UserError as error:
            return error
        except Exception as error:  # a compiler that is not there, a device without the operation
            return _Failure(reason(error))

    def _make(self, question: _Make) -> tuple[int, float, int | None]:
        from topformer_jax.benchmark import torch_programs

        if self._torch is None:
            self._torch = torch_programs.Torch(*self._settings)
        program = getattr(torch_programs, question.function)(self._torch, *question.arguments)
        self._programs.append(program)
        return len(self._programs) - 1, program.first, program.memory

    def _run(self, question: _Run) -> float:
        return self._programs[question.place].run(question.calls)


def _serve(pipe: Connection, variant: str, device: str, config: ConfigDict) -> None:
    """What a peer's process does: it answers questions until the parent closes the pipe or is gone."""
    loader.end_with_parent()
    jax.config.update("jax_platforms", "cpu")  # the accelerator is PyTorch's and the parent's
    if "kept_memory" in variant.split("+"):
        cli.keep_freed_memory()  # before PyTorch is there
    server = _Server(variant, device, config)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(server.answer(pipe.recv()))


def reason(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _check(variant: str, config: ConfigDict) -> None:
    """Raises a UserError where there is no such variant for the config."""
    if set(variant.split("+")) - set(WORDS):
        raise UserError(f"there is no variant {variant} of PyTorch: join words of {', '.join(WORDS)} by +")
    if config.model.dtype == "float64":
        raise UserError("the peer knows float32 and bfloat16: --config.model.dtype=float32")


def _device() -> str:
    """PyTorch's name of the kind of device that JAX has."""
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        raise UserError(
            f"PyTorch cannot use the device that JAX has here ({backend}): leave --peer torch out"
        )
    return "cpu" if backend == "cpu" else "cuda"
