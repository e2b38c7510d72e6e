"""Trainings of two processes, killed again and again at any moment, end with the weights of an undisturbed one.

TOPFORMER_KILLS=25 pytest --all -n0 -s tests/test_kills.py kills 100 trainings on a disk and as many in a bucket.
"""

import os
import pathlib
import random
import shutil
import subprocess
import time
from typing import Any

import numpy as np
import pytest

from tests.bucket import Bucket, bucket, storage
from tests.commands import FOLDER, LONGEST, finish, free_port, start_pair
from tests.test_processes import LOST
from topformer_jax import checkpoints
from topformer_jax.runtime import logs

__all__ = ["bucket", "storage"]

KILLS = int(os.environ.get("TOPFORMER_KILLS", "3"))


def have_met(number: int) -> bool:
    """Whether both processes are connected to a port; before that, one waits five minutes for the other."""
    rows = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{number:04X}") and row[3] == "01" for row in rows) >= 2


def outcome(workdir: Any) -> tuple[dict[str, bytes], list[tuple[int, float]]]:
    """The last checkpoint's weights, and all losses of the log: each step once, whatever was computed twice."""
    tensors, _ = checkpoints.read_model(workdir)
    records = logs.read_records(workdir / "metrics.jsonl")
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    return {name: np.asarray(value).tobytes() for name, value in tensors.items()}, losses


def kill(pair: list[subprocess.Popen[str]], victims: list[int]) -> float:
    """Kills one of two processes or both; returns the seconds after which the other one ended."""
    for number in victims:
        pair[number].kill()
    began = time.monotonic()
    outputs = finish(pair)
    for survivor in {0, 1} - {*victims}:
        # The last step may have been behind it.
        assert LOST.search(outputs[survivor][1]) or pair[survivor].returncode == 0, outputs[survivor]
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["shapes", "folder"])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_kills(
    place: str, source: str, workers: int, bucket: Bucket, tmp_path: pathlib.Path, drawn: pathlib.Path
) -> None:
    changes: dict[str, Any] = {
        "schedule.steps": 40,
        "checkpoint_every": 1,
        "data.num_workers": workers,
        "upload_every": 1,
        **(FOLDER | {"data.root": drawn} if source == "folder" else {}),
    }
    began = time.monotonic()
    outputs = finish(start_pair(tmp_path / "undisturbed", changes))
    latest = time.monotonic() - began  # seconds after the start
    assert "done: " in outputs[0][0], outputs
    expected = outcome(tmp_path / "undisturbed")
    dice = random.Random(f"{place} {source} {workers}")
    kills, finished, alone = 0, 0, [0.0]
    while kills < KILLS or not finished:
        workdir: Any = (bucket.root if place == "bucket" else tmp_path) / f"run{finished}"
        meeting = free_port()
        pair = start_pair(workdir, changes, port=meeting)
        moment = time.monotonic() + (dice.uniform(0, latest) if kills < KILLS else LONGEST)
        while time.monotonic() < moment and None in [process.poll() for process in pair]:
            time.sleep(0.02)
        if pair[0].poll() is None:
            alone.append(kill(pair, dice.choice(([0], [1], [0, 1])) if have_met(meeting) else [0, 1]))
            kills += 1
        else:
            outputs = finish(pair)
            assert [process.returncode for process in pair] == [0, 0], outputs
            assert outcome(workdir) == expected
            finished += 1
            if place == "disk":
                shutil.rmtree(workdir)
    print(
        f"\n{place}, {source}, {workers} workers: {kills} kills, {finished} runs finished with the same weights "
        f"and logs; the other process ended within {max(alone):.1f} s"
    )
