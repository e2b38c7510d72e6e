"""What the network sees of an image, and which static shapes its programs have: sizes, windows, canvases, tiles.

As in mmsegmentation, an image is resized to fit `evaluation.scale` (times each of `evaluation.img_ratios`) and then
up to multiples of `evaluation.size_divisor`. Everything here runs on the host, in numpy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from topformer_jax.data.transforms import Size, eval_size, multiply_scale
from topformer_jax.ops.tiled import TILE, num_cells, tile_support

ViewSizes = tuple[Size, ...]  # a (height, width) for each ratio
# Of the rows and of the columns: the first pixel of each window, and the windows' length.
Windows = tuple[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]]


def largest_size(sizes: Sequence[Size]) -> Size:
    """The smallest size that all of them fit into."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


class ProgramShapes(NamedTuple):
    """What is static in the programs; images of many sizes fit into it (see `plan.plan_shapes`)."""

    canvases: tuple[ViewSizes, ...]  # of the network's input; each image takes one of them
    buffers: tuple[ViewSizes, ...]  # one per canvas: what its images lie in; larger with sliding windows
    max_windows: tuple[ViewSizes, ...]  # one per canvas: sliding windows, down and across
    supports: tuple[ViewSizes, ...]  # cells of the logits that a tile needs; each image takes one of them
    masked: bool  # False where every image fills its canvas: the plain network

    def select_canvas(self, canvas: int) -> "ProgramShapes":
        """The shapes for the images of one of the canvases."""
        return self._replace(
            canvases=(self.canvases[canvas],),
            buffers=(self.buffers[canvas],),
            max_windows=(self.max_windows[canvas],),
        )

    def buffer(self, ratio: int) -> Size:
        """What every image at a ratio fits into."""
        return largest_size([buffer[ratio] for buffer in self.buffers])

    def window_capacity(self, ratio: int) -> Size:
        """The most windows, down and across, of any image at a ratio."""
        return largest_size([windows[ratio] for windows in self.max_windows])

    def fits(self, smaller: "ProgramShapes") -> bool:
        """Whether what fits into other shapes of one canvas and support fits into these."""
        pairs = [
            (smaller.canvases, self.canvases),
            (smaller.supports, self.supports),
            (smaller.buffers, self.buffers),
            (smaller.max_windows, self.max_windows),
        ]
        return all(_choose(large, small[0]) is not None for small, large in pairs)

    def pixels(self) -> int:
        """Of the network's input, for a single canvas."""
        return sum(height * width for height, width in self.canvases[0])


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


def window_grid(input_size: Size, evaluation: ConfigDict) -> Windows:
    """`axis_windows` of both axes; in mode "whole" a single window, the whole input."""
    if evaluation.mode == "whole":
        return ((0,), input_size[0]), ((0,), input_size[1])
    return (
        axis_windows(input_size[0], evaluation.crop_size[0], evaluation.stride[0]),
        axis_windows(input_size[1], evaluation.crop_size[1], evaluation.stride[1]),
    )


def window_sizes(size: Size, evaluation: ConfigDict) -> ViewSizes:
    """The size of the network's inputs, the windows, for an image of `size`, one per ratio."""
    grids = [window_grid(input_size, evaluation) for input_size in network_sizes(size, evaluation)]
    return tuple((rows[1], columns[1]) for rows, columns in grids)


def window_counts(size: Size, evaluation: ConfigDict) -> ViewSizes:
    """How many windows there are, down and across, one pair per ratio."""
    grids = [window_grid(input_size, evaluation) for input_size in network_sizes(size, evaluation)]
    return tuple((len(rows[0]), len(columns[0])) for rows, columns in grids)


def needed_support(size: Size, evaluation: ConfigDict) -> ViewSizes:
    """The cells of the logits (down, across) that a tile of an image of `size` depends on, one pair per ratio."""
    supports = []
    for input_size in network_sizes(size, evaluation):
        down, across = (
            tile_support(size[axis], input_size[axis], TILE[axis], len(starts), window)
            for axis, (starts, window) in enumerate(window_grid(input_size, evaluation))
        )
        supports.append((down, across))
    return tuple(supports)


def choose_canvas(shapes: ProgramShapes, sizes: ViewSizes) -> int:
    """The number of the smallest canvas that windows of these sizes fit into; there is one."""
    number = _choose(shapes.canvases, sizes)
    assert number is not None
    return number


def choose_support(shapes: ProgramShapes, support: ViewSizes) -> int:
    """The number of the smallest support that is enough; there is one."""
    number = _choose(shapes.supports, support)
    assert number is not None
    return number


def _choose(choices: tuple[ViewSizes, ...], needed: ViewSizes) -> int | None:
    areas = {
        number: sum(height * width for height, width in choice)
        for number, choice in enumerate(choices)
        if np.all(np.array(needed) <= np.array(choice))
    }
    return min(areas, key=lambda number: areas[number]) if areas else None


def logits_size(shapes: ProgramShapes, ratio: int) -> Size:
    """Height and width of the logits of all windows side by side.

    Those of a single canvas are padded to one of few sizes, so that few programs follow the network. Where several
    canvases share them, that would be too much memory.
    """
    height, width = (
        max(
            windows[ratio][axis] * num_cells(canvas[ratio][axis])
            for windows, canvas in zip(shapes.max_windows, shapes.canvases, strict=True)
        )
        for axis in (0, 1)
    )
    if len(shapes.canvases) == 1:
        height, width = (max(32, round_up_to_power(cells)) for cells in (height, width))
    down, across = (max(support[ratio][axis] for support in shapes.supports) for axis in (0, 1))
    return max(height, down), max(width, across)


def join_tiles(tiles: np.ndarray, size: Size) -> np.ndarray:
    """Tiles `[tiles, rows, columns, ...]` as one array `[h, w, ...]` of an image of `size`."""
    down, across = tile_grid(size)
    joined = tiles[: down * across].reshape(down, across, *tiles.shape[1:]).swapaxes(1, 2)
    return joined.reshape(down * TILE[0], across * TILE[1], *tiles.shape[3:])[: size[0], : size[1]]


def tile_grid(size: Size) -> Size:
    """How many tiles cover an image, down and across."""
    return -(-size[0] // TILE[0]), -(-size[1] // TILE[1])


def label_grid(size: Size) -> Size:
    """The tiles (down, across) that an image's labels are laid out in: one of few grids, 16 x 8, 32 x 8, ..."""
    down, across = tile_grid(size)
    return max(16, round_up_to_power(down)), max(8, round_up_to_power(across))


def round_up_to_power(count: int) -> int:
    """The smallest power of two that is at least `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()
