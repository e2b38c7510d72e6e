"""PyTorch beside ours: each variant answers its question in a process of its own, as its user would run it.

The process, `benchmarks.torch_peer`, times its own calls; its allocator and its threads touch nobody else's times.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.timing import Program
from topformer_jax.runtime import cli
from topformer_jax.runtime.errors import UserError

WORDS = ("eager", "channels_last", "compile", "kept_memory")
# The fastest variant on a CPU, by question; on CUDA it is channels_last+compile.
BEST = {
    "train_step": "eager+kept_memory",
    "loss": "eager+kept_memory",
    "logits": "channels_last+compile",
    "labels": "channels_last+kept_memory",
    "exported_file": "eager",
    "onnx_logits": "eager",
    "onnx_labels": "eager",
    "evaluate": "eager",
}
# kept_memory: glibc keeps freed memory, as in our commands (`cli.keep_freed_memory`); by default it does not.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}


def add_flags(parser: cli.Parser) -> None:
    """The flags of scripts that can run PyTorch beside ours."""
    parser.add_argument("--peer", choices=["torch"], help="run PyTorch too (pip install -e '.[convert]')")
    text = f"of PyTorch: {', '.join(WORDS)}, or several joined by + (default: eager, and the fastest one)"
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=text)


@contextlib.contextmanager
def start(
    args: argparse.Namespace, question: str, config: ConfigDict, *arguments: Any
) -> Iterator[dict[str, Program]]:
    """PyTorch's programs by name, none without `--peer torch`: a function of `torch_peer`, for these arguments.

    They end with the `with` block. A variant that does not work here is reported on stderr and skipped.

    Raises:
        UserError: there is no such variant, or PyTorch does not run the config's dtype or JAX's device here.
    """
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend(), "none")
    best = "channels_last+compile" if device == "cuda" else BEST[question]
    variants = (args.variants or dict.fromkeys(["eager", best])) if args.peer else ()
    if variants and (device == "none" or config.model.dtype == "float64"):
        raise UserError(
            "PyTorch runs here on a CPU or a GPU, in float32 or bfloat16: run without --peer torch"
        )
    programs = {}
    with contextlib.ExitStack() as stack:
        for variant in variants:
            if set(variant.split("+")) - set(WORDS):
                raise UserError(f"PyTorch has no variant {variant}: join words of {', '.join(WORDS)} by +")
            name = f"torch {variant}"
            process = stack.enter_context(_start_process(question, variant, device))
            try:
                answer = _ask(name, process, pickle.dumps((config, arguments)))
            except UserError as error:
                print(f"skipped: {error.line}", file=sys.stderr, flush=True)
                continue
            print(f"{name}: the first call took {answer['first_seconds']:.2f} s", file=sys.stderr, flush=True)
            result = answer["result"] and np.array(answer["result"])
            run = functools.partial(_run, name, process)
            programs[name] = Program(run, answer["first_seconds"], answer["memory_bytes"], None, result)
        yield programs


@contextlib.contextmanager
def _start_process(question: str, variant: str, device: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.torch_peer", question, variant, device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[1],
        # The accelerator is for PyTorch and for the process that asks.
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (KEEP_MEMORY if "kept_memory" in variant else {}),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _run(name: str, process: "subprocess.Popen[bytes]", calls: int) -> float:
    return float(_ask(name, process, f"{calls}\n".encode())["seconds"])


def _ask(name: str, process: "subprocess.Popen[bytes]", question: bytes) -> dict[str, Any]:
    """Writes a question, and reads the line of JSON that answers it."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(question)
        process.stdin.flush()
    line = process.stdout.readline() or b'{"error": "its process has ended"}'
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise UserError(f"{name} does not work here: {answer['error']}")
    return answer
