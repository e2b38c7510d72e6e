"""Labels for images of any size, by a model or an exported file: `Predictor`, `ExportedPredictor`, `segment`.

`open_predictor` opens what a command names.
"""

import argparse
import collections
import functools
import importlib.util
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict, FrozenConfigDict

from topformer_jax import checkpoints, config as config_lib, models
from topformer_jax.data.batch import Image, Labels
from topformer_jax.data.catalog import Colour
from topformer_jax.data.transforms import Size, eval_image, multiply_scale, resize_image
from topformer_jax.exporters import Exported, open_exported
from topformer_jax.inference import plan
from topformer_jax.inference.compiled import compile_inference, make_global_batch
from topformer_jax.inference.plan import Arrays, InferenceInput, ProgramShapes, plan_shapes, view_flips
from topformer_jax.ops.tiled import ViewLogits
from topformer_jax.runtime import files, sharding
from topformer_jax.runtime.errors import UserError, need_packages

# Images as the network sees them, before the normalisation, to logits.
Network = Callable[[UInt8[np.ndarray, "1 h w 3"]], Float[np.ndarray, "1 _h _w classes"]]
RUNTIMES = ("auto", "jax", "onnx")
# The settings that --stretch replaces.
STRETCHED = ("evaluation.scale", "evaluation.size_divisor", "evaluation.img_ratios")
# The last two models that `segment` was called with: their parts, and their predictors.
_recent: collections.deque[tuple[list[Any], "Predictor"]] = collections.deque(maxlen=2)


class Predictor:
    """Labels images of any size, one at a time, on this process's first device.

    `model.config.evaluation` says how an image is resized, and whether windows, several scales or flipped views are
    used. Images of many sizes share few compiled programs, whose sizes are rounded up.

    Args:
        model: as `topformer_jax.load` returns it; it is switched to inference mode.
        image_sizes: (height, width) of the images to come, if they are known: fewer programs are compiled.
        network: computes the logits instead of the model, for example an exported file; not in mode "slide".
        runtime: of the network. "onnx" is onnxruntime, for a CPU, float32 and mode "whole": its labels are JAX's,
            except for ties of two classes by rounding. "auto" is "onnx" where that works, and else "jax".

    Attributes:
        network: computes the logits; None if JAX does.
        runtime: "jax", or "onnxruntime" for another network.
        classes, palette, checkpoint_config: the model's.

    Raises:
        UserError: the model is a classifier, or the runtime does not work for it.
    """

    def __init__(
        self,
        model: models.Segmenter | models.Classifier,
        image_sizes: Sequence[Size] = (),
        network: Network | None = None,
        runtime: str = "auto",
    ):
        if not isinstance(model, models.Segmenter):
            raise UserError(f"{model.config.name} is a classifier: only a segmenter labels pixels")
        self.model = model
        self.classes, self.palette = model.classes, model.palette
        self.checkpoint_config = model.checkpoint_config
        mesh = sharding.make_inference_mesh(jax.local_devices()[:1])
        self._programs = compile_inference(model, mesh)
        # Where a file is the network, the model has other weights.
        self._may_fall_back = network is None
        self.network = _open_onnx(model, runtime) if network is None else network
        self.runtime = "jax" if self.network is None else "onnxruntime"
        self._planned: list[ProgramShapes] = []
        if image_sizes:
            planned = plan_shapes(image_sizes, self._programs.evaluation, round_up=True)
            self._planned = [planned.select_canvas(canvas) for canvas in range(len(planned.canvases))]

    @functools.cached_property
    def _tensors(self) -> Any:
        """The weights on the device, once they are needed there."""
        return jax.device_put(models.state_dict(self.model), sharding.replicated(self._programs.mesh))

    def __call__(self, image: Image) -> Labels:
        """The class of each pixel: uint8 `[h, w]` for an RGB image uint8 `[h, w, 3]`."""
        return self._predict_labels(image, self._compute_views(image))

    def with_probabilities(self, image: Image) -> tuple[Labels, Float[np.ndarray, "h w classes"]]:
        """The class of each pixel, and the softmax over classes: 4 bytes per class and pixel."""
        batch = self._compute_views(image)
        shares = np.asarray(self._programs.probabilities(*batch))[0]
        return self._predict_labels(image, batch), shares[: image.shape[0], : image.shape[1]]

    def _compute_views(self, image: Image) -> tuple[list[ViewLogits], Arrays, Arrays]:
        """What the programs after the network take."""
        programs = self._programs
        size = (image.shape[0], image.shape[1])
        shapes = self._find_shapes(size)
        if self.network is not None:
            shapes = shapes._replace(masked=False)  # it sees images of their own size
        prepared = plan.prepare_input(image, None, programs.evaluation, shapes, dtype=programs.dtype.name)
        batch = make_global_batch([prepared], programs.batch_sharding)
        if self.network is None:
            return programs.compute_views(self._tensors, shapes, batch), batch.tiles, batch.labels
        try:
            return self._run_network(self.network, size, shapes, batch), batch.tiles, batch.labels
        except NotImplementedError as error:  # of the exporter, for a network with other layers
            if not self._may_fall_back:
                raise
            print(f"note: JAX computes the network: {files.shorten(error, 150)}", file=sys.stderr)
            self.network, self.runtime = None, "jax"
            return self._compute_views(image)

    def _run_network(
        self, network: Network, size: Size, shapes: ProgramShapes, batch: InferenceInput
    ) -> list[ViewLogits]:
        """The views' logits from another network, padded like the model's own."""
        views = []
        flips = len(view_flips(self._programs.evaluation))
        sizes = plan.network_sizes(size, self._programs.evaluation)
        for number, view in enumerate(batch.views):
            height, width = sizes[number // flips]
            logits = network(np.ascontiguousarray(np.asarray(view.windows)[0, :, :height, :width]))
            padded = np.zeros((1, *shapes.logits_size(number // flips), self.model.num_classes), np.float32)
            padded[:, : logits.shape[1], : logits.shape[2]] = logits
            placed = jax.device_put(padded.swapaxes(2, 3)[None], self._programs.batch_sharding)
            views.append(view.with_logits(placed))
        return views

    def _find_shapes(self, size: Size) -> ProgramShapes:
        """The smallest of the planned shapes that the image fits into, or else its own, rounded up."""
        own = plan_shapes([size], self._programs.evaluation, round_up=True)
        fitting = [shapes for shapes in self._planned if shapes.fits(own)]
        return min(fitting, key=lambda shapes: shapes.pixels(), default=own)

    def _predict_labels(self, image: Image, batch: tuple[list[ViewLogits], Arrays, Arrays]) -> Labels:
        predictions, _ = self._programs.predict_and_count(*batch)
        return np.asarray(predictions)[0, : image.shape[0], : image.shape[1]]


def _open_onnx(model: models.Segmenter, runtime: str) -> Network | None:
    """The network in onnxruntime; None if JAX computes it."""
    if runtime not in RUNTIMES:
        raise UserError(f"runtime {runtime!r}: expected one of {', '.join(RUNTIMES)}")
    mode, platform = model.config.evaluation.mode, jax.local_devices()[0].platform
    mistakes = {
        f"runtime onnx is for CPUs, and the device is a {platform}": platform != "cpu",
        "runtime onnx computes float32: set model.dtype=float32": model.policy.dtype != np.float32,
        "runtime onnx sees whole images: set evaluation.mode=whole": mode != "whole",
    }
    is_installed = all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))
    if runtime == "jax" or (runtime == "auto" and (any(mistakes.values()) or not is_installed)):
        return None
    for line, is_made in mistakes.items():
        if is_made:
            raise UserError(line)
    with need_packages("runtime onnx needs onnx and onnxruntime"):
        from topformer_jax.exporters import onnx_file
    return onnx_file.open_model(model)


def _list_parts(model: nnx.Module) -> list[Any]:
    """The modules, weights and settings of a model: the objects themselves, without copies."""
    modules, others = [model], []
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, nnx.Module):
                modules.append(value)
            elif isinstance(value, nnx.Variable):
                others.append(value.get_raw_value())  # a hundred times as fast as get_value
            elif not name.startswith("_"):  # flax's own
                others.append(value)
    return [*modules, *others]


def _find_predictor(model: models.Segmenter | models.Classifier, runtime: str) -> Predictor:
    """The predictor of an earlier call, or a new one if a weight, a mode or the config is another object now."""
    runtime = sys.intern(runtime)
    parts = [runtime, *_list_parts(model)]
    for known, predictor in tuple(_recent):
        if len(parts) == len(known) and all(map(operator.is_, parts, known)):
            return predictor
    predictor = Predictor(model, runtime=runtime)
    _recent.append(([runtime, *_list_parts(model)], predictor))  # in inference mode
    return predictor


def segment(model: models.Segmenter | models.Classifier, image: Image, runtime: str = "auto") -> Labels:
    """The class of each pixel of one RGB image of any size, evaluated as the model's own config says.

    The weights of the last two models stay on the device between calls.

    >>> import numpy as np, topformer_jax
    >>> model = topformer_jax.load("topformer_t_context60")  # and a checkpoint
    >>> segment(model, np.zeros((60, 80, 3), np.uint8)).shape
    (60, 80)

    Args:
        model: as `topformer_jax.load` returns it; it is switched to inference mode. To change the evaluation, load it
            with other settings: `load(config, checkpoint, **{"evaluation.flip": True})`.
        image: uint8 `[h, w, 3]`.
        runtime: see `Predictor`.

    Returns:
        uint8 `[h, w]`.

    Raises:
        UserError: the model is a classifier, or the runtime does not work for it.
    """
    return _find_predictor(model, runtime)(image)


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
            for size in itertools.chain(*(plan.network_sizes(size, evaluation) for size in image_sizes)):
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
