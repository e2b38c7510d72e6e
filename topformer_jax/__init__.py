"""TopFormer in JAX: `load(config, checkpoint)` gives a model; commands are `python -m topformer_jax.NAME`."""

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from topformer_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from topformer_jax.data.augment import normalize as normalize
    from topformer_jax.exporters import Exported
    from topformer_jax.inference import segment as segment
    from topformer_jax.models import Classifier, Segmenter


def __getattr__(name: str) -> Any:
    """Imports `segment` and `normalize` when they are first used, so that `import topformer_jax` is fast."""
    if name == "segment":
        from topformer_jax.inference import segment

        return segment
    if name == "normalize":
        from topformer_jax.data.augment import normalize

        return normalize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _interrupted(*_: object) -> None:
    """Ends a command at once: one of JAX's callbacks can swallow an exception, and the command would continue."""
    os.write(2, b"interrupted\n")
    try:
        sys.modules["topformer_jax.runtime.files"].delete_unfinished()
    finally:  # also while that module is being imported
        os._exit(130)


# Ctrl-C ends a command with one line, also during its imports. Training sets its own handler.
_starting = sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
if _starting and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
if _starting:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no warnings of JAX's C++ code, which reads it once
    gc.disable()  # a fifth of the time that the imports take; `cli.run` enables it


def load(
    config: "str | os.PathLike[str] | ConfigDict",
    checkpoint: "str | os.PathLike[str] | None" = None,
    **overrides: Any,
) -> "Segmenter | Classifier":
    """Builds the model of a config, ready for inference.

    A segmenter takes float32 images `[n, h, w, 3]`, RGB, of any size, from `normalize` (ImageNet's mean and standard
    deviation), and returns logits `[n, ceil(h / 8), ceil(w / 8), classes]`; a classifier returns `[n, classes]`. For
    speed, compile a function that calls it with `jax.jit` or `nnx.jit`.

    `model.classes[label]` is the name of a class, and `model.palette[label]` its colour (red, green, blue) in a
    segmenter. They come from the checkpoint, else from a built-in data set or `data.class_names`, or they are empty.
    `model.checkpoint_config` holds the settings of the checkpoint, or is None.

    Args:
        config: the name of a recipe, the path of a config file, or a config.
        checkpoint: a `.pth` or `.safetensors` file, a checkpoint folder or one of its steps, or the work directory of
            a run. Without one, the weights are drawn from `config.seed`.
        overrides: settings by dotted key, e.g. `**{"model.dtype": "bfloat16"}`.

    Raises:
        UserError: the config or the checkpoint is wrong, or they do not fit.

    >>> import numpy as np, topformer_jax
    >>> model = topformer_jax.load("topformer_t_ade")
    >>> model.classes[:3]
    ('wall', 'building', 'sky')
    >>> model(topformer_jax.normalize(np.zeros((1, 64, 96, 3), np.uint8))).shape
    (1, 8, 12, 150)
    """
    from topformer_jax import checkpoints, config as config_lib

    return checkpoints.load_model(config_lib.load(config, overrides), checkpoint)


def exported(path: "str | os.PathLike[str]") -> "Exported":
    """Opens a file of `python -m topformer_jax.export` in its own runtime: a function of images.

    It takes images, uint8 `[n, h, w, 3]`, RGB, and returns numpy arrays: labels, uint8 `[n, h, w]`, or logits,
    probabilities or scores, float32. Its `description` names the output and the classes.

    Args:
        path: a `.onnx`, `.tflite` or `.stablehlo` file.

    Raises:
        UserError: the file does not exist, is damaged or of another program, or its runtime is not installed.
    """
    from topformer_jax.exporters import open_exported

    return open_exported(path)
