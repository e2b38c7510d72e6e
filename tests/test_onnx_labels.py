"""Labels in ONNX files: classes that are nowhere the largest are left out, and nothing changes by it."""

import itertools

import jax
import numpy as np
import onnxruntime
import pytest

from topformer_jax.exporters import network, onnx_labels, onnx_rules
from topformer_jax.exporters.onnx_graph import Graph, Value


def run(graph: Graph, value: Value, logits: np.ndarray) -> np.ndarray:
    """What a graph computes of logits."""
    model = graph.model([Value(logits.shape, "float32", (0, 1, 2, 3), "logits")], [("result", value)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"logits": logits})[0])


def label(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The labels that an ONNX file finds."""
    graph = Graph()
    inputs = [graph.add_input("logits", logits.shape, "float32")]
    program = jax.make_jaxpr(lambda values: network.label_pixels(values, size=size))(logits)
    (value,) = onnx_rules.translate(graph, program, inputs, onnx_labels.RULES)
    return run(graph, value, logits)


def possible(logits: np.ndarray) -> list[int]:
    """The classes that an ONNX file keeps."""
    graph = Graph()
    inputs = graph.add_input("logits", logits.shape, "float32")
    name = onnx_labels._possible_classes(graph, graph.stored(inputs, onnx_labels.STORED))
    return [int(number) for number in run(graph, Value(("k",), "int64", (0,), name), logits)]


def possible_plainly(logits: np.ndarray) -> list[int]:
    """A loop over all cells."""
    n, h, w, _ = logits.shape
    padded = np.pad(logits, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    found: set[int] = set()
    for image, i, j in itertools.product(range(n), range(h + 1), range(w + 1)):
        corners = padded[image, i : i + 2, j : j + 2].reshape(4, -1)
        found |= set(np.flatnonzero(corners.max(axis=0) >= corners.min(axis=0).max()).tolist())
    return sorted(found)


def blobs(seed: int, n: int, h: int, w: int, classes: int, noise: float) -> np.ndarray:
    """Logits of regions, as a trained network's: the wave that is highest, and noise."""
    rng = np.random.default_rng(seed)
    phase, pace = rng.uniform(0, 6, (2, n, 1, 1, classes)), rng.uniform(-1, 1, (2, n, 1, 1, classes))
    y, x = np.arange(h)[:, None, None], np.arange(w)[:, None]
    waves = np.sin(phase[0] + pace[0] * y) + np.sin(phase[1] + pace[1] * x)
    waves -= np.linspace(0, 6, classes)  # the last ones are rare
    return np.asarray(3 * waves + noise * rng.standard_normal(waves.shape), np.float32)


@pytest.mark.parametrize(
    ("shape", "size", "noise"),
    [
        ((1, 8, 8, 150), (64, 64), 0.1),
        ((2, 5, 7, 19), (35, 51), 0.0),
        ((3, 4, 6, 60), (17, 41), 1.0),
        ((1, 6, 6, 30), (48, 48), 50.0),  # all classes stay
        ((1, 1, 1, 9), (8, 8), 1.0),
        ((1, 1, 5, 2), (3, 40), 1.0),
        ((2, 20, 16, 40), (9, 7), 0.1),  # smaller than the logits
    ],
)
def test_labels_are_those_of_all_classes(
    shape: tuple[int, int, int, int], size: tuple[int, int], noise: float
) -> None:
    logits = blobs(0, *shape, noise)
    kept = possible(logits)
    assert kept == possible_plainly(logits)
    assert (len(kept) == shape[3]) == (noise == 50.0)
    scores = np.asarray(network.enlarge(logits, size=size))
    found = label(logits, size)
    assert (found.dtype, found.shape) == (np.uint8, (shape[0], *size))
    lost = scores.max(axis=-1) - np.take_along_axis(scores, found[..., None].astype(int), axis=-1)[..., 0]
    assert lost.max() <= 1e-5 * np.abs(scores).max()
    assert (found != scores.argmax(axis=-1)).mean() <= 1e-3


def test_a_class_of_the_last_image_alone_stays() -> None:
    logits = np.zeros((3, 4, 4, 6), np.float32)
    logits[..., 1] = 2
    logits[2, 3, 3, 4] = 9
    assert possible(logits) == [1, 4]
    assert label(logits, (32, 32))[2, 31, 31] == 4


def test_equal_classes_give_the_first() -> None:
    logits = np.zeros((1, 3, 3, 5), np.float32)
    logits[..., 0] = -1
    assert possible(logits) == [1, 2, 3, 4]
    assert (label(logits, (24, 24)) == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_logits_give_labels_too(value: float) -> None:
    for logits in (np.full((1, 3, 3, 5), value, np.float32), blobs(1, 1, 3, 3, 5, 1.0)):
        logits[0, 1, 1] = value
        assert possible(logits)
        assert label(logits, (24, 24)).max() < 5
