"""Draws the input of the network: a grid of augmented training images and their labels.

  python -m topformer_jax.browse --config configs/topformer_b_ade.py --config.data.root=DIR --output browse.png

Draws the batch of the first training step (or of --step), after crop, flip and colour distortion; void is black. If
the config is a classifier's, draws images with the names of their classes, after RandAugment, erasing and mixup.
"""

from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--output", type=files.as_path, metavar="FILE", help="default: runs/<config name>/browse.png")
    add("--count", type=int, default=8, help="number of examples, at most the batch size (default 8)")
    add("--step", type=int, default=1, help="training step, from 1 (default 1)")
    return parser


cli.answer_help(__name__, make_parser)

import contextlib

import jax
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.data import class_balance, loader, sources
from topformer_jax.data.augment import MEAN, STD
from topformer_jax.data.batch import Batch, Image
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.training.step import augment_batch
from topformer_jax.visualize import drawing


def browse(config: ConfigDict, step: int, count: int) -> drawing.Canvas:
    """Draws the first `count` examples of a step's batch, one per row: image, label and their blend.

    Steps count from 1. Raises UserError if the data does not fit the config or cannot be read.
    """
    data_set = sources.find_data_set(config)
    source = sources.open_source(config, "train", logs.Progress)
    settings = config_lib.load(config, {"data.num_workers": 0})
    draws = None
    if loader.needs_class_draws(settings):
        print(f"counting the pixels of {len(source):,} labels", flush=True)
        draws = class_balance.group_by_class(np.stack([*loader.count_pixels(source, settings, range(len(source)))]))
    batches = loader.training_batches(source, settings, start_step=step - 1, class_draws=draws)
    with contextlib.closing(batches):
        # Mixup takes pairs.
        batch: Batch = jax.tree.map(lambda values: values[: count + count % 2], next(batches))
    is_classifier = config.task == "classification"
    images, labels = jax.device_get(jax.jit(lambda batch: augment_batch(batch, config))(batch))
    rows, captions = [], []
    for number in range(min(count, len(images))):
        picture = _denormalize(images[number], np.asarray(batch["size"][number]))
        epoch = int(batch["epoch"][number])
        when = "drawn for a class" if loader.is_drawn(epoch) else f"epoch {epoch}"
        caption = f"example {batch['index'][number]}, {when}"
        if is_classifier:
            rows.append([picture])
            captions.append(f"{data_set.classes[labels.first[number]]}, {caption}")
        else:
            label = labels[number].astype(np.uint8)
            colours = drawing.colorize(label, data_set.palette)
            rows.append([picture, colours, drawing.blend(picture, label, data_set.palette)])
            captions.append(caption)
    return drawing.image_grid(rows, ("image", "label", "both")[: len(rows[0])], captions, height=256)


def _denormalize(image: Float[np.ndarray, "h w 3"], size: Int[np.ndarray, "2"]) -> Image:
    """The image as uint8 RGB; the padding outside `size` (height, width) becomes black."""
    pixels = np.clip(np.rint(image * STD + MEAN), 0, 255).astype(np.uint8)
    height, width = size
    pixels[height:], pixels[:, width:] = 0, 0
    return pixels


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    if args.count < 1 or args.step < 1:
        raise UserError(f"--count is {args.count}, --step {args.step}: expected 1 or more")
    output = args.output or files.as_path("runs") / config.name / "browse.png"
    drawing.write_image(output, browse(config, args.step, args.count))
    print(f"wrote {output}")


if __name__ == "__main__":
    cli.run(main)
