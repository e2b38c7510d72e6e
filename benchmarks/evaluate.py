"""How many images a second does the exact evaluation take, from files to the confusion matrix?

  python -m benchmarks.evaluate --peer torch --config configs/topformer_t_ade.py
  python -m benchmarks.evaluate --peer torch --config configs/topformer_t_ade.py --images 64 --sizes 40

On generated files, with random weights, on one device. PyTorch evaluates an image at a time, as officially; its
labels are ours up to rounding.
"""

import jax
import numpy as np

from benchmarks import peers, samples, timing
from benchmarks.timing import OURS
from topformer_jax import checkpoints, models
from topformer_jax.inference import metrics
from topformer_jax.inference.evaluation import evaluate_split
from topformer_jax.runtime import cli, sharding
from topformer_jax.runtime.errors import UserError


def compare_results(rows: list[timing.Row], programs: dict[str, timing.Program]) -> list[str]:
    """Adds each program's mIoU to its row; a line on how far each one's confusion matrix is from the first's."""
    notes = []
    ours = programs[OURS].result
    for row in rows:
        confusion = programs[row["program"]].result
        assert ours is not None
        assert confusion is not None
        row["miou"] = metrics.compute_scores(confusion).miou
        row["pixels_apart"] = int(np.abs(confusion - ours).sum()) // 2
        if row["program"] != OURS:
            share = row["pixels_apart"] / ours.sum()
            notes.append(f"{row['program']}: at least {share:.1e} of the pixels have another class than ours")
    return notes


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__, images=(32, "generated files"), sizes=(1, "different sizes of them"))
    peers.add_flags(parser)
    args, config = timing.parse(parser)
    settings = config.evaluation
    if args.peer and (settings.mode, settings.flip, settings.img_ratios) != ("whole", False, (1.0,)):
        raise UserError("PyTorch evaluates whole images at one scale here, without flip: run without --peer")
    model = models.build_segmenter(config)
    weights = samples.weights(model)
    checkpoints.load_state_dict(model, weights)
    mesh = sharding.make_inference_mesh(jax.local_devices()[:1])
    found = []
    many = sorted(set(samples.data_set_sizes("ade20k", 100 * args.sizes)), key=hash)
    sizes = many[: args.sizes] if args.sizes > 1 else [samples.SIZE]
    with samples.written_files(args.images, config, sizes) as source:
        ours = timing.start(OURS, lambda: found.append(evaluate_split(model, source, mesh).confusion))
        programs = {OURS: ours._replace(result=found[0])}
        torch_weights = samples.torch_weights(weights)
        with peers.start(args, "evaluate", config, torch_weights, source) as torch_programs:
            programs |= torch_programs
            rows = timing.compare(f"{args.images} images", programs, args.repeats, images=args.images)
    notes = compare_results(rows, programs)
    timing.report(f"evaluate: {timing.describe(config)}, random weights", rows, args, notes)


if __name__ == "__main__":
    cli.run(main)
