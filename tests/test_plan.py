"""Plans of evaluations: every example once, few programs, full batches, little padding."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from ml_collections import ConfigDict

from benchmarks.plan import padding, used_rows
from benchmarks.samples import ade20k_sizes
from topformer_jax import config as config_lib
from topformer_jax.data.transforms import Size
from topformer_jax.inference.plan import (
    EvalBatch,
    choose_canvases,
    padded_label_size,
    plan_evaluation,
    plan_shapes,
    window_grids,
)


def _check(
    batches: list[EvalBatch], sizes: list[Size], evaluation: ConfigDict, devices: int, rows_per_device: int
) -> None:
    """Every example once, in a row whose device computes its canvas, with room for its labels."""
    shapes = plan_shapes(sizes, evaluation)
    indices = [index for batch in batches for index in batch.rows if index is not None]
    assert sorted(indices) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch.rows) == devices * rows_per_device
        for first in range(0, len(batch.rows), rows_per_device):
            rows = batch.rows[first : first + rows_per_device]
            on_device = [index for index in rows if index is not None]
            assert list(rows[: len(on_device)]) == on_device  # padding comes last
            grids = [window_grids(sizes[index], evaluation) for index in on_device]
            assert len({shapes.find_canvas(grid) for grid in grids}) <= 1
            assert all(all(np.array(sizes[index]) <= batch.label_size) for index in on_device)


@pytest.mark.parametrize(("devices", "rows_per_device"), [(1, 1), (8, 8), (256, 8)])
def test_ade_is_a_few_full_batches(devices: int, rows_per_device: int) -> None:
    sizes = ade20k_sizes(2000)
    evaluation = config_lib.ade20k("tiny").evaluation
    batches = plan_evaluation(sizes, evaluation, devices=devices, rows_per_device=rows_per_device)
    _check(batches, sizes, evaluation, devices, rows_per_device)
    shapes = plan_shapes(sizes, evaluation)
    assert len(shapes.canvases) <= 4
    assert len(batches) == math.ceil(2000 / (devices * rows_per_device))
    assert used_rows(batches) >= 0.97 or devices == 256
    assert padding(shapes, sizes, evaluation) <= 0.15


def test_images_of_one_size_are_not_masked() -> None:
    shapes = plan_shapes([(1024, 2048)] * 3, config_lib.load("topformer_b_cityscapes").evaluation)
    assert not shapes.masked
    assert shapes.canvases == (((512, 1024),),)


def test_more_canvases_pad_less() -> None:
    sizes = ade20k_sizes(2000)
    shares = []
    for count in (1, 2, 4, 64):
        config = config_lib.load(config_lib.ade20k("tiny"), {"evaluation.max_canvases": count})
        shapes = plan_shapes(sizes, config.evaluation)
        assert len(shapes.canvases) <= count
        shares.append(padding(shapes, sizes, config.evaluation))
    assert shares == sorted(shares, reverse=True)
    assert shares[1] < shares[0] - 0.1
    assert len(shapes.canvases) < 8  # no more than it takes


def test_the_last_batch_is_spread_over_the_devices() -> None:
    evaluation = config_lib.ade20k("tiny").evaluation
    batches = plan_evaluation([(512, 683)] * 80, evaluation, devices=8, rows_per_device=8)
    assert len(batches) == 2
    rows = np.array([index is not None for index in batches[1].rows]).reshape(8, 8)
    assert rows.sum(1).tolist() == [2] * 8


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=30),
    devices=st.integers(1, 5),
    rows_per_device=st.integers(1, 3),
    mode=st.sampled_from(["whole", "slide"]),
    ratios=st.sampled_from([(1.0,), (0.5, 1.5)]),
    limit=st.integers(1, 4),
)
def test_plans_of_any_sizes(
    sizes: list[Size], devices: int, rows_per_device: int, mode: str, ratios: tuple[float, ...], limit: int
) -> None:
    evaluation = config_lib.base_config().evaluation
    evaluation.update(
        scale=(300, 90), mode=mode, crop_size=(64, 80), stride=(40, 50), img_ratios=ratios, max_canvases=limit
    )
    batches = plan_evaluation(sizes, evaluation, devices=devices, rows_per_device=rows_per_device)
    _check(batches, sizes, evaluation, devices, rows_per_device)
    shapes = plan_shapes(sizes, evaluation)
    assert len(shapes.canvases) <= limit
    assert 0 <= padding(shapes, sizes, evaluation) < 1


def test_merged_shapes_are_nearly_the_best() -> None:
    """Against every choice of two shapes among the possible sides."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        shapes = [tuple(int(side) for side in rng.integers(1, 9, 2)) for _ in range(7)]
        sides = [sorted({shape[axis] for shape in shapes}) for axis in (0, 1)]

        def work(chosen: list[tuple[int, ...]], shapes: list[tuple[int, ...]] = shapes) -> float:
            fitting = ([math.prod(c) for c in chosen if np.all(np.array(shape) <= c)] for shape in shapes)
            return sum(min(pixels, default=math.inf) for pixels in fitting)

        found = choose_canvases(shapes, [1] * 7, 2, 0.0)
        best = min(work(list(pair)) for pair in itertools.combinations(itertools.product(*sides), 2))
        assert len(found) <= 2
        assert work(found) <= 1.25 * best


def test_shapes_of_special_images() -> None:
    assert plan_evaluation([], config_lib.base_config().evaluation, devices=2, rows_per_device=2) == []
    assert padded_label_size((10_000, 500)) == (16_384, 1024)
    config = config_lib.load(config_lib.ade20k("tiny"), {"evaluation.mode": "slide"})
    # Sliding windows of wide images do not enlarge those of tall ones.
    shapes = plan_shapes([(512, 1200), (1200, 512), (300, 300)], config.evaluation)
    assert shapes.windows == (4,)
    assert shapes.logits_size(0) == (64, 64)
