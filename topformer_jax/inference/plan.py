"""What the network sees of each image, which static shapes its programs have, and which images share a batch.

As in mmsegmentation, an image is resized to fit `evaluation.scale` (times each of `evaluation.img_ratios`) and then
up to multiples of `evaluation.size_divisor`. Everything here runs on the host, in numpy, and depends on the sizes of
the images only, so that every process makes the same plan.
"""

import collections
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from topformer_jax.data.transforms import Size, eval_size, multiply_scale
from topformer_jax.ops.tiled import TILE, num_cells, tile_support

ViewSizes = tuple[Size, ...]  # a (height, width) for each ratio
# As few canvases as keep the padding under this share of the network's pixels: a fifth of a network's time is little
# beside a program to compile.
MAX_PADDING = 0.2
MAX_SIZES = 100  # different sizes that canvases are searched for; more are rounded up first


class WindowGrid(NamedTuple):
    """An image at one ratio, as the network sees it: resized, and cut into windows; in mode "whole" a single one."""

    size: Size  # of the resized image
    window: Size
    tops: tuple[int, ...]  # first row of each window
    lefts: tuple[int, ...]  # first column of each window


class ProgramShapes(NamedTuple):
    """What is static in the programs; images of many sizes fit into it (see `plan_shapes`)."""

    canvases: tuple[ViewSizes, ...]  # of the network's input, a window; each image takes one of them
    windows: tuple[int, ...]  # the most sliding windows of any image, for each ratio
    support: ViewSizes  # cells of a window's logits (down, across) that a tile depends on at most
    masked: bool  # False where every window fills its canvas: the plain network

    def select_canvas(self, canvas: int) -> "ProgramShapes":
        """The shapes for the images of one of the canvases."""
        return self._replace(canvases=(self.canvases[canvas],))

    def find_canvas(self, sizes: ViewSizes) -> int:
        """The number of the smallest canvas that windows of these sizes fit into; there is one."""
        fitting = [
            number
            for number, canvas in enumerate(self.canvases)
            if np.all(np.array(sizes) <= np.array(canvas))
        ]
        return min(fitting, key=lambda number: _count_pixels(self.canvases[number]))

    def canvas_size(self, ratio: int) -> Size:
        """What windows of every canvas fit into."""
        return _largest([canvas[ratio] for canvas in self.canvases])

    def logits_size(self, ratio: int) -> Size:
        """Height and width of a window's logits with padding."""
        height, width = self.canvas_size(ratio)
        return _largest([(num_cells(height), num_cells(width)), self.support[ratio]])

    def fits(self, smaller: "ProgramShapes") -> bool:
        """Whether what fits into other shapes fits into these, which have one canvas as the others."""
        return all(
            np.all(np.array(small) <= np.array(large))
            for small, large in zip(smaller[:3], self[:3], strict=True)
        )

    def pixels(self) -> int:
        """Of the network's input, for a single canvas."""
        return _count_pixels(self.canvases[0])


class EvalBatch(NamedTuple):
    """One batch of an evaluation plan. Row r lies on device `r // rows_per_device`."""

    shapes: ProgramShapes  # of its programs
    rows: tuple[int | None, ...]  # the example in each row; a device's first row has one, or none of its rows
    label_size: Size  # what the labels of every example fit into


class EvalPlan(NamedTuple):
    """Every example of a data set exactly once."""

    shapes: ProgramShapes
    batches: tuple[EvalBatch, ...]


def network_sizes(size: Size, evaluation: ConfigDict) -> ViewSizes:
    """The sizes of the network's inputs for an image of `size`, one per ratio."""
    return tuple(
        eval_size(size, scale=multiply_scale(evaluation.scale, ratio), size_divisor=evaluation.size_divisor)
        for ratio in evaluation.img_ratios
    )


def axis_windows(pixels: int, window: int, stride: int) -> tuple[tuple[int, ...], int]:
    """The first pixel of each window along an axis, and the windows' length.

    Windows are `stride` apart; the last one is moved back to end with the axis, as in mmsegmentation's slide mode.

    >>> axis_windows(pixels=700, window=512, stride=341)
    ((0, 188), 512)
    """
    length = min(window, pixels)
    count = max(pixels - window + stride - 1, 0) // stride + 1
    return tuple(min(number * stride, pixels - length) for number in range(count)), length


def window_grids(size: Size, evaluation: ConfigDict) -> tuple[WindowGrid, ...]:
    """What the network sees of an image of `size`, one grid per ratio."""
    grids = []
    for resized in network_sizes(size, evaluation):
        (tops, height), (lefts, width) = (
            ((0,), resized[axis])
            if evaluation.mode == "whole"
            else axis_windows(resized[axis], evaluation.crop_size[axis], evaluation.stride[axis])
            for axis in (0, 1)
        )
        grids.append(WindowGrid(resized, (height, width), tops, lefts))
    return tuple(grids)


def tile_grid(size: Size) -> Size:
    """How many tiles cover an image, down and across."""
    return -(-size[0] // TILE[0]), -(-size[1] // TILE[1])


def padded_label_size(size: Size) -> Size:
    """The array that an image's labels lie in: its sides are powers of two, at least 512 rows and 1024 columns."""
    return max(512, _round_up_to_power(size[0])), max(1024, _round_up_to_power(size[1]))


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
    canvases = [shapes.find_canvas(_window_sizes(window_grids(size, evaluation))) for size in image_sizes]
    label_sizes = [padded_label_size(size) for size in image_sizes]
    # Within a canvas, images of similar size share a batch, so that small ones do not wait for a large one.
    order = sorted(
        range(len(image_sizes)),
        key=lambda index: (canvases[index], label_sizes[index], math.prod(image_sizes[index]), index),
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
        label_size = _largest([label_sizes[index] for chunk in spread for index in chunk])
        batch_shapes = shapes.select_canvas(canvases[spread[0][0]]) if devices == 1 else shapes
        batches.append(EvalBatch(batch_shapes, tuple(rows), label_size))
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
    grids = {size: window_grids(size, evaluation) for size in number_of}
    sizes = [_window_sizes(each) for each in grids.values()]
    windows = [max(map(_count_windows, of_ratio)) for of_ratio in zip(*grids.values(), strict=True)]
    if round_up:
        limit = evaluation.crop_size if evaluation.mode == "slide" else (2**30, 2**30)
        sizes = [
            tuple(
                (min(_round_up(height), limit[0]), min(_round_up(width), limit[1])) for height, width in views
            )
            for views in sizes
        ]
        windows = [_round_up_to_power(count) for count in windows]
    canvases = choose_canvases(
        [tuple(side for size in views for side in size) for views in sizes],
        list(number_of.values()),
        evaluation.max_canvases,
        MAX_PADDING,
    )
    paired = tuple(tuple(zip(canvas[::2], canvas[1::2], strict=True)) for canvas in canvases)
    supports = [
        [
            (
                tile_support(size[0], grid.size[0], TILE[0], grid.window[0]),
                tile_support(size[1], grid.size[1], TILE[1], grid.window[1]),
            )
            for grid in each
        ]
        for size, each in grids.items()
    ]
    support = tuple(_largest(of_ratio) for of_ratio in zip(*supports, strict=True))
    masked = round_up or any(views not in paired for views in sizes)
    return ProgramShapes(paired, tuple(windows), support, masked)


def choose_canvases(
    sizes: Sequence[tuple[int, ...]], weights: Sequence[int], limit: int, max_padding: float
) -> list[tuple[int, ...]]:
    """Few canvases into which images fit: at most `limit`, and no more than keep the padding under `max_padding`.

    It adds one after the other, and each time exchanges each for the one that leaves the fewest pixels to compute.

    Args:
        sizes: of the images: height and width, for each ratio.
        weights: of each size, how often it occurs.
        limit: of the number of results.
        max_padding: share of the pixels that may be padding.
    """

    def count_pixels(sides: np.ndarray) -> np.ndarray:
        return (sides[..., ::2] * sides[..., 1::2]).sum(-1).astype(np.float64)

    wanted, weight = _round_to_few(np.array(sizes, np.int64), np.array(weights, np.float64))
    pairs = np.maximum(wanted[:, None], wanted).reshape(-1, wanted.shape[1])
    candidates = np.unique(np.concatenate([pairs, wanted.max(0)[None]]), axis=0)
    fits = (wanted[:, None] <= candidates).all(-1)
    # Of each size on each candidate, the pixels of all its images.
    work = np.where(fits, count_pixels(candidates), np.inf) * weight[:, None]
    needed = (count_pixels(wanted) * weight).sum()
    chosen = [int(work.sum(0).argmin())]
    while len(chosen) < limit and needed < (1 - max_padding) * work[:, chosen].min(1).sum():
        chosen.append(chosen[0])
        for place in 3 * list(reversed(range(len(chosen)))):
            others = work[:, chosen[:place] + chosen[place + 1 :]].min(1)
            chosen[place] = int(np.minimum(others[:, None], work).sum(0).argmin())
    canvas_of = work[:, chosen].argmin(1)
    canvases = [wanted[canvas_of == number].max(0) for number in np.unique(canvas_of)]
    return sorted(tuple(map(int, canvas)) for canvas in canvases)


def _round_to_few(sizes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_SIZES` different sizes into which all fit, with their weights; rounded as little as possible."""
    step = 1
    while True:
        rounded, index = np.unique(-(-sizes // step), axis=0, return_inverse=True)
        if len(rounded) <= MAX_SIZES:
            classes = [sizes[index.ravel() == number].max(0) for number in range(len(rounded))]
            return np.array(classes), np.bincount(index.ravel(), weights)
        step *= 2


def _window_sizes(grids: Sequence[WindowGrid]) -> ViewSizes:
    return tuple(grid.window for grid in grids)


def _count_windows(grid: WindowGrid) -> int:
    return len(grid.tops) * len(grid.lefts)


def _count_pixels(sizes: ViewSizes) -> int:
    return sum(height * width for height, width in sizes)


def _largest(sizes: Sequence[Size]) -> Size:
    """The smallest size that all of them fit into."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _round_up(pixels: int) -> int:
    """One of four lengths per power of two: 512, 640, 768, 896, 1024, ..."""
    step = 1 << max((pixels - 1).bit_length() - 3, 3)
    return -(-pixels // step) * step


def _round_up_to_power(count: int) -> int:
    """The smallest power of two that is at least `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()
