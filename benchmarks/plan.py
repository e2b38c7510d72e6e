"""How many networks does an evaluation compile, how full are its batches, and how much of its pixels is padding?

  python -m benchmarks.plan --config configs/topformer_b_ade.py

For images of sizes like ADE20K's. Only the plan is computed.
"""

import argparse
import functools
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from benchmarks import runner, samples
from benchmarks.runner import Report
from topformer_jax.data.transforms import Size
from topformer_jax.inference.plan import EvalBatch, ProgramShapes, plan_evaluation, plan_shapes, window_grids
from topformer_jax.runtime import cli


def used_rows(batches: Sequence[EvalBatch]) -> float:
    """The share of all batches' rows that hold an example."""
    rows = [index is not None for batch in batches for index in batch.rows]
    return sum(rows) / max(len(rows), 1)


def padding(shapes: ProgramShapes, image_sizes: Sequence[Size], evaluation: ConfigDict) -> float:
    """The share of the network's pixels that lie outside of an image, in rows that hold one."""
    inside = total = 0
    for size in image_sizes:
        grids = window_grids(size, evaluation)
        canvas = shapes.canvases[shapes.find_canvas(grids)]
        inside += sum(grid.num_windows * math.prod(grid.window) for grid in grids)
        total += sum(grid.num_windows * math.prod(side) for grid, side in zip(grids, canvas, strict=True))
    return 1 - inside / max(total, 1)


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """The figures of the plan, for batches of so many rows, 8 per device."""
    sizes = samples.ade20k_sizes(args.images)
    per_device = min(8, args.rows)
    devices = -(-args.rows // per_device)
    batches = plan_evaluation(sizes, config.evaluation, devices=devices, rows_per_device=per_device)
    shapes = plan_shapes(sizes, config.evaluation)
    row = {
        "case": f"{args.images} images",
        "program": f"{args.rows} rows",
        "sizes": len(set(sizes)),
        "networks": sum(len(set(sizes)) for sizes in zip(*shapes.canvases, strict=True)),
        "batches": len(batches),
        "used_rows": used_rows(batches),
        "padding": padding(shapes, sizes, config.evaluation),
    }
    return Report(f"plan: of an evaluation, {config.name}", [row])


counts = {"images": (2000, "of the data set"), "rows": (64, "of a batch")}
main = functools.partial(runner.run, __doc__, measure, **counts)  # type: ignore[arg-type]
if __name__ == "__main__":
    cli.run(main)
