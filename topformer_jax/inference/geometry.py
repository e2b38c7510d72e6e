"""What the network sees of an image, and which images can share a compiled program: sizes, windows, tiles, batches.

As in mmsegmentation, an image is resized to fit `evaluation.scale` (times each of `evaluation.img_ratios`) and then
up to multiples of `evaluation.size_divisor`. Everything here runs on the host, in numpy.
"""

import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels
from topformer_jax.data.transforms import Size, eval_image, eval_size, multiply_scale
from topformer_jax.ops.tiled import (
    TILE,
    BandedResize,
    num_cells,
    resize_matrix,
    split_into_bands,
    tile_support,
)


class ShapeBucket(NamedTuple):
    """The static shapes of a batch: images in the same bucket share its compiled programs, whatever their sizes."""

    input_sizes: tuple[Size, ...]  # of the network's input, one per ratio
    supports: tuple[Size, ...]  # cells of the logits that a tile depends on (down, across), one per ratio
    num_tiles: int  # capacity: at least the tiles of any image
    tiles_per_side: int  # capacity: at least the tiles along any side of an image


class InferenceInput(NamedTuple):
    """One image as the compiled programs take it; a batch stacks the arrays of several along a new first axis."""

    images: tuple[Image, ...]  # resized for the network, one per ratio
    row_resizes: tuple[BandedResize, ...]  # from logits back to the original height, one per view
    column_resizes: tuple[BandedResize, ...]  # likewise to the original width
    tile_counts: Int32[np.ndarray, "2"]  # number of tiles, and how many of them lie side by side
    labels: UInt8[np.ndarray, "tiles rows columns"]  # IGNORE_LABEL without a label and beyond the image


class EvalBatch(NamedTuple):
    """One batch of an evaluation plan."""

    bucket: ShapeBucket
    indices: tuple[int, ...]  # of examples, at most as many as the batch has rows


def network_sizes(size: Size, evaluation: ConfigDict) -> tuple[Size, ...]:
    """The sizes of the network's inputs for an image of `size`, one per ratio."""
    return tuple(
        eval_size(size, scale=multiply_scale(evaluation.scale, ratio), size_divisor=evaluation.size_divisor)
        for ratio in evaluation.img_ratios
    )


def view_flips(evaluation: ConfigDict) -> tuple[bool, ...]:
    """The views of each network input: as it is, and mirrored if `evaluation.flip` is on."""
    return (False, True) if evaluation.flip else (False,)


def axis_windows(pixels: int, window: int, stride: int) -> tuple[tuple[int, ...], int]:
    """The first pixel of each window along an axis, and the windows' length.

    Windows are `stride` apart; the last one is moved back to end with the axis, as in mmsegmentation's slide mode.

    >>> axis_windows(pixels=700, window=512, stride=341)
    ((0, 188), 512)
    """
    length = min(window, pixels)
    count = max(pixels - window + stride - 1, 0) // stride + 1
    return tuple(min(number * stride, pixels - length) for number in range(count)), length


def window_grid(
    input_size: Size, evaluation: ConfigDict
) -> tuple[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]]:
    """`axis_windows` of both axes; in mode "whole" a single window, the whole input."""
    if evaluation.mode == "whole":
        return ((0,), input_size[0]), ((0,), input_size[1])
    return (
        axis_windows(input_size[0], evaluation.crop_size[0], evaluation.stride[0]),
        axis_windows(input_size[1], evaluation.crop_size[1], evaluation.stride[1]),
    )


def padded_logits_size(input_size: Size, evaluation: ConfigDict) -> Size:
    """Height and width of the logits of all windows side by side, padded to one of few sizes."""
    rows, columns = (
        _padded_cells(len(starts) * num_cells(window))
        for starts, window in window_grid(input_size, evaluation)
    )
    return rows, columns


def make_bucket(
    image_sizes: Sequence[Size], input_sizes: Sequence[Size], evaluation: ConfigDict
) -> ShapeBucket:
    """The smallest bucket for images of `image_sizes` that all have the network inputs `input_sizes`."""
    supports = []
    for input_size in input_sizes:
        down, across = (
            max(
                tile_support(size[axis], input_size[axis], TILE[axis], len(starts), window)
                for size in image_sizes
            )
            for axis, (starts, window) in enumerate(window_grid(input_size, evaluation))
        )
        supports.append((down, across))
    grids = [_tile_grid(size) for size in image_sizes]
    return ShapeBucket(
        tuple(input_sizes),
        tuple(supports),
        max(256, _round_up_to_power(4, max(down * across for down, across in grids))),
        max(16, _round_up_to_power(4, max(max(grid) for grid in grids))),
    )


def prepare_input(
    image: Image,
    label: Labels | None,
    evaluation: ConfigDict,
    bucket: ShapeBucket | None = None,
    dtype: str = "float32",
) -> InferenceInput:
    """Resizes an image for the network, and lays out its resize matrices and its labels in tiles.

    Args:
        image: uint8 `[h, w, 3]`, RGB.
        label: uint8 `[h, w]`, or None where only the prediction is wanted.
        evaluation: the settings `config.evaluation`.
        bucket: that the image shares with others; one of its own if None.
        dtype: of the resize matrices, float32 or float64.
    """
    size = (image.shape[0], image.shape[1])
    if bucket is None:
        bucket = make_bucket([size], network_sizes(size, evaluation), evaluation)
    images, rows, columns = [], [], []
    for ratio, input_size, support in zip(
        evaluation.img_ratios, bucket.input_sizes, bucket.supports, strict=True
    ):
        scale = multiply_scale(evaluation.scale, ratio)
        images.append(eval_image(image, scale=scale, size_divisor=evaluation.size_divisor))
        windows = window_grid(input_size, evaluation)
        for flip in view_flips(evaluation):
            row, column = (
                _resize_bands(
                    size[axis],
                    input_size[axis],
                    *windows[axis],
                    TILE[axis],
                    support[axis],
                    bucket.tiles_per_side,
                    flip and axis == 1,
                    dtype,
                )
                for axis in (0, 1)
            )
            rows.append(row)
            columns.append(column)
    down, across = _tile_grid(size)
    return InferenceInput(
        tuple(images),
        tuple(rows),
        tuple(columns),
        np.array((down * across, across), np.int32),
        _split_into_tiles(label, bucket.num_tiles),
    )


def padding_input(bucket: ShapeBucket, evaluation: ConfigDict, dtype: str) -> InferenceInput:
    """What fills a row of a batch that has no image: zeros, and no tiles."""
    rows: list[BandedResize] = []
    columns: list[BandedResize] = []
    for support in bucket.supports:
        for _ in view_flips(evaluation):
            for axis, resizes in enumerate((rows, columns)):
                weights = np.zeros((bucket.tiles_per_side, TILE[axis], support[axis]), dtype)
                resizes.append(BandedResize(np.zeros(bucket.tiles_per_side, np.int32), weights))
    return InferenceInput(
        tuple(np.zeros((*size, 3), np.uint8) for size in bucket.input_sizes),
        tuple(rows),
        tuple(columns),
        np.array((0, 1), np.int32),
        _split_into_tiles(None, bucket.num_tiles),
    )


def join_tiles(tiles: np.ndarray, size: Size) -> np.ndarray:
    """Tiles `[tiles, rows, columns, ...]` as one array `[h, w, ...]` of an image of `size`."""
    down, across = _tile_grid(size)
    joined = tiles[: down * across].reshape(down, across, *tiles.shape[1:]).swapaxes(1, 2)
    return joined.reshape(down * TILE[0], across * TILE[1], *tiles.shape[3:])[: size[0], : size[1]]


def plan_batches(image_sizes: Sequence[Size], evaluation: ConfigDict, rows: int) -> list[EvalBatch]:
    """Every example exactly once, in batches of at most `rows`; depends on the sizes only, so all processes agree.

    Args:
        image_sizes: (height, width) of every example.
        evaluation: the settings `config.evaluation`.
        rows: of a batch, over all devices.
    """
    groups = collections.defaultdict(list)
    for index, size in enumerate(image_sizes):
        groups[network_sizes(size, evaluation)].append(index)
    batches = []
    for input_sizes in sorted(groups):
        # Images of similar size share a batch, so that small ones do not wait for a large one.
        group = sorted(
            groups[input_sizes], key=lambda index: (image_sizes[index][0] * image_sizes[index][1], index)
        )
        for start in range(0, len(group), rows):
            indices = tuple(group[start : start + rows])
            bucket = make_bucket([image_sizes[index] for index in indices], input_sizes, evaluation)
            batches.append(EvalBatch(bucket, indices))
    return batches


def count_programs(batches: Sequence[EvalBatch], evaluation: ConfigDict) -> tuple[int, int]:
    """How many programs a plan compiles: of the network, and of the resize and counting after it."""
    networks = {size for batch in batches for size in batch.bucket.input_sizes}
    counting = {
        (
            *batch.bucket[1:],
            *(padded_logits_size(size, evaluation) for size in batch.bucket.input_sizes),
        )
        for batch in batches
    }
    return len(networks), len(counting)


def _split_into_tiles(label: Labels | None, capacity: int) -> UInt8[np.ndarray, "tiles rows columns"]:
    """The inverse of `join_tiles`, up to `capacity` tiles."""
    tiles = np.full((capacity, *TILE), IGNORE_LABEL, np.uint8)
    if label is not None:
        size = (label.shape[0], label.shape[1])
        down, across = _tile_grid(size)
        pad = ((0, down * TILE[0] - size[0]), (0, across * TILE[1] - size[1]))
        padded = np.pad(label, pad, constant_values=IGNORE_LABEL)
        padded = padded.reshape(down, TILE[0], across, TILE[1]).swapaxes(1, 2)
        tiles[: down * across] = padded.reshape(-1, *TILE)
    return tiles


def _tile_grid(size: Size) -> Size:
    """How many tiles cover an image, down and across."""
    return -(-size[0] // TILE[0]), -(-size[1] // TILE[1])


def _round_up_to_power(base: int, count: int) -> int:
    """The smallest power of `base` that is at least `count`."""
    power = 1
    while power < count:
        power *= base
    return power


def _padded_cells(cells: int) -> int:
    """An axis of the logits, padded to one of few lengths so that few programs follow the network."""
    return max(32, _round_up_to_power(2, cells))


@functools.lru_cache(maxsize=256)
def _resize_bands(
    pixels: int,
    input_pixels: int,
    starts: tuple[int, ...],
    window: int,
    tile: int,
    support: int,
    num_tiles: int,
    flip: bool,
    dtype: str,
) -> BandedResize:
    """The resize of one axis in tiles; cached, since images of a data set share few sizes."""
    matrix = resize_matrix(input_pixels, pixels, starts, window, dtype)
    return split_into_bands(
        matrix[::-1] if flip else matrix,
        tile,
        support=support,
        num_tiles=num_tiles,
        padded_cells=_padded_cells(len(starts) * num_cells(window)),
    )
