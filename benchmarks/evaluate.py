"""How many images a second does the exact evaluation take, from files to the confusion matrix?

  python -m benchmarks.evaluate --peer torch --config configs/topformer_t_ade.py

On generated files, with random weights, on one device; with `--mixed` of many sizes, distributed as ADE20K's. PyTorch
evaluates an image at a time, as officially; its labels are ours up to rounding.
"""

import argparse
import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import runner, samples
from benchmarks.runner import OURS, Report
from topformer_jax import models
from topformer_jax.inference.evaluation import evaluate_split
from topformer_jax.runtime import cli, sharding
from topformer_jax.runtime.errors import UserError


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """Our evaluation beside PyTorch's, and how many pixels differ."""
    settings = config.evaluation
    if args.peer and (settings.mode, settings.flip, settings.img_ratios) != ("whole", False, (1.0,)):
        raise UserError("PyTorch evaluates whole images at one scale here, without flip: run without --peer")
    model = models.build_segmenter(config)
    weights = samples.torch_weights(models.state_dict(model))
    mesh = sharding.make_inference_mesh(jax.local_devices()[:1])
    found = []
    notes = []
    sizes = samples.ade20k_sizes(args.images) if args.mixed else [samples.SIZE]
    with samples.written_files(args.images, config, sizes) as source:
        programs = {OURS: runner.start(OURS, lambda: found.append(evaluate_split(model, source, mesh).confusion))}
        with runner.start_peers(args, "evaluate", config, weights, source) as peers:
            case = f"{args.images} images of {len(set(sizes))} sizes"
            rows = runner.compare(case, programs | peers, args.repeats, images=args.images)
            for name, peer in peers.items():
                assert peer.result is not None
                share = np.abs(peer.result - found[0]).sum() / 2 / found[0].sum()
                notes.append(f"{name}: at least {share:.1e} of the pixels have another class than ours")
    return Report(f"evaluate: {runner.describe(config)}, random weights", rows, notes)


flags = {"mixed": {"action": "store_true", "help": "of many sizes"}}
main = functools.partial(runner.run, __doc__, measure, peers=True, flags=flags, images=(32, "generated files"))
if __name__ == "__main__":
    cli.run(main)
