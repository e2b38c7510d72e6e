"""From images to labels. How one image goes through it:

    sizes of all images
      |  plan.plan_evaluation: which images share a canvas, a program and a batch                 (host, numpy)
      v
    ProgramShapes, EvalBatches
      |  plan.prepare_input: the image resized, flipped, cut into windows, with resize matrices    (host, numpy)
      v
    InferenceInput  -- rows of a batch, of any sizes -->  make_global_batch
      |  CompiledInference.compute_views: normalize, network; for each view and window          (devices)
      v
    logits [n, windows, h/8, classes, w/8] of each view
      |  CompiledInference.predict_and_count or .probabilities: a tile of pixels at a time (ops/tiled.py)   (devices)
      v
    labels uint8 [n, rows, columns] at the top left of arrays of few sizes, counts of the confusion matrix

As in mmsegmentation, logits are resized to the network's input (averaged where sliding windows overlap) and from
there to the image; softmaxes of several views are averaged. `plan` is plain numpy, `compiled` holds the jitted
programs, users call `predictor`, and `evaluation` scores a data set.

Words: a *view* is one look at an image, at one ratio, flipped or not; a *window* is a crop of the network's input in
mode "slide", and the whole input otherwise; a *canvas* is the shape of the network's input, in which a window lies at
the top left (`models/layers.py`); a *row* is the place of one image in a batch; a *cell* is a pixel of the logits
(stride 8); a *tile* is 32 x 128 pixels of the original image.
"""

from topformer_jax.inference.compiled import CompiledInference, compile_inference, make_global_batch
from topformer_jax.inference.plan import EvalBatch, InferenceInput, ProgramShapes, plan_evaluation
from topformer_jax.inference.predictor import Predictor, segment

__all__ = [
    "CompiledInference",
    "EvalBatch",
    "InferenceInput",
    "Predictor",
    "ProgramShapes",
    "compile_inference",
    "make_global_batch",
    "plan_evaluation",
    "segment",
]
