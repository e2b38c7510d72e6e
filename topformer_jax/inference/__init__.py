"""From images to labels. How one image goes through it:

    image uint8 [h, w, 3]
      |  geometry.prepare_input: resized for the network, its resize matrices and label tiles   (host, numpy)
      v
    InferenceInput  -- rows of a batch, all of one ShapeBucket (geometry.plan_batches) -->  make_global_batch
      |  CompiledInference.compute_views: normalize, network; per scale, mirrored or not        (devices)
      v
    logits [n, h/8, classes, w/8] of each view
      |  CompiledInference.predict_and_count or .probabilities: a tile of pixels at a time (ops/tiled.py)   (devices)
      v
    labels in tiles, counts of the confusion matrix  -- geometry.join_tiles -->  labels uint8 [h, w]

As in mmsegmentation, logits are resized to the network's input (averaged where sliding windows overlap) and from
there to the image; softmaxes of several views are averaged. `geometry` is plain numpy, `compiled` holds what is
jitted, `predictor` is what a user calls; evaluating a data set is `topformer_jax.evaluation`.

Words: a *view* is one look at an image, at one ratio, mirrored or not; a *window* is a crop of the network's input in
mode "slide"; a *cell* is a pixel of the logits (stride 8); a *tile* is 32 x 128 pixels of the original image; a
*bucket* holds the static shapes that images share to share a program.
"""

from topformer_jax.inference.compiled import CompiledInference, compile_inference, make_global_batch
from topformer_jax.inference.geometry import EvalBatch, InferenceInput, ShapeBucket
from topformer_jax.inference.predictor import Predictor, segment

__all__ = [
    "CompiledInference",
    "EvalBatch",
    "InferenceInput",
    "Predictor",
    "ShapeBucket",
    "compile_inference",
    "make_global_batch",
    "segment",
]
