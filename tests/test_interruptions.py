"""What stops a training on the way: no number, a full disk, Ctrl-C. One line, and nothing lost.

`pytest -s tests/test_interruptions.py` shows the lines.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.commands import FOLDER, LONGEST, ROOT, arguments, only_line, refused_here, run_here, start
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError


def test_no_number(tmp_path: pathlib.Path) -> None:
    """A learning rate that is harmless at the first step only."""
    changes = {"schedule.lr": 1e30, "schedule.warmup_ratio": 1e-38, "checkpoint_every": 1}
    line = refused_here(tmp_path / "run", changes)
    assert "is nan at step 3: lower schedule.lr, or set optimizer.clip_norm; the newest saved step is 2" in line


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[Callable[[pathlib.Path, str], None]]:
    """Mounts a disk of a size on a folder, or gives the one that is there another size."""
    mounted: list[pathlib.Path] = []

    def mount(folder: pathlib.Path, size: str) -> None:
        options = f"remount,size={size}" if folder in mounted else f"size={size}"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount a disk")
        mounted.append(folder)

    yield mount
    for folder in dict.fromkeys(reversed(mounted)):
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_and_a_bad_picture_lose_nothing(
    root: pathlib.Path, tmp_path: pathlib.Path, disk: Callable[[pathlib.Path, str], None]
) -> None:
    """The second checkpoint does not fit; then there is space; then a picture of the evaluation is fixed."""
    changes = FOLDER | {"data.root": root, "checkpoint_every": 3}
    workdir = tmp_path / "small/run"
    disk(workdir.parent, "10m")
    line = refused_here(workdir, changes)
    assert f"cannot write a checkpoint into {workdir}/checkpoints: no space is left on the disk" in line
    assert "the newest saved step is 3; fix it and start the same command again" in line

    disk(workdir.parent, "200m")
    whole = (root / "images/val/1.jpg").read_bytes()
    (root / "images/val/1.jpg").write_bytes(whole[:-400])
    line = refused_here(workdir, changes)
    assert "/images/val/1.jpg is cut off" in line
    assert "step 6 is saved: the same command resumes from there" in line

    (root / "images/val/1.jpg").write_bytes(whole)
    assert "from checkpoint 6" in run_here(workdir, changes)
    steps = [json.loads(text)["step"] for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 6]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


@pytest.mark.parametrize("part", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_under_the_logs(
    tmp_path: pathlib.Path, disk: Callable[[pathlib.Path, str], None], part: str
) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    disk(workdir, "8k" if part == "metrics.jsonl" else "1m")
    disk(workdir / "tensorboard", "1m" if part == "metrics.jsonl" else "16k")
    log = logs.RunLog(workdir, 0, 10**6, active=True)
    names = ("loss", "pixel_accuracy", "learning_rate", "images_per_second", "data_wait", "skipped")

    def fill() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            for step in range(1, 1000):
                log.log_step(step, dict.fromkeys(names, 1.0))

    with pytest.raises(UserError, match=r"cannot write .*: No space left on device") as error:
        fill()
    log.close()
    print(f"\n{error.value.line}")
    assert part in error.value.line
    assert logs.read_records(workdir / "metrics.jsonl")[-1]["step"] > 10


@pytest.mark.slow
def test_an_output_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    words = [sys.executable, "-m", "topformer_jax.train", *arguments(tmp_path / "run", {})]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            words,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
    assert done.returncode == 2
    assert "cannot write what the command prints: No space left on device" in only_line(done.stderr)


@pytest.mark.parametrize("moment", ["imports", "start"])
def test_interrupted_while_it_starts(tmp_path: pathlib.Path, moment: str) -> None:
    process = start(tmp_path / "run", {})

    def there() -> bool:
        if moment == "imports":
            return "numpy" in pathlib.Path(f"/proc/{process.pid}/maps").read_text()
        return (tmp_path / "run/checkpoints").exists()

    while process.poll() is None and not there():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONGEST)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_reader_that_ends_with_ctrl_c_costs_no_step(tmp_path: pathlib.Path) -> None:
    """As in `train ... | tee log`: the same Ctrl-C ends tee, and the run still saves the step it has computed."""
    changes = {"schedule.steps": 100_000, "checkpoint_every": 100_000, "evaluate_every": 100_000}
    with start(tmp_path / "run", changes) as process:
        assert process.stdout is not None
        while "step 2/" not in (line := process.stdout.readline()):
            assert line, process.communicate()
        process.stdout.close()
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert len(list((tmp_path / "run/checkpoints").glob("[0-9]*"))) == 1
