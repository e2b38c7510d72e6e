"""Memory that is not there: one line that says what to lower, nothing lost; a small /dev/shm; empty evaluations."""

import hashlib
import itertools
import mmap
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.commands import FOLDER, TINY, command, only_line, run_here
from tests.test_bad_input import rewrite
from topformer_jax import checkpoints, config as config_lib, evaluate, train
from topformer_jax.data import codecs, loader, sources
from topformer_jax.runtime import cli, logs, processes
from topformer_jax.runtime.errors import UserError, explain_out_of_memory
from topformer_jax.training import run as run_lib

HUGE = 2**46  # numbers: more bytes than a process can address, whatever the machine has
ADVICE = "lower batch_size or data.crop_size, or raise grad_accum_steps (smaller micro-batches)"


# What JAX says on GPUs and TPUs, and how much was requested.
@pytest.mark.parametrize(("text", "gib"), [
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment OOM", "4.44"),
    ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0", "2.99"),
    ("RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0", "0.17"),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of "
     "15.48G hbm. Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:", "21.95"),
    ("RESOURCE_EXHAUSTED: Attempting to reserve 6.48G at the bottom of memory. There are 6.78G free.", "6.48"),
    ("RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 15.65G.", "15.65"),
    ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", ""),
    ("std::bad_alloc", ""),
])  # fmt: skip
def test_what_accelerators_say(text: str, gib: str) -> None:
    asked = f", {gib} GiB were requested" if gib else ""
    assert explain_out_of_memory(jax.errors.JaxRuntimeError(text), "train") == f"out of memory{asked}: {ADVICE}"


def test_other_errors_are_no_lack_of_memory() -> None:
    for error in (
        UserError("out of memory: lower batch_size"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Disallowed host-to-device transfer"),
        jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset by peer"),
        OSError(28, "No space left on device"),
    ):
        assert explain_out_of_memory(error, "train") is None


def _allocate_in_torch() -> None:
    import torch

    torch.empty(HUGE)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: jnp.zeros(HUGE, jnp.float32).block_until_ready(),
        lambda: np.zeros(HUGE),
        lambda: bytearray(HUGE * 8),
        lambda: cv2.resize(np.zeros((9, 9, 3), np.uint8), (2**24, 2**24)),
        _allocate_in_torch,
        lambda: mmap.mmap(-1, HUGE * 8),
    ],
    ids=["jax", "numpy", "python", "opencv", "torch", "mmap"],
)
def test_a_command_ends_with_one_line(
    allocate: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever allocates: the real errors of the libraries."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/predict.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(allocate)
    assert end.value.code == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith("error: out of memory")
    assert "segment smaller pictures" in line


NO_MEMORY = "alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 2700000000 bytes"


@pytest.mark.parametrize(("error", "words"), [
    (cv2.error(NO_MEMORY), "a.png does not fit into memory: lower data.num_workers, or make the picture smaller"),
    (MemoryError(), "a.png does not fit into memory: lower data.num_workers"),
    (cv2.error("pixels <= CV_IO_MAX_IMAGE_PIXELS"), "a.png is larger than OpenCV reads, 2"),
    (cv2.error("another one"), "a.png cannot be decoded: it is not an image, or damaged"),
])  # fmt: skip
def test_a_picture_without_memory_is_not_damaged(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cv2.imencode(".png", np.zeros((4, 6, 3), np.uint8))[1].tobytes()
    monkeypatch.setattr(cv2, "imdecode", mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=words):
        codecs.decode_image(data, "a.png")


# In a run

SMALL = {"schedule.steps": 4}


def test_a_step_without_memory_loses_nothing_else(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real error of XLA at the third step; the run resumes from the second one and ends as if nothing had been."""
    init, calls = train.init_training, []

    def init_training(*args: Any) -> Any:
        state, step = init(*args)

        def fail_once(*arguments: Any) -> Any:
            calls.append(0)
            if len(calls) == 3:
                with jax.transfer_guard("allow"):
                    jnp.zeros(HUGE, jnp.float32).block_until_ready()
            return step(*arguments)

        return state, fail_once

    monkeypatch.setattr(train, "init_training", init_training)
    with pytest.raises(UserError, match=r"out of memory, 262,144\.00 GiB were requested") as error:
        run_here(tmp_path, SMALL)
    assert error.value.line.endswith(f"{ADVICE}; the newest saved step is 2")
    assert checkpoints.CheckpointStore(tmp_path / "checkpoints", 3).latest == 2
    run_here(tmp_path, SMALL)
    steps = [r["step"] for r in logs.read_records(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_an_evaluation_without_memory_saves_the_state(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lib, "evaluate_split", lambda *_, **__: np.zeros(HUGE))
    with pytest.raises(UserError, match=r"set evaluation\.per_device_batch_size=1") as error:
        run_here(tmp_path, SMALL | {"schedule.steps": 1})
    assert error.value.line.endswith("; step 1 is saved: the same command resumes from there")


def test_an_evaluation_of_nothing_ends_the_run(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels of validation are emptied after the look at them; with the right ones the run goes on."""
    labels = root / "annotations/val"
    shutil.copytree(labels, tmp_path / "right")
    for path in labels.iterdir():
        rewrite(path, lambda label: np.full_like(label, 255))
    changes = FOLDER | SMALL | {"data.root": str(root), "data.num_workers": 0, "evaluate_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(train, "look_at_labels", lambda *_: [])
        with pytest.raises(
            UserError, match=r"no label of the validation split in .* has a pixel of a class"
        ) as error:
            run_here(tmp_path / "run", changes)
    assert error.value.line.endswith("; step 2 is saved: the same command resumes from there")
    words = ["--config", "topformer_t_shapes", "--checkpoint", tmp_path / "run", "--workdir", tmp_path / "scores"]
    settings = [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    with pytest.raises(UserError, match=r"no label of the validation split in .* python -m topformer_jax\.check"):
        command(evaluate.main, *words, *settings)
    shutil.copytree(tmp_path / "right", labels, dirs_exist_ok=True)
    run_here(tmp_path / "run", changes)
    records = logs.read_records(tmp_path / "run/metrics.jsonl")
    scores = {record["step"]: record["miou"] for record in records if record["kind"] == "evaluation"}
    assert scores.keys() == {2, 4}
    assert np.isfinite([*scores.values()]).all()


# Shared memory


@pytest.mark.parametrize(
    ("megabytes", "processes_on_host", "said"),
    [(100, 1, ""), (100, 2, "26 batches in it would need 104"), (2, 1, "13 batches in it would need 52")],
)
def test_a_small_shared_memory(
    megabytes: int,
    processes_on_host: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A batch has 4 MiB; of two workers there are at most 13. Those of one host's processes share the memory."""
    monkeypatch.setattr(loader, "count_free_shared_memory", lambda: megabytes << 20)
    found = []
    for count in (2, 0):
        changes = {"data.num_workers": count, "batch_size": 4, "data.crop_size": (512, 512)}
        config = config_lib.load(config_lib.shapes(), changes)
        source = sources.open_source(config, "train")
        batches = loader.training_batches(source, config, processes_on_host=processes_on_host)
        found.append([zlib.crc32(batch["image"].tobytes()) for batch in itertools.islice(batches, 6)])
        batches.close()
    assert found[0] == found[1]
    line = f"note: /dev/shm has {megabytes} MB free, and {said} MB: the data workers send them through pipes, which "
    end = "is slower; with Docker, docker run --shm-size=1g\n"
    assert capsys.readouterr().out == (line + end if said else "")


def test_what_tells_shared_memories_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three processes the third is in another container, whose /dev/shm is another file system."""
    assert processes.count_equal("") == 1
    name, free = loader.name_shared_memory(), loader.count_free_shared_memory()
    monkeypatch.setattr(loader, "SHARED_MEMORY", "/proc")
    own, other = (
        np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        for text in (name, loader.name_shared_memory())
    )
    monkeypatch.setattr(processes, "gather_processes", lambda _: np.stack([own, own, other]))
    assert processes.count_equal(name) == 2
    monkeypatch.setattr(loader, "SHARED_MEMORY", "/no/where")
    assert free is not None
    assert (loader.name_shared_memory(), loader.count_free_shared_memory()) == ("", None)
