"""The authors' own weights on real pictures: labels of the official code, and of the file that the authors published.

The pictures and weights belong to others and are not shipped: they lie in `data/` beside the folder TOPFORMER_GOLDEN.
"""

import functools
import os
import pathlib
from collections.abc import Callable

import cv2
import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

import topformer_jax
from topformer_jax import config
from topformer_jax.data import codecs
from topformer_jax.data.sources import open_source
from topformer_jax.inference import Predictor
from topformer_jax.inference.evaluation import evaluate_split
from topformer_jax.models import Segmenter
from topformer_jax.ops import resample
from topformer_jax.runtime import sharding

Find = Callable[[str], pathlib.Path]


@pytest.fixture(scope="module")
def data() -> pathlib.Path:
    golden = pathlib.Path(os.environ.get("TOPFORMER_GOLDEN", "."))
    folder = golden.resolve().parent / "data"
    if not (folder / "weights/T_ade512.pth").exists():
        pytest.skip("no weights/T_ade512.pth in data/ beside the folder TOPFORMER_GOLDEN")
    return folder


def _load(data: pathlib.Path) -> Segmenter:
    model = topformer_jax.load("topformer_t_ade", data / "weights/T_ade512.pth")
    assert isinstance(model, Segmenter)
    return model


def _images(data: pathlib.Path, names: list[str]) -> dict[str, np.ndarray]:
    folder = data / "ade_samples/images/validation"
    return {name: codecs.decode_image((folder / f"{name}.jpg").read_bytes(), name) for name in names}


def test_labels_are_the_official_codes(data: pathlib.Path, golden: Find) -> None:
    """At most two pixels may differ: ties of two classes in float32."""
    official = dict(np.load(golden("published/official_512.npz")))
    images = _images(data, list(official))
    predictor = Predictor(_load(data), image_sizes=[image.shape[:2] for image in images.values()])
    different = {name: int(np.sum(predictor(image) != official[name])) for name, image in images.items()}
    assert sum(different.values()) <= 2, different


def test_evaluation_counts_the_official_labels(data: pathlib.Path, golden: Find) -> None:
    settings = config.load("topformer_t_ade", {"data.root": str(data / "ade_samples"), "data.num_workers": 0})
    source = open_source(settings, "validation")
    expected = np.zeros((150, 150), np.int64)
    for name, predicted in np.load(golden("published/official_512.npz")).items():
        label = np.asarray(PIL.Image.open(data / f"ade_samples/annotations/validation/{name}.png")).astype(int) - 1
        np.add.at(expected, (label[label >= 0], predicted[label >= 0]), 1)
    counted = evaluate_split(_load(data), source, sharding.make_inference_mesh(jax.devices()[:1])).confusion
    assert np.abs(counted - expected).sum() <= 4  # a pixel that differs counts in two cells


def test_labels_are_the_published_files(data: pathlib.Path, golden: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' .tflite file resizes with align_corners=True; this network does so in this test only."""

    @functools.lru_cache
    def align_corners(size: int, new_size: int, dtype: str = "float32") -> np.ndarray:
        position = np.linspace(0, size - 1, new_size)
        return np.maximum(1 - np.abs(position[:, None] - np.arange(size)), 0).astype(dtype)

    monkeypatch.setattr(resample, "bilinear_matrix", align_corners)
    published = np.load(golden("published/t512_labels.npz"))
    model = _load(data)
    model.eval()
    forward = nnx.jit(lambda model, image: model(topformer_jax.normalize(image)).argmax(-1))
    equal = []
    for name, labels in zip(published["names"], published["labels"], strict=True):
        image = codecs.decode_image((data / str(name)).read_bytes(), str(name))
        resized = cv2.resize(image, (512, 512), interpolation=cv2.INTER_LINEAR)
        equal.append(np.mean(np.asarray(forward(model, resized[None]))[0] == labels))
    assert np.mean(equal) >= 0.9999
