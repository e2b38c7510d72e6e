"""From logits to pixels in tiles, against PyTorch's resizes in a row; whole predictions against the official ones."""

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, strategies as st
from jax import lax
from ml_collections import ConfigDict, FrozenConfigDict

import topformer_jax
from tests.parity import run, to_nchw, to_nhwc
from topformer_jax import config, inference, models
from topformer_jax.data.augment import normalize
from topformer_jax.exporters import onnx_graph
from topformer_jax.inference import predictor
from topformer_jax.inference.plan import InferenceInput, network_sizes, plan_shapes, prepare_input, window_grids
from topformer_jax.models.layers import BatchNorm, fold_batch_norms
from topformer_jax.ops import tiled
from topformer_jax.ops.resample import resize
from topformer_jax.ops.tiled import ViewLogits
from topformer_jax.runtime.errors import UserError
from topformer_jax.runtime.sharding import make_inference_mesh

MODES: dict[str, dict[str, Any]] = {
    "single": {},
    "slide": {"mode": "slide"},
    "multiscale_flip": {"img_ratios": (0.5, 1.0, 1.5), "flip": True},
}


def _evaluation(**changes: Any) -> ConfigDict:
    settings = config.base_config().evaluation
    settings.update(changes)
    return settings


def _interpolate(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return to_nhwc(torch.nn.functional.interpolate(to_nchw(logits), size, mode="bilinear", align_corners=False))


def _official(patches: dict[tuple[int, int], np.ndarray], network: Any, window: Any, size: Any) -> np.ndarray:
    """The official steps: windows resized and averaged, then resized to the picture."""
    classes = next(iter(patches.values())).shape[-1]
    total, counts = np.zeros((1, *network, classes)), np.zeros((1, *network, 1))
    for (top, left), logits in patches.items():
        inside = (slice(None), slice(top, top + window[0]), slice(left, left + window[1]))
        total[inside] += _interpolate(logits, window)
        counts[inside] += 1
    return _interpolate(total / counts, size)


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    scale=st.tuples(st.integers(33, 300), st.integers(33, 300)),
    align=st.sampled_from([1, 32]),
    mode=st.sampled_from(["whole", "slide"]),
    flip=st.booleans(),
    in_row=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.usefixtures("x64")
def test_tiles_are_the_resizes_in_a_row(
    size: Any, scale: Any, align: int, mode: str, flip: bool, in_row: bool, seed: int
) -> None:
    rng, classes = np.random.default_rng(seed), 3
    evaluation = _evaluation(
        scale=scale, size_divisor=align, mode=mode, crop_size=(96, 72), stride=(64, 29), flip=flip
    )
    shapes = plan_shapes([size], evaluation)
    prepared = prepare_input(np.zeros((*size, 3), np.uint8), None, evaluation, shapes, dtype="float64")
    (network,) = network_sizes(size, evaluation)
    (grid,) = window_grids(size, evaluation)
    (height, width), tops, lefts = grid.window, grid.rows.starts, grid.columns.starts
    assert prepared.views[0].windows.shape == (len(tops) * len(lefts), height, width, 3)
    expected: list[np.ndarray] = []
    seen = []
    for number in range(1 + flip):
        cells = (tiled.num_cells(height), tiled.num_cells(width))
        patches = {(top, left): rng.normal(size=(1, *cells, classes)) for top in tops for left in lefts}
        whole = _official(patches, network, (height, width), size)
        expected.append(whole[:, :, ::-1] if number else whole)
        stacked = np.concatenate(list(patches.values()))
        pad = [(0, padded - side) for padded, side in zip(shapes.logits_size(0), cells, strict=True)]
        logits = np.pad(stacked, [(0, 0), *pad, (0, 0)]).swapaxes(2, 3)
        view = prepared.views[number]
        seen.append(view.with_logits(jnp.asarray(logits)))
    found = _whole(seen, prepared, classes, in_row)[: size[0], : size[1]]
    if flip:
        expected = [torch.softmax(torch.from_numpy(logits.copy()), -1).numpy() for logits in expected]
    assert np.abs(found - np.sum(expected, 0)[0]).max() <= 1e-12


def _whole(seen: list[ViewLogits], prepared: InferenceInput, classes: int, in_row: bool) -> np.ndarray:
    """The logits of all tiles, put together; of several views the sum of their softmaxes."""

    def use(carry: jax.Array, logits: list[jax.Array], corner: Any) -> jax.Array:
        found = logits[0] if len(logits) == 1 else len(logits) * tiled.mean_probabilities(logits)
        return lax.dynamic_update_slice(carry, found.swapaxes(1, 2), (*corner, jnp.int32(0)))

    start = jnp.zeros((*prepared.labels.shape, classes), jnp.float64)
    compute = tiled.tile_logits(jax.tree.map(jnp.asarray, seen))
    number = prepared.labels.shape[1] // tiled.TILE[1] if in_row else 0
    return np.asarray(tiled.fold_tiles(compute, jnp.asarray(prepared.tiles), start, use, in_row=number))


@pytest.mark.parametrize("special", [0.0, np.inf])
def test_classes_that_are_the_label_of_no_pixel_are_left_out(special: float) -> None:
    """The labels stay the same bits. On the left few classes may be the label, on the right all 40."""
    rng, size, cells, classes = np.random.default_rng(0), (100, 512), (13, 64), 40
    logits = rng.normal(size=(*cells, classes)).astype(np.float32)
    logits[:, :32, :12] += 12 * np.arange(12) / 12
    logits[:, :16, :4] += 12
    logits[3, 20, 30] += special
    bands = [
        tiled.split_into_bands(tiled.resize_matrices(pixels, pixels), tile, support=number)
        for pixels, tile, number in zip(size, tiled.TILE, (8, 24), strict=True)
    ]
    rows, columns = jax.tree.map(jnp.asarray, bands)
    view = ViewLogits(jnp.asarray(logits.swapaxes(1, 2)[None]), jnp.ones(2, jnp.int32), rows, columns)
    all_logits, labels = tiled.tile_logits([view]), jax.jit(tiled.tile_labels([view]))
    possible = []
    for row, column in np.ndindex(4, 4):
        tile = jnp.int32(row), jnp.int32(column)
        assert np.array_equal(labels(*tile), tiled.predict_classes(all_logits(*tile)))
        zero = jnp.int32(0)
        read = tiled._read_cells(view, zero, zero, zero, *tile)
        if not special:  # a GPU's labels; infinity times a weight of 0 is nan
            assert np.array_equal(labels(*tile), tiled._label_in_one_pass(*read, "highest"))
        possible.append(classes - int(tiled._is_behind(*read).sum()))
    assert min(possible) <= 8
    assert max(possible) > 20
    assert (possible[0] == classes) == np.isinf(special)


@pytest.mark.parametrize("mode", MODES)
def test_the_official_label_maps(golden: Callable, mode: str) -> None:
    """12 pictures, one checkpoint: the label of (nearly) every pixel."""
    overrides = {f"evaluation.{key}": value for key, value in MODES[mode].items()}
    model = topformer_jax.load(config.ade20k("tiny"), golden("checkpoints/tiny.pth"), **overrides)
    assert isinstance(model, models.Segmenter)
    info = json.loads(golden(f"eval/{mode}.json").read_text())
    predictor = inference.Predictor(model)
    settings = model.config.evaluation
    wrong = pixels = 0
    files = info["files"] if mode == "single" else info["files"][:4]
    for file, shapes in zip(files, info["input_shapes"], strict=False):
        image = np.asarray(cv2.imread(str(golden(f"mini_ade/images/validation/{file}")), cv2.IMREAD_COLOR_RGB))
        networks = network_sizes((image.shape[0], image.shape[1]), settings)
        assert [list(network) for network in networks for _ in range(1 + settings.flip)] == shapes
        expected = np.asarray(cv2.imread(str(golden(f"eval/{mode}/{file[:-4]}.png")), cv2.IMREAD_GRAYSCALE))
        wrong += int((predictor(image) != expected).sum())
        pixels += expected.size
    print(f"{mode}: {wrong} of {pixels} pixels differ")
    assert wrong / pixels <= 1e-4


@pytest.fixture(scope="module")
def small() -> models.Segmenter:
    """A random network of 5 classes."""
    settings = config.load(config.ade20k("tiny"), {"model.num_classes": 5, "model.drop_path_rate": 0.0})
    return models.build_segmenter(settings)


def _evaluated_by(model: models.Segmenter, **changes: Any) -> models.Segmenter:
    """The same network under a config with another evaluation."""
    overrides = {f"evaluation.{key}": value for key, value in changes.items()}
    graphdef, state = nnx.split(model)
    changed = nnx.merge(graphdef, state)
    changed.config = FrozenConfigDict(config.load(model.config, overrides))
    return changed


def test_a_model_is_evaluated_by_its_own_recipe() -> None:
    """mmsegmentation: (520, 520) without alignment; (2048, 448), up to multiples of 32."""
    expected = {"topformer_t_context60": (371, 520), "topformer_t_ade448": (448, 640)}
    for recipe, size in expected.items():
        assert network_sizes((500, 700), topformer_jax.load(recipe).config.evaluation) == (size,)


def test_a_classifier_labels_no_pixels() -> None:
    with pytest.raises(UserError, match="topformer_t_imagenet is a classifier"):
        topformer_jax.segment(topformer_jax.load("topformer_t_imagenet"), np.zeros((9, 9, 3), np.uint8))


def test_segment_is_the_plain_formulation(small: models.Segmenter) -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), (77, 61))
    model = _evaluated_by(small, scale=(64, 64))
    labels = inference.segment(model, image)
    assert labels.shape == (61, 77)
    assert labels.dtype == np.uint8
    shapes = plan_shapes([(61, 77)], model.config.evaluation)
    fitted = np.asarray(prepare_input(image, None, model.config.evaluation, shapes).views[0].windows[0])
    logits = jnp.asarray(run(model, normalize(fitted[None])))
    plain = resize(resize(logits, fitted.shape[:2]), (61, 77))[0]
    assert (np.asarray(plain).argmax(-1) != labels).mean() < 1e-3
    _, probabilities = inference.Predictor(model).with_probabilities(image)
    assert np.abs(probabilities - np.asarray(jax.nn.softmax(plain, -1))).max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (2000, 2), (3, 700)])
def test_pictures_of_any_size(small: models.Segmenter, size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 9, np.uint8)
    assert inference.segment(_evaluated_by(small, scale=(128, 64)), image).shape == size


def test_a_second_predictor_compiles_nothing(small: models.Segmenter) -> None:
    model = _evaluated_by(small, scale=(80, 64))
    image = np.zeros((50, 60, 3), np.uint8)
    inference.Predictor(model, runtime="jax")(image)
    again = models.build_segmenter(model.config)
    inference.Predictor(again, runtime="jax")(np.ones((49, 59, 3), np.uint8))
    programs = inference.compile_inference(model, make_inference_mesh(jax.devices()[:1]))
    shapes = plan_shapes([(50, 60)], model.config.evaluation, round_up=True)
    assert getattr(programs._network_of, "cache_info")().currsize == 1  # noqa: B009
    for program in (programs.network(shapes, 0), programs.predict_and_count):
        assert getattr(program, "_cache_size")() == 1  # noqa: B009


def test_segment_keeps_the_weights_and_notices_others(small: models.Segmenter) -> None:
    model = _evaluated_by(small, scale=(64, 64))
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    head = model.decode_head.conv_seg
    assert head.bias is not None
    for label in range(3):
        bias = jnp.where(jnp.arange(5) == label, 1e6, 0.0)
        if label == 1:
            head.bias.set_value(bias)
        else:
            model.decode_head.conv_seg = head = nnx.clone(head)
            head.bias = nnx.data(nnx.Param(bias))
        assert (inference.segment(model, image) == label).all()
        with mock.patch.object(models, "state_dict", side_effect=AssertionError):
            assert (inference.segment(model, image) == label).all()
    model.train()
    assert (inference.segment(model, image) == 2).all()
    assert all(module.use_running_average for _, module in nnx.iter_modules(model) if isinstance(module, BatchNorm))


@pytest.mark.parametrize("kind", ["folded", "views"])
def test_onnxruntime_gives_the_labels_of_jax(small: models.Segmenter, kind: str) -> None:
    """Of pictures of two sizes: the graph for one size, and the one for any."""
    views = {"img_ratios": (1.0, 1.5), "flip": True} if kind == "views" else {}
    model = _evaluated_by(small, scale=(96, 64), **views)
    model.eval()
    model = fold_batch_norms(model) if kind == "folded" else model
    ours, theirs = (inference.Predictor(model, runtime=runtime) for runtime in ("jax", "auto"))
    assert (ours.runtime, theirs.runtime) == ("jax", "onnxruntime")
    for size in ((60, 90), (70, 64)):
        noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        image = cv2.resize(noise, size[::-1])
        expected, probabilities = ours.with_probabilities(image)
        labels, found = theirs.with_probabilities(image)
        assert np.abs(found - probabilities).max() < 1e-5
        assert (labels != expected).mean() < 1e-3


def test_where_onnxruntime_does_not_work(small: models.Segmenter, capsys: pytest.CaptureFixture[str]) -> None:
    """auto is JAX there; a layer that the exporter does not know is said."""
    slide = _evaluated_by(small, mode="slide")
    assert inference.Predictor(slide).runtime == "jax"
    with pytest.raises(UserError, match=r"set evaluation\.mode=whole"):
        inference.Predictor(slide, runtime="onnx")
    with pytest.raises(UserError, match="expected one of auto, jax, onnx"):
        inference.Predictor(small, runtime="fast")
    with mock.patch.object(predictor.importlib.util, "find_spec", return_value=None):
        assert inference.Predictor(small).runtime == "jax"
    model, image = _evaluated_by(small, scale=(64, 64)), np.zeros((50, 60, 3), np.uint8)
    unknown = inference.Predictor(model)
    with mock.patch.dict(onnx_graph.RULES):
        del onnx_graph.RULES["conv_general_dilated"]
        labels = unknown(image)
    assert "there is no ONNX rule for JAX's conv_general_dilated" in capsys.readouterr().err
    assert unknown.runtime == "jax"
    assert np.array_equal(labels, inference.Predictor(model, runtime="jax")(image))

    def fail(_: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    with pytest.raises(NotImplementedError):  # the model's weights are not those of another network
        inference.Predictor(model, network=fail)(image)


def test_memory_of_a_large_picture() -> None:
    """2048 x 1024 pixels and 150 classes: what follows the network, against the resized logits at once."""
    large = models.build_segmenter(config.load(config.ade20k("tiny"), {"evaluation.scale": (2048, 1024)}))
    programs = inference.compile_inference(large, make_inference_mesh(jax.devices()[:1]))
    shapes = plan_shapes([(1024, 2048)], large.config.evaluation)
    image = prepare_input(np.zeros((1024, 2048, 3), np.uint8), None, large.config.evaluation, shapes)
    batch = inference.make_global_batch([image], programs.batch_sharding)
    logits: Any = jax.ShapeDtypeStruct((1, 1, 128, 150, 256), jnp.float32)
    views = [batch.views[0].with_logits(logits)]
    count: Any = programs.predict_and_count
    ours = count.lower(views, batch.tiles, batch.labels).compile()

    def plain(logits: jax.Array) -> jax.Array:
        return jnp.argmax(resize(resize(logits, (1024, 2048)), (1024, 2048)), -1)

    theirs = jax.jit(plain).lower(jax.ShapeDtypeStruct((1, 128, 256, 150), jnp.float32)).compile()
    found = [program.memory_analysis() for program in (ours, theirs)]
    sizes = [memory.temp_size_in_bytes / 1e6 for memory in found if memory is not None]
    print(f"temporary: {sizes[0]:.0f} MB, plainly {sizes[1]:.0f} MB")
    assert sizes[0] < sizes[1] / 20
