"""One image as the compiled programs take it: resized, with its windows, resize matrices and label tiles."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int32, UInt8
from ml_collections import ConfigDict

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels
from topformer_jax.data.transforms import ResizedImage, Size, eval_image, multiply_scale
from topformer_jax.inference.geometry import (
    ProgramShapes,
    Windows,
    choose_canvas,
    choose_support,
    label_grid,
    largest_size,
    logits_size,
    needed_support,
    network_sizes,
    tile_grid,
    view_flips,
    window_grid,
    window_sizes,
)
from topformer_jax.models.area import WHOLE, ImageArea, make_image_area
from topformer_jax.ops.tiled import TILE, BandedResize, resize_matrix, split_into_bands

Arrays = Array | np.ndarray  # on the host for one image, on the devices for a batch


class NetworkInput(NamedTuple):
    """One image at one ratio, and the sliding windows on it; in mode "whole" one window, the image."""

    image: UInt8[Arrays, "*n h w 3"]  # resized, at the top left of its buffer
    size: Int32[Arrays, "*n 2"]  # of the resized image
    canvas: Int32[Arrays, "*n"]  # which of the shapes' canvases; their number in a row without an image
    area: ImageArea  # of a window on its canvas; WHOLE where nothing is masked
    tops: Int32[Arrays, "*n down"]  # first row of each window; after the image's own windows, 0
    lefts: Int32[Arrays, "*n across"]
    counts: Int32[Arrays, "*n 2"]  # windows, down and across


class LabelTiles(NamedTuple):
    """The label of one image, cut into tiles."""

    counts: Int32[Arrays, "*n 2"]  # number of tiles, and how many of them lie side by side
    support: Int32[Arrays, "*n"]  # which of the shapes' supports
    labels: UInt8[Arrays, "*n tiles rows columns"]  # IGNORE_LABEL without a label and beyond the image


class InferenceInput(NamedTuple):
    """One image as the compiled programs take it; a batch stacks the arrays of several along a new first axis."""

    networks: tuple[NetworkInput, ...]  # one per ratio
    row_resizes: tuple[BandedResize, ...]  # from logits back to the original height, one per view
    column_resizes: tuple[BandedResize, ...]  # likewise to the original width
    tiles: LabelTiles


def prepare_input(
    image: Image,
    label: Labels | None,
    evaluation: ConfigDict,
    shapes: ProgramShapes,
    grid: Size | None = None,
    dtype: str = "float32",
) -> InferenceInput:
    """Resizes an image for the network, and lays out its resize matrices and its labels in tiles.

    Args:
        image: uint8 `[h, w, 3]`, RGB.
        label: uint8 `[h, w]`, or None where only the prediction is wanted.
        evaluation: the settings `config.evaluation`.
        shapes: of the programs; the image fits into them.
        grid: of the labels' tiles (down, across), which the image shares with others; its own if None.
        dtype: of the matrices, float32 or float64.
    """
    size = (image.shape[0], image.shape[1])
    grid = label_grid(size) if grid is None else grid
    canvas = choose_canvas(shapes, window_sizes(size, evaluation))
    support = choose_support(shapes, needed_support(size, evaluation))
    networks, rows, columns = [], [], []
    for ratio, input_size in enumerate(network_sizes(size, evaluation)):
        scale = multiply_scale(evaluation.scale, evaluation.img_ratios[ratio])
        resized = eval_image(image, scale=scale, size_divisor=evaluation.size_divisor)
        windows = window_grid(input_size, evaluation)
        networks.append(_make_network_input(resized, windows, canvas, shapes, ratio, dtype))
        for flip in view_flips(evaluation):
            row, column = (
                _resize_bands(
                    size[axis],
                    input_size[axis],
                    *windows[axis],
                    flip and axis == 1,
                    _band_shape(shapes, ratio, axis, support, grid),
                    dtype,
                )
                for axis in (0, 1)
            )
            rows.append(row)
            columns.append(column)
    down, across = tile_grid(size)
    tiles = LabelTiles(
        np.array((down * across, across), np.int32),
        np.array(support, np.int32),
        _split_into_tiles(label, grid),
    )
    return InferenceInput(tuple(networks), tuple(rows), tuple(columns), tiles)


def padding_input(
    shapes: ProgramShapes, grid: Size, evaluation: ConfigDict, dtype: str = "float32"
) -> InferenceInput:
    """What fills a row of a batch that has no image: zeros, and no tiles."""
    networks: list[NetworkInput] = []
    rows: list[BandedResize] = []
    columns: list[BandedResize] = []
    pixel = np.zeros((1, 1, 3), np.uint8)  # an image has at least one
    for ratio in range(len(shapes.canvases[0])):
        windows = (((0,), 1), ((0,), 1))
        networks.append(_make_network_input(pixel, windows, len(shapes.canvases), shapes, ratio, dtype))
        for _ in view_flips(evaluation):
            for axis, resizes in enumerate((rows, columns)):
                shape = _band_shape(shapes, ratio, axis, 0, grid)
                weights = np.zeros((shape.num_tiles, shape.tile, shape.padded_support), dtype)
                resizes.append(BandedResize(np.zeros(shape.num_tiles, np.int32), weights))
    tiles = LabelTiles(np.array((0, 1), np.int32), np.array(0, np.int32), _split_into_tiles(None, grid))
    return InferenceInput(tuple(networks), tuple(rows), tuple(columns), tiles)


def _split_into_tiles(label: Labels | None, grid: Size) -> UInt8[np.ndarray, "tiles rows columns"]:
    """The inverse of `join_tiles`, with room for a whole grid of tiles."""
    tiles = np.full((grid[0] * grid[1], *TILE), IGNORE_LABEL, np.uint8)
    if label is not None:
        size = (label.shape[0], label.shape[1])
        down, across = tile_grid(size)
        pad = ((0, down * TILE[0] - size[0]), (0, across * TILE[1] - size[1]))
        padded = np.pad(label, pad, constant_values=IGNORE_LABEL)
        padded = padded.reshape(down, TILE[0], across, TILE[1]).swapaxes(1, 2)
        tiles[: down * across] = padded.reshape(-1, *TILE)
    return tiles


def _at_top_left(image: Image, size: Size) -> ResizedImage:
    """An image at the top left of a larger one, which is zero elsewhere."""
    if image.shape[:2] == size:
        return image
    padded = np.zeros((*size, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def _make_network_input(
    image: Image, windows: Windows, canvas: int, shapes: ProgramShapes, ratio: int, dtype: str
) -> NetworkInput:
    """A resized image with its windows, as arrays of the programs' static shapes."""
    starts = [np.array(starts, np.int32) for starts, _ in windows]
    area = WHOLE
    if shapes.masked:
        # The matrices of the largest canvas, of which the others take the corner.
        largest = largest_size([choice[ratio] for choice in shapes.canvases])
        area = make_image_area((windows[0][1], windows[1][1]), largest, dtype)
    tops, lefts = (
        np.pad(first, (0, most - len(first)))
        for first, most in zip(starts, shapes.window_capacity(ratio), strict=True)
    )
    return NetworkInput(
        _at_top_left(image, shapes.buffer(ratio)),
        np.array(image.shape[:2], np.int32),
        np.array(canvas, np.int32),
        area,
        tops,
        lefts,
        np.array([len(first) for first in starts], np.int32),
    )


class BandShape(NamedTuple):
    """The static shape of one axis's `BandedResize`."""

    tile: int  # pixels of a tile
    support: int  # cells that a tile may depend on
    padded_support: int  # cells that are stored, at least `support`
    num_tiles: int
    num_cells: int  # of the logits, with padding


def _band_shape(shapes: ProgramShapes, ratio: int, axis: int, support: int, grid: Size) -> BandShape:
    supports = [choice[ratio][axis] for choice in shapes.supports]
    return BandShape(
        TILE[axis], supports[support], max(supports), grid[axis], logits_size(shapes, ratio)[axis]
    )


@functools.lru_cache(maxsize=256)
def _resize_bands(
    pixels: int,
    input_pixels: int,
    starts: tuple[int, ...],
    window: int,
    flip: bool,
    shape: BandShape,
    dtype: str,
) -> BandedResize:
    """The resize of one axis in tiles; cached, since images of a data set share few sizes."""
    matrix = resize_matrix(input_pixels, pixels, starts, window, dtype)
    bands = split_into_bands(
        matrix[::-1] if flip else matrix,
        shape.tile,
        support=shape.support,
        num_tiles=shape.num_tiles,
        padded_cells=shape.num_cells,
    )
    pad = shape.padded_support - shape.support
    return bands._replace(weights=np.pad(bands.weights, ((0, 0), (0, 0), (0, pad))))
