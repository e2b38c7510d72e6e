"""From stride-8 logits to full-resolution scores, one tile of output pixels at a time.

The steps between the logits and the original image (the resize to the network's input, the mean over sliding windows,
the resize to the image) are linear in each axis, so their matrices multiply into one matrix per axis and window. Two
small products give the scores of a tile from a few cells of the logits. Image sizes are data, not shapes, so one
compiled program serves images of many sizes, and full-resolution scores exist for one tile only.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from topformer_jax.ops.resample import bilinear_matrix, bilinear_taps

STRIDE = 8  # input pixels per cell of the logits
TILE = (32, 128)  # output pixels, (height, width); 128 columns fill a TPU's vector lanes
Corner = tuple[Array, Array]  # the first row and column of a tile
TileLogits = Float[Array, "rows classes columns"]  # a view's logits, resized, at the pixels of a tile


class BandedResize(NamedTuple):
    """One axis of a resize in tiles of output pixels, each of which depends on few cells.

    Output pixel i of tile t is `sum_j weights[t, i, j] * cells[starts[t] + j]`.
    """

    starts: Int32[np.ndarray | Array, "*n tiles"]
    weights: Float[np.ndarray | Array, "*n tiles pixels support"]


class ViewLogits(NamedTuple):
    """The logits of one view (a scale, mirrored or not) of an image, classes before columns, and their resize."""

    logits: Float[Array, "windows h classes w"]
    counts: Int32[
        np.ndarray | Array, "2"
    ]  # windows of the image, down and across; further ones do not matter
    rows: BandedResize  # of each row of windows
    columns: BandedResize


def num_cells(pixels: int) -> int:
    """The number of cells of logits for `pixels` network input pixels."""
    return -(-pixels // STRIDE)


def tile_support(pixels: int, input_pixels: int, tile: int, window: int) -> int:
    """The most cells of a window that a tile along an axis depends on, rounded up to a multiple of 8.

    `pixels` are those of the original image, `input_pixels` of the network's input.
    """
    needed = min(num_cells(window), int((min(tile, pixels) * input_pixels / pixels + 1) / STRIDE) + 3)
    return -(-needed // 8) * 8


def resize_matrices(
    input_pixels: int,
    pixels: int,
    starts: Sequence[int] = (0,),
    window: int | None = None,
    dtype: str = "float32",
) -> Float[np.ndarray, "windows pixels cells"]:
    """The resizes of one axis, from logits to the image, as one matrix per window; the products add up.

    Args:
        input_pixels: of the network's input.
        pixels: of the original image.
        starts: first input pixel of each window.
        window: pixels of a window; the whole input if None.
        dtype: of the sampling grids and of the result; products are accumulated in float64.
    """
    window = input_pixels if window is None else window
    within_window = bilinear_matrix(num_cells(window), window, dtype).astype(np.float64)
    to_input = np.zeros((len(starts), input_pixels, within_window.shape[1]))
    counts = np.zeros((input_pixels, 1))
    for number, start in enumerate(starts):
        to_input[number, start : start + window] = within_window
        counts[start : start + window] += 1
    averaged = to_input / counts
    lower, upper, fraction = bilinear_taps(input_pixels, pixels, dtype)
    fraction = fraction.astype(np.float64)[:, None]
    return ((1 - fraction) * averaged[:, lower] + fraction * averaged[:, upper]).astype(dtype)


def split_into_bands(
    matrix: Float[np.ndarray, "*n pixels cells"],
    tile: int,
    *,
    support: int | None = None,
    num_tiles: int | None = None,
    padded_cells: int | None = None,
) -> BandedResize:
    """Cuts the resize matrices of an axis into tiles of rows, each with only the cells that it depends on.

    Args:
        matrix: `[pixels, cells]`, or several of them.
        tile: pixels of a tile.
        support: cells kept per tile; if None, the most that any tile needs.
        num_tiles: of the result; tiles after those of the image are zero.
        padded_cells: cells of the logits including padding; at least `support`.

    Raises:
        ValueError: a tile depends on more than `support` cells.
    """
    *leading, pixels, cells = matrix.shape
    num_tiles = -(-pixels // tile) if num_tiles is None else num_tiles
    padded_cells = cells if padded_cells is None else max(padded_cells, cells)
    padding = [(0, num_tiles * tile - pixels), (0, padded_cells - cells)]
    tiles = np.pad(matrix, [(0, 0)] * len(leading) + padding)
    tiles = tiles.reshape(*leading, num_tiles, tile, padded_cells)
    used = (tiles != 0).any(-2)
    first = used.argmax(-1)
    last = np.where(used.any(-1), padded_cells - 1 - used[..., ::-1].argmax(-1), 0)
    needed = int((last - first).max()) + 1
    support = needed if support is None else support
    if needed > support:
        raise ValueError(f"a tile needs {needed} cells, the support is {support}")
    starts = np.minimum(first, padded_cells - support)
    index = starts[..., None, None] + np.arange(support)
    return BandedResize(starts.astype(np.int32), np.take_along_axis(tiles, index, -1))


def fold_tiles(
    views: Sequence[ViewLogits],
    tiles: Int[Array, "2"],
    init: Any,
    body: Callable[[Any, list[TileLogits], Corner], Any],
    *,
    precision: str | None = "highest",
) -> Any:
    """Runs `carry = body(carry, logits, corner)` over the tiles of an image, row by row; returns the last carry.

    Args:
        views: of the image, each with its own logits and resize.
        tiles: of the image, down and across.
        init: the carry before the first tile.
        body: gets the resized logits of every view at a tile: see `predict_classes` and `mean_probabilities`.
        precision: of the matrix products.
    """
    down, across = tiles

    def fold_one(tile: Array, carry: Any) -> Any:
        row, column = tile // across, tile % across
        logits = [_tile_logits(view, row, column, precision) for view in views]
        return body(carry, logits, (row * TILE[0], column * TILE[1]))

    with jax.named_scope("tiles"):
        return lax.fori_loop(0, down * across, fold_one, init)


def _tile_logits(view: ViewLogits, row: Array, column: Array, precision: str | None) -> TileLogits:
    """The resized logits of one tile: the sum over the windows."""
    windows, _, classes, _ = view.logits.shape
    height, width = view.rows.weights.shape[-1], view.columns.weights.shape[-1]
    zero = jnp.zeros((), jnp.int32)
    matmul = functools.partial(jnp.matmul, precision=precision)

    def resize_window(number: Array, down: Array, across: Array) -> Array:
        corner = (number, view.rows.starts[down, row], zero, view.columns.starts[across, column])
        patch = lax.dynamic_slice(view.logits, corner, (1, height, classes, width))
        stretched = matmul(patch.reshape(height * classes, width), view.columns.weights[across, column].T)
        scores = matmul(view.rows.weights[down, row], stretched.reshape(height, -1))
        return scores.reshape(TILE[0], classes, TILE[1])

    if windows == 1:
        return resize_window(zero, zero, zero)

    def add_window(number: Array, total: Array) -> Array:
        return total + resize_window(number, number // view.counts[1], number % view.counts[1])

    zeros = jnp.zeros((TILE[0], classes, TILE[1]), view.logits.dtype)
    return lax.fori_loop(zero, view.counts[0] * view.counts[1], add_window, zeros)


def mean_probabilities(logits: Sequence[TileLogits]) -> Float[Array, "rows classes columns"]:
    """The softmax over classes at the pixels of a tile, averaged over the views."""
    return _sum_probabilities(logits) / len(logits)


def predict_classes(logits: Sequence[TileLogits]) -> Int32[Array, "rows columns"]:
    """The class with the largest mean probability at the pixels of a tile; a single view needs no softmax."""
    return argmax_classes(logits[0] if len(logits) == 1 else _sum_probabilities(logits))


def _sum_probabilities(logits: Sequence[TileLogits]) -> Float[Array, "rows classes columns"]:
    return functools.reduce(jnp.add, [jax.nn.softmax(each, axis=1) for each in logits])


def argmax_classes(scores: Float[Array, "rows classes columns"]) -> Int32[Array, "rows columns"]:
    """The class with the largest score, the lowest index among equals; like `jnp.argmax(scores, axis=1)`.

    Two plain reductions instead of one over (value, index) pairs, which takes a CPU five times as long.
    """
    classes = scores.shape[1]
    index = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    largest = jnp.max(scores, axis=1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(scores == largest, index, classes), axis=1), classes - 1)
