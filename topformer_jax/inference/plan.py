"""Which images share a program and a batch: few canvases, few batches, every device busy.

All of it depends on the sizes of the images alone, so that every process makes the same plan.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from topformer_jax.data.transforms import Size
from topformer_jax.inference.geometry import (
    ProgramShapes,
    ViewSizes,
    choose_canvas,
    label_grid,
    largest_size,
    logits_size,
    needed_support,
    network_sizes,
    round_up_to_power,
    tile_grid,
    window_counts,
    window_sizes,
)
from topformer_jax.ops.tiled import TILE

# As few canvases as keep the padding under this share of the network's pixels: a fifth of a network's time is little
# beside a program to compile.
MAX_PADDING = 0.2
# Likewise of the work that follows the network; and how many programs for it, at most.
MAX_SUPPORT_PADDING, MAX_SUPPORTS = 0.3, 3
MAX_MERGED = 200  # different shapes that are merged pair by pair; more are rounded first


class EvalBatch(NamedTuple):
    """One batch of an evaluation plan. Row r lies on device `r // rows_per_device`."""

    shapes: ProgramShapes  # of its programs
    rows: tuple[int | None, ...]  # the example in each row; a device's first row has one, or none of its rows
    grid: Size  # tiles that the labels of every example fit into


class EvalPlan(NamedTuple):
    """Every example of a data set exactly once."""

    shapes: ProgramShapes
    batches: tuple[EvalBatch, ...]

    def used_rows(self) -> float:
        """The share of all batches' rows that hold an example."""
        rows = [index is not None for batch in self.batches for index in batch.rows]
        return sum(rows) / max(len(rows), 1)

    def padding(self, image_sizes: Sequence[Size], evaluation: ConfigDict) -> float:
        """The share of the network's pixels that lie outside of an image, in rows that hold one."""
        inside = total = 0
        for size in image_sizes:
            views = window_sizes(size, evaluation)
            canvas = self.shapes.canvases[choose_canvas(self.shapes, views)]
            windows = [down * across for down, across in window_counts(size, evaluation)]
            inside += sum(n * h * w for n, (h, w) in zip(windows, views, strict=True))
            total += sum(n * h * w for n, (h, w) in zip(windows, canvas, strict=True))
        return 1 - inside / max(total, 1)

    def num_programs(self) -> tuple[int, int]:
        """How many programs it compiles: networks, and those that resize and count after them.

        A branch counts as a program.
        """
        ratios = range(len(self.shapes.canvases[0]))
        networks = {(ratio, canvas[ratio]) for canvas in self.shapes.canvases for ratio in ratios}
        counting = {
            (batch.grid, *(logits_size(batch.shapes, ratio) for ratio in ratios)) for batch in self.batches
        }
        return len(networks), len(counting) * len(self.shapes.supports)


def plan_evaluation(
    image_sizes: Sequence[Size], evaluation: ConfigDict, *, devices: int, rows_per_device: int
) -> EvalPlan:
    """Plans the batches of a data set.

    A device computes images of one canvas at a time, other devices those of others, so that a batch is full although
    few of its images share a canvas; its programs then have a branch for each canvas. With a single device each
    canvas has programs of its own. The last batch spreads over all devices, and with them over the hosts that read
    the images.

    Args:
        image_sizes: (height, width) of every example.
        evaluation: the settings `config.evaluation`.
        devices: of all processes.
        rows_per_device: images that a device computes at once.
    """
    if not image_sizes:
        return EvalPlan(plan_shapes([(1, 1)], evaluation), ())
    shapes = plan_shapes(image_sizes, evaluation)
    canvases = [choose_canvas(shapes, window_sizes(size, evaluation)) for size in image_sizes]
    grids = [label_grid(size) for size in image_sizes]
    # Within a canvas, images of similar size share a batch, so that small ones do not wait for a large one.
    order = sorted(
        range(len(image_sizes)),
        key=lambda index: (canvases[index], grids[index], math.prod(image_sizes[index]), index),
    )
    chunks = []
    for canvas in range(len(shapes.canvases)):
        group = [index for index in order if canvases[index] == canvas]
        chunks += [group[start : start + rows_per_device] for start in range(0, len(group), rows_per_device)]
    batches = []
    for start in range(0, len(chunks), devices):
        rows: list[int | None] = [None] * (devices * rows_per_device)
        spread = _spread(chunks[start : start + devices], devices)
        for number, chunk in enumerate(spread):
            first = number * devices // len(spread) * rows_per_device
            rows[first : first + len(chunk)] = chunk
        largest = np.max([grids[index] for chunk in spread for index in chunk], axis=0)
        batch_shapes = shapes.select_canvas(canvases[spread[0][0]]) if devices == 1 else shapes
        batches.append(EvalBatch(batch_shapes, tuple(rows), (int(largest[0]), int(largest[1]))))
    return EvalPlan(shapes, tuple(batches))


def _spread(chunks: list[list[int]], devices: int) -> list[list[int]]:
    """Splits chunks until every device has one, or none has more than one image."""
    chunks = list(chunks)
    while len(chunks) < devices and max(map(len, chunks)) > 1:
        number = max(range(len(chunks)), key=lambda number: len(chunks[number]))
        half = (len(chunks[number]) + 1) // 2
        chunks[number : number + 1] = [chunks[number][:half], chunks[number][half:]]
    return chunks


def plan_shapes(
    image_sizes: Sequence[Size], evaluation: ConfigDict, *, round_up: bool = False
) -> ProgramShapes:
    """The static shapes of the programs for images of these sizes.

    Args:
        image_sizes: (height, width) of images, in any order.
        evaluation: the settings `config.evaluation`.
        round_up: whether canvases are rounded up to one of few sizes, so that other images can share the programs.
    """
    number_of = collections.Counter(image_sizes)
    sizes, counts = list(number_of), list(number_of.values())
    inputs = [network_sizes(size, evaluation) for size in sizes]
    windows = [window_sizes(size, evaluation) for size in sizes]
    num_windows = [window_counts(size, evaluation) for size in sizes]
    if round_up:
        inputs, windows = ([_round_up(size) for size in sizes] for sizes in (inputs, windows))
        num_windows = [
            tuple((round_up_to_power(down), round_up_to_power(across)) for down, across in counts)
            for counts in num_windows
        ]
        if evaluation.mode == "slide":
            down, across = evaluation.crop_size
            windows = [tuple((min(h, down), min(w, across)) for h, w in sizes) for sizes in windows]
    canvases = merge_shapes(
        [_flat(window) for window in windows],
        counts,
        lambda shape: shape[..., ::2] * shape[..., 1::2],
        evaluation.max_canvases,
        MAX_PADDING,
    )
    tiles = [math.prod(tile_grid(size)) * count for size, count in zip(sizes, counts, strict=True)]
    supports = merge_shapes(
        [_flat(needed_support(size, evaluation)) for size in sizes],
        tiles,
        _tile_work,
        MAX_SUPPORTS,
        MAX_SUPPORT_PADDING,
    )
    shapes = ProgramShapes(
        tuple(_pairs(canvas) for canvas in canvases),
        (),
        (),
        tuple(_pairs(support) for support in supports),
        True,
    )
    of_canvas: list[list[int]] = [[] for _ in canvases]
    for index, window in enumerate(windows):
        of_canvas[choose_canvas(shapes, window)].append(index)
    return shapes._replace(
        buffers=tuple(
            _largest([canvas, *(inputs[index] for index in group)])
            for canvas, group in zip(shapes.canvases, of_canvas, strict=True)
        ),
        max_windows=tuple(_largest([num_windows[index] for index in group]) for group in of_canvas),
        masked=round_up or any(window not in shapes.canvases for window in windows),
    )


def merge_shapes(
    shapes: Sequence[tuple[int, ...]],
    weights: Sequence[int],
    work: Callable[[np.ndarray], np.ndarray],
    limit: int,
    max_padding: float,
) -> list[tuple[int, ...]]:
    """Few shapes into which all others fit: at most `limit`, and no more than keep the padding under `max_padding`.

    From one shape for each it merges, again and again, the two that cost least, and ends by giving each its cheapest
    fitting shape.

    Args:
        shapes: to fit, of integers; one fits into another that is nowhere smaller.
        weights: of each, how often it occurs.
        work: of shapes `[..., numbers]`, what computing them takes: the last axis of the result is summed.
        limit: of the number of results.
        max_padding: share of the whole work that may go into what is larger than needed.
    """
    wanted = np.array(shapes, np.int64)
    weight = np.array(weights, np.float64)

    def total(chosen: np.ndarray) -> np.ndarray:
        return work(chosen).sum(-1).astype(np.float64)

    needed = float((total(wanted) * weight).sum())
    merged, counts = _round_to_few(wanted, weight)
    best = merged
    while True:
        best = _refine(wanted, weight, merged, total)
        if len(merged) == 1:
            break
        together = np.maximum(merged[:, None], merged[None])
        cost = total(together) * (counts[:, None] + counts[None])
        cost -= (total(merged) * counts)[:, None] + (total(merged) * counts)[None]
        np.fill_diagonal(cost, np.inf)
        first, second = np.unravel_index(np.argmin(cost), cost.shape)
        rest = [index for index in range(len(merged)) if index not in (first, second)]
        fewer = np.concatenate([merged[rest], together[first, second][None]])
        if len(best) <= limit:
            padded = (total(_fit(wanted, _refine(wanted, weight, fewer, total), total)) * weight).sum()
            if needed / padded < 1 - max_padding:
                break
        merged, counts = fewer, np.append(counts[rest], counts[first] + counts[second])
    return sorted(tuple(map(int, shape)) for shape in best)


def _round_to_few(wanted: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different shapes with their weights; rounded up where there are too many to merge pair by pair."""
    step = 1
    while True:
        rounded = -(-wanted // step) * step
        merged, index = np.unique(rounded, axis=0, return_inverse=True)
        if len(merged) <= MAX_MERGED:
            # What a class holds, not what it was rounded to.
            classes = [wanted[index.ravel() == number].max(0) for number in range(len(merged))]
            return np.array(classes), np.bincount(index.ravel(), weight)
        step *= 2


def _refine(
    wanted: np.ndarray, weight: np.ndarray, chosen: np.ndarray, total: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Gives each shape its cheapest fitting one, and shrinks these to what they hold."""
    fitted = _fit(wanted, chosen, total)
    classes = np.unique(fitted, axis=0)
    return np.array([wanted[(fitted == shape).all(1)].max(0) for shape in classes])


def _fit(wanted: np.ndarray, chosen: np.ndarray, total: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """For each shape, the cheapest of the chosen ones that it fits into."""
    fits = (wanted[:, None] <= chosen[None]).all(-1)
    return chosen[np.where(fits, total(chosen)[None], np.inf).argmin(1)]


def _tile_work(supports: np.ndarray) -> np.ndarray:
    """Multiply-adds for a tile and class: its rows' and columns' products, from (down, across) cells."""
    down, across = supports[..., ::2], supports[..., 1::2]
    return down * across * TILE[1] + TILE[0] * down * TILE[1]


def _round_up(sizes: ViewSizes) -> ViewSizes:
    """Each side rounded up to one of four per power of two: 512, 640, 768, 896, 1024, ..."""

    def round_side(pixels: int) -> int:
        step = 1 << max((pixels - 1).bit_length() - 3, 3)
        return -(-pixels // step) * step

    return tuple((round_side(height), round_side(width)) for height, width in sizes)


def _flat(sizes: ViewSizes) -> tuple[int, ...]:
    return tuple(side for size in sizes for side in size)


def _largest(sizes: Sequence[ViewSizes]) -> ViewSizes:
    """For each ratio, what all fit into."""
    return tuple(largest_size(of_ratio) for of_ratio in zip(*sizes, strict=True))


def _pairs(numbers: Sequence[int] | np.ndarray) -> ViewSizes:
    return tuple((int(h), int(w)) for h, w in zip(numbers[::2], numbers[1::2], strict=True))
