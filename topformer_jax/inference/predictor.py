"""Labels for single images of any size: `Predictor`, and `segment` for one call."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from topformer_jax import models, sharding
from topformer_jax.data.batch import Image, Labels
from topformer_jax.data.transforms import Size
from topformer_jax.errors import UserError
from topformer_jax.inference.compiled import compile_inference, make_global_batch
from topformer_jax.inference.geometry import ProgramShapes, join_tiles, logits_size, view_flips
from topformer_jax.inference.inputs import InferenceInput, LabelTiles, prepare_input
from topformer_jax.inference.plan import plan_shapes
from topformer_jax.ops.tiled import ViewLogits

# Images as the network sees them but for the normalisation, to logits.
Network = Callable[[UInt8[np.ndarray, "1 h w 3"]], Float[np.ndarray, "1 _h _w classes"]]
MAX_PADDED = 2  # an image uses another image's program where that computes up to so many times its own pixels


class Predictor:
    """Labels images of any size, one at a time, on this process's first device.

    How an image is resized, and whether windows, several scales or mirrored views are used, is the evaluation of
    the config that the model was loaded with (`model.config.evaluation`).

    Images of many sizes share few compiled programs: one that fits an earlier program uses it.

    Args:
        model: as `topformer_jax.load` returns it; it is switched to inference mode.
        tensors: by official name, to use instead of the model's own.
        image_sizes: (height, width) of the images to come, as far as they are known: their programs are made for
            them, and are fewer.
        network: what computes the logits instead of the model, an exported file for one; not in mode "slide".

    Raises:
        UserError: the model is a classifier.
    """

    def __init__(
        self,
        model: models.Segmenter | models.Classifier,
        tensors: Mapping[str, np.ndarray | Array] | None = None,
        image_sizes: Sequence[Size] = (),
        network: Network | None = None,
    ):
        if not isinstance(model, models.Segmenter):
            raise UserError(f"{model.config.name} is a classifier: only a segmenter labels pixels")
        mesh = sharding.make_inference_mesh(jax.local_devices()[:1])
        self._programs = compile_inference(model, mesh)
        tensors = models.state_dict(model) if tensors is None else dict(tensors)
        self._tensors = jax.device_put(tensors, sharding.replicated(mesh))
        if network is not None and self._programs.evaluation.mode != "whole":
            raise UserError("another network sees whole images: set evaluation.mode=whole")
        self._network = network
        self._shapes: list[ProgramShapes] = []
        if image_sizes:
            planned = plan_shapes(image_sizes, self._programs.evaluation, round_up=True)
            # A program for each canvas, so that those of another folder can be among them.
            self._shapes = [planned.select_canvas(canvas) for canvas in range(len(planned.canvases))]

    def __call__(self, image: Image) -> Labels:
        """The class of each pixel: uint8 `[h, w]` for an RGB image uint8 `[h, w, 3]`."""
        return self._predict_labels(image, *self._compute_views(image))

    def with_probabilities(self, image: Image) -> tuple[Labels, Float[np.ndarray, "h w classes"]]:
        """The class of each pixel, and the softmax over classes: 4 bytes per class and pixel."""
        shapes, tiles, views = self._compute_views(image)
        found = np.asarray(self._programs.probabilities(shapes.supports)(views, tiles))[0]
        return self._predict_labels(image, shapes, tiles, views), join_tiles(found, image.shape[:2])

    def _compute_views(self, image: Image) -> tuple[ProgramShapes, LabelTiles, list[ViewLogits]]:
        programs = self._programs
        size = (image.shape[0], image.shape[1])
        shapes = self._find_shapes(size)
        prepared = prepare_input(image, None, programs.evaluation, shapes, dtype=programs.dtype.name)
        batch = make_global_batch({0: prepared}, 1, programs.batch_sharding)
        if self._network is not None:
            return shapes, batch.tiles, self._run_network(self._network, shapes, prepared, batch)
        return shapes, batch.tiles, programs.compute_views(self._tensors, shapes, batch)

    def _run_network(
        self, network: Network, shapes: ProgramShapes, prepared: InferenceInput, batch: InferenceInput
    ) -> list[ViewLogits]:
        """The views' logits from another network, padded like the model's own."""
        views = []
        for ratio, inputs in enumerate(prepared.networks):
            height, width = inputs.size
            for flip in view_flips(self._programs.evaluation):
                image = np.asarray(inputs.image)[None, :height, :width]
                logits = network(np.ascontiguousarray(image[:, :, ::-1] if flip else image))
                down, across = logits_size(shapes, ratio)
                pad = ((0, 0), (0, down - logits.shape[1]), (0, across - logits.shape[2]), (0, 0))
                padded = np.pad(logits, pad).swapaxes(2, 3)
                views.append(jax.device_put(padded, self._programs.batch_sharding))
        return [
            ViewLogits(*parts) for parts in zip(views, batch.row_resizes, batch.column_resizes, strict=True)
        ]

    def _find_shapes(self, size: Size) -> ProgramShapes:
        """Those made before that the image fits into with the least padding; new ones where it would be too much."""
        own = plan_shapes([size], self._programs.evaluation, round_up=True)
        fitting = [shapes for shapes in self._shapes if shapes.fits(own)]
        best = min(fitting, key=lambda shapes: shapes.pixels(), default=own)
        if best.pixels() > MAX_PADDED * own.pixels():
            best = own
        if best not in self._shapes:
            self._shapes.append(best)
        return best

    def _predict_labels(
        self, image: Image, shapes: ProgramShapes, tiles: LabelTiles, views: list[ViewLogits]
    ) -> Labels:
        programs = self._programs
        predictions, _, _ = programs.predict_and_count(shapes.supports)(views, tiles, programs.zero_totals())
        return join_tiles(np.asarray(predictions)[0], image.shape[:2])


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
