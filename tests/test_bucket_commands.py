"""Every command with paths in a bucket does what it does on a local disk; a slice's run from bucket to bucket."""

import json
import pathlib
import time
from typing import Any

import cv2
import numpy as np
import pytest

from tests.bucket import Bucket, bucket, storage
from tests.commands import (
    ROOT,
    arguments,
    command as run_here,
    finish,
    launch,
    launch_pair,
    start_pair,
    wait_for,
)
from topformer_jax import checkpoints, convert, evaluate, predict
from topformer_jax.data import shapes
from topformer_jax.runtime import logs

__all__ = ["bucket", "storage"]


def command(module: str, *words: Any, is_pair: bool = False) -> list[str]:
    """Runs a command in one process or in two that find each other; returns what each printed."""
    started = launch_pair(module, *words) if is_pair else [launch(module, *words)]
    outputs = finish(started)
    report = "\n".join(text for pair in outputs for text in pair)
    assert all(process.returncode == 0 for process in started), report
    return [out for out, _ in outputs]


def settings(workdir: Any, changes: dict[str, Any]) -> list[str]:
    """The configuration alone of the training's words."""
    words = arguments(workdir, changes)
    return words[:2] + words[4:]


def contents(folder: Any) -> dict[str, bytes]:
    """The pictures and tables below a folder, by their path in it."""
    found: dict[str, bytes] = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= {f"{path.name}/{name}": data for name, data in contents(path).items()}
        elif path.suffix in (".png", ".jpg", ".csv"):
            found[path.name] = path.read_bytes()
    return found


def weights(path: Any) -> dict[str, bytes]:
    tensors, _ = checkpoints.load.find_format(path).read(path)
    return {name.removeprefix("state_dict/"): np.asarray(value).tobytes() for name, value in tensors.items()}


def scores(folder: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    del found["checkpoint"], found["devices"]
    return found


@pytest.fixture
def picture(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), shapes.draw("validation", 0, 72)[0][..., ::-1])
    return path


def test_outputs_in_a_bucket_are_those_on_a_disk(
    bucket: Bucket,
    shapes_weights: pathlib.Path,
    tmp_path: pathlib.Path,
    picture: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Convert, predict and evaluate; one process also has its cache of compiled programs in the bucket."""
    words = settings(None, {"model.depths": 4})
    monkeypatch.chdir(ROOT)
    # Each place reads what was written into the same place.
    for place in (tmp_path, bucket):
        run_here(convert.main, *words, "--checkpoint", shapes_weights, "--output", f"{place}/model.pth")
        run_here(convert.main, *words, "--checkpoint", f"{place}/model.pth", "--output", f"{place}/model")
        run_here(predict.main, *words, "--checkpoint", f"{place}/model", "--output", f"{place}/out", picture)
        scoring = [*words, "--checkpoint", f"{place}/model.pth", "--workdir", f"{place}/scores"]
        scoring += ["--save-predictions", f"{place}/predictions"]
        if place is bucket:
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{bucket}/programs")
            command("evaluate", *scoring)
        else:
            run_here(evaluate.main, *scoring)
    for name in ("model", "model.pth"):
        assert weights(bucket / name) == weights(tmp_path / name) == weights(shapes_weights)
    for name in ("out", "scores", "predictions"):
        assert contents(bucket / name) == contents(tmp_path / name) != {}
    assert scores(bucket / "scores") == scores(tmp_path / "scores")
    assert (bucket / "scores/report.html").exists()
    assert list((bucket / "programs").iterdir())


def kill_after_a_checkpoint(bucket: Bucket, workdir: Any, changes: dict[str, Any], step: int) -> None:
    """Starts two processes of 4 devices, on a server that fails meanwhile; kills both after a step's checkpoint."""
    pair = start_pair(workdir, changes)
    try:
        wait_for(pair, (workdir / f"checkpoints/{step}/commit_success.txt").exists)
        bucket.set_faults(cut=2, fail=3, status=503, delay=0.02)  # it is writing the next one, or soon will
        time.sleep(1)
    finally:
        for process in pair:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_slice_trains_from_a_bucket_into_a_bucket(
    bucket: Bucket, tmp_path: pathlib.Path, drawn: pathlib.Path, picture: pathlib.Path
) -> None:
    """Records, two killed starts and a third, scores, a prediction and a .pth file, as if all had been local."""
    changes: dict[str, Any] = {
        "data.source": "array_record",
        "data.dataset": "custom",
        "schedule.steps": 8,
        "checkpoint_every": 1,
        "upload_every": 1,
    }
    places: dict[Any, dict[str, Any]] = {}
    for place in (tmp_path, bucket):
        command("prepare", "custom", "--source", drawn, "--output", f"{place}/data", "--format", "array_record")
        places[place] = changes | {"data.root": f"{place}/data"}
    bucket.set_faults(fail=3, status=503, delay=0.01)
    for step in (2, 5):
        kill_after_a_checkpoint(bucket, bucket / "run", places[bucket], step)
    for place, change in places.items():
        out = command("train", *arguments(f"{place}/run", change), is_pair=True)
        assert ("from checkpoint" in out[0]) == (place is bucket), out
        assert "done: curves in" in out[0]
        words = [*settings(None, change), "--checkpoint", f"{place}/run"]
        command("evaluate", *words, "--workdir", f"{place}/scores", is_pair=True)
        command("predict", *words, "--output", f"{place}/out", picture)
        command("convert", *words, "--output", f"{place}/model.pth")
    local, remote = ([(r["step"], r.get("loss")) for r in logs.read_records(p / "run/metrics.jsonl")] for p in places)
    assert remote == local
    for name in ("run", "model.pth"):
        assert weights(bucket / name) == weights(tmp_path / name)
    for name in ("out", "scores"):
        assert contents(bucket / name) == contents(tmp_path / name) != {}
    assert scores(bucket / "scores") | {"data": ""} == scores(tmp_path / "scores") | {"data": ""}
