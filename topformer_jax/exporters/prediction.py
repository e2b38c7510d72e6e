"""Labels for images of any size from an exported file, as a config's evaluation says."""

import itertools
import os
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float
from ml_collections import FrozenConfigDict

from topformer_jax import config, models
from topformer_jax.data.batch import Image, Labels
from topformer_jax.data.catalog import Colour
from topformer_jax.data.transforms import (
    ResizedImage,
    Size,
    eval_image,
    multiply_scale,
    resize_image,
)
from topformer_jax.exporters.exported import open_exported
from topformer_jax.inference import Predictor
from topformer_jax.inference.plan import network_sizes
from topformer_jax.runtime.errors import UserError

# The settings that `stretch` replaces.
STRETCHED = ("evaluation.scale", "evaluation.size_divisor", "evaluation.img_ratios")


class ExportedPredictor:
    """Labels images of any size by an exported file, one at a time.

    An image is resized as in an evaluation of the checkpoint. A file of logits then gives what the evaluation
    gives, but for ties of two classes: logits are resized to the image, views averaged. Labels are repeated or
    left out where the image has another size than the network's input.

    Args:
        path: of the file.
        model: whose config says how to evaluate; its weights are not used.
        stretch: resizes every image to the one size that the file is for instead, whatever its shape, as an app
            does; the labels are those of that size, repeated or left out.
        image_sizes: (height, width) of the images to come, as far as they are known: see `Predictor`.

    Attributes:
        runtime: what runs the file, with its version.
        stretched_size: (height, width) that every image is resized to; None without `stretch`.
        classes, palette, checkpoint_config: what the file says of its checkpoint, as a loaded model does.

    Raises:
        UserError: the file cannot be read, or does not fit the config.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: models.Segmenter,
        stretch: bool = False,
        image_sizes: Sequence[Size] = (),
    ):
        self._exported = open_exported(path)
        self._evaluation = evaluation = model.config.evaluation
        facts = self._exported.description
        self.runtime = self._exported.runtime
        if facts["output"] not in ("labels", "logits"):
            raise UserError(f"{path} gives {facts['output']}: expected a file of labels or logits")
        self.classes: tuple[str, ...] = tuple(facts.get("classes", ()))
        self.palette: tuple[Colour, ...] = tuple((r, g, b) for r, g, b in facts.get("palette", ()))
        self.checkpoint_config: FrozenConfigDict | None = FrozenConfigDict(config.complete(facts["config"]))
        classes = self.checkpoint_config.model.num_classes
        if classes != model.config.model.num_classes:
            raise UserError(f"{path} has {classes} classes, the config {model.config.model.num_classes}")
        if evaluation.mode != "whole":
            raise UserError(
                "an exported file sees whole images: leave out --slide, or set evaluation.mode=whole"
            )
        several_sizes = len(evaluation.img_ratios) > 1
        if facts["output"] == "labels" and (several_sizes or evaluation.flip):
            raise UserError(
                f"{path} gives labels, and views are averaged before there are any: export --logits"
            )
        self.stretched_size: Size | None = None
        network_model: models.Segmenter | models.Classifier = model
        if stretch:
            if facts["size"] is None:
                raise UserError(f"--stretch is for a file of one size, and {path} takes images of any")
            if several_sizes:
                raise UserError("--stretch resizes an image to one size: leave out --img-ratios")
            self.stretched_size = size = facts["size"][0], facts["size"][1]
            overrides = dict(zip(STRETCHED, (size, 1, (1.0,)), strict=True))
            network_model = models.build(config.load(model.config, overrides))
            image_sizes = [size]
        else:  # at once, not after half of the images
            for size in itertools.chain(*(network_sizes(size, evaluation) for size in image_sizes)):
                self._exported.check_size(size)
        self._predictor = None
        if facts["output"] == "logits":
            self._predictor = Predictor(network_model, image_sizes=image_sizes, network=self._exported)

    def __call__(self, image: Image) -> Labels:
        """The class of each pixel: uint8 `[h, w]` for an RGB image uint8 `[h, w, 3]`.

        Raises:
            UserError: the resized image does not have the size that the file is for.
        """
        seen = self._resize(image)
        labels = self._exported(seen[None])[0] if self._predictor is None else self._predictor(seen)
        height, width = image.shape[:2]
        if labels.shape == (height, width):
            return labels
        return np.asarray(cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT))

    def _resize(self, image: Image) -> ResizedImage:
        """What the file sees; of logits without --stretch, what the predictor resizes."""
        if self.stretched_size is not None:
            return resize_image(image, self.stretched_size)
        if self._predictor is not None:
            return image
        scale = multiply_scale(self._evaluation.scale, self._evaluation.img_ratios[0])
        return eval_image(image, scale=scale, size_divisor=self._evaluation.size_divisor)

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
