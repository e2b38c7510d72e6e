"""How many programs does an evaluation compile, how full are its batches, and how much of its pixels is padding?

  python -m benchmarks.plan

For images distributed as those of each data set, evaluated as its recipe says. Nothing is computed but the plan.
"""

from benchmarks import samples, timing
from topformer_jax import cli
from topformer_jax import config as config_lib
from topformer_jax.inference import plan_evaluation

RECIPES = {
    "ade20k": "topformer_b_ade",
    "cityscapes": "topformer_b_cityscapes",
    "pascal_context": "topformer_t_context60",
    "cocostuff": "topformer_b_cocostuff10k",
}


def plan_row(name: str, images: int, rows: int, canvases: int) -> timing.Row:
    """The figures of a data set's plan, for batches of so many rows, 8 a device."""
    recipe = config_lib.load(RECIPES[name], {"evaluation.max_canvases": canvases})
    sizes = samples.data_set_sizes(name, images)
    rows_per_device = min(8, rows)
    plan = plan_evaluation(
        sizes, recipe.evaluation, devices=-(-rows // rows_per_device), rows_per_device=rows_per_device
    )
    networks, counting = plan.num_programs()
    return {
        "case": f"{name}, {images} images",
        "program": f"{rows} rows",
        "sizes": len(set(sizes)),
        "networks": networks,
        "counting": counting,
        "batches": len(plan.batches),
        "used_rows": plan.used_rows(),
        "padding": plan.padding(sizes, recipe.evaluation),
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
