"""Evaluation: every example once, the same integers on any mesh, the official scores, and the command."""

import collections
import csv
import json
import pathlib
from collections.abc import Callable
from typing import Any

import cv2
import jax
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import samples
from tests.commands import command, finish, launch_pair, refused_command
from topformer_jax import config as config_lib, evaluate, inference, models
from topformer_jax.data import sources
from topformer_jax.data.codecs import decode_label
from topformer_jax.inference import metrics
from topformer_jax.inference.evaluation import LoadedExample, evaluate_images, evaluate_split
from topformer_jax.inference.plan import plan_shapes, prepare_input

ROOT = pathlib.Path(__file__).parents[1]
SHAPES = {
    "data.shapes.validation": 13,  # that no number of devices divides
    "data.shapes.size": 48,
    "evaluation.scale": (64, 48),
}


def _config(**changes: Any) -> ConfigDict:
    overrides = SHAPES | {key.replace("__", "."): value for key, value in changes.items()}
    return config_lib.load(config_lib.shapes(), overrides)


def _mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def test_the_same_integers_on_any_number_of_devices() -> None:
    config = _config()
    source = sources.open_source(config, "validation")
    model = models.build_segmenter(config)
    seen: collections.Counter[int] = collections.Counter()
    results = [
        evaluate_split(model, source, _mesh(devices), on_example=lambda each, _: seen.update([each.index]))
        for devices in (1, 8)
    ]
    assert set(seen.values()) == {2}
    assert len(seen) == 13
    predictor = inference.Predictor(model, runtime="jax")
    expected = np.zeros((10, 10), np.int64)
    for index in range(13):
        example = source[index]
        label, guess = example.label, predictor(np.asarray(example.image))
        valid = np.asarray(label) < 10
        np.add.at(expected, (np.asarray(label)[valid], guess[valid]), 1)
        accuracy = (np.asarray(label)[valid] == guess[valid]).mean()
        assert np.isclose(results[0].example_accuracy[index], accuracy)
    for result in results:
        assert np.array_equal(result.confusion, expected)
        assert np.array_equal(result.example_accuracy, results[0].example_accuracy)
        assert np.array_equal(result.example_miou, results[0].example_miou)


def _near(label: np.ndarray, pixels: int) -> np.ndarray:
    """Where a pixel's chessboard distance to another value is at most so many pixels, by SciPy's transform."""
    near = np.zeros(label.shape, bool)
    for value in np.unique(label):
        own = label == value
        if not own.all():
            near |= own & (scipy.ndimage.distance_transform_cdt(own, "chessboard") <= pixels)
    return near


@pytest.mark.parametrize("pixels", [1, 3, 40])
def test_the_band_near_boundaries(pixels: int) -> None:
    rng = np.random.default_rng(pixels)
    for height, width in ((1, 1), (1, 30), (17, 60)):
        coarse = rng.choice([0, 1, 7, 255], (-(-height // 8), -(-width // 8))).astype(np.uint8)
        label = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
        label[height // 2, width // 2] = 3
        expected = np.where(_near(label, pixels), label, 255)
        np.testing.assert_array_equal(metrics.keep_boundary(label, pixels), expected)


def test_scores_near_boundaries() -> None:
    """On 1 and 8 devices, and of a function: counted in the band, which the other counts do not see."""
    config = _config(evaluation__boundary_pixels=2)
    source = sources.open_source(config, "validation")
    model = models.build_segmenter(config)
    predictor = inference.Predictor(model, runtime="jax")
    expected = np.zeros((10, 10), np.int64)
    for index in range(13):
        label = np.asarray(source[index].label)
        counted = _near(label, 2) & (label < 10)
        np.add.at(expected, (label[counted], predictor(np.asarray(source[index].image))[counted]), 1)
    plain = evaluate_split(models.build_segmenter(_config()), source, _mesh(1))
    assert plain.boundary is None
    assert 0 < expected.sum() < plain.confusion.sum() / 2
    results = [evaluate_split(model, source, _mesh(devices)) for devices in (1, 8)]
    for result in (*results, evaluate_images(predictor, source, config)):
        assert result.boundary is not None
        np.testing.assert_array_equal(result.boundary, expected)
        np.testing.assert_array_equal(result.confusion, plain.confusion)


SLIDE = {"evaluation__mode": "slide", "evaluation__crop_size": (40, 48), "evaluation__stride": (28, 30)}


@pytest.mark.parametrize(
    ("changes", "on_gpu"),
    [
        ({}, False),
        (SLIDE, False),
        ({"evaluation__img_ratios": (0.5, 1.5), "evaluation__flip": True}, False),
        (SLIDE | {"evaluation__flip": True}, True),
    ],
    ids=["whole", "slide", "multiscale_flip", "together"],
)
@pytest.mark.usefixtures("x64")
def test_masked_images_get_the_labels_of_the_plain_network(changes: dict[str, Any], on_gpu: bool) -> None:
    """Images of many sizes in full batches on 4 devices, against each one alone in a program of its own size.

    A GPU computes the tiles of a batch's images together.
    """
    config = _config(
        evaluation__per_device_batch_size=2, evaluation__max_canvases=2, model__dtype="float64", **changes
    )
    sizes = [(43, 53), (97, 66), (30, 30)]
    assert plan_shapes(sizes, config.evaluation).masked
    model = models.build_segmenter(config)
    predictions, images, classes = {}, {}, config.model.num_classes
    counts = np.zeros((classes, classes), np.int64)

    def keep(example: LoadedExample, predict: Callable[[], np.ndarray]) -> None:
        predictions[example.index] = predict()
        images[example.index] = example.image
        counts[:] += metrics.count_on_host(example.label, predictions[example.index], classes)

    inference.compile_inference(model, _mesh(4))._together = on_gpu
    with samples.written_files(3, config, sizes) as source:
        result = evaluate_split(model, source, _mesh(4), on_example=keep)
    np.testing.assert_array_equal(result.confusion, counts)
    programs = inference.compile_inference(model, _mesh(1))
    for index, size in enumerate(sizes):
        alone = plan_shapes([size], config.evaluation)
        assert not alone.masked
        image = images[index]
        inputs = prepare_input(image, None, config.evaluation, alone, dtype="float64")
        batch = inference.make_global_batch([inputs], programs.batch_sharding)
        views = programs.compute_views(models.state_dict(model), alone, batch)
        labels, _ = programs.predict_and_count(views, batch.tiles, batch.labels)
        assert np.array_equal(np.asarray(labels)[0, : size[0], : size[1]], predictions[index])


@pytest.fixture(scope="module")
def ade(golden: Callable) -> list[str]:
    """The arguments that every evaluation of the small ADE20K has."""
    checkpoint, root = golden("checkpoints/tiny.pth"), golden("mini_ade")
    config = ["--config", "topformer_t_ade", f"--config.data.root={root}"]
    return [*config, "--checkpoint", str(checkpoint)]


def test_the_official_scores(golden: Callable, ade: list[str], tmp_path: pathlib.Path) -> None:
    """In mode "whole"; the label maps of the others are in test_inference.py."""
    predictions = tmp_path / "predictions"
    printed = command(evaluate.main, *ade, "--workdir", tmp_path, "--save-predictions", predictions)
    official = json.loads(golden("eval/single.json").read_text())
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert "boundary" not in printed + json.dumps(found)
    shown = {name: (found[name], official["metrics"][name]) for name in ("mIoU", "mAcc", "aAcc")}
    print(shown)
    for ours, theirs in shown.values():
        assert abs(ours - theirs) <= 1e-4
    assert f"mIoU {100 * found['mIoU']:.2f}" in printed
    with (tmp_path / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    confusion = np.array([[int(cell) for cell in row[1:]] for row in rows])
    assert header[1:] == [row[0] for row in rows]
    right = np.array(official["area_intersect"])
    assert np.abs(np.diag(confusion) - right).sum() <= 1e-4 * right.sum()
    assert (tmp_path / "report.html").stat().st_size > 10_000
    for file in official["files"]:
        saved = decode_label(
            (predictions / f"{file[:-4]}.png").read_bytes(), file, classes=150, reduce_zero_label=False
        )
        expected = cv2.imread(str(golden(f"eval/single/{file[:-4]}.png")), cv2.IMREAD_GRAYSCALE)
        assert (saved != expected).mean() <= 1e-4


def test_two_processes_count_as_one(shapes_weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Five pictures on 2 processes x 4 devices: the second has nothing to do in the last batches."""
    arguments = ["--config", "configs/topformer_t_shapes.py", "--config.data.shapes.validation=5"]
    arguments += ["--config.data.shapes.size=48", "--config.evaluation.scale=(64,48)"]
    arguments += ["--config.evaluation.boundary_pixels=2"]
    arguments += ["--checkpoint", str(shapes_weights), "--workdir"]
    printed = command(evaluate.main, *arguments, tmp_path / "one").splitlines()
    found = json.loads((tmp_path / "one/metrics.json").read_text())
    assert "boundary_pixels 2" in found["evaluation"]
    heading, means = (next(line for line in printed if word in line) for word in ("class ", "mIoU "))
    assert heading.split() == ["class", "IoU", "boundary", "IoU", "Acc"]
    assert means.endswith(f"boundary mIoU {100 * found['boundary_mIoU']:.2f}")
    of_class = [row["boundary_IoU"] for row in found["classes"].values() if row["boundary_IoU"] is not None]
    assert np.isclose(found["boundary_mIoU"], np.mean(of_class))
    assert found["boundary_mIoU"] != found["mIoU"]
    pair = launch_pair("evaluate", *arguments, tmp_path / "two")
    outputs = finish(pair)
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "mIoU" in outputs[0][0]
    assert "mIoU" not in outputs[1][0]
    ours, theirs = ((tmp_path / name / "confusion.csv").read_text() for name in ("one", "two"))
    assert ours == theirs
    assert json.loads((tmp_path / "two/metrics.json").read_text())["boundary_mIoU"] == found["boundary_mIoU"]


def test_onnxruntime_counts_as_jax(shapes_weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Except for ties of two classes."""
    words = ["--config", "topformer_t_shapes", "--checkpoint", shapes_weights]
    words += [f"--config.{key}={value}" for key, value in SHAPES.items()]
    confusions = []
    for runtime in ("jax", "onnx"):
        command(evaluate.main, *words, "--runtime", runtime, "--workdir", tmp_path / runtime)
        rows = np.loadtxt(tmp_path / runtime / "confusion.csv", delimiter=",", skiprows=1, dtype=str)
        confusions.append(rows[:, 1:].astype(int))
    assert confusions[0].sum() == confusions[1].sum() > 0
    assert np.abs(confusions[0] - confusions[1]).sum() <= 1e-3 * confusions[0].sum()
    facts = [json.loads((tmp_path / name / "metrics.json").read_text())["devices"] for name in ("jax", "onnx")]
    assert facts[1] == "onnxruntime" != facts[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--runtime", "onnx", "--slide"], "runtime onnx sees whole images"),
        (["--config", "topformer_b_ade"], "it is of variant tiny"),
        (
            ["--config.model.num_classes=59", "--config.data.dataset=context59"],
            "does not have the config's 59 classes",
        ),
        (["--img-ratios", "half"], "--img-ratios cannot be 'half'"),
        (["--config.evaluation.stride=(0,0)", "--slide"], "evaluation.stride"),
        (["--checkpoint", "no/where.pth"], "no checkpoint no/where.pth"),
        (["--workdir", "/proc/no"], "cannot write into /proc/no"),
        (["--config", "topformer_t_imagenet"], "it is a segmenter's: use the config of its data set"),
    ],
)
def test_mistakes_are_one_line(ade: list[str], tmp_path: pathlib.Path, changes: list[str], message: str) -> None:
    assert message in refused_command(evaluate.main, *ade, "--workdir", tmp_path, *changes)
