"""The benchmarks: each command on tiny settings, what it writes, and that the peers do the same work."""

import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from topformer_jax import checkpoints, models
from topformer_jax import config as config_lib
from topformer_jax.benchmark import feeding, measure, peer, plain_loading, samples
from topformer_jax.benchmark.__main__ import main
from topformer_jax.benchmark.measure import Options, Program
from topformer_jax.benchmark.peer import Peers
from topformer_jax.benchmark.report import Report
from topformer_jax.data import loader, transforms
from topformer_jax.data.augment import normalise
from topformer_jax.errors import UserError

Run = Callable[..., tuple[str, dict[str, Any]]]
RECIPE = ("--config", "configs/topformer_t_ade.py")
TINY = (
    *RECIPE,
    "--config.data.crop_size=(64,64)",
    "--config.batch_size=2",
    "--config.model.num_classes=7",
)
EAGER = ("--peer", "torch", "--variants", "eager")
LINUX = sys.platform == "linux"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> Run:
    """Runs the command with a chart; returns the printed table and the JSON."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(measure, "_matmul_rate", lambda size: 1e11)
    monkeypatch.setattr(measure, "_copy_rate", lambda size: 1e11)
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])

    def run(*arguments: str) -> tuple[str, dict[str, Any]]:
        numbers, chart = tmp_path / "numbers.json", tmp_path / "charts" / "chart.png"
        outputs = ("--repeats", "1", "--json", str(numbers), "--chart", str(chart))
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, *outputs])
        main()
        assert not multiprocessing.active_children()
        assert chart.read_bytes().startswith(b"\x89PNG")
        return capsys.readouterr().out, json.loads(numbers.read_text())

    return run


def _check(found: dict[str, Any], programs: list[str], *, images: int) -> None:
    """The rows are of these programs, ours first, and their numbers fit together."""
    assert found["facts"]["device"] == "cpu (cpu)"
    assert [row["program"] for row in found["rows"]] == programs
    for row in found["rows"]:
        seconds = row["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert np.isclose(row["images_per_second"], images / seconds["median"])
        assert (row["ours_faster"] is None) == (row["program"] == programs[0])
        assert row["first_seconds"] > 0


def test_train_step(run: Run) -> None:
    variants = ("--peer", "torch", "--variants", "eager+kept_memory")
    text, found = run("train-step", *TINY, *variants)
    _check(found, ["ours", "torch eager+kept_memory"], images=2)
    ours, theirs = found["rows"]
    assert ours["case"] == "2 x 64 x 64"
    assert 0 < ours["temporary_bytes"] < ours["memory_bytes"]
    assert theirs["memory_bytes"] > 0 if LINUX else theirs["memory_bytes"] is None
    assert ours["share_of_bandwidth"] > 0
    assert theirs["share_of_bandwidth"] is None
    for row in found["rows"]:
        assert 0 < row["share_of_peak"] < 1
    title, facts, head, *lines = text.splitlines()
    assert title == "train-step: topformer_t_ade, float32, precision highest"
    assert "cores" in facts
    assert head.split("  ")[-1].strip() == "of bandwidth"
    assert lines[0].startswith("2 x 64 x 64  ours")
    assert lines[1].startswith("2 x 64 x 64  torch eager+kept_memory")


def test_inference(run: Run) -> None:
    text, found = run("inference", *TINY, "--size", "64", "--batch", "2", *EAGER)
    assert _cases(found) == ["to logits", "to labels"]
    for rows in (found["rows"][:2], found["rows"][2:]):
        _check(found | {"rows": rows}, ["ours", "torch eager"], images=2)
    assert "2 x 64 x 64" in text.splitlines()[0]


def test_loss(run: Run) -> None:
    _, found = run("loss", *TINY, "--size", "64", "--batch", "2", *EAGER)
    programs = [row["program"] for row in found["rows"]]
    assert programs[0] == "ours"
    assert programs[-1] == "torch eager"
    _check(found, programs, images=2)
    assert found["rows"][0]["case"] == "2 x 8 x 8 x 7 to 64 x 64"


def test_evaluate_agrees_with_its_peer(run: Run) -> None:
    small = ("data.shapes.validation=5", "data.shapes.size=48", "evaluation.scale=(64,48)")
    settings = [f"--config.{setting}" for setting in small]
    recipe = ("--config", "configs/topformer_t_shapes.py")
    text, found = run("evaluate", *recipe, *settings, "--images", "3", *EAGER)
    _check(found, ["ours", "torch eager"], images=3)
    ours, theirs = found["rows"]
    assert ours["miou"] > 0
    assert theirs["agrees"]
    assert "they agree" in text


def test_input(run: Run) -> None:
    text, found = run("input", *TINY, "--images", "2", "--workers", "0", "--peer", "torch")
    one, threads = ([row for row in found["rows"] if row["case"] == case] for case in ("one core", "threads"))
    _check(found | {"rows": one}, ["ours", "plain"], images=2)
    _check(found | {"rows": threads}, ["ours", "torch DataLoader"], images=16)
    assert "a core" in text.splitlines()[2]


def test_input_over_workers(run: Run) -> None:
    _, found = run("input", *TINY, "--images", "1", "--workers", "1")
    row = found["rows"][-1]
    assert (row["case"], row["program"]) == ("1 workers, batch 2", "ours")
    assert row["images_per_second_per_core"] == row["images_per_second"]


def test_train(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "RUN", 0.1)
    text, found = run("train", *TINY, "--images", "3", "--workers", "1")
    assert _cases(found) == ["batch 2, 1 workers"]
    alone, fed = found["rows"]
    assert [alone["program"], fed["program"]] == ["step alone", "from files"]
    assert fed["images_per_second"] == pytest.approx(2 / fed["seconds"]["median"])
    assert fed["share_of_step"] == pytest.approx(alone["seconds"]["median"] / fed["seconds"]["median"])
    assert 0 <= fed["data_wait"] <= 1
    assert "of the step's rate" in text


def test_depthwise(run: Run) -> None:
    text, found = run("depthwise", "--batch", "1", "--size", "8", "--channels", "4")
    assert len(found["rows"]) == 16
    for first, second in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        assert first["case"] == second["case"]
        _check(found | {"rows": [first, second]}, ["shifted", "library"], images=1)
    assert "k5 s2 forward + backward" in text


@pytest.mark.slow
def test_compile(run: Run) -> None:
    _, found = run("compile", *TINY)
    cases = {case: {r["program"] for r in found["rows"] if r["case"] == case} for case in _cases(found)}
    phases = {"import", "state", "first step", "second step", "dispatch", "whole process"}
    assert cases["train-step, empty cache"] == cases["train-step, filled cache"] == phases
    assert cases["import"] >= {"jax", "topformer_jax.train", "topformer_jax.benchmark.__main__"}


@pytest.mark.slow
def test_tpu(run: Run) -> None:
    pytest.importorskip("libtpu")
    text, found = run("tpu", *TINY, "--slices", "v5e:2x4", "--batches", "4", "8", "--evaluation")
    programs = ["train-step", "evaluation, logits", "evaluation, count"]
    assert [row["program"] for row in found["rows"]] == programs
    for row in found["rows"]:
        assert row["arguments_bytes"] > 0
    assert "batch 4: less than an image a chip" in text


def _cases(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in found["rows"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu", "--peer", "torch"], "has no peer in PyTorch"),
        (["tpu"], "needs --config FILE"),
        (["loss", "--repeats", "0"], "1 or more"),
        (["loss", "--size", "8", "--peer", "torch", "--variants", "fast"], "no variant fast"),
    ],
)
def test_mistakes(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(UserError, match=message):
        main()


@pytest.mark.parametrize(("package", "extra"), [("torch", "convert"), ("libtpu", "tpu-compile")])
def test_what_is_not_installed(package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from topformer_jax.benchmark import tpu

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
        measure.require_torch() if package == "torch" else tpu.tpu(
            config_lib.ade20k("tiny"), ["v5e:2x4"], [8]
        )


def test_a_cpu_has_a_bandwidth() -> None:
    assert 1e8 < measure._copy_rate(2**22) < 1e13


def test_programs_take_turns() -> None:
    calls: list[str] = []

    def program(name: str) -> Program:
        return measure.ready(name, lambda: calls.append(name))

    seconds = measure.sequential({"a": program("a"), "b": program("b")}, 3)
    assert calls == [*"ab", *"ab", *"ababab"]  # the first call, the warm-up, three turns
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_a_program_that_stops_is_left_out() -> None:
    calls: list[str] = []

    def goes_on(count: int) -> float:
        calls.extend("a" * count)
        return 0.5

    def stops(count: int) -> float:
        calls.extend("b" * count)
        if len(calls) > 3:
            raise measure.Stopped
        return 1.0

    seconds = measure.sequential({"a": Program(goes_on), "b": Program(stops)}, 3)
    assert calls == [*"ab", *"ab", *"aa"]
    assert seconds == {"a": [0.5, 0.5, 0.5]}


def test_a_ratio_is_that_of_neighbours() -> None:
    programs = {name: Program(lambda calls: 0.0) for name in ("ours", "peer")}
    drifting = {"ours": [1.0, 10.0, 2.0], "peer": [3.0, 30.0, 6.0]}
    ours, peer = measure.rows("case", programs, drifting, images=6)
    assert ours["ours_faster"] is None
    assert peer["ours_faster"] == 3
    assert ours["images_per_second"] == 3
    text = Report("title", {"cores": 2, "other": None}, [ours, peer]).text()
    assert text.splitlines()[1] == "cores 2"
    assert text.splitlines()[3].split()[-2:] == ["-", "0.00"]


def test_a_peer_gives_the_same_in_turn() -> None:
    changes = {"evaluation.scale": (64, 64), "model.num_classes": 7}
    config = config_lib.load(config_lib.ade20k("tiny"), changes)
    model = models.build_segmenter(config)
    model.eval()
    pictures, tensors = samples.pictures(2, (64, 64)), samples.weights(model)
    checkpoints.load_state_dict(model, tensors)
    ours = np.asarray(nnx.jit(lambda model, images: model(images))(model, normalise(pictures)))
    with Peers(config, Options(peer=True, variants=("eager",))) as peers:
        logits = peers.make("logits", tensors, pictures)["torch eager"]
        theirs = peers.results["torch eager"].transpose(0, 2, 3, 1)
        labels = peers.make("labels", tensors, pictures)["torch eager"]
        for program, shape in ((logits, (2, 7, 8, 8)), (labels, (2, 64, 64)), (logits, (2, 7, 8, 8))):
            (seconds,) = measure.sequential({"": program}, 1)[""]
            assert seconds > 0
            assert peers.results["torch eager"].shape == shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert not peers.notes
    assert not multiprocessing.active_children()


def test_a_variant_that_does_not_work_is_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    logits, labels = np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 16, 16), np.uint8)
    with Peers(
        config_lib.ade20k("tiny"), Options(peer=True, variants=("eager+kept_memory", "compile"))
    ) as peers:
        programs = peers.make("loss", logits, labels)
        assert list(programs) == ["torch eager+kept_memory"]
        (note,) = peers.notes
        assert note.startswith("torch compile does not work here: ")
        assert "no-such-compiler" in note
        assert "\n" not in note

        # The other one ends while it is timed.
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        start = time.monotonic()
        assert measure.sequential(programs, 2) == {}
        assert peers.make("loss", logits, labels) == {}
        assert time.monotonic() - start < 10
        assert peers.notes[1:] == [
            "torch eager+kept_memory does not work here: its process was ended by SIGKILL"
        ]
    assert not multiprocessing.active_children()


def test_a_reason_is_one_line() -> None:
    assert peer.reason(RuntimeError("no compiler\nat all")) == "RuntimeError: no compiler at all"
    assert len(peer.reason(RuntimeError("word " * 100))) == 200


def test_the_plain_pipeline_does_the_same(tmp_path: pathlib.Path) -> None:
    still = {"ratio": (1.0, 1.0), "crop": (96, 160), "scale": (160, 96), "flip": 0.0, "photometric": False}
    changes = {f"data.{key}": value for key, value in (still | {"cat_max_ratio": 1.0}).items()}
    config = config_lib.load(config_lib.ade20k("tiny"), changes)
    source = samples.write(tmp_path, 2, config, (80, 112))  # 96 x 134 pixels when it is fitted
    from topformer_jax.benchmark.torch_programs import plain_decoded

    pipeline = plain_loading.Pipeline(source, config)
    for index in range(2):
        image, label = loader.decode_example(source[index], config)
        for ours, theirs in zip((image, label), plain_decoded(source[index], config), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        data = config.data
        example = transforms.random_resize_crop(
            *(image, label),
            crop_size=data.crop_size,
            scale=data.scale,
            ratio_range=data.ratio_range,
            cat_max_ratio=data.cat_max_ratio,
            rng=np.random.default_rng(0),
        )
        theirs_image, theirs_label = pipeline(index)
        height, width = example["size"]
        ours_image = np.asarray(normalise(example["image"][None]))[0, :height, :width]
        assert theirs_image.shape == (3, 96, 160)
        assert (height, width) == (96, 134)
        assert not theirs_image[:, :, width:].any()
        np.testing.assert_allclose(
            theirs_image[:, :height, :width].transpose(1, 2, 0), ours_image, rtol=0, atol=2e-6
        )
        np.testing.assert_array_equal(theirs_label, example["label"])


def test_the_plain_pipeline_distorts(tmp_path: pathlib.Path) -> None:
    config = config_lib.load(config_lib.ade20k("tiny"), {"data.crop_size": (64, 64), "data.scale": (128, 64)})
    pipeline = plain_loading.Pipeline(samples.write(tmp_path, 1, config, (64, 80)), config)
    draws = [pipeline(0) for _ in range(8)]
    assert len({image.tobytes() for image, _ in draws}) == 8
    for image, label in draws:
        assert (image.shape, image.dtype, label.shape, label.dtype) == ((3, 64, 64), "f4", (64, 64), "i8")
        assert np.abs(image).max() < 3


def test_peaks_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        platform = "gpu"
        device_kind = ""

    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    for kind, bandwidth in (
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("TPU v5 lite", 819e9),
        ("TPU v5", 2765e9),
        ("another", None),
    ):
        Device.device_kind = kind
        assert measure.machine().bandwidth == bandwidth
