"""One image as the compiled programs take it: its windows, their resize matrices and its labels, as arrays."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int32, UInt8
from ml_collections import ConfigDict

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels
from topformer_jax.data.transforms import ResizedImage, Size, eval_image, multiply_scale
from topformer_jax.inference.plan import (
    ProgramShapes,
    WindowGrid,
    padded_label_size,
    tile_grid,
    window_grids,
)
from topformer_jax.models.layers import WHOLE, ImageArea, make_image_area
from topformer_jax.ops.tiled import TILE, BandedResize, resize_matrices, split_into_bands

Arrays = Array | np.ndarray  # on the host for one image, on the devices for a batch


class ViewInput(NamedTuple):
    """One image at one ratio, mirrored or not: what the network sees, and how its logits become pixels."""

    windows: UInt8[Arrays, "*n windows h w 3"]  # each at the top left; in mode "whole" one, the image
    counts: Int32[Arrays, "*n 2"]  # windows of this image, down and across
    canvas: Int32[Arrays, "*n"]  # which of the shapes' canvases; their number in a row without an image
    area: ImageArea  # of a window on its canvas; WHOLE where nothing is masked
    rows: BandedResize  # of each row of windows, from its logits to the rows of the image
    columns: BandedResize


class LabelInput(NamedTuple):
    """The label of one image, and the tiles in which its pixels are computed."""

    tiles: Int32[Arrays, "*n 2"]  # down and across
    labels: UInt8[Arrays, "*n rows columns"]  # IGNORE_LABEL without a label and beyond the image


class InferenceInput(NamedTuple):
    """One image as the compiled programs take it; a batch stacks the arrays of several along a new first axis."""

    views: tuple[ViewInput, ...]  # for each ratio as it is, and mirrored if `evaluation.flip` is on
    label: LabelInput


def view_flips(evaluation: ConfigDict) -> tuple[bool, ...]:
    """The views of each ratio: as it is, and mirrored if `evaluation.flip` is on."""
    return (False, True) if evaluation.flip else (False,)


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
        image: uint8 `[h, w, 3]`, RGB.
        label: uint8 `[h, w]`, or None where only the prediction is wanted.
        evaluation: the settings `config.evaluation`.
        shapes: of the programs; the image fits into them.
        label_size: of the labels' array, which the image shares with others; its own if None.
        dtype: of the matrices, float32 or float64.
    """
    size = (image.shape[0], image.shape[1])
    label_size = padded_label_size(size) if label_size is None else label_size
    grids = window_grids(size, evaluation)
    canvas = np.array(shapes.find_canvas(tuple(grid.window for grid in grids)), np.int32)
    views = []
    for ratio, grid in enumerate(grids):
        scale = multiply_scale(evaluation.scale, evaluation.img_ratios[ratio])
        resized = eval_image(image, scale=scale, size_divisor=evaluation.size_divisor)
        area = WHOLE
        if shapes.masked:
            area = make_image_area(grid.window, shapes.canvas_size(ratio), dtype)
        counts = np.array((len(grid.tops), len(grid.lefts)), np.int32)
        for flip in view_flips(evaluation):
            windows = _cut_windows(resized[:, ::-1] if flip else resized, grid, shapes, ratio)
            rows, columns = (
                _resize_bands(
                    (grid.size[axis], size[axis]),
                    (grid.tops, grid.lefts)[axis],
                    grid.window[axis],
                    flip and axis == 1,
                    BandShape(
                        shapes.windows[ratio],
                        label_size[axis] // TILE[axis],
                        TILE[axis],
                        shapes.support[ratio][axis],
                        shapes.logits_size(ratio)[axis],
                    ),
                    dtype,
                )
                for axis in (0, 1)
            )
            views.append(ViewInput(windows, counts, canvas, area, rows, columns))
    labels = np.full(label_size, IGNORE_LABEL, np.uint8)
    if label is not None:
        labels[: size[0], : size[1]] = label
    return InferenceInput(tuple(views), LabelInput(np.array(tile_grid(size), np.int32), labels))


def padding_input(
    size: Size, evaluation: ConfigDict, shapes: ProgramShapes, label_size: Size, dtype: str = "float32"
) -> InferenceInput:
    """What fills a row of a batch that has no image: a black one of a size that fits, without a canvas and tiles."""
    black = np.zeros((*size, 3), np.uint8)
    views, label = prepare_input(black, None, evaluation, shapes, label_size, dtype)
    canvas = np.array(len(shapes.canvases), np.int32)
    return InferenceInput(
        tuple(view._replace(canvas=canvas) for view in views), label._replace(tiles=np.zeros(2, np.int32))
    )


def _cut_windows(
    image: ResizedImage, grid: WindowGrid, shapes: ProgramShapes, ratio: int
) -> UInt8[np.ndarray, "windows h w 3"]:
    """The windows of an image, row by row; each on a canvas that is zero elsewhere."""
    height, width = grid.window
    windows = np.zeros((shapes.windows[ratio], *shapes.canvas_size(ratio), 3), np.uint8)
    for number, (top, left) in enumerate(itertools.product(grid.tops, grid.lefts)):
        windows[number, :height, :width] = image[top : top + height, left : left + width]
    return windows


class BandShape(NamedTuple):
    """The static shape of one axis's resizes."""

    windows: int
    num_tiles: int
    tile: int  # pixels of a tile
    support: int  # cells that a tile may depend on
    num_cells: int  # of a window's logits, with padding


@functools.lru_cache(maxsize=256)
def _resize_bands(
    pixels: tuple[int, int],
    starts: tuple[int, ...],
    window: int,
    flip: bool,
    shape: BandShape,
    dtype: str,
) -> BandedResize:
    """The resizes of the windows along one axis in tiles; cached, since images of a data set share few sizes.

    Args:
        pixels: of the network's input and of the image.
        starts, window: first input pixel of each window, and their length.
        flip: whether the network sees the image mirrored.
        shape: of the result.
        dtype: of the matrices.
    """
    matrices = resize_matrices(*pixels, starts, window, dtype)
    bands = split_into_bands(
        matrices[:, ::-1] if flip else matrices,
        shape.tile,
        support=shape.support,
        num_tiles=shape.num_tiles,
        padded_cells=shape.num_cells,
    )
    missing = (0, shape.windows - len(starts))
    return BandedResize(*(np.pad(x, [missing] + [(0, 0)] * (x.ndim - 1)) for x in bands))
