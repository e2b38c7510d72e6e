"""Shows what the loader feeds the network: a grid of augmented training images and their labels.

  python -m topformer_jax.browse --config configs/topformer_b_ade.py --config.data.root=DIR --output browse.png

Takes the batch of training's first step (or of --step), after crop, flip and colour distortion; void is black. Of a
classifier it shows images with the names of their classes, after RandAugment, erasing and mixup.
"""

from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--output", type=files.as_path, metavar="FILE", help="default: runs/<config name>/browse.png"
    )
    parser.add_argument(
        "--count", type=int, default=8, help="number of examples, at most the batch size (default 8)"
    )
    parser.add_argument("--step", type=int, default=1, help="training step, from 1 (default 1)")
    return parser


cli.answer_help(__name__, make_parser)

import jax
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.data import loader, sources
from topformer_jax.data.augment import MEAN, STD, augment
from topformer_jax.data.batch import Batch, Image
from topformer_jax.data.classification.augment import augment_classes
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.visualize import drawing


def browse(config: ConfigDict, step: int, count: int) -> drawing.Canvas:
    """Draws the first `count` examples of a step's batch, one a row: image, label and their blend.

    Args:
        config: of the data and the training.
        step: of the training, from 1.
        count: number of examples, at most the batch size.

    Returns:
        uint8 `[_, _, 3]`, RGB.

    Raises:
        UserError: the data does not fit the config or cannot be read.
    """
    data_set = sources.find_data_set(config)
    source = sources.open_source(config, "train", logs.Progress)
    batches = loader.training_batches(
        source, config_lib.load(config, {"data.num_workers": 0}), start_step=step - 1
    )
    try:
        batch: Batch = jax.tree.map(
            lambda values: values[: count + count % 2], next(batches)
        )  # mixup takes pairs
    finally:
        batches.close()
    captions = [
        f"example {index}, epoch {epoch}" for index, epoch in zip(batch["index"], batch["epoch"], strict=True)
    ]
    if config.task == "classification":
        mixed, classes = jax.jit(lambda batch: augment_classes(batch, config))(batch)
        pictures = [
            _denormalize(image, size) for image, size in zip(np.asarray(mixed), batch["size"], strict=True)
        ]
        names = [data_set.classes[label] for label in np.asarray(classes.first)]
        captions = [f"{name}, {caption}" for name, caption in zip(names, captions, strict=True)]
        return drawing.image_grid(
            [[picture] for picture in pictures[:count]],
            titles=("image",),
            captions=captions[:count],
            height=256,
        )
    augment_batch = jax.jit(
        lambda batch: augment(
            batch, config.seed, flip=config.data.flip_prob, photometric=config.data.photometric_distortion
        )
    )
    images, labels = (np.asarray(array)[:count] for array in augment_batch(batch))
    rows = []
    for number, (normalized, size) in enumerate(zip(images, batch["size"][:count], strict=True)):
        image, label = _denormalize(normalized, size), labels[number].astype(np.uint8)
        colours = drawing.colorize(label, data_set.palette)
        rows.append([image, colours, drawing.blend(image, label, data_set.palette)])
    return drawing.image_grid(rows, titles=("image", "label", "both"), captions=captions[:count], height=256)


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
