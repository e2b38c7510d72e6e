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
from jaxtyping import Array, Bool, Float, Int, Int32

from topformer_jax.ops.resample import bilinear_matrix, bilinear_taps

STRIDE = 8  # input pixels per cell of the logits
TILE = (32, 128)  # output pixels, (height, width); 128 columns fill a TPU's vector lanes
FEW = (8, 16, 32, 64)  # numbers of classes that a CPU labels a tile with
Corner = tuple[Array, Array]  # the first row and column of a tile
TileLogits = Float[Array, "rows classes columns"]  # a view's logits, resized, at the pixels of a tile


class BandedResize(NamedTuple):
    """One axis of a resize in tiles of output pixels, each of which depends on few cells.

    Output pixel i of tile t is `sum_j weights[t, i, j] * cells[starts[t] + j]`.
    """

    starts: Int32[np.ndarray | Array, "*n tiles"]
    weights: Float[np.ndarray | Array, "*n tiles pixels support"]


class ViewLogits(NamedTuple):
    """The logits of one view (a scale, flipped or not) of an image, classes before columns, and their resize."""

    logits: Float[Array, "windows h classes w"]
    counts: Int32[np.ndarray | Array, "2"]  # windows of the image, down and across; further ones do not matter
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
    compute: Callable[[Array, Array], Any],
    tiles: Int[Array, "2"],
    init: Any,
    body: Callable[[Any, Any, Corner], Any],
    *,
    in_row: int = 0,
) -> Any:
    """Runs `carry = body(carry, values, corner)` over the tiles of an image, row by row; returns the last carry.

    Args:
        compute: the values of the tile in a row and a column of tiles: `tile_logits` or `tile_labels`.
        tiles: of the image, down and across.
        init: the carry before the first tile.
        body: gets the values of each tile, and its first row and column of pixels.
        in_row: compute this many tiles of a row together, as one wide tile; the rest of them lies beyond the image.
            0: one after the other.
    """
    down, across = tiles

    def fold_one(tile: Array, carry: Any) -> Any:
        row, column = tile // across, tile % across
        return body(carry, compute(row, column), (row * TILE[0], column * TILE[1]))

    def fold_row(row: Array, carry: Any) -> Any:
        row = row.astype(jnp.int32)  # with x64 enabled the loop may count in int64
        values = jax.vmap(compute, (None, 0))(row, jnp.arange(in_row, dtype=jnp.int32))
        wide = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1), values)
        return body(carry, wide, (row * TILE[0], jnp.zeros_like(row)))

    with jax.named_scope("tiles"):
        if in_row:
            return lax.fori_loop(0, down, fold_row, init)
        return lax.fori_loop(0, down * across, fold_one, init)


def tile_logits(
    views: Sequence[ViewLogits], precision: str | None = "highest"
) -> Callable[[Array, Array], list[TileLogits]]:
    """The resized logits of each view at a tile: the sum over the windows."""
    zero = jnp.zeros((), jnp.int32)

    def of_view(view: ViewLogits, row: Array, column: Array) -> TileLogits:
        windows, _, classes, _ = view.logits.shape
        if windows == 1:
            return _enlarge(*_read_cells(view, zero, zero, zero, row, column), precision)

        def add_window(number: Array, total: Array) -> Array:
            down, across = number // view.counts[1], number % view.counts[1]
            return total + _enlarge(*_read_cells(view, number, down, across, row, column), precision)

        zeros = jnp.zeros((TILE[0], classes, TILE[1]), view.logits.dtype)
        return lax.fori_loop(zero, view.counts[0] * view.counts[1], add_window, zeros)

    return lambda row, column: [of_view(view, row, column) for view in views]


def tile_labels(
    views: Sequence[ViewLogits], precision: str | None = "highest"
) -> Callable[[Array, Array], Int32[Array, "rows columns"]]:
    """The class with the largest mean probability at the pixels of a tile; a single view needs no softmax.

    A CPU leaves out classes that are the label of no pixel of a tile (see `_is_behind`), which are most of them in
    a photograph.
    """
    all_logits = tile_logits(views, precision)
    view, zero = views[0], jnp.zeros((), jnp.int32)
    windows, _, classes, _ = view.logits.shape
    numbers = [few for few in FEW if 2 * few <= classes]

    def label(row: Array, column: Array) -> Array:
        return predict_classes(all_logits(row, column))

    def label_possible(row: Array, column: Array) -> Array:
        cells, rows, columns = _read_cells(view, zero, zero, zero, row, column)
        is_behind = _is_behind(cells, rows, columns)
        order = jnp.argsort(is_behind)  # first those that may be a label, in the order of classes

        def label_few(few: int) -> Array:
            return order[predict_classes([_enlarge(cells[:, order[:few]], rows, columns, precision)])]

        branches = [functools.partial(label_few, few) for few in numbers]
        too_few = sum((~is_behind[order[few - 1]]).astype(jnp.int32) for few in numbers)
        return lax.switch(too_few, [*branches, lambda: label(row, column)])

    def label_in_one_pass(row: Array, column: Array) -> Array:
        cells, rows, columns = _read_cells(view, zero, zero, zero, row, column)
        return _label_in_one_pass(cells, rows, columns, precision)

    if len(views) > 1 or windows > 1:
        return label
    on_cpu = label_possible if numbers else label
    return lambda row, column: lax.platform_dependent(
        row, column, cpu=on_cpu, cuda=label_in_one_pass, rocm=label_in_one_pass, default=label
    )


def _is_behind(
    cells: Float[Array, "h classes w"], rows: Float[Array, "_rows h"], columns: Float[Array, "_columns w"]
) -> Bool[Array, " classes"]:
    """Whether the largest of a class's cells that a tile depends on is below the smallest of another class's.

    Scores are averages of these cells, so the class is the label of no pixel. The margin is far above rounding. If a
    cell is infinite, no class is behind.
    """
    used = (rows != 0).any(0)[:, None, None] & (columns != 0).any(0)
    largest = jnp.max(cells, (0, 2), where=used, initial=-jnp.inf)
    smallest = jnp.min(cells, (0, 2), where=used, initial=jnp.inf)
    return largest < jnp.max(smallest) - 1e-5 * jnp.max(jnp.abs(cells))


def _read_cells(
    view: ViewLogits, window: Array, down: Array, across: Array, row: Array, column: Array
) -> tuple[Array, Array, Array]:
    """The cells `[h, classes, w]` of a window that a tile depends on, and their resize in rows and columns."""
    height, width = view.rows.weights.shape[-1], view.columns.weights.shape[-1]
    corner = (window, view.rows.starts[down, row], jnp.zeros_like(row), view.columns.starts[across, column])
    cells = lax.dynamic_slice(view.logits, corner, (1, height, view.logits.shape[2], width))[0]
    return cells, view.rows.weights[down, row], view.columns.weights[across, column]


def _enlarge(cells: Array, rows: Array, columns: Array, precision: str | None) -> TileLogits:
    height, classes, width = cells.shape
    matmul = functools.partial(jnp.matmul, precision=precision)
    stretched = matmul(cells.reshape(height * classes, width), columns.T)
    return matmul(rows, stretched.reshape(height, -1)).reshape(TILE[0], classes, TILE[1])


def _label_in_one_pass(
    cells: Float[Array, "h classes w"],
    rows: Float[Array, "_rows h"],
    columns: Float[Array, "_columns w"],
    precision: str | None,
) -> Int32[Array, "_rows _columns"]:
    """The labels of a tile where XLA fuses the resize of the rows with the maximum, and so writes no scores."""
    stretched = jnp.matmul(
        jnp.broadcast_to(columns, (len(cells), *columns.shape)), cells.swapaxes(1, 2), precision=precision
    )
    terms = (rows[:, row, None, None] * stretched[row] for row in range(len(cells)))
    return jnp.argmax(functools.reduce(jnp.add, terms), 2).astype(jnp.int32)


def mean_probabilities(logits: Sequence[TileLogits]) -> Float[Array, "rows classes columns"]:
    """The softmax over classes at the pixels of a tile, averaged over the views."""
    return _sum_probabilities(logits) / len(logits)


def predict_classes(logits: Sequence[TileLogits]) -> Int32[Array, "rows columns"]:
    """The class with the largest mean probability at the pixels of a tile; a single view needs no softmax.

    Among equals it is the one with the lowest index. Two plain reductions instead of `jnp.argmax`, whose one over
    (value, index) pairs takes a CPU five times as long.
    """
    scores = logits[0] if len(logits) == 1 else _sum_probabilities(logits)
    classes = scores.shape[1]
    index = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    largest = jnp.max(scores, axis=1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(scores == largest, index, classes), axis=1), classes - 1)


def _sum_probabilities(logits: Sequence[TileLogits]) -> Float[Array, "rows classes columns"]:
    return functools.reduce(jnp.add, [jax.nn.softmax(each, axis=1) for each in logits])
