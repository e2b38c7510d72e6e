"""Labels for images of any size by an exported file; `open_predictor` opens what a command names."""

import argparse
import itertools
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict, FrozenConfigDict

from topformer_jax import checkpoints, config as config_lib
from topformer_jax.data.batch import Image, Labels
from topformer_jax.data.catalog import Colour
from topformer_jax.data.transforms import Size, eval_image, multiply_scale, resize_image
from topformer_jax.exporters import Exported, open_exported
from topformer_jax.inference.plan import network_sizes
from topformer_jax.inference.predictor import Predictor
from topformer_jax.runtime.errors import UserError

# The settings that --stretch replaces.
STRETCHED = ("evaluation.scale", "evaluation.size_divisor", "evaluation.img_ratios")


class ExportedPredictor:
    """Labels images of any size by an exported file, one at a time.

    An image is resized as in an evaluation of the checkpoint. A file of logits then gives the labels of the
    evaluation, except for ties of two classes: logits are resized to the image, views averaged. The labels of a file
    of labels are repeated or left out if the image has another size than the network's input.

    Args:
        exported: the file.
        config: says how to evaluate.
        stretch: resizes every image to the one size of the file instead, whatever its shape, as an app does.
        image_sizes: see `Predictor`.

    Attributes:
        runtime: the name and version of the runtime.
        stretched_size: (height, width) that every image is resized to; None without `stretch`.
        classes, palette, checkpoint_config: of its checkpoint, as a loaded model has them.

    Raises:
        UserError: the file does not fit the config.
    """

    def __init__(
        self, exported: Exported, config: ConfigDict, stretch: bool = False, image_sizes: Sequence[Size] = ()
    ):
        facts, name, evaluation = exported.description, exported.name, config.evaluation
        self._exported, self._evaluation, self.runtime = exported, evaluation, exported.runtime
        self.classes: tuple[str, ...] = tuple(facts.get("classes", ()))
        self.palette: tuple[Colour, ...] = tuple((r, g, b) for r, g, b in facts.get("palette", ()))
        self.checkpoint_config: FrozenConfigDict | None = FrozenConfigDict(config_lib.complete(facts["config"]))
        classes = self.checkpoint_config.model.num_classes
        has_labels, several_sizes = facts["output"] == "labels", len(evaluation.img_ratios) > 1
        if not has_labels and facts["output"] != "logits":
            raise UserError(f"{name} gives {facts['output']}: expected a file of labels or logits")
        if classes != config.model.num_classes:
            raise UserError(f"{name} has {classes} classes, the config {config.model.num_classes}")
        if evaluation.mode != "whole":
            raise UserError("an exported file sees whole images: leave out --slide, or set evaluation.mode=whole")
        if has_labels and (several_sizes or evaluation.flip):
            raise UserError(f"{name} gives labels, but several views need logits to average: export --logits")
        if stretch and facts["size"] is None:
            raise UserError(f"--stretch is for a file of one size, and {name} takes images of any")
        if stretch and several_sizes:
            raise UserError("--stretch resizes an image to one size: leave out --img-ratios")
        self.stretched_size: Size | None = None
        if stretch:
            self.stretched_size = size = facts["size"][0], facts["size"][1]
            config = config_lib.load(config, dict(zip(STRETCHED, (size, 1, (1.0,)), strict=True)))
            image_sizes = [size]
        else:  # at once, not after half of the images
            for size in itertools.chain(*(network_sizes(size, evaluation) for size in image_sizes)):
                exported.check_size(size)
        self._predictor = None
        if not has_labels:
            model = checkpoints.load_segmenter(config, None)
            self._predictor = Predictor(model, image_sizes=image_sizes, network=exported)

    def __call__(self, image: Image) -> Labels:
        """The class of each pixel: uint8 `[h, w]` for an RGB image uint8 `[h, w, 3]`.

        Raises:
            UserError: the resized image does not have the size that the file is for.
        """
        seen = image
        if self.stretched_size is not None:
            seen = resize_image(image, self.stretched_size)
        elif self._predictor is None:
            scale = multiply_scale(self._evaluation.scale, self._evaluation.img_ratios[0])
            seen = eval_image(image, scale=scale, size_divisor=self._evaluation.size_divisor)
        labels = self._exported(seen[None])[0] if self._predictor is None else self._predictor(seen)
        height, width = image.shape[:2]
        if labels.shape == (height, width):
            return labels
        return np.asarray(cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT))

    def with_probabilities(self, image: Image) -> tuple[Labels, Float[np.ndarray, "h w classes"]]:
        """The class of each pixel, and the softmax over classes.

        Raises:
            UserError: the file has no logits, or images are stretched.
        """
        if self._predictor is None:
            raise UserError(f"--probabilities needs logits: export {self._exported.name} with --logits")
        if self.stretched_size is not None:
            raise UserError("--probabilities are of images in their own shape: leave out --stretch")
        return self._predictor.with_probabilities(image)


def open_predictor(
    config: ConfigDict,
    args: argparse.Namespace,
    *,
    image_sizes: Sequence[Size] = (),
    given: Iterable[str] = (),
) -> Predictor | ExportedPredictor:
    """Opens the checkpoint or the exported file of a command, and prints where the config differs from it.

    Args:
        config: the command's.
        args: the flags of `cli.add_weights_flags`, and `runtime`, None for "auto".
        image_sizes: see `Predictor`.
        given: settings that the command's own flags have changed; their differences are not printed.

    Raises:
        UserError: it cannot be read, or does not fit the config.
    """
    predictor: Predictor | ExportedPredictor
    if args.exported is not None:
        if args.runtime:
            raise UserError("--runtime is for --checkpoint: the suffix of an exported file sets its runtime")
        predictor = ExportedPredictor(open_exported(args.exported), config, args.stretch, image_sizes)
    elif args.stretch:
        raise UserError("--stretch is for --exported")
    else:
        model = checkpoints.load_segmenter(config, args.checkpoint)
        predictor = Predictor(model, image_sizes=image_sizes, runtime=args.runtime or "auto")
    checkpoints.print_differences(predictor, config, given={*given, *(STRETCHED if args.stretch else ())})
    return predictor
