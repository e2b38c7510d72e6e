"""Pixels of the classes, and the weights that loss.class_weight makes from them."""

import json
import math
import pathlib
import shutil
import statistics

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import broken_sets
from tests.broken_sets import CLASSES, labels
from tests.commands import TINY
from tests.test_bad_input import cut, rewrite
from tests.test_check import configure, look_through, open_image
from topformer_jax import check, config
from topformer_jax.config.settings import WEIGHTINGS
from topformer_jax.data import sources
from topformer_jax.data.class_balance import weigh_classes
from topformer_jax.data.loader import count_pixels
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.training.class_weight import find_class_pixels, set_class_weight
from topformer_jax.training.run_folder import RunFolder
from topformer_jax.training.step import init_training

# Of four labels of four classes; the last class never occurs.
PIXELS = np.array([[700, 250, 50, 0], [1000, 0, 0, 0], [0, 400, 0, 0], [90, 9, 1, 0]])


def published(name: str, pixels: list[list[int]]) -> list[float]:
    """The weights of the publications, not scaled, of classes that occur."""
    by_class = list(zip(*pixels, strict=True))
    total, counts = sum(map(sum, pixels)), [sum(each) for each in by_class]
    if name == "balanced":  # sklearn.utils.class_weight: n_samples / (n_classes * bincount)
        return [total / (len(counts) * count) for count in counts]
    if name == "enet":
        return [1 / math.log(1.02 + count / total) for count in counts]
    frequencies = [
        count / sum(sum(label) for label, of_class in zip(pixels, each, strict=True) if of_class)
        for count, each in zip(counts, by_class, strict=True)
    ]
    return [statistics.median(frequencies) / frequency for frequency in frequencies]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_those_of_the_publications(name: str) -> None:
    expected = np.array(published(name, PIXELS[:, :3].tolist()))
    share = PIXELS.sum(0) / PIXELS.sum()
    found = weigh_classes(name, PIXELS)
    np.testing.assert_allclose(found[:3] / found[0], expected / expected[0], rtol=1e-14)
    assert found[3] == 0
    assert share @ found == pytest.approx(1, rel=1e-14)
    if name == "balanced":
        np.testing.assert_allclose(found[:3], expected, rtol=1e-14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("pixels") / "maps"
    broken_sets.write(root)
    return root


def count(settings: ConfigDict) -> list[list[int]]:
    source = sources.open_source(settings, "train")
    return [pixels.tolist() for pixels in count_pixels(source, settings, range(len(source)))]


def test_counts(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy's, with labels in parts, and with zero-label reduction."""
    monkeypatch.setattr("topformer_jax.data.loader.COUNTED_AT_ONCE", 100)
    arrays = [open_image(path) for path in labels(folder, "train")]
    assert count(configure(folder)) == [[int((x == c).sum()) for c in range(CLASSES)] for x in arrays]
    reduced = configure(folder, {"data.reduce_zero_label": True})
    assert count(reduced) == [[int((x == c + 1).sum()) for c in range(CLASSES)] for x in arrays]


def test_check_shows_the_weights(folder: pathlib.Path) -> None:
    _, report = look_through(configure(folder))
    arrays = [open_image(path) for path in labels(folder, "train")]
    pixels = [[int((x == c).sum()) for c in range(CLASSES)] for x in arrays]
    lines = [" ".join(line.split()) for line in check.format_report(report).splitlines()]
    (row,) = (line.split() for line in lines if line.startswith("4 class 4"))
    for place, name in enumerate(WEIGHTINGS, -len(WEIGHTINGS)):
        weights = np.array(published(name, pixels))
        weights /= np.sum(pixels, 0) / np.sum(pixels) @ weights
        assert row[place] == f"{weights[4]:.3g}"
    _, report = look_through(configure(folder), limit=3)
    assert "class_weight" not in report["splits"]["train"]  # of a part they would be others


def test_names_and_numbers() -> None:
    settings = config.shapes()
    assert config.load(settings, {"loss.class_weight": "enet"}).loss.class_weight == "enet"
    numbers = tuple(range(10))
    assert config.load(settings, {"loss.class_weight": str(numbers)}).loss.class_weight == numbers
    stored = json.loads(config.load(settings, {"loss.class_weight": "enet"}).to_json())
    assert config.complete(stored).loss.class_weight == "enet"
    with pytest.raises(UserError, match=r"\(1.0, 2.5\) \(tuple\) or balanced or enet or median_frequency"):
        config.load(settings, {"loss.class_weight": "balance"})
    with pytest.raises(UserError, match="task=segmentation only"):
        config.load(config.imagenet("tiny"), {"loss.class_weight": "enet"})
    with pytest.raises(UserError, match="a step needs numbers"):
        init_training(config.load(settings, {"loss.class_weight": "enet"}))


def set_weights(
    settings: ConfigDict, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> tuple[tuple[float, ...], str]:
    """The numbers in place of the name, and what is printed."""
    source = sources.open_source(settings, "train")
    workdir.mkdir(exist_ok=True)
    pixels = find_class_pixels(settings, source, RunFolder(workdir, 60), logs.Progress)
    made = set_class_weight(settings, sources.find_data_set(settings), pixels)
    assert config.load(made, {"loss.class_weight": settings.loss.class_weight}) == settings
    return made.loss.class_weight, capsys.readouterr().out


def test_numbers_of_a_name(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later start takes the counts of the first one, unless it has other labels."""
    settings = config.load(config.shapes(), TINY | {"loss.class_weight": "median_frequency"})
    found, out = set_weights(settings, tmp_path, capsys)
    pixels = np.array(count(settings))
    weights = weigh_classes("median_frequency", pixels)
    rarest = int(pixels.sum(0).argmin())
    assert found == tuple(weights.tolist())
    line = (
        f"class weights: median_frequency, {weights.min():.3g} to {weights.max():.3g}; the rarest class is "
        f"{sources.find_data_set(settings).classes[rarest]}, {pixels.sum(0)[rarest]:,} of {pixels.sum():,} pixels, "
        f"weight {weights[rarest]:.3g}\n"
    )
    assert out.endswith(f"12/12 training labels counted\n{line}")
    file = tmp_path / "class_pixels.json"
    said = f"pixels per class are read from {file}: if labels have changed since, delete it\n"
    assert set_weights(settings, tmp_path, capsys) == (found, said + line)
    file.write_text(file.read_text().replace('"labels":[{', '"labels":[{"0":1,', 1))  # the first start's count
    assert set_weights(settings, tmp_path, capsys)[0] != found
    other = config.load(settings, {"data.shapes.size": 80})
    assert "12/12 training labels counted\n" in set_weights(other, tmp_path, capsys)[1]
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"labels": [{"0": 10**9, "1": 1}] + [{}] * 11}))
    balanced = config.load(other, {"loss.class_weight": "balanced"})
    with pytest.raises(UserError, match="a weight beyond 0 to 1,000,000; the rarest class is clouds, 1 of "):
        set_weights(balanced, tmp_path, capsys)
    file.write_text("{")
    with pytest.raises(UserError, match=r"is not the JSON .*; delete it, and the labels are counted again"):
        set_weights(settings, tmp_path, capsys)


def test_classes_and_labels_without_pixels(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(folder, tmp_path / "maps")
    settings = configure(root, {"loss.class_weight": "balanced"})
    for path in labels(root, "train"):
        rewrite(path, lambda label: np.where(np.isin(label, (3, 12)), 255, label).astype(np.uint8))
    cut(labels(root, "train")[1])
    with pytest.raises(UserError, match=r"1\.png is cut off"):
        set_weights(settings, tmp_path / "run", capsys)
    settings = config.load(settings, {"data.skip_unreadable": True})
    weights, out = set_weights(settings, tmp_path / "run", capsys)
    assert np.flatnonzero(np.array(weights) == 0).tolist() == [3, 12]
    assert "class weights: 0 for 2 classes (class 3, class 12) of 19 without a training pixel\n" in out
    assert "class weights: 1 of 10 training labels hold no class or are unreadable\n" in out
    for path in labels(root, "train"):
        cut(path)
    with pytest.raises(UserError, match="balanced needs a training label that holds a class"):
        set_weights(settings, tmp_path / "other", capsys)
