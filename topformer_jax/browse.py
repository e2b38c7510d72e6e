"""Shows what the loader feeds the network: a picture of augmented images and their labels, some a row.

  python -m topformer_jax.browse --config configs/topformer_b_ade.py --config.data.root=DIR --output browse.png

Takes what training would take at its first step (or at --step), after crop, flip and colours; black is void.
"""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from topformer_jax import cli, pictures
from topformer_jax import config as config_lib
from topformer_jax.data import loader, sources
from topformer_jax.data.augment import MEAN, STD, augment
from topformer_jax.data.batch import Batch
from topformer_jax.errors import UserError


def browse(config: ConfigDict, step: int, count: int) -> np.ndarray:
    """The first `count` examples of a step's batch as a picture: image, label, and the one over the other."""
    data_set = sources.data_set(config)
    source = sources.open_source(config, "train")
    batches = loader.training_batches(
        source, config_lib.load(config, {"data.num_workers": 0}), start_step=step
    )
    try:
        batch: Batch = jax.tree.map(lambda values: values[:count], next(batches))
    finally:
        batches.close()
    augmented = jax.jit(
        lambda batch: augment(
            batch, config.seed, flip=config.data.flip_prob, photometric=config.data.photometric_distortion
        )
    )
    images, labels = (np.asarray(array) for array in augmented(batch))
    inside = np.zeros((*labels.shape, 1), bool)
    for number, (height, width) in enumerate(batch["size"]):
        inside[number, :height, :width] = True
    shown = np.where(inside, np.clip(np.rint(images * STD + MEAN), 0, 255), 0).astype(np.uint8)
    rows, captions = [], []
    for number, (image, label) in enumerate(zip(shown, labels.astype(np.uint8), strict=True)):
        rows.append(
            [
                image,
                pictures.colorize(label, data_set.palette),
                pictures.blend(image, label, data_set.palette),
            ]
        )
        captions.append(f"example {batch['index'][number]}, epoch {batch['epoch'][number]}")
    return pictures.grid(rows, titles=("image", "label", "both"), captions=captions, height=256)


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="FILE", help="default: runs/<config name>/browse.png"
    )
    parser.add_argument("--count", type=int, default=8, help="examples of the batch, at most all (default 8)")
    parser.add_argument("--step", type=int, default=0, help="of training, from 0 (default 0)")
    args, config = parser.parse()
    assert config is not None  # --config is required
    if args.count < 1 or args.step < 0:
        raise UserError(f"--count is {args.count}, --step {args.step}: expected 1 or more, and 0 or more")
    output = args.output or pathlib.Path("runs") / config.name / "browse.png"
    pictures.write(output, browse(config, args.step, args.count))
    print(f"wrote {output}")


if __name__ == "__main__":
    cli.run(main)
