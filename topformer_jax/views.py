"""What the network sees of a picture, and which pictures can share a program: sizes, windows, tiles.

As officially, a picture is fitted into `evaluation.scale` (times each of `evaluation.img_ratios`) and brought up to
multiples of `evaluation.size_divisor`. Everything here is numpy, on the host.
"""

import collections
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.transforms import eval_image, eval_size, multiply_scale
from topformer_jax.ops import tiled
from topformer_jax.ops.tiled import TILE, BandedResize

Size = tuple[int, int]  # (height, width)
Picture = UInt8[np.ndarray, "h w 3"]
Labels = UInt8[np.ndarray, "h w"]


class ShapeBucket(NamedTuple):
    """The static sizes of the program that follows the network; pictures of many sizes share one."""

    supports: tuple[Size, ...]  # cells that a tile needs, for each scale
    tiles: int  # of a picture, at most
    along: int  # of them in one row or column, at most


class InferenceInput(NamedTuple):
    """One picture as the programs take it."""

    images: tuple[Picture, ...]  # the network's inputs, one a scale
    rows: tuple[BandedResize, ...]  # one a view
    columns: tuple[BandedResize, ...]
    grid: np.ndarray  # int32, how many tiles, and how many of them side by side
    labels: UInt8[np.ndarray, "tiles rows columns"]


def network_sizes(size: Size, evaluation: ConfigDict) -> tuple[Size, ...]:
    """The sizes of the network's inputs for a picture of this size, one a scale."""
    return tuple(
        eval_size(size, scale=multiply_scale(evaluation.scale, factor), size_divisor=evaluation.size_divisor)
        for factor in evaluation.img_ratios
    )


def room(pictures: Sequence[Size], networks: Sequence[Size], evaluation: ConfigDict) -> ShapeBucket:
    """The room that pictures with these network inputs need together."""
    supports = []
    for network in networks:
        grids = windows(network, evaluation)
        down, across = (
            max(
                tiled.support(size[axis], network[axis], TILE[axis], len(starts), window) for size in pictures
            )
            for axis, (starts, window) in enumerate(grids)
        )
        supports.append((down, across))
    tiles = [_grid(size) for size in pictures]
    return ShapeBucket(
        tuple(supports),
        max(256, _power(4, max(down * across for down, across in tiles))),
        max(16, _power(4, max(max(counts) for counts in tiles))),
    )


def windows(
    network: Size, evaluation: ConfigDict
) -> tuple[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]]:
    """For each axis where the windows over an input begin, and how many pixels a window has.

    One window, the whole input, in mode "whole"; in mode "slide" they are `evaluation.stride` apart and the last one
    is moved back to end with the input.
    """
    if evaluation.mode == "whole":
        return ((0,), network[0]), ((0,), network[1])

    def axis(pixels: int, crop: int, stride: int) -> tuple[tuple[int, ...], int]:
        window = min(crop, pixels)
        count = max(pixels - crop + stride - 1, 0) // stride + 1
        return tuple(min(number * stride, pixels - window) for number in range(count)), window

    return (
        axis(network[0], evaluation.crop_size[0], evaluation.stride[0]),
        axis(network[1], evaluation.crop_size[1], evaluation.stride[1]),
    )


def extents(network: Size, evaluation: ConfigDict) -> Size:
    """Cells of the logits with their padding, for a network input of this size."""
    down, across = (
        _extent(len(starts) * tiled.cells(window)) for starts, window in windows(network, evaluation)
    )
    return down, across


def prepare(
    image: Picture,
    label: Labels | None,
    evaluation: ConfigDict,
    space: ShapeBucket | None = None,
    dtype: str = "float32",
) -> InferenceInput:
    """Resizes a picture for the network and lays out its grids and its labels (void where there are none)."""
    size = (image.shape[0], image.shape[1])
    networks = network_sizes(size, evaluation)
    space = room([size], networks, evaluation) if space is None else space
    images, rows, columns = [], [], []
    for factor, network, needed in zip(evaluation.img_ratios, networks, space.supports, strict=True):
        images.append(
            eval_image(
                image, scale=multiply_scale(evaluation.scale, factor), size_divisor=evaluation.size_divisor
            )
        )
        grids = windows(network, evaluation)
        down, across, mirrored = (
            _bands(
                size[axis], network[axis], *grids[axis], TILE[axis], needed[axis], space.along, flip, dtype
            )
            for axis, flip in ((0, False), (1, False), (1, True))
        )
        for flip in flips(evaluation):
            rows.append(down)
            columns.append(mirrored if flip else across)
    down_tiles, across_tiles = _grid(size)
    tiles = np.full((space.tiles, *TILE), IGNORE_LABEL, np.uint8)
    if label is not None:
        pad = [(0, count * tile - side) for count, tile, side in zip(_grid(size), TILE, size, strict=True)]
        whole = np.pad(label, pad, constant_values=IGNORE_LABEL)
        whole = whole.reshape(down_tiles, TILE[0], across_tiles, TILE[1]).swapaxes(1, 2)
        tiles[: down_tiles * across_tiles] = whole.reshape(-1, *TILE)
    grid = np.array((down_tiles * across_tiles, across_tiles), np.int32)
    return InferenceInput(tuple(images), tuple(rows), tuple(columns), grid, tiles)


def blank(networks: Sequence[Size], space: ShapeBucket, evaluation: ConfigDict, dtype: str) -> InferenceInput:
    """What stands in a batch's row that has no picture: zeros, and not one tile."""
    rows: list[BandedResize] = []
    columns: list[BandedResize] = []
    for supports in space.supports:
        for _ in flips(evaluation):
            for axis, found in enumerate((rows, columns)):
                weights = np.zeros((space.along, TILE[axis], supports[axis]), dtype)
                found.append(BandedResize(np.zeros(space.along, np.int32), weights))
    return InferenceInput(
        tuple(np.zeros((*network, 3), np.uint8) for network in networks),
        tuple(rows),
        tuple(columns),
        np.array((0, 1), np.int32),
        np.full((space.tiles, *TILE), IGNORE_LABEL, np.uint8),
    )


def untile(tiles: np.ndarray, size: Size) -> np.ndarray:
    """Tiles `[tiles, rows, columns, ...]` put together to a picture of this size."""
    down, across = _grid(size)
    whole = tiles[: down * across].reshape(down, across, *tiles.shape[1:]).swapaxes(1, 2)
    return whole.reshape(down * TILE[0], across * TILE[1], *tiles.shape[3:])[: size[0], : size[1]]


class EvalBatch(NamedTuple):
    """A batch of an evaluation: pictures with the same network inputs, and the room they need together."""

    networks: tuple[Size, ...]
    space: ShapeBucket
    indices: tuple[int, ...]  # of examples, at most as many as a batch has rows


def plan(sizes: Sequence[Size], evaluation: ConfigDict, rows: int) -> list[EvalBatch]:
    """Every example once, in batches of at most `rows`: a function of the sizes alone, the same on any process.

    Args:
        sizes: (height, width) of every example.
        evaluation: a config's settings of that name.
        rows: of a batch, over all devices.
    """
    groups = collections.defaultdict(list)
    for index, size in enumerate(sizes):
        groups[network_sizes(size, evaluation)].append(index)
    batches = []
    for networks in sorted(groups):
        # Pictures of about the same size share a batch, so that small ones do not wait for a large one.
        members = sorted(groups[networks], key=lambda index: (sizes[index][0] * sizes[index][1], index))
        for start in range(0, len(members), rows):
            chosen = members[start : start + rows]
            space = room([sizes[index] for index in chosen], networks, evaluation)
            batches.append(EvalBatch(networks, space, tuple(chosen)))
    return batches


def programs_of(planned: Sequence[EvalBatch], evaluation: ConfigDict) -> tuple[int, int]:
    """How many programs a plan compiles: networks, and programs after them."""
    networks = {network for batch in planned for network in batch.networks}
    after = {
        (batch.space, *(extents(network, evaluation) for network in batch.networks)) for batch in planned
    }
    return len(networks), len(after)


def flips(evaluation: ConfigDict) -> tuple[bool, ...]:
    """Which views a network input has: as it is, and mirrored if `evaluation.flip` says so."""
    return (False, True) if evaluation.flip else (False,)


def _grid(size: Size) -> Size:
    """How many tiles cover a picture, down and across."""
    return -(-size[0] // TILE[0]), -(-size[1] // TILE[1])


def _power(base: int, count: int) -> int:
    """The smallest power of 2 or 4 that is not below a count."""
    return base ** math.ceil(math.log(count, base) - 1e-9)


def _extent(cells: int) -> int:
    """Cells of an axis of the logits with their padding: few sizes, so that few programs follow."""
    return max(32, _power(2, cells))


@functools.lru_cache(maxsize=256)
def _bands(
    pixels: int,
    network: int,
    starts: tuple[int, ...],
    window: int,
    tile: int,
    support: int,
    capacity: int,
    flip: bool,
    dtype: str,
) -> BandedResize:
    matrix = tiled.axis_matrix(pixels, network, starts, window, dtype)
    extent = _extent(len(starts) * tiled.cells(window))
    return tiled.bands(
        matrix[::-1] if flip else matrix, tile, support=support, capacity=capacity, extent=extent
    )
