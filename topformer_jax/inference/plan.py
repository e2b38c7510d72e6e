"""From images of any size to arrays of few shapes: program shapes, batches, and one image as the programs take it.

As in mmsegmentation, an image is resized to fit `evaluation.scale` (times each of `evaluation.img_ratios`) and then
up to multiples of `evaluation.size_divisor`. Everything here runs on the host, in numpy. A plan depends only on the
sizes of the images, so that every process makes the same one.
"""

import collections
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int32, UInt8
from ml_collections import ConfigDict

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels
from topformer_jax.data.transforms import Size, eval_image, eval_size, multiply_scale
from topformer_jax.models.layers import WHOLE, ImageArea, make_image_area
from topformer_jax.ops.tiled import (
    TILE,
    BandedResize,
    ViewLogits,
    num_cells,
    resize_matrices,
    split_into_bands,
    tile_support,
)

ViewSizes = tuple[Size, ...]  # a (height, width) for each ratio
Arrays = Array | np.ndarray  # on the host for one image, on the devices for a batch
# Canvases are added until less than this share of the network's pixels is padding. Less padding would not pay: each
# canvas is one more program to compile.
MAX_PADDING = 0.2
MAX_SIZES = 100  # different sizes that canvases are searched for; more are rounded up first


class AxisWindows(NamedTuple):
    """One axis of an image at one ratio: resized, and cut into windows; in mode "whole" a single one."""

    axis: int  # 0: the rows, 1: the columns
    pixels: int  # of the image
    resized: int  # of the network's input
    window: int
    starts: tuple[int, ...]  # first pixel of each window


class WindowGrid(NamedTuple):
    """An image at one ratio, as the network sees it."""

    rows: AxisWindows
    columns: AxisWindows

    @property
    def window(self) -> Size:
        """Height and width of each window."""
        return self.rows.window, self.columns.window

    @property
    def num_windows(self) -> int:
        """The number of windows."""
        return len(self.rows.starts) * len(self.columns.starts)


class ProgramShapes(NamedTuple):
    """The static shapes of the programs; images of many sizes fit into them (see `plan_shapes`)."""

    canvases: tuple[ViewSizes, ...]  # sizes of the network's input; an image uses one of the canvases
    windows: tuple[int, ...]  # at each ratio the most sliding windows of any image
    supports: tuple[Size, ...]  # at each ratio the cells of a window (down, across) that a tile depends on at most
    masked: bool  # False if every window fills its canvas: the plain network

    def canvas_size(self, ratio: int) -> Size:
        """The size that windows of every canvas fit into, at one of the ratios."""
        return _largest([canvas[ratio] for canvas in self.canvases])

    def logits_size(self, ratio: int) -> Size:
        """Height and width of a window's logits with padding."""
        height, width = self.canvas_size(ratio)
        return _largest([(num_cells(height), num_cells(width)), self.supports[ratio]])

    def select_canvas(self, canvas: int) -> "ProgramShapes":
        """The shapes for the images of one of the canvases."""
        return self._replace(canvases=(self.canvases[canvas],))

    def find_canvas(self, grids: Sequence[WindowGrid]) -> int:
        """The number of the smallest canvas that an image's windows fit into."""
        windows = [grid.window for grid in grids]
        fitting = [n for n, canvas in enumerate(self.canvases) if np.all(np.array(windows) <= canvas)]
        return min(fitting, key=self.pixels)

    def fits(self, smaller: "ProgramShapes") -> bool:
        """Whether the images of other shapes fit into these; both have one canvas."""
        return all(np.all(np.array(small) <= large) for small, large in zip(smaller[:3], self[:3], strict=True))

    def pixels(self, canvas: int = 0) -> int:
        """The pixels of the network's input on a canvas, over all ratios."""
        return sum(height * width for height, width in self.canvases[canvas])


class EvalBatch(NamedTuple):
    """One batch of an evaluation plan. Row r lies on device `r // rows_per_device`."""

    shapes: ProgramShapes  # of its programs
    rows: tuple[int | None, ...]  # the example in each row, or None; a device fills its first rows first
    label_size: Size  # the labels of every example fit into it


class ViewInput(NamedTuple):
    """One image at one ratio, flipped or not: what the network sees, and how its logits become pixels."""

    windows: UInt8[Arrays, "*n windows h w 3"]  # each at the top left; in mode "whole" one, the image
    counts: Int32[Arrays, "*n 2"]  # windows of this image, down and across
    canvas: Int32[Arrays, "*n"]  # number of the canvas; for a row without an image, the number of canvases
    area: ImageArea  # of a window on its canvas; WHOLE if nothing is masked
    rows: BandedResize  # of each row of windows, from its logits to the rows of the image
    columns: BandedResize

    def with_logits(self, logits: Any) -> ViewLogits:
        """The view as the programs after the network take it; of the logits the shape is enough to compile them."""
        return ViewLogits(logits, self.counts, self.rows, self.columns)


class InferenceInput(NamedTuple):
    """One image as the compiled programs take it; a batch stacks the arrays of several along a new first axis."""

    views: tuple[ViewInput, ...]  # for each ratio as it is, and flipped if `evaluation.flip` is on
    tiles: Int32[Arrays, "*n 2"]  # in which the pixels of the image are computed, down and across
    labels: UInt8[Arrays, "*n rows columns"]  # IGNORE_LABEL without a label and beyond the image


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

    def cut(axis: int, resized: int) -> AxisWindows:
        starts: tuple[int, ...] = (0,)
        window = resized
        if evaluation.mode == "slide":
            starts, window = axis_windows(resized, evaluation.crop_size[axis], evaluation.stride[axis])
        return AxisWindows(axis, size[axis], resized, window, starts)

    return tuple(WindowGrid(cut(0, h), cut(1, w)) for h, w in network_sizes(size, evaluation))


def view_flips(evaluation: ConfigDict) -> tuple[bool, ...]:
    """The views of each ratio: as it is, and flipped if `evaluation.flip` is on."""
    return (False, True) if evaluation.flip else (False,)


def padded_label_size(size: Size) -> Size:
    """The array that an image's labels lie in: its sides are powers of two, at least 512 rows and 1024 columns."""
    return max(512, _round_up_to_power(size[0])), max(1024, _round_up_to_power(size[1]))


def plan_evaluation(
    image_sizes: Sequence[Size], evaluation: ConfigDict, *, devices: int, rows_per_device: int
) -> list[EvalBatch]:
    """Plans the batches of a data set: every example exactly once.

    In a batch, each device computes images of one canvas, and different devices may use different canvases. A batch
    is then full even if few of its images share a canvas; the compiled programs have one branch per canvas. With a
    single device, each canvas has its own programs. The last batch is spread over all devices, so that all hosts read
    some of its images.

    `devices` are those of all processes, each of which computes `rows_per_device` images at once.
    """
    if not image_sizes:
        return []
    shapes = plan_shapes(image_sizes, evaluation)
    canvases = [shapes.find_canvas(window_grids(size, evaluation)) for size in image_sizes]
    label_sizes = [padded_label_size(size) for size in image_sizes]
    # Within a canvas, images of similar size share a batch, so that small ones do not wait for a large one.
    order = sorted(
        range(len(image_sizes)),
        key=lambda index: (canvases[index], label_sizes[index], math.prod(image_sizes[index]), index),
    )
    chunks = []
    for _, images in itertools.groupby(order, key=canvases.__getitem__):
        group = list(images)
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
    return batches


def _spread(chunks: list[list[int]], devices: int) -> list[list[int]]:
    """Splits chunks until every device has one, or none has more than one image."""
    chunks = list(chunks)
    while len(chunks) < devices and max(map(len, chunks)) > 1:
        number = max(range(len(chunks)), key=lambda number: len(chunks[number]))
        half = (len(chunks[number]) + 1) // 2
        chunks[number : number + 1] = [chunks[number][:half], chunks[number][half:]]
    return chunks


def plan_shapes(image_sizes: Sequence[Size], evaluation: ConfigDict, *, round_up: bool = False) -> ProgramShapes:
    """The static shapes of the programs for images of these sizes.

    With `round_up`, canvases are rounded up to one of few sizes, so that other images can share the programs.
    """
    number_of = collections.Counter(image_sizes)
    grids = {size: window_grids(size, evaluation) for size in number_of}
    limit = evaluation.crop_size if evaluation.mode == "slide" else (2**30, 2**30)

    def sides(grids: Sequence[WindowGrid]) -> tuple[int, ...]:
        """Height and width of the windows at each ratio, one after the other."""
        windows = [(side, most) for grid in grids for side, most in zip(grid.window, limit, strict=True)]
        return tuple(min(_round_up(side), most) if round_up else side for side, most in windows)

    wanted = [sides(each) for each in grids.values()]
    canvases = choose_canvases(wanted, list(number_of.values()), evaluation.max_canvases, MAX_PADDING)
    windows, supports = [], []
    for of_ratio in zip(*grids.values(), strict=True):
        most = max(grid.num_windows for grid in of_ratio)
        windows.append(_round_up_to_power(most) if round_up else most)
        supports.append(_largest([(_support(grid.rows), _support(grid.columns)) for grid in of_ratio]))
    sizes = tuple(tuple(zip(canvas[::2], canvas[1::2], strict=True)) for canvas in canvases)
    masked = round_up or any(each not in canvases for each in wanted)
    return ProgramShapes(sizes, tuple(windows), tuple(supports), masked)


def choose_canvases(
    sizes: Sequence[tuple[int, ...]], weights: Sequence[int], limit: int, max_padding: float
) -> list[tuple[int, ...]]:
    """Few canvases into which images fit: at most `limit`, and no more than keep the padding under `max_padding`.

    A greedy search: it adds the canvas that leaves the fewest pixels to compute, then tries to exchange each of those
    chosen before, in three rounds.

    `sizes` are those of the images, height and width for each ratio; `weights` say how often each occurs.
    """

    def count_pixels(sides: np.ndarray) -> np.ndarray:
        return (sides[..., ::2] * sides[..., 1::2]).sum(-1).astype(np.float64)

    wanted, weight = _round_to_few(np.array(sizes, np.int64), np.array(weights, np.float64))
    pairs = np.maximum(wanted[:, None], wanted).reshape(-1, wanted.shape[1])
    candidates = np.unique(np.concatenate([pairs, wanted.max(0)[None]]), axis=0)
    fits = (wanted[:, None] <= candidates).all(-1)
    # The pixels of all images of each size on each candidate.
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


def prepare_input(
    image: Image,
    label: Labels | None,
    evaluation: ConfigDict,
    shapes: ProgramShapes,
    label_size: Size | None = None,
    dtype: str = "float32",
) -> InferenceInput:
    """Resizes an image for the network, cuts its windows, and lays out their resize matrices and its labels.

    Args:
        image: RGB.
        label: None if only the prediction is wanted.
        evaluation: the settings `config.evaluation`.
        shapes: of the programs; the image fits into them.
        label_size: of the labels' array, which the image shares with others; its own if None.
        dtype: of the matrices, float32 or float64.
    """
    size = (image.shape[0], image.shape[1])
    label_size = padded_label_size(size) if label_size is None else label_size
    grids = window_grids(size, evaluation)
    canvas = np.array(shapes.find_canvas(grids), np.int32)
    views = []
    for ratio, grid in enumerate(grids):
        scale = multiply_scale(evaluation.scale, evaluation.img_ratios[ratio])
        resized = eval_image(image, scale=scale, size_divisor=evaluation.size_divisor)
        area = make_image_area(grid.window, shapes.canvas_size(ratio), dtype) if shapes.masked else WHOLE
        (height, width), tops, lefts = grid.window, grid.rows.starts, grid.columns.starts
        for flip in view_flips(evaluation):
            windows = np.zeros((shapes.windows[ratio], *shapes.canvas_size(ratio), 3), np.uint8)
            seen = resized[:, ::-1] if flip else resized
            for number, (top, left) in enumerate(itertools.product(tops, lefts)):
                windows[number, :height, :width] = seen[top : top + height, left : left + width]
            rows, columns = (
                _resize_bands(side, label_size[side.axis] // TILE[side.axis], shapes, ratio, flip, dtype)
                for side in grid
            )
            counts = np.array((len(tops), len(lefts)), np.int32)
            views.append(ViewInput(windows, counts, canvas, area, rows, columns))
    labels = np.full(label_size, IGNORE_LABEL, np.uint8)
    if label is not None:
        labels[: size[0], : size[1]] = label
    tiles = np.array([-(-side // tile) for side, tile in zip(size, TILE, strict=True)], np.int32)
    return InferenceInput(tuple(views), tiles, labels)


def padding_input(
    size: Size, evaluation: ConfigDict, shapes: ProgramShapes, label_size: Size, dtype: str = "float32"
) -> InferenceInput:
    """The input for a row of a batch that has no image: a black image, which no canvas and no tile takes."""
    black = prepare_input(np.zeros((*size, 3), np.uint8), None, evaluation, shapes, label_size, dtype)
    none = np.array(len(shapes.canvases), np.int32)
    views = tuple(view._replace(canvas=none) for view in black.views)
    return black._replace(views=views, tiles=np.zeros(2, np.int32))


@functools.lru_cache(maxsize=256)
def _resize_bands(
    side: AxisWindows, num_tiles: int, shapes: ProgramShapes, ratio: int, flip: bool, dtype: str
) -> BandedResize:
    """The resizes of an image's windows along one axis, in tiles; cached, since images share few sizes."""
    matrices = resize_matrices(side.resized, side.pixels, side.starts, side.window, dtype)
    matrices = matrices[:, ::-1] if flip and side.axis == 1 else matrices
    bands = split_into_bands(
        matrices,
        TILE[side.axis],
        support=shapes.supports[ratio][side.axis],
        num_tiles=num_tiles,
        padded_cells=shapes.logits_size(ratio)[side.axis],
    )
    missing = (0, shapes.windows[ratio] - len(side.starts))
    return BandedResize(*(np.pad(x, [missing] + [(0, 0)] * (x.ndim - 1)) for x in bands))


def _support(side: AxisWindows) -> int:
    return tile_support(side.pixels, side.resized, TILE[side.axis], side.window)


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
