"""The benchmarks: each script runs on tiny settings and prints finite numbers, and the peers do the same work."""

import argparse
import importlib
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import chromium, compile as compile_lib, gpu, input as input_lib, runner, samples, side_by_side
from benchmarks.runner import Program
from tests.parity import settings_for
from topformer_jax.data import loader, transforms
from topformer_jax.data.augment import normalize
from topformer_jax.runtime import sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.training import step

Run = Callable[..., list[dict[str, Any]]]
SETTINGS = {
    "data.crop_size": "(64,64)",
    "batch_size": "2",
    "model.num_classes": "7",
    "evaluation.scale": "(64,48)",
}
TINY = (
    "--config",
    "configs/topformer_t_ade.py",
    *(f"--config.{key}={value}" for key, value in SETTINGS.items()),
)
EAGER = ("--peer", "torch", "--variants", "eager")
TORCH = "torch eager"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> Run:
    """Runs a script; returns its rows once table and numbers are checked."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(runner, "PAUSE", 0.0)
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])

    def run(script: str, *arguments: str) -> list[dict[str, Any]]:
        path = tmp_path / "numbers.json"
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--repeats", "1", "--json", str(path)])
        importlib.import_module(f"benchmarks.{script}").main()
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
        title, _, _, *lines = capsys.readouterr().out.splitlines()
        assert title.startswith(f"{script}: ")
        for row, line in zip(rows, lines[: len(rows)], strict=True):
            assert line.startswith(row["case"])
            assert row["program"] in line
            numbers = [*row.get("seconds", {}).values()]
            numbers += [value for value in row.values() if isinstance(value, int | float)]
            assert all(math.isfinite(number) and number >= 0 for number in numbers)
        return rows

    return run


def test_train_step(run: Run) -> None:
    ours, theirs = run("train_step", *TINY, "--peer", "torch", "--variants", "eager+kept_memory")
    assert (ours["case"], theirs["program"]) == ("2 x 64 x 64", "torch eager+kept_memory")
    assert 0 < ours["temporary_bytes"] < ours["memory_bytes"]
    assert theirs["ratio"] == theirs["seconds"]["median"] / ours["seconds"]["median"]
    assert theirs["images_per_second"] == 2 / theirs["seconds"]["median"]


def test_inference(run: Run) -> None:
    rows = run("inference", *TINY, "--size", "64", "--exported", *EAGER)
    programs = ["ours", "auto", "our .onnx", "our .tflite", TORCH, "torch's ONNX"]
    assert [(row["case"], row["program"]) for row in rows] == [
        (f"to {output}", program) for output in ("logits", "labels") for program in programs
    ]


def test_loss(run: Run) -> None:
    rows = run("loss", *TINY, "--size", "64", "--batch", "2", *EAGER)
    assert [row["program"] for row in rows] == [runner.OURS, "plain", TORCH]
    assert rows[0]["case"] == "2 x 8 x 8 x 7 to 64 x 64"


def test_evaluate_counts_as_its_peer(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(samples, "SIZE", (64, 85))
    run("evaluate", *TINY, "--images", "3", *EAGER)
    (note,) = json.loads((tmp_path / "numbers.json").read_text())["notes"]
    assert float(note.split()[4]) <= 1e-3


def test_gpu(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """All questions at small sizes on the CPU; what the time does not suffice for is named."""
    monkeypatch.setattr(gpu, "DEPTHWISE", ((64, 8, 3, 2),))
    monkeypatch.setattr(samples, "ade20k_sizes", lambda count: [(48, 64), (64, 48)] * (count // 2))
    flags = (*TINY, "--config.model.depths=1", "--batches", "2", "--images", "4")
    rows = run("gpu", *flags, "--budget", "10000")
    assert [*dict.fromkeys(row["case"].partition(",")[0] for row in rows)] == [
        "train step tiny",
        "2 x 8 x 8 x 7 to 64 x 64",
        "train step base",
        "4 images of 2 sizes",
        "depthwise 3 x 3",
    ]
    assert {row["program"] for row in rows} >= {runner.OURS, "plain", "xla", "shifted"}
    assert all(row["runs"] > 0 for row in rows)
    assert run("gpu", *flags, "--budget", "1") == []
    notes = json.loads((tmp_path / "numbers.json").read_text())["notes"]
    assert [note.split(":")[0] for note in notes] == ["left out"] * 5


def test_plan_and_input(run: Run) -> None:
    (row,) = run("plan", "--images", "1000", "--rows", "8")
    assert row["networks"] <= 4
    assert row["used_rows"] >= 0.97
    assert [row["program"] for row in run("input", *TINY, "--images", "1")] == [runner.OURS, "official"]


def test_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    settings = {"data.crop_size": (64, 64), "data.shapes.validation": 3, "data.shapes.size": 64}
    settings |= {
        "evaluation.scale": (96, 64),
        "schedule.steps": 2,
        "schedule.warmup_steps": 1,
        "batch_size": 16,
    }
    flags = [
        *("--config", "topformer_t_shapes"),
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]

    def run_script(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["side_by_side", *map(str, words)])
        side_by_side.main()

    found = {}
    for program in ("ours", "torch"):
        path = tmp_path / f"{program}.json"
        run_script("--program", program, *flags, "--every", 2, "--json", path)
        found[program] = json.loads(path.read_text())
        assert list(found[program]["miou"]) == ["2"]
    # BatchNorms of a few values, here and in a small batch, make much of rounding.
    assert np.allclose(found["ours"]["losses"], found["torch"]["losses"], rtol=2e-3, atol=0)
    run_script("--draw", *(tmp_path / f"{name}.json" for name in found), "--output", tmp_path / "curves.svg")
    assert "ours: mIoU" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(UserError, match="give --program"):
        run_script(*flags)


@pytest.mark.slow
def test_page(run: Run) -> None:
    if not (chromium.find() and shutil.which("npm")):
        pytest.skip("needs chromium and npm")
    rows = run("page", *TINY, "--size", "64")
    assert [row["program"] for row in rows] == ["wasm 1", "wasm 2"] * 4


def test_training_looks_up_the_step_that_was_compiled_elsewhere() -> None:
    """The program's text is the key of JAX's persistent cache, with the versions and the devices."""
    config = settings_for("tiny", batch_size=8, mesh__fsdp=2, data__crop_size=(64, 64))
    train_step: Any
    state, train_step = step.init_training(config)
    batch = jax.device_put(samples.batch(config), sharding.batch_sharding(sharding.make_train_mesh(config)))
    compiled_elsewhere, *arguments = compile_lib.step_program(config, jax.devices(), 1)
    assert compiled_elsewhere.lower(*arguments).as_text() == train_step.lower(state, batch).as_text()


@pytest.mark.slow
def test_compile_for_a_tpu(run: Run) -> None:
    pytest.importorskip("libtpu")
    rows = run("compile", *TINY, "--images", "1", "--programs", "step", "evaluation")
    programs = ["train step, 1 images", "evaluation, 8 images: logits", "evaluation, 8 images: counts"]
    assert [row["program"] for row in rows] == programs


@pytest.mark.slow
def test_a_gpu_starts_few_kernels(run: Run) -> None:
    """Of the loss at most 100 for 32 images, and of an evaluation's pixels 420 for 64 images of ADE20K's sizes."""
    pytest.importorskip("jax_plugins.xla_cuda12")
    rows = run("compile", "--slices", "h200:1", "--images", "32", "--programs", "loss", "evaluation")
    kernels = {row["program"]: row["kernels"] for row in rows}
    assert 30 < kernels["loss, 32 images"] <= 100
    assert kernels["evaluation, 64 images: counts"] <= 420


def test_programs_take_turns_and_a_ratio_is_that_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PAUSE", 0.0)
    calls: list[str] = []

    def program(name: str, *seconds: float) -> Program:
        left = list(seconds)

        def run(_: int) -> float:
            calls.append(name)
            return left.pop(0)

        return Program(run, 0.0)

    drifting = {"a": program("a", 9, 1, 10, 2), "b": program("b", 9, 3, 30, 6)}
    first, second = runner.compare("case", drifting, 3, images=6)
    assert calls == list("abababab")
    assert "ratio" not in first
    assert (first["images_per_second"], second["ratio"]) == (3, 3)
    assert (first["noise"], second["noise"]) == (6.5, 6.5)  # the median of 10 / 1 and 10 / 2, less 1


def test_a_variant_that_does_not_work_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(peer="torch", variants=["eager"])
    with runner.start_peers(args, "loss", settings_for("tiny"), "not an array", "neither") as programs:
        assert not programs
    assert "skipped: torch eager does not work here: " in capsys.readouterr().err
    args.variants = ["fast"]
    with (
        pytest.raises(UserError, match="no variant fast"),
        runner.start_peers(args, "loss", settings_for("tiny")),
    ):
        pass


def test_the_official_example_is_ours() -> None:
    still: dict[str, Any] = {
        "crop_size": (96, 160),
        "scale": (160, 96),
        "ratio_range": (1.0, 1.0),
        "cat_max_ratio": 1.0,
    }
    still |= {"flip_prob": 0.0, "photometric_distortion": False}
    config = settings_for("tiny", **{f"data__{key}": value for key, value in still.items()})
    with samples.written_files(1, config, [(80, 112)]) as source:  # 96 x 134 pixels when it is fitted
        image, label = loader.decode_example(source[0], config)
        theirs, their_label = input_lib.make_example(source[0], config, np.random.default_rng(0))
    ours = transforms.random_resize_crop(image, label, config.data, np.random.default_rng(0))
    pixels = np.asarray(normalize(ours["image"][None]))[0, :, :134]
    np.testing.assert_allclose(theirs[:, :, :134].transpose(1, 2, 0), pixels, rtol=0, atol=2e-6)
    assert not theirs[:, :, 134:].any()
    np.testing.assert_array_equal(their_label, ours["label"])
