"""Labels for images of any size from an exported file, as a config's evaluation says."""

import os

import cv2
import numpy as np
from jaxtyping import Float

from topformer_jax import models
from topformer_jax.data.batch import Image, Labels
from topformer_jax.data.transforms import eval_image, multiply_scale
from topformer_jax.errors import UserError
from topformer_jax.exporters.exported import open_exported
from topformer_jax.inference import Predictor


class ExportedPredictor:
    """Labels images of any size by an exported file, one at a time.

    An image is resized as in an evaluation of the checkpoint. A file of logits then gives what the evaluation
    gives, but for ties of two classes: logits are resized to the image, views averaged. Labels are repeated or
    left out where the image has another size than the network's input.

    Args:
        path: of the file.
        model: whose config says how to evaluate; its weights are not used.

    Raises:
        UserError: the file cannot be read, or does not fit the config.
    """

    def __init__(self, path: str | os.PathLike[str], model: models.Segmenter):
        config = model.config
        self._exported = open_exported(path)
        self._evaluation = evaluation = config.evaluation
        output = self._exported.description["output"]
        if output not in ("labels", "logits"):
            raise UserError(f"{path} gives {output}: expected a file of labels or logits")
        classes = self._exported.description["config"]["model"]["num_classes"]
        if classes != config.model.num_classes:
            raise UserError(f"{path} has {classes} classes, the config {config.model.num_classes}")
        if evaluation.mode != "whole":
            raise UserError(
                "an exported file sees whole images: leave out --slide, or set evaluation.mode=whole"
            )
        several = len(evaluation.img_ratios) > 1 or evaluation.flip
        if output == "labels" and several:
            raise UserError(
                f"{path} gives labels, and views are averaged before there are any: export --logits"
            )
        self._predictor = Predictor(model, network=self._exported) if output == "logits" else None

    def __call__(self, image: Image) -> Labels:
        """The class of each pixel: uint8 `[h, w]` for an RGB image uint8 `[h, w, 3]`.

        Raises:
            UserError: the resized image does not have the size that the file is for.
        """
        if self._predictor is not None:
            return self._predictor(image)
        evaluation = self._evaluation
        scale = multiply_scale(evaluation.scale, evaluation.img_ratios[0])
        resized = eval_image(image, scale=scale, size_divisor=evaluation.size_divisor)
        labels = self._exported(resized[None])[0]
        if labels.shape == image.shape[:2]:
            return labels
        size = image.shape[1], image.shape[0]
        return np.asarray(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT))

    def with_probabilities(self, image: Image) -> tuple[Labels, Float[np.ndarray, "h w classes"]]:
        """The class of each pixel, and the softmax over classes.

        Raises:
            UserError: the file has no logits.
        """
        if self._predictor is None:
            raise UserError(f"--probabilities needs logits: export {self._exported.name} with --logits")
        return self._predictor.with_probabilities(image)
