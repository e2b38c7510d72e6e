"""Labels for single images of any size: `Predictor`, and `segment` for one call."""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Float

from topformer_jax import models, sharding
from topformer_jax.data.batch import Image, Labels
from topformer_jax.errors import UserError
from topformer_jax.inference.compiled import compile_inference, make_global_batch
from topformer_jax.inference.geometry import InferenceInput, join_tiles, prepare_input
from topformer_jax.ops.tiled import ViewLogits


class Predictor:
    """Labels images of any size, one at a time, on this process's first device.

    How an image is resized, and whether windows, several scales or mirrored views are used, is the evaluation of
    the config that the model was loaded with (`model.config.evaluation`).

    Args:
        model: as `topformer_jax.load` returns it; it is switched to inference mode.
        tensors: by official name, to use instead of the model's own.

    Raises:
        UserError: the model is a classifier.
    """

    def __init__(
        self,
        model: models.Segmenter | models.Classifier,
        tensors: Mapping[str, np.ndarray | Array] | None = None,
    ):
        if not isinstance(model, models.Segmenter):
            raise UserError(f"{model.config.name} is a classifier: only a segmenter labels pixels")
        mesh = sharding.make_inference_mesh(jax.local_devices()[:1])
        self._programs = compile_inference(model, mesh)
        tensors = models.state_dict(model) if tensors is None else dict(tensors)
        self._tensors = jax.device_put(tensors, sharding.replicated(mesh))

    def __call__(self, image: Image) -> Labels:
        """The class of each pixel: uint8 `[h, w]` for an RGB image uint8 `[h, w, 3]`."""
        return self._predict_labels(image, *self._compute_views(image))

    def with_probabilities(self, image: Image) -> tuple[Labels, Float[np.ndarray, "h w classes"]]:
        """The class of each pixel, and the softmax over classes: 4 bytes per class and pixel."""
        batch, views = self._compute_views(image)
        tiles = self._programs.probabilities(views, batch.tile_counts, batch.labels)
        probabilities = join_tiles(np.asarray(tiles)[0], (image.shape[0], image.shape[1]))
        return self._predict_labels(image, batch, views), probabilities

    def _compute_views(self, image: Image) -> tuple[InferenceInput, list[ViewLogits]]:
        programs = self._programs
        prepared = prepare_input(image, None, programs.evaluation, dtype=programs.dtype.name)
        batch = make_global_batch({0: prepared}, 1, programs.batch_sharding)
        return batch, programs.compute_views(self._tensors, batch)

    def _predict_labels(self, image: Image, batch: InferenceInput, views: list[ViewLogits]) -> Labels:
        programs = self._programs
        predictions, _, _ = programs.predict_and_count(
            views, batch.tile_counts, batch.labels, programs.zero_totals()
        )
        return join_tiles(np.asarray(predictions)[0], (image.shape[0], image.shape[1]))


def segment(model: models.Segmenter | models.Classifier, image: Image) -> Labels:
    """The class of each pixel of one RGB image of any size, evaluated as the model's own config says.

    >>> import numpy as np, topformer_jax
    >>> model = topformer_jax.load("topformer_t_context60")  # and a checkpoint
    >>> segment(model, np.zeros((60, 80, 3), np.uint8)).shape
    (60, 80)

    Args:
        model: as `topformer_jax.load` returns it; it is switched to inference mode. To evaluate it otherwise, load it
            otherwise: `load(config, checkpoint, **{"evaluation.flip": True})`.
        image: uint8 `[h, w, 3]`.

    Returns:
        uint8 `[h, w]`.

    Raises:
        UserError: the model is a classifier.
    """
    return Predictor(model)(image)
