"""From stride-8 logits to full-resolution scores, one tile of output pixels at a time.

Every resize between the logits and the original image (to the network's input, averaging over sliding windows, to the
image) is linear in each axis, so their matrices multiply into a single matrix per axis. A tile of pixels depends on
a few cells of the logits only: two small matrix products give its scores, which are consumed at once and never
stored. Image sizes enter as data, not as shapes, so one compiled program serves images of many sizes, and scores of
all classes at full resolution exist for one tile only.
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


class BandedResize(NamedTuple):
    """One axis of a resize, cut into tiles of output pixels; a matrix with few non-zero columns per tile.

    Output pixel i of tile t is `sum_j weights[t, i, j] * cells[starts[t] + j]`.
    """

    starts: Int32[np.ndarray | Array, "*n tiles"]
    weights: Float[np.ndarray | Array, "*n tiles pixels support"]

    def narrow(self, support: int) -> "BandedResize":
        """The same resize where no tile depends on more than `support` cells: without the columns of zeros."""
        return self._replace(weights=self.weights[..., :support])


class ViewLogits(NamedTuple):
    """The logits of one view (a scale, mirrored or not) of an image, classes before columns, and their resize."""

    logits: Float[Array, "h classes w"]
    row_resize: BandedResize
    column_resize: BandedResize


def num_cells(pixels: int) -> int:
    """How many cells of logits one axis of `pixels` network input pixels has."""
    return -(-pixels // STRIDE)


def tile_support(pixels: int, input_pixels: int, tile: int, num_windows: int, window: int) -> int:
    """The most cells that any tile along an axis depends on, rounded up to 8, 16, 32, ... to limit program shapes.

    Args:
        pixels: of the original image.
        input_pixels: of the network's input.
        tile: pixels of a tile.
        num_windows: sliding windows; with several, the cells of one pixel lie far apart.
        window: pixels of a window.
    """
    needed = num_windows * num_cells(window)
    if num_windows == 1:
        needed = min(needed, int((min(tile, pixels) * input_pixels / pixels + 1) / STRIDE) + 3)
    return max(8, 1 << (needed - 1).bit_length())


def resize_matrix(
    input_pixels: int,
    pixels: int,
    starts: Sequence[int] = (0,),
    window: int | None = None,
    dtype: str = "float32",
) -> Float[np.ndarray, "pixels cells"]:
    """All resizes of one axis as one matrix: logits to windows, their mean where they overlap, then to the image.

    Args:
        input_pixels: of the network's input.
        pixels: of the original image.
        starts: first input pixel of each window; the windows' cells lie one window after the other.
        window: pixels of a window; the whole input if None.
        dtype: of the sampling grids and of the result; products are accumulated in float64.
    """
    window = input_pixels if window is None else window
    within_window = bilinear_matrix(num_cells(window), window, dtype).astype(np.float64)
    to_input = np.zeros((input_pixels, len(starts), within_window.shape[1]))
    for number, start in enumerate(starts):
        to_input[start : start + window, number] = within_window
    counts = np.zeros(input_pixels)
    for start in starts:
        counts[start : start + window] += 1
    averaged = (to_input / counts[:, None, None]).reshape(input_pixels, -1)
    lower, upper, fraction = bilinear_taps(input_pixels, pixels, dtype)
    fraction = fraction.astype(np.float64)[:, None]
    return ((1 - fraction) * averaged[lower] + fraction * averaged[upper]).astype(dtype)


def split_into_bands(
    matrix: Float[np.ndarray, "pixels cells"],
    tile: int,
    *,
    support: int | None = None,
    num_tiles: int | None = None,
    padded_cells: int | None = None,
) -> BandedResize:
    """Cuts the resize matrix of an axis into tiles of rows, keeping only the cells that each tile depends on.

    Args:
        matrix: see `resize_matrix`.
        tile: pixels of a tile.
        support: cells kept per tile; if None, the most that any tile needs.
        num_tiles: of the result, at least those of the image; the others are zero.
        padded_cells: cells of the logits including padding; at least `support`.

    Raises:
        ValueError: a tile depends on more than `support` cells.
    """
    pixels, width = matrix.shape
    count = -(-pixels // tile)
    padded_cells = width if padded_cells is None else padded_cells
    padded = np.zeros((count * tile, max(padded_cells, width)), matrix.dtype)
    padded[:pixels, :width] = matrix
    tiles = padded.reshape(count, tile, -1)
    used = (tiles != 0).any(1)
    first = used.argmax(1)
    last = used.shape[1] - 1 - used[:, ::-1].argmax(1)
    needed = int((last - first).max()) + 1
    support = needed if support is None else support
    if needed > support:
        raise ValueError(f"a tile needs {needed} cells, the support is {support}")
    starts = np.minimum(first, padded_cells - support)
    cells = starts[:, None, None] + np.arange(support)
    weights = np.take_along_axis(tiles, cells, -1)
    pad = 0 if num_tiles is None else num_tiles - count
    return BandedResize(
        np.pad(starts, (0, pad)).astype(np.int32), np.pad(weights, ((0, pad), (0, 0), (0, 0)))
    )


def fold_tiles(
    views: Sequence[ViewLogits],
    num_tiles: Int[Array, ""],
    tiles_across: Int[Array, ""],
    init: Any,
    body: Callable[[Any, Float[Array, "rows classes columns"], Int[Array, ""]], Any],
    *,
    precision: str | None = "highest",
) -> Any:
    """Runs `carry = body(carry, scores, tile)` over the tiles of an image, row by row; returns the last carry.

    With one view, scores are its resized logits; with several, the sum of their softmaxes.

    Args:
        views: of the image, each with its own logits and resize.
        num_tiles: tiles of the image.
        tiles_across: how many of them lie side by side.
        init: the carry before the first tile.
        body: what to do with the scores of a tile.
        precision: of the matrix products.
    """

    def fold_one(tile: Array, carry: Any) -> Any:
        row, column = tile // tiles_across, tile % tiles_across
        scores = [_tile_scores(view, row, column, precision) for view in views]
        if len(scores) > 1:
            scores = [jax.nn.softmax(score, axis=1) for score in scores]
        return body(carry, functools.reduce(jnp.add, scores), tile)

    with jax.named_scope("tiles"):
        return lax.fori_loop(0, num_tiles, fold_one, init)


def _tile_scores(
    view: ViewLogits, row: Array, column: Array, precision: str | None
) -> Float[Array, "rows classes columns"]:
    """The resized logits of one tile."""
    row_weights, column_weights = view.row_resize.weights[row], view.column_resize.weights[column]
    _, classes, _ = view.logits.shape
    height, width = row_weights.shape[1], column_weights.shape[1]
    zero = jnp.zeros((), view.row_resize.starts.dtype)
    corner = (view.row_resize.starts[row], zero, view.column_resize.starts[column])
    patch = lax.dynamic_slice(view.logits, corner, (height, classes, width))
    matmul = functools.partial(jnp.matmul, precision=precision)
    stretched = matmul(patch.reshape(height * classes, width), column_weights.T)
    scores = matmul(row_weights, stretched.reshape(height, -1))
    return scores.reshape(row_weights.shape[0], classes, -1)


def mean_probabilities(
    scores: Float[Array, "rows classes columns"], num_views: int
) -> Float[Array, "rows classes columns"]:
    """The softmax over classes, averaged over the views, from the scores that `fold_tiles` hands out."""
    return jax.nn.softmax(scores, axis=1) if num_views == 1 else scores / num_views


def argmax_classes(scores: Float[Array, "rows classes columns"]) -> Int32[Array, "rows columns"]:
    """The class with the largest score, the lowest index among equals; like `jnp.argmax(scores, axis=1)`.

    Two plain reductions instead of one over (value, index) pairs, which takes a CPU five times as long.
    """
    classes = scores.shape[1]
    index = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    largest = jnp.max(scores, axis=1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(scores == largest, index, classes), axis=1), classes - 1)
