"""Sums over the pixels of logits that are resized to the labels' size, without storing the resized logits.

For 150 classes and 512 x 512 pixels the resized logits take 157 MB per image, and their gradient as much again: in
the official code, writing and reading them is most of a training step. Here a loop goes over tiles of the labels. For
each tile it resizes the logits and adds its part of the sums and of the gradient; only these are stored.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.resample import bilinear_matrix
from topformer_jax.ops.tiled import BandedResize, split_into_bands

Logits = Float[Array, "n h w classes"]
Labels = Int[Array, "n height width"]


class Tiling(NamedTuple):
    """How a batch of labels is cut into tiles.

    Attributes:
        height, width: of the largest tile, pixels.
        images: the most that a device computes together.
        lookups: whether to look up the label's score and bound the softmax's shift; else both are reductions over
            the classes.
        together: the most tiles that a device computes together, all its images counted; 0: one of each image.
    """

    height: int
    width: int
    images: int
    lookups: bool
    together: int = 0


# Small tiles, whose scores fit the caches. XLA writes and reads the scores for each reduction: 4 x 64 x 64 x 150
# logits take 130 ms, and 240 ms with reductions instead of look-ups and with matrix products for the rows (2 cores).
CPU = Tiling(8, 128, 2**31, lookups=True)
# Tiles of whole rows. XLA fuses all reductions over the classes with the scores' computation and never writes the
# scores. The TPU compiler estimates a sixth of the time of smaller tiles; 8 images fit a fast memory of 128 MB.
ACCELERATOR = Tiling(8, 2**31, 8, lookups=False)
# A GPU would take longer to start a tile's kernels than to run them. So many tiles of 150 classes and 512 columns
# take 0.8 GB; it grows with both.
GPU = ACCELERATOR._replace(images=2**31, together=560)
# With all logits this close to each other, `exp` of the distance to a bound of the maximum is above 0.
SAFE_RANGE = 80


class Softmax(NamedTuple):
    """The softmax of the scores in a tile, `exponentials / total`, and its parts.

    Attributes:
        scores: `[n, rows, classes, columns]`.
        exponentials: of the scores less `shift`.
        total: their sum over the classes, `[n, rows, columns]`.
        shift: at least the largest score, `[n, rows, columns]`; the largest one where `Tiling.lookups` is off.
    """

    scores: Array
    exponentials: Array
    total: Array
    shift: Array

    @property
    def probabilities(self) -> Array:
        """`[n, rows, classes, columns]`."""
        return self.exponentials / self.total[:, :, None]

    @property
    def log_total(self) -> Array:
        """The logarithm of the sum of the scores' exponentials, `[n, rows, columns]`."""
        return jnp.log(self.total) + self.shift


class Tile(NamedTuple):
    """The pixels of a tile: their labels, and the cells that their scores are interpolated from.

    Attributes:
        label: int32 `[n, rows, columns]`.
        patches: of each map of logits the cells that the tile depends on, `[n, cell_rows, classes, cell_columns]`.
        is_near: of each map, whether all logits are within `SAFE_RANGE`.
        vertical, horizontal: weights of the resize, `[rows, cell_rows]` and `[columns, cell_columns]`.
        tiling: that the tile comes from.
        precision: of matrix products.
    """

    label: Array
    patches: tuple[Array, ...]
    is_near: tuple[Array, ...]
    vertical: Array
    horizontal: Array
    tiling: Tiling
    precision: str | None

    @property
    def valid(self) -> Array:
        """Where the label is not `IGNORE_LABEL`, `[n, rows, columns]`."""
        return self.label != IGNORE_LABEL

    @property
    def is_label(self) -> Array:
        """Whether a class is the label, `[n, rows, classes, columns]`."""
        classes = lax.broadcasted_iota(jnp.int32, (1, 1, self.patches[0].shape[2], 1), 2)
        return classes == self.label[:, :, None]

    def look_up(self, values: Array) -> Array:
        """Each pixel's value of its label's class, of values `[n, rows, classes, columns]`."""
        if not self.tiling.lookups:
            return jnp.sum(jnp.where(self.is_label, values, 0), 2)
        index = jnp.where(self.valid, self.label, 0)[:, :, None]
        return jnp.take_along_axis(values, index, 2)[:, :, 0]

    def weigh_label(self, weights: Array) -> Array:
        """Each pixel's weight, of weights by class."""
        if not self.tiling.lookups:
            return self.look_up(weights[:, None])
        return weights[jnp.where(self.valid, self.label, 0)]

    def compute_softmax(self, number: int, temperature: float = 1.0) -> Softmax:
        """The softmax of a map's scores divided by a temperature."""
        stretched = self._stretch(self.patches[number])
        if temperature != 1:
            stretched = stretched / temperature
        scores = _weigh_rows(self.vertical, stretched)
        if not self.tiling.lookups:
            shift = jnp.max(scores, 2)
        else:
            # The resized maximum is at least the maximum of the resized scores, which takes a pass over a tile
            # several times as large. Where the exponentials of all classes might vanish it is the maximum itself.
            shift = lax.cond(
                self.is_near[number] if temperature >= 1 else jnp.bool_(False),
                lambda: _weigh_rows(self.vertical, jnp.max(stretched, 2)),
                lambda: jnp.max(_weigh_rows(self.vertical, stretched), 2),
            )
        exponentials = jnp.exp(scores - shift[:, :, None])
        total = jnp.sum(exponentials, 2)
        if self.tiling.together:
            # XLA would write all scores or exponentials to read them again. A GPU computes them faster, once in each
            # reduction.
            stretched, shift = lax.optimization_barrier((stretched, shift))
            again = _weigh_rows(self.vertical, stretched)
            total = jnp.sum(jnp.exp(again - shift[:, :, None]), 2)
            stretched, shift, total = lax.optimization_barrier((stretched, shift, total))
            exponentials = jnp.exp(_weigh_rows(self.vertical, stretched) - shift[:, :, None])
        return Softmax(scores, exponentials, total, shift)

    def pull_back(self, score_grad: Array) -> Array:
        """The gradient of a patch from that of the tile's scores: the transpose of the resize."""
        cell_rows = self.vertical.shape[1]
        if self.tiling.lookups:  # XLA's CPU backend would write an array that a reduction reads to memory
            x = _weigh_rows(self.vertical.T, score_grad)
        elif self.tiling.together and cell_rows == 2:
            # XLA would write the gradient for two sums. One sum of complex numbers is a single pass.
            pair = lax.complex(self.vertical[:, 0], self.vertical[:, 1])[:, None, None]
            total = jnp.sum(score_grad.astype(pair.dtype) * pair, 1)
            x = jnp.stack([total.real, total.imag], 1)
        else:
            weights = self.vertical[:, :, None, None]
            x = jnp.stack([jnp.sum(weights[:, row] * score_grad, 1) for row in range(cell_rows)], 1)
        return self._shrink(x)

    def _stretch(self, patch: Array) -> Array:
        """A patch resized along its last axis, `[n, cell_rows, classes, columns]`."""
        if self.tiling.together:  # with the classes last, over which a GPU then reduces without a transpose
            horizontal = jnp.broadcast_to(self.horizontal, (*patch.shape[:2], *self.horizontal.shape))
            return jnp.matmul(horizontal, patch.swapaxes(2, 3), precision=self.precision).swapaxes(2, 3)
        stretched = jnp.matmul(patch.reshape(-1, patch.shape[-1]), self.horizontal.T, precision=self.precision)
        return stretched.reshape(*patch.shape[:-1], -1)

    def _shrink(self, x: Array) -> Array:
        """The transpose of `_stretch`."""
        if self.tiling.together:
            horizontal = jnp.broadcast_to(self.horizontal.T, (*x.shape[:2], *self.horizontal.T.shape))
            return jnp.matmul(horizontal, x.swapaxes(2, 3), precision=self.precision).swapaxes(2, 3)
        grad = jnp.matmul(x.reshape(-1, x.shape[-1]), self.horizontal, precision=self.precision)
        return grad.reshape(self.patches[0].shape)


# From a tile and arrays `[n, ...]` to sums over the pixels of each image, arrays `[n, ...]`, and the gradient of the
# first map's scores, `[n, rows, classes, columns]`, or None.
TileLoss = Callable[[Tile, Any], tuple[Any, Array | None]]
SumTiles = Callable[..., tuple[Any, Any]]  # `sum_tiles` with its function


def _weigh_rows(vertical: Array, patch: Array) -> Array:
    """Resizes the second axis of an array by a matrix: multiply-adds, which XLA fuses with what follows.

    `vertical` is `[after, before]`, `patch` `[n, before, ...]`, the result `[n, after, ...]`.
    """
    weights = vertical.reshape(*vertical.shape, *(1,) * (patch.ndim - 2))
    terms = (weights[:, row] * patch[:, row, None] for row in range(patch.shape[1]))
    return functools.reduce(jnp.add, terms)


def sum_tiles(
    tile_loss: TileLoss,
    maps: tuple[Array, ...],
    labels: Array,
    extra: Any = None,
    *,
    precision: str | None,
    devices: int,
) -> tuple[Any, Array | None]:
    """Sums a function over all tiles of a batch.

    Args:
        tile_loss: the function.
        maps: logits, all `[n, h, w, classes]`.
        labels: `[n, height, width]`.
        extra: the second argument of `tile_loss`.
        precision: of matrix products.
        devices: the batch is sharded over. The sums do not depend on it; with the right number no images move between
            devices.

    Returns:
        The sums of each image, and the gradient of the first map or None.
    """
    run = functools.partial(_sum_groups, tile_loss, precision=precision, devices=devices)
    on_cpu, on_gpu, elsewhere = (functools.partial(run, tiling=tiling) for tiling in (CPU, GPU, ACCELERATOR))
    return lax.platform_dependent(maps, labels, extra, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=elsewhere)


def _sum_groups(
    tile_loss: TileLoss, *arrays: Any, devices: int, tiling: Tiling, precision: str | None
) -> tuple[Any, Array | None]:
    """Runs `_sum_group` on groups of at most `tiling.images` images per device, one group after the other."""

    n = len(arrays[1])
    together = max(tiling.together // -(-n // devices), 1)

    def run(group: Any) -> tuple[Any, Array | None]:
        return _sum_group(tile_loss, *group, tiling=tiling, together=together, precision=precision)

    # A group has equally many images from each device. If devices hold unequal numbers, all images are one group.
    per_device = n // devices if n % devices == 0 else 1
    divisors = (count for count in range(1, per_device + 1) if per_device % count == 0)
    groups = next(count for count in divisors if per_device // count <= tiling.images)
    if groups == 1:
        return run(arrays)
    # Groups interleave, so that no image moves to another device.
    split = jax.tree.map(lambda x: x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1), arrays)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), lax.map(run, split))


def _sum_group(
    tile_loss: TileLoss,
    maps: tuple[Array, ...],
    labels: Array,
    extra: Any,
    *,
    precision: str | None,
    tiling: Tiling,
    together: int,
) -> tuple[Any, Array | None]:
    """`sum_tiles` of one group, at most `together` tiles of each image at a time.

    The sums stay separate for each image: summing over a sharded batch would need communication at every tile.
    """
    group, rounds = _cut_group(maps, labels, precision, tiling, together)
    together = len(group.down.weights) // rounds
    tiles_across = len(group.across.weights)
    zero = jnp.int32(0)

    def split(number: Array) -> tuple[Array, Array]:
        number = number.astype(jnp.int32)  # with x64 enabled the loop counts in int64
        return number // tiles_across, number % tiles_across

    def compute_tile(row: Array, column: Array) -> tuple[Any, Array | None, tuple[Array, ...]]:
        tile, corner = group.cut_tile(row, column)
        terms, score_grad = tile_loss(tile, extra)
        return terms, None if score_grad is None else tile.pull_back(score_grad), corner

    def add_patch(gradient: Array, patch: Array, corner: tuple[Array, ...]) -> Array:
        old = lax.dynamic_slice(gradient, corner, patch.shape)
        return lax.dynamic_update_slice(gradient, old + patch, corner)

    def add_tile(number: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, gradient = carry
        terms, patch, corner = compute_tile(*split(number))
        if patch is not None:
            gradient = add_patch(gradient, patch, corner)
        return jax.tree.map(jnp.add, sums, terms), gradient

    def add_tiles(number: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, gradient = carry
        row, column = split(number)
        chosen = row * together + jnp.arange(together, dtype=jnp.int32)
        terms, patches, _ = jax.vmap(compute_tile, (0, None))(chosen, column)
        if patches is not None:
            patch = _add_patches(patches, group.down.starts[chosen], maps[0].shape[1])
            gradient = add_patch(gradient, patch, (zero, zero, zero, group.across.starts[column]))
        return jax.tree.map(lambda x, each: x + jnp.sum(each, 0, dtype=x.dtype), sums, terms), gradient

    terms, score_grad = jax.eval_shape(lambda: tile_loss(group.cut_tile(zero, zero)[0], extra))
    start = jax.tree.map(jnp.zeros_like, terms), None if score_grad is None else jnp.zeros_like(group.maps[0])
    add = add_tile if together == 1 else add_tiles
    sums, gradient = lax.fori_loop(0, rounds * tiles_across, add, start)
    return sums, None if gradient is None else gradient.swapaxes(2, 3)


class _Group(NamedTuple):
    """Images that are computed together: padded labels, logits with the columns last, and their cut into tiles."""

    labels: Array
    maps: tuple[Array, ...]
    is_near: tuple[Array, ...]
    down: BandedResize
    across: BandedResize
    tiling: Tiling
    precision: str | None

    def cut_tile(self, row: Array, column: Array) -> tuple[Tile, tuple[Array, ...]]:
        """The tile in a row and a column of tiles, and the place of its patches."""
        (_, rows, cell_rows), (_, columns, cell_columns) = self.down.weights.shape, self.across.weights.shape
        n, _, classes, _ = self.maps[0].shape
        zero = jnp.int32(0)
        corner = (zero, self.down.starts[row], zero, self.across.starts[column])
        shape = (n, cell_rows, classes, cell_columns)
        tile = Tile(
            lax.dynamic_slice(self.labels, (zero, row * rows, column * columns), (n, rows, columns)),
            tuple(lax.dynamic_slice(each, corner, shape) for each in self.maps),
            self.is_near,
            self.down.weights[row],
            self.across.weights[column],
            self.tiling,
            self.precision,
        )
        return tile, corner


def _cut_group(
    maps: tuple[Array, ...], labels: Array, precision: str | None, tiling: Tiling, together: int
) -> tuple[_Group, int]:
    """A group, and in how many rounds its tiles are computed, those of a column."""
    _, height, width = labels.shape
    _, h, w, _ = maps[0].shape
    dtype = maps[0].dtype.name
    # At stride 8 each tile of 8 rows then lies between the centres of two neighbouring logits, and is interpolated
    # from these two only.
    shift = tiling.height // 2 if tiling.height < height else 0
    down, pad_rows, rounds = _cut_axis(h, height, tiling.height, dtype, shift, together)
    across, pad_columns, _ = _cut_axis(w, width, tiling.width, dtype)
    labels = jnp.pad(labels.astype(jnp.int32), ((0, 0), pad_rows, pad_columns), constant_values=IGNORE_LABEL)
    down, across = jax.tree.map(jnp.asarray, (down, across))
    # Columns last: they fill vector lanes, classes may not.
    maps = tuple(each.swapaxes(2, 3) for each in maps)
    is_near = tuple(jnp.max(each) - jnp.min(each) < SAFE_RANGE for each in maps)
    return _Group(labels, maps, is_near, down, across, tiling, precision), rounds


def _add_patches(
    grad: Float[Array, "tiles n cell_rows classes w"], starts: Int[Array, " tiles"], h: int
) -> Float[Array, "n {h} classes w"]:
    """Adds up the gradients of patches whose first rows of cells are `starts`.

    Patches overlap. A product adds them up in a fixed order; a scatter on a GPU does not.
    """
    cells = starts[:, None] + jnp.arange(grad.shape[2], dtype=starts.dtype)
    place = (cells[:, :, None] == jnp.arange(h, dtype=cells.dtype)).astype(grad.dtype)
    return jnp.einsum("bih,bnicw->nhcw", place, grad, precision="highest")


def _cut_axis(
    cells: int, pixels: int, tile: int, dtype: str, shift: int = 0, together: int = 1
) -> tuple[BandedResize, tuple[int, int], int]:
    """Cuts one axis of the labels into tiles.

    Args:
        cells: logits along the axis.
        pixels: labels along the axis.
        tile: pixels of the largest tile.
        dtype: of the weights.
        shift: the first tile begins this many pixels before the axis.
        together: the most tiles of a round.

    Returns:
        The resize of each tile (see `ops.tiled`), the padding (before, after) of the labels, pixels, and in how many
        rounds of equally many tiles they are computed; tiles after the axis have no weights.
    """
    tile = min(tile, pixels)
    matrix = np.pad(bilinear_matrix(cells, pixels, dtype), ((shift, 0), (0, 0)))
    count = -(-len(matrix) // tile)
    rounds = -(-count // together)
    count = -(-count // rounds) * rounds
    return split_into_bands(matrix, tile, num_tiles=count), (shift, count * tile - len(matrix)), rounds
