"""How many programs does an evaluation compile, how full are its batches, and how much of its pixels is padding?

  python -m benchmarks.plan

For images distributed as those of each data set, evaluated as its recipe says. Nothing is computed but the plan.
"""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from benchmarks import samples, timing
from topformer_jax import config as config_lib
from topformer_jax.data.transforms import Size
from topformer_jax.inference import EvalPlan, plan_evaluation
from topformer_jax.inference.plan import window_grids
from topformer_jax.runtime import cli

RECIPES = {
    "ade20k": "topformer_b_ade",
    "cityscapes": "topformer_b_cityscapes",
    "pascal_context": "topformer_t_context60",
    "cocostuff": "topformer_b_cocostuff10k",
}


def used_rows(plan: EvalPlan) -> float:
    """The share of all batches' rows that hold an example."""
    rows = [index is not None for batch in plan.batches for index in batch.rows]
    return sum(rows) / max(len(rows), 1)


def padding(plan: EvalPlan, image_sizes: Sequence[Size], evaluation: ConfigDict) -> float:
    """The share of the network's pixels that lie outside of an image, in rows that hold one."""
    inside = total = 0
    for size in image_sizes:
        grids = window_grids(size, evaluation)
        canvas = plan.shapes.canvases[plan.shapes.find_canvas(tuple(grid.window for grid in grids))]
        for grid, (height, width) in zip(grids, canvas, strict=True):
            windows = len(grid.tops) * len(grid.lefts)
            inside += windows * math.prod(grid.window)
            total += windows * height * width
    return 1 - inside / max(total, 1)


def count_programs(plan: EvalPlan) -> tuple[int, int]:
    """How many programs a plan compiles: networks, and those that resize and count after them."""
    ratios = range(len(plan.shapes.windows))
    networks = {(ratio, canvas[ratio]) for canvas in plan.shapes.canvases for ratio in ratios}
    counting = {
        (batch.label_size, *(batch.shapes.logits_size(ratio) for ratio in ratios)) for batch in plan.batches
    }
    return len(networks), len(counting)


def plan_row(name: str, images: int, rows: int, canvases: int) -> timing.Row:
    """The figures of a data set's plan, for batches of so many rows, 8 a device."""
    recipe = config_lib.load(RECIPES[name], {"evaluation.max_canvases": canvases})
    sizes = samples.data_set_sizes(name, images)
    rows_per_device = min(8, rows)
    plan = plan_evaluation(
        sizes, recipe.evaluation, devices=-(-rows // rows_per_device), rows_per_device=rows_per_device
    )
    networks, counting = count_programs(plan)
    return {
        "case": f"{name}, {images} images",
        "program": f"{rows} rows",
        "sizes": len(set(sizes)),
        "networks": networks,
        "counting": counting,
        "batches": len(plan.batches),
        "used_rows": used_rows(plan),
        "padding": padding(plan, sizes, recipe.evaluation),
    }


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__, images=(2000, "of each data set"), canvases=(4, "networks at most"))
    parser.add_argument("--rows", nargs="+", type=timing.positive, default=[8, 64, 2048], help="of a batch")
    args, _ = timing.parse(parser)
    rows = [
        plan_row(name, args.images, rows, args.canvases) for name in samples.DATA_SETS for rows in args.rows
    ]
    timing.report("plan: of evaluations", rows, args)


if __name__ == "__main__":
    cli.run(main)
