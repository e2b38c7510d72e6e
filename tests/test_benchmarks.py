"""The benchmarks: each script runs on tiny settings and prints finite numbers, and the peers do the same work."""

import argparse
import importlib.util
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax import nnx

from benchmarks import chromium, official_input, peers, samples, side_by_side, timing
from benchmarks.timing import Program
from tests.parity import settings_for
from tests.test_class_images import write_images
from topformer_jax import checkpoints, models
from topformer_jax.data import loader, transforms
from topformer_jax.data.augment import normalize
from topformer_jax.runtime.errors import UserError

Run = Callable[..., list[dict[str, Any]]]
RECIPE = ("--config", "configs/topformer_t_ade.py")
SETTINGS = {
    "data.crop_size": "(64,64)",
    "batch_size": "2",
    "model.num_classes": "7",
    "evaluation.scale": "(64,48)",
}
TINY = (*RECIPE, *(f"--config.{key}={value}" for key, value in SETTINGS.items()))
CLASSIFIER = (
    *("--config", "configs/topformer_t_imagenet.py", "--config.data.crop_size=(64,64)"),
    *("--config.batch_size=2", "--config.model.num_classes=7"),
)
EAGER = ("--peer", "torch", "--variants", "eager")
TORCH = "torch eager"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> Run:
    """Runs a script; returns its rows once table and numbers are checked."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(timing, "PAUSE", 0.0)
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
            numbers = [
                *row.get("seconds", {}).values(),
                *(v for v in row.values() if isinstance(v, int | float)),
            ]
            assert numbers
            assert all(math.isfinite(number) and number >= 0 for number in numbers)
        return rows

    return run


def _programs(rows: list[dict[str, Any]]) -> list[str]:
    return [row["program"] for row in rows]


def test_train_step(run: Run) -> None:
    ours, theirs = run("train_step", *TINY, "--peer", "torch", "--variants", "eager+kept_memory")
    assert (ours["case"], theirs["program"]) == ("2 x 64 x 64", "torch eager+kept_memory")
    assert 0 < ours["temporary_bytes"] < ours["memory_bytes"]
    assert theirs["ratio"] == theirs["seconds"]["median"] / ours["seconds"]["median"]
    assert theirs["images_per_second"] == 2 / theirs["seconds"]["median"]


def test_exported(run: Run) -> None:
    rows = run("exported", *TINY, "--size", "64", *EAGER)
    programs = ["ours", "our .onnx", "our .tflite", TORCH, "torch's ONNX"]
    assert [(row["case"], row["program"]) for row in rows] == [
        (f"to {question}", program) for question in ("logits", "labels") for program in programs
    ]
    rows = run("exported", *TINY, "--size", "64", "--outputs", "half-labels", "--suffixes", ".onnx")
    assert [(row["case"], row["program"]) for row in rows] == [
        ("to half-labels", program) for program in ("ours", "our .onnx")
    ]
    rows = run("exported", *CLASSIFIER, "--size", "64", *EAGER)
    assert [(row["case"], row["program"]) for row in rows] == [("to scores", name) for name in programs]
    with pytest.raises(UserError, match="a classifier gives scores"):
        run("exported", *CLASSIFIER, "--outputs", "labels")
    with pytest.raises(UserError, match=r"missing\.jpg"):
        run("exported", *TINY, "--image", "missing.jpg")


def test_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    settings = {
        "data.crop_size": (64, 64),
        "data.shapes.validation": 3,
        "data.shapes.size": 64,
        "batch_size": 16,
    }
    settings |= {"evaluation.scale": (96, 64), "schedule.steps": 4, "schedule.warmup_steps": 2}
    flags = [
        "--config",
        "topformer_t_shapes",
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
        assert list(found[program]["miou"]) == ["2", "4"]
    # BatchNorms of a few values, here and in a small batch, make much of rounding.
    assert np.allclose(found["ours"]["losses"], found["torch"]["losses"], rtol=2e-3, atol=0)
    assert found["ours"]["losses"][0] != found["ours"]["losses"][3]
    run_script("--draw", *(tmp_path / f"{name}.json" for name in found), "--output", tmp_path / "curves.svg")
    assert "ours: mIoU" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(UserError, match="give --program"):
        run_script(*flags)
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(UserError, match=r"cut\.json is not a file"):
        run_script("--draw", tmp_path / "cut.json", "--output", tmp_path / "x.svg")


@pytest.mark.slow
def test_page(run: Run) -> None:
    if not (chromium.find() and shutil.which("npm")):
        pytest.skip("needs chromium and npm")
    rows = run("page", *TINY, "--size", "64")
    assert _programs(rows) == ["wasm 1", "wasm 2"] * 4


def test_inference(run: Run) -> None:
    rows = run("inference", *TINY, "--size", "64", "--batch", "2", *EAGER)
    assert [row["case"] for row in rows] == ["to logits"] * 2 + ["to labels"] * 2
    assert _programs(rows) == [timing.OURS, TORCH] * 2


def test_loss(run: Run) -> None:
    rows = run("loss", *TINY, "--size", "64", "--batch", "2", *EAGER)
    assert _programs(rows) == [timing.OURS, "plain", TORCH]
    assert rows[0]["case"] == "2 x 8 x 8 x 7 to 64 x 64"


def test_evaluate_counts_as_its_peer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SIZE", (64, 85))
    ours, theirs = run("evaluate", *TINY, "--images", "3", "--sizes", "2", *EAGER)
    assert ours["miou"] > 0
    assert abs(ours["miou"] - theirs["miou"]) < 1e-3
    assert theirs["pixels_apart"] <= 1e-3 * 3 * 512 * 683


def test_layers(run: Run) -> None:
    rows = run("layers", *TINY)
    names = ["stem", *(f"layer{index}" for index in range(1, 10)), "trans", "SIM 1", "SIM 2", "SIM 3"]
    rates, parts = ["matrix product", "sum"], [*names, "decode_head", "loss"]
    assert [row["case"] for row in rows] == [*rates, *parts, "sum of the parts", "whole step"]
    found = {row["case"]: row for row in rows}
    assert found["matrix product"]["operations"] == pytest.approx(2 * 2048**3, rel=0.01)
    total = sum(found[name]["operations"] for name in parts)
    assert found["sum of the parts"]["operations"] == pytest.approx(total)
    assert all(row["bound_seconds"] > 0 for row in rows)
    with pytest.raises(UserError, match="is a classifier"):
        run("layers", *CLASSIFIER)


def test_plan(run: Run) -> None:
    rows = run("plan", *RECIPE, "--images", "1000", "--rows", "8")
    assert [row["case"] for row in rows] == [f"{name}, 1000 images" for name in samples.DATA_SETS]
    assert all(row["networks"] <= 4 for row in rows)
    assert all(row["used_rows"] >= 0.97 for row in rows)


def test_input(run: Run) -> None:
    rows = run("input", *TINY, "--images", "1", "--workers", "1")
    assert _programs(rows) == [timing.OURS, "official", timing.OURS]
    assert rows[2]["case"] == "1 workers, batch 2"


def test_input_of_a_classifier(run: Run, tmp_path: pathlib.Path) -> None:
    """timm is no dependency: where it is missing, the flag says so."""
    root = write_images(tmp_path / "images", 1, 1)
    flags = (*CLASSIFIER, f"--config.data.root={root}", "--workers", "1")
    rows = run("input", *flags)
    assert _programs(rows) == [timing.OURS, timing.OURS]
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(UserError, match="pip install timm, or leave --peer out"):
            run("input", *flags, "--peer", "timm")
    else:
        assert _programs(run("input", *flags, "--peer", "timm"))[1] == "timm"


def test_train_step_of_a_classifier(run: Run) -> None:
    ours, theirs = run("train_step", *CLASSIFIER, *EAGER)
    assert (ours["case"], theirs["program"]) == ("2 x 64 x 64", TORCH)


@pytest.mark.slow
def test_start_up(run: Run) -> None:
    rows = run("start_up", *TINY)
    phases = ["import", "state", "first step", "dispatch", "whole process"]
    assert _programs(rows) == phases * 2


@pytest.mark.slow
def test_tpu(run: Run) -> None:
    pytest.importorskip("libtpu")
    rows = run("tpu", *TINY, "--slices", "v5e:2x4", "--batches", "4", "8", "--evaluation")
    assert _programs(rows) == ["train step", *["evaluation, logits", "evaluation, count"] * 3]
    assert rows[0]["other_bytes"] == 0  # the chips send each other gradients and sums alone


def test_programs_take_turns_and_a_ratio_is_that_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    calls: list[str] = []

    def program(name: str, *seconds: float) -> Program:
        left = list(seconds)

        def run(_: int) -> float:
            calls.append(name)
            return left.pop(0)

        return Program(run, 0.0)

    drifting = {"a": program("a", 9, 1, 10, 2), "b": program("b", 9, 3, 30, 6)}
    first, second = timing.compare("case", drifting, 3, images=6)
    assert calls == list("abababab")
    assert "ratio" not in first
    assert (first["images_per_second"], second["ratio"]) == (3, 3)


def test_a_peer_has_our_logits() -> None:
    config = settings_for("tiny", model__num_classes=7)
    model = models.build_segmenter(config)
    model.eval()
    images, weights = samples.images(2, (64, 64)), samples.weights(model)
    checkpoints.load_state_dict(model, weights)
    ours = np.asarray(nnx.jit(lambda model, images: model(images))(model, normalize(images)))
    args = argparse.Namespace(peer="torch", variants=["eager"])
    with peers.start(args, "logits", config, samples.torch_weights(weights), images) as programs:
        theirs = programs[TORCH].result
        assert theirs is not None
        assert programs[TORCH].run(2) > 0
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), rtol=0, atol=1e-4)


def test_a_variant_that_does_not_work_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(peer="torch", variants=["eager"])
    with peers.start(args, "loss", settings_for("tiny"), "not an array", "neither") as programs:
        assert not programs
    assert "skipped: torch eager does not work here: " in capsys.readouterr().err
    args.variants = ["fast"]
    with pytest.raises(UserError, match="no variant fast"), peers.start(args, "loss", settings_for("tiny")):
        pass


def test_the_official_example_is_ours() -> None:
    still = {"ratio_range": (1.0, 1.0), "crop_size": (96, 160), "scale": (160, 96), "cat_max_ratio": 1.0}
    still |= {"flip_prob": 0.0, "photometric_distortion": False}
    config = settings_for("tiny", **{f"data__{key}": value for key, value in still.items()})
    with samples.written_files(1, config, [(80, 112)]) as source:  # 96 x 134 pixels when it is fitted
        image, label = loader.decode_example(source[0], config)
        theirs, their_label = official_input.make_example(source[0], config, np.random.default_rng(0))
    keywords: dict[str, Any] = {
        "crop_size": (96, 160),
        "scale": (160, 96),
        "ratio_range": (1.0, 1.0),
        "cat_max_ratio": 1.0,
    }
    ours = transforms.random_resize_crop(image, label, **keywords, rng=np.random.default_rng(0))
    pixels = np.asarray(normalize(ours["image"][None]))[0, :, :134]
    np.testing.assert_allclose(theirs[:, :, :134].transpose(1, 2, 0), pixels, rtol=0, atol=2e-6)
    assert not theirs[:, :, 134:].any()
    np.testing.assert_array_equal(their_label, ours["label"])
