"""From logits of a stride of 8 to what is wanted at each pixel of a picture, a tile of pixels at a time.

All resizes between the two (to the network's input, over sliding windows, to the picture) are linear in each axis,
so their matrices multiply into one a axis. A tile of pixels needs a few cells of the logits alone: two small
products give its scores, which are used and forgotten. The sizes of pictures are data, not shapes: one program
serves them all, and the classes at full resolution exist for one tile only.
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

STRIDE = 8  # pixels a cell of the logits
TILE = (32, 128)  # pixels, (height, width); the width fills a TPU's lanes


class BandedResize(NamedTuple):
    """One axis of a resize, cut into tiles.

    Pixel i of tile t is the sum over j of `weights[t, i, j]` times cell `starts[t] + j`.
    """

    starts: Int32[np.ndarray | Array, "*n tiles"]
    weights: Float[np.ndarray | Array, "*n tiles pixels support"]


class ViewLogits(NamedTuple):
    """The logits of one look at a picture, classes before columns, and how they are resized."""

    logits: Float[Array, "h classes w"]
    rows: BandedResize
    columns: BandedResize


def cells(pixels: int) -> int:
    """How many cells of logits an axis of the network's input has."""
    return -(-pixels // STRIDE)


def support(pixels: int, network: int, tile: int, windows: int, window: int) -> int:
    """Cells that any tile of an axis of a picture needs, at most; 8, 16, 32, ..., so that few programs do.

    Args:
        pixels: of the picture.
        network: pixels of the network's input.
        tile: pixels of a tile.
        windows: that slide over the input; where there are several, neighbours' cells are far apart.
        window: pixels of a window.
    """
    needed = windows * cells(window)
    if windows == 1:
        needed = min(needed, int((min(tile, pixels) * network / pixels + 1) / STRIDE) + 3)
    return max(8, 1 << (needed - 1).bit_length())


def axis_matrix(
    pixels: int, network: int, starts: Sequence[int] = (0,), window: int | None = None, dtype: str = "float32"
) -> Float[np.ndarray, "pixels cells"]:
    """The resizes of one axis as a matrix: logits to windows, their mean where they overlap, then to the picture.

    Args:
        pixels: of the picture.
        network: pixels of the network's input.
        starts: where windows begin; their cells lie one window after the other.
        window: pixels of a window; the whole input where None.
        dtype: of the grids, and of the result; sums are in float64.
    """
    window = network if window is None else window
    inside = bilinear_matrix(cells(window), window, dtype).astype(np.float64)
    joined = np.zeros((network, len(starts), inside.shape[1]))
    for number, start in enumerate(starts):
        joined[start : start + window, number] = inside
    counts = np.zeros(network)
    for start in starts:
        counts[start : start + window] += 1
    whole = (joined / counts[:, None, None]).reshape(network, -1)
    lower, upper, fraction = bilinear_taps(network, pixels, dtype)
    share = fraction.astype(np.float64)[:, None]
    return ((1 - share) * whole[lower] + share * whole[upper]).astype(dtype)


def bands(
    matrix: Float[np.ndarray, "pixels cells"],
    tile: int,
    *,
    support: int | None = None,
    capacity: int | None = None,
    extent: int | None = None,
) -> BandedResize:
    """Cuts an axis' matrix into tiles.

    Args:
        matrix: of the axis.
        tile: pixels of a tile.
        support: cells of a tile; as many as one of them needs where None.
        capacity: tiles of the result; those after the last one needed are zero.
        extent: cells of the logits, padding included; at least `support`.
    """
    pixels, width = matrix.shape
    count = -(-pixels // tile)
    extent = width if extent is None else extent
    padded = np.zeros((count * tile, max(extent, width)), matrix.dtype)
    padded[:pixels, :width] = matrix
    tiles = padded.reshape(count, tile, -1)
    used = (tiles != 0).any(1)
    first = used.argmax(1)
    last = used.shape[1] - 1 - used[:, ::-1].argmax(1)
    needed = int((last - first).max()) + 1
    support = needed if support is None else support
    if needed > support:
        raise ValueError(f"a tile needs {needed} cells, the support is {support}")
    starts = np.minimum(first, extent - support)
    where = starts[:, None, None] + np.arange(support)
    weights = np.take_along_axis(tiles, where, -1)
    pad = 0 if capacity is None else capacity - count
    return BandedResize(
        np.pad(starts, (0, pad)).astype(np.int32), np.pad(weights, ((0, pad), (0, 0), (0, 0)))
    )


def tiled(
    views: Sequence[ViewLogits],
    count: Int[Array, ""],
    across: Int[Array, ""],
    start: Any,
    use: Callable[[Any, Float[Array, "rows classes columns"], Int[Array, ""]], Any],
    *,
    precision: str | None = "highest",
) -> Any:
    """Runs `carry = use(carry, scores, tile)` over the tiles of a picture, row after row.

    The scores are the resized logits of a single view, and the sum of the softmaxes of several.

    Args:
        views: of the picture, each with its own size and bands.
        count: of tiles that are used.
        across: of them, how many lie side by side.
        start: the carry before the first tile.
        use: what to do with a tile's scores.
        precision: of the products.
    """

    def one(tile: Array, carry: Any) -> Any:
        row, column = tile // across, tile % across
        scores = [_scores(view, row, column, precision) for view in views]
        if len(scores) > 1:
            scores = [jax.nn.softmax(score, axis=1) for score in scores]
        return use(carry, functools.reduce(jnp.add, scores), tile)

    with jax.named_scope("tiles"):
        return lax.fori_loop(0, count, one, start)


def _scores(view: ViewLogits, row: Array, column: Array, precision: str | None) -> Array:
    """A tile's resized logits `[rows, classes, columns]`."""
    down, across = view.rows.weights[row], view.columns.weights[column]
    _, classes, _ = view.logits.shape
    height, width = down.shape[1], across.shape[1]
    zero = jnp.zeros((), view.rows.starts.dtype)
    corner = (view.rows.starts[row], zero, view.columns.starts[column])
    patch = lax.dynamic_slice(view.logits, corner, (height, classes, width))
    product = functools.partial(jnp.matmul, precision=precision)
    wide = product(patch.reshape(height * classes, width), across.T)
    return product(down, wide.reshape(height, -1)).reshape(down.shape[0], classes, -1)


def largest(scores: Float[Array, "rows classes columns"]) -> Int32[Array, "rows columns"]:
    """The class with the largest score, the first of equals.

    In two plain reductions: an argmax, which reduces pairs, takes a CPU five times as long.
    """
    classes = scores.shape[1]
    number = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    best = jnp.max(scores, axis=1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(scores == best, number, classes), axis=1), classes - 1)
