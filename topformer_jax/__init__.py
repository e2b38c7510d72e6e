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
    """Imports `segment` and `normalize` when they are first used: importing the package alone stays fast."""
    if name == "segment":
        from topformer_jax.inference import segment

        return segment
    if name == "normalize":
        from topformer_jax.data.augment import normalize

        return normalize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _interrupted(*_: object) -> None:
    """Ends a command at once: an exception can get lost in one of JAX's callbacks, and the command would go on."""
    os.write(2, b"interrupted\n")
    try:
        sys.modules["topformer_jax.runtime.files"].delete_unfinished()
    finally:  # also while that module is being imported
        os._exit(130)


# Ctrl-C ends a command in one line, also in the seconds that its imports take. What runs longer sets its own.
_starting = sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
if _starting and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
if _starting:
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "2"
    )  # no warnings of JAX's C++ code: it reads it when imported
    gc.disable()  # a fifth of the time that the imports take; `cli.run` enables it


def load(
    config: "str | os.PathLike[str] | ConfigDict",
    checkpoint: "str | os.PathLike[str] | None" = None,
    **overrides: Any,
) -> "Segmenter | Classifier":
    """The model of a config, ready for inference.

    A segmenter takes float32 images `[n, h, w, 3]`, RGB, from `normalize` (ImageNet's mean and standard
    deviation), of any size, and returns logits `[n, ceil(h / 8), ceil(w / 8), classes]`; a classifier returns
    `[n, classes]`. Compile it for speed: `jax.jit` or `nnx.jit` of a function that calls it.

    `model.classes[label]` is the name of a class, `model.palette[label]` its colour (red, green, blue), of a
    segmenter: the checkpoint's own, else those of a built-in data set or of `data.class_names`, else they are empty.
    `model.checkpoint_config` holds the settings that the checkpoint was made with, or None where it has none.

    Args:
        config: the name of a recipe, the path of a config file, or a config.
        checkpoint: a `.pth` or `.safetensors` file, a checkpoint folder or one of its steps, or a run's work
            directory. Without one, the weights are drawn from `config.seed`.
        overrides: settings by dotted key, e.g. `**{"model.dtype": "bfloat16"}`.

    Raises:
        UserError: the config or the checkpoint is wrong, or they do not fit each other.
    """
    from topformer_jax import checkpoints, config as config_lib

    return checkpoints.load_model(config_lib.load(config, overrides), checkpoint)


def exported(path: "str | os.PathLike[str]") -> "Exported":
    """Opens a file of `python -m topformer_jax.export` in its own runtime: a function of images.

    It takes images, uint8 `[n, h, w, 3]`, RGB, and returns what the file gives, in numpy: labels, uint8
    `[n, h, w]`, or logits, probabilities or scores, float32. Its `description` says which, and names the classes.

    Args:
        path: a `.onnx`, `.tflite` or `.stablehlo` file.

    Raises:
        UserError: the file does not exist, is damaged or of another origin, or its runtime is not installed.
    """
    from topformer_jax.exporters import open_exported

    return open_exported(path)
