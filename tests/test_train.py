"""The training command from end to end, on tiny settings: outputs, resume, several processes."""

import json
import pathlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import jax
import numpy as np
import pytest

from tests.bucket import Bucket, bucket, storage
from tests.commands import (
    LONGEST,
    ROOT,
    TINY,
    arguments,
    comes_to_pass,
    finish,
    launch,
    losses,
    outcome,
    refused_here,
    run,
    run_here,
    start,
    start_pair,
    stop_after,
)
from topformer_jax import config, load, train
from topformer_jax.data import loader
from topformer_jax.data.batch import Batch
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.training.run import STEPS_IN_FLIGHT, Monitor, Run, load_teacher, parse_steps
from topformer_jax.training.run_folder import RunFolder
from topformer_jax.training.step import learning_rate

__all__ = ["bucket", "storage"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A run that was never stopped, and its output."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run_here(workdir, {})


def test_what_a_run_leaves(whole: tuple[pathlib.Path, str]) -> None:
    workdir, out = whole
    expected = ".lock checkpoints config.json configs curves.png metrics.jsonl predictions tensorboard"
    assert {path.name for path in workdir.iterdir()} == {*expected.split()}
    assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6]
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 8
    assert [path.name for path in (workdir / "predictions").iterdir()] == ["0000006.png"]
    assert list((workdir / "tensorboard").iterdir())
    assert "12 training and 3 validation examples" in out
    assert "best: mIoU" in out
    scored = [r for r in logs.read_records(workdir / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert [record["step"] for record in scored] == [6]
    model = load(ROOT / "configs/topformer_t_shapes.py", workdir, **{"model.depths": 1})
    assert jax.eval_shape(model, jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")).shape == (1, 8, 8, 10)


def test_a_later_start_of_a_finished_run(whole: tuple[pathlib.Path, str]) -> None:
    """It has nothing to do, says what changed, keeps its settings, and refuses what cannot change."""
    workdir, _ = whole
    before = (workdir / "metrics.jsonl").read_text()
    out = run_here(workdir, {"schedule.lr": 0.5, "log_every": 3})
    assert "from checkpoint 6" in out
    assert (workdir / "metrics.jsonl").read_text() == before
    assert f"best: mIoU {logs.read_records(workdir / 'metrics.jsonl')[-1]['miou']:.4f} at step 6" in out
    assert "changed since step 6: schedule.lr: 0.003 -> 0.5\n" in out
    assert out.count("changed since") == 1
    texts = [file.read_text() for file in sorted((workdir / "configs").iterdir())]
    assert ['"lr": 0.5,' in text for text in texts] == [False, True]
    assert texts[-1] == (workdir / "config.json").read_text()
    line = refused_here(workdir, {"optimizer.name": "rmsprop_tf"})
    assert f"{workdir}/checkpoints/6 holds a run with optimizer.name=adamw, and the config has" in line
    assert len(list((workdir / "configs").iterdir())) == 2


def test_a_run_of_epochs(tmp_path: pathlib.Path) -> None:
    """Its schedule, evaluations and end are those of the steps; a warm-up that does not end is said."""
    changes = {"schedule.epochs": 2, "evaluate_every": 0, "schedule.warmup_steps": 3}
    out = run_here(tmp_path, changes)
    assert "2.0 epochs of 12 pictures = 3 steps of 8 images, crops (64, 64)\n" in out
    assert "warning: all 3 steps are warm-up (schedule.warmup_steps=3), and the learning rate stays below" in out
    records = logs.read_records(tmp_path / "metrics.jsonl")
    assert [(record["kind"], record["step"]) for record in records] == [
        (kind, step) for step in (1, 2, 3) for kind in ("train", "evaluation")
    ]
    schedule = config.load(config.shapes(), {"schedule.steps": 3, "schedule.warmup_steps": 3}).schedule
    rates = [record["learning_rate"] for record in records if record["kind"] == "train"]
    np.testing.assert_allclose(rates, [learning_rate(step, schedule) for step in range(3)], rtol=1e-6)
    again = run_here(tmp_path, changes | {"schedule.warmup_steps": 2, "data.shapes.train": 16})
    assert "from checkpoint 3" in again
    assert "warm-up" not in again
    assert "changed since step 3: schedule.steps: 3 -> 4\n" in again


@jax.jit
def compute(x: jax.Array, count: int) -> jax.Array:
    """Keeps the device busy for `count` products."""
    return jax.lax.fori_loop(0, count, lambda _, y: y @ y / 512, x)


def test_a_few_steps_are_in_flight() -> None:
    """However many steps there are between two log lines, the host is at most two ahead of the devices."""

    steps = []
    monitor = Monitor(mock.Mock(spec=Run), mock.Mock(spec=loader.DeviceBatches))
    for step in range(8):
        steps.append({"loss": compute(jax.numpy.full((512, 512), float(step)), 300)})
        monitor.add(steps[-1])
        assert all(metrics["loss"].is_ready() for metrics in steps[:-STEPS_IN_FLIGHT])


@pytest.mark.parametrize("busy", [False, True])
def test_a_wait_for_data_counts_while_the_devices_are_idle(busy: bool) -> None:
    come = threading.Event()

    class Batches(loader.DeviceBatches):
        looks = 0

        def wait(self, seconds: float) -> bool:
            """The batch comes at the third look for it."""
            self.looks += 1
            if self.looks == 3:
                come.set()
            return super().wait(seconds)

    def make_batches() -> Iterator[Batch]:
        come.wait()
        yield cast(Batch, {"index": np.zeros(1, np.int32)})

    metrics = {"loss": compute(jax.numpy.ones((512, 512)), 1000 if busy else 1)}
    if not busy:
        metrics["loss"].block_until_ready()
    batches = Batches(make_batches(), jax.sharding.SingleDeviceSharding(jax.devices()[0]), 1)
    monitor = Monitor(mock.Mock(spec=Run), batches)
    monitor.add(metrics)
    assert monitor.next_batch()["index"] == 0
    assert (monitor.data_wait_seconds > 0) == (not busy)
    batches.close()


def test_a_teacher_that_does_not_fit() -> None:
    teacher = {"distillation.config": "topformer_b_ade", "distillation.checkpoint": "b.pth"}
    with pytest.raises(UserError, match="topformer_b_ade has 150 classes, this run 10"):
        load_teacher(config.load(config.shapes(), teacher))
    with pytest.raises(UserError, match="needs both"):
        config.load(config.shapes(), {"distillation.checkpoint": "b.pth"})
    with pytest.raises(UserError, match=r"channel_weight is 3\.0: it needs a teacher"):
        config.load(config.shapes(), {"distillation.channel_weight": 3})


@pytest.mark.parametrize("steps", ["3", "3:2", "0:1", "a:b"])
def test_profile_of_no_steps(steps: str) -> None:
    with pytest.raises(UserError, match="expected FIRST:LAST"):
        parse_steps(steps)


def test_the_loop_refuses_implicit_transfers(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was left on the host is not copied to the devices in silence."""

    class HostBatches(loader.DeviceBatches):
        def __next__(self) -> Any:
            return jax.device_get(super().__next__())  # explicit: JAX 0.12 refuses np.asarray here

    monkeypatch.setattr(loader, "DeviceBatches", HostBatches)
    settings = config.load(config.shapes(), TINY)
    with (
        RunFolder(tmp_path / "run", 60) as folder,
        pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"),
    ):
        train.train(settings, folder)


def test_a_signal_saves_and_the_same_command_goes_on(whole: tuple[pathlib.Path, str], tmp_path: pathlib.Path) -> None:
    with stop_after(3):
        run_here(tmp_path, {})
    stopped_at = max(losses(tmp_path))
    assert 3 <= stopped_at < 6
    assert f"from checkpoint {stopped_at}" in run_here(tmp_path, {})
    assert outcome(tmp_path) == outcome(whole[0])


def test_a_killed_run_with_every_option_resumes(whole: tuple[pathlib.Path, str], tmp_path: pathlib.Path) -> None:
    """Averages, accumulation, a worker, class weights, a profile, boundaries, and a teacher: the finished run."""
    teacher = tmp_path / "teacher.py"
    lines = "from topformer_jax import config", "def get_config():", "    settings = config.shapes()"
    teacher.write_text("\n".join([*lines, "    settings.model.depths = 1", "    return settings"]))
    changes: dict[str, Any] = {
        "batch_size": 16,
        "ema_decay": 0.5,
        "grad_accum_steps": 2,
        "evaluation.boundary_pixels": 2,
        "data.balance": 0.5,
        "data.mix": "paste",
        "data.rotation": 20.0,
        "loss.class_weight": "balanced",
        "distillation.config": teacher,
        "distillation.checkpoint": whole[0],
    }
    out = run_here(tmp_path / "whole", changes, "--profile", "2:3")
    assert f"{teacher}, {whole[0]}" in out
    assert f"wrote the profile into {tmp_path}/whole/profile" in out
    assert list((tmp_path / "whole/profile").rglob("*.xplane.pb"))
    assert re.search(
        r"for the 10 of 10 classes that occur in 12 training labels; \w+ occurs in the fewest labels, \d", out
    )
    assert "the pixels of classes are those in" not in out  # labels are counted once, for both settings
    assert re.search(r"step 6/6  miou 0\.\d+  macc 0\.\d+  aacc 0\.\d+  boundary_miou 0\.\d+", out)
    # The schedule depends on the number of steps, so the first half is cut off by a kill, not by fewer steps.
    process = start(tmp_path / "cut", changes | {"data.num_workers": 1})
    comes_to_pass([process], lambda: max(losses(tmp_path / "cut") or {0: 0.0}) >= 2)
    process.kill()
    process.communicate(timeout=LONGEST)
    run_here(tmp_path / "cut", changes)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "cut")


def test_a_run_in_a_bucket(bucket: Bucket, whole: tuple[pathlib.Path, str]) -> None:
    """Killed after a checkpoint, with a server that fails now and then; the same as on a local disk."""
    remote = bucket / "run"
    bucket.set_faults(fail=3, status=503, delay=0.01)
    process = start(remote, {"upload_every": 1})
    comes_to_pass([process], (remote / "checkpoints/2/commit_success.txt").exists)
    process.kill()
    process.communicate()
    out = run_here(remote, {})
    assert "from checkpoint" in out
    assert f"done: curves in {remote}/curves.png" in out
    assert outcome(remote) == outcome(whole[0])
    for name in ("config.json", "curves.png", "predictions/0000006.png"):
        assert (remote / name).exists()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process on 1 device and on 8, and two processes of 4: the same losses, one log, one checkpoint."""
    # float64: in float32 rounding alone drives the runs apart by a few thousandths in ten steps.
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    changes = {
        "schedule.steps": 10,
        "checkpoint_every": 5,
        "data.shapes.validation": 5,
        "model.dtype": "float64",
        "loss.class_weight": "enet",
    }
    runs = {1: tmp_path / "one", 8: tmp_path / "eight"}
    for devices, workdir in runs.items():
        process = launch("train", *arguments(workdir, changes), devices=devices)
        out, err = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, out + err
    pair = start_pair(tmp_path / "two", changes)
    outputs = finish(pair)
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "8 x cpu in 2 processes" in outputs[0][0]
    assert "step 10/10" in outputs[0][0]
    assert "step" not in outputs[1][0]
    expected = losses(runs[1])
    worst = 0.0
    for workdir in (runs[8], tmp_path / "two"):
        found = losses(workdir)
        assert set(found) == set(expected) == set(range(1, 11))
        worst = max(worst, *(abs(found[step] / expected[step] - 1) for step in expected))
    print(f"1 device, 8 devices, 2 processes x 4: losses of 10 steps differ by {worst:.1e}")
    assert worst <= 1e-5


@pytest.mark.slow
def test_fine_tuning_raises_the_score(tmp_path: pathlib.Path, golden: Callable) -> None:
    """From the golden Tiny, on the set that it was trained on for some minutes."""
    scores = []
    for steps, rate in ((1, 0.0), (200, 1e-3)):
        changes = {
            "data.source": "folder",
            "data.dataset": "ade20k",
            "data.root": golden("mini_ade"),
            "data.reduce_zero_label": True,
            "data.crop_size": "(256,256)",
            "data.scale": "(1024,256)",
            "evaluation.scale": "(1024,256)",
            "evaluation.size_divisor": 32,
            "model.num_classes": 150,
            "init_from": golden("checkpoints/tiny.pth"),
            "schedule.steps": steps,
            "schedule.lr": rate,
        }
        run(tmp_path / str(steps), changes)
        records = logs.read_records(tmp_path / str(steps) / "metrics.jsonl")
        scores.append(records[-1]["miou"])
    print(f"mIoU before and after fine-tuning: {scores}")
    assert scores[1] > scores[0] + 0.01
