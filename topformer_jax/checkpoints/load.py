"""This checkpoint into that model, strictly: each tensor has one place, each place its tensor, all numbers finite.

    path -> its format's reader -> names matched (names.py) -> part chosen -> checked -> the model's variables

Another format is a module with a reader and a writer like `torch_format`'s, and a line in `FILE_FORMATS`.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from topformer_jax import models
from topformer_jax.checkpoints import names, orbax_store, safetensors_format, torch_format
from topformer_jax.checkpoints.origin import set_origin
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

Model = TypeVar("Model", models.Segmenter, models.Classifier, models.Segmenter | models.Classifier)
Tensors = dict[str, np.ndarray]
Metadata = dict[str, Any]
Shape = tuple[int, ...]
MOST_SHOWN = 4  # tensors of a kind: with what is said of names, an error has at most ten lines
CLASS_LAYERS = ("decode_head.conv_seg.", "head.l.")  # the layers whose shape depends on the number of classes


@dataclasses.dataclass(frozen=True)
class Format:
    """How one kind of checkpoint is read and written.

    Readers return tensors in this package's layout, by the names that they have in the file, and metadata (`meta`,
    and `config` where it is known). Writers take the same. `shape` gives a tensor's shape as the file has it, for
    messages; `holds_config`: whether what this project writes contains its config.
    """

    read: Callable[[files.Path], tuple[Tensors, Metadata]]
    write: Callable[[files.Path, Mapping[str, np.ndarray], Mapping[str, Any]], None]
    shape: Callable[[Shape], Shape] = lambda shape: shape
    holds_config: bool = True


FOLDER = Format(orbax_store.read_model, orbax_store.save_model)
TORCH = Format(torch_format.read_pth, torch_format.write_pth, torch_format.torch_shape, holds_config=False)
SAFETENSORS = Format(
    safetensors_format.read_safetensors, safetensors_format.write_safetensors, torch_format.torch_shape
)
# By suffix.
FILE_FORMATS = {**dict.fromkeys(torch_format.SUFFIXES, TORCH), safetensors_format.SUFFIX: SAFETENSORS}


def load_model(
    config: ConfigDict, checkpoint: str | os.PathLike[str] | None = None, *, part: str = "all"
) -> models.Segmenter | models.Classifier:
    """Builds a config's model and loads a checkpoint into it. The model is in inference mode.

    Its `classes`, `palette` and `checkpoint_config` are what the checkpoint says, where all of it is taken.

    Args:
        config: all settings; they are the model's `config` too.
        checkpoint: a `.pth` or `.safetensors` file, a checkpoint folder or a step of it, or a training run's work
            directory. Without one the weights are drawn from `config.seed`.
        part: what to take of the checkpoint: "all"; "all_but_classes", where the last layer stays fresh;
            "backbone", from an ImageNet classifier, where injections and head stay fresh.

    Raises:
        UserError: the config is wrong, the checkpoint cannot be read, or they do not fit.

    >>> from topformer_jax import config
    >>> model = load_model(config.ade20k("tiny"))
    >>> model(np.zeros((1, 64, 96, 3), np.float32)).shape
    (1, 8, 12, 150)
    """
    return _load_weights(models.build(config), checkpoint, part)


def load_segmenter(
    config: ConfigDict, checkpoint: str | os.PathLike[str] | None = None, *, part: str = "all"
) -> models.Segmenter:
    """`load_model` for commands that need a segmenter.

    Raises:
        UserError: the config is a classifier's, or as `load_model` does.
    """
    return _load_weights(models.build_segmenter(config), checkpoint, part)


def _load_weights(model: Model, checkpoint: str | os.PathLike[str] | None, part: str) -> Model:
    metadata: Metadata = {}
    if checkpoint is not None:
        tensors, metadata = read_checkpoint(checkpoint, model, part)
        load_state_dict(model, tensors)
    # Names and settings are another model's where a part of it is fresh.
    set_origin(model, metadata if part == "all" else {}, checkpoint)
    model.eval()
    return model


def read_checkpoint(
    path: str | os.PathLike[str], model: models.Segmenter | models.Classifier, part: str = "all"
) -> tuple[Tensors, Metadata]:
    """Reads a checkpoint of any format that fits a model exactly; the model stays as it is.

    Args:
        path: see `load_model`.
        model: whose names and shapes are expected, and whose values are returned where `part` leaves them fresh.
        part: see `load_model`.

    Returns:
        All of the model's tensors by official name in this package's layout, and the checkpoint's metadata.

    Raises:
        UserError: it cannot be read, does not fit, or holds NaN or infinity.
    """
    config = model.config
    if part == "backbone" and config.task != "segmentation":
        raise UserError(
            "only a segmenter can start from a classifier's backbone; the config is a classifier's"
        )
    path = files.as_path(path)
    file_format = find_format(path)
    tensors, metadata = file_format.read(path)
    variables = models.named_variables(model)
    shapes = {name: variable.shape for name, variable in variables.items()}
    tensors = names.match_names(tensors, shapes, str(path), metadata.get("meta", {}))
    fresh = fresh_names(variables, part)
    skipped = ("head.",) if part == "backbone" else ()  # the classifier's
    tensors = {
        name: tensor for name, tensor in tensors.items() if name not in fresh and not name.startswith(skipped)
    }
    injection = metadata.get("config", {}).get("model", {}).get("injection", config.model.injection)
    if part != "backbone" and injection != config.model.injection:  # two have the same names and shapes
        raise UserError(f"{path} has injection {injection}, the config {config.model.injection}")
    expected = {name: shape for name, shape in shapes.items() if name not in fresh}
    tensors = names.fill_counters(tensors, expected, str(path))
    as_in_file = file_format.shape
    check_state_dict(
        {name: as_in_file(tensor.shape) for name, tensor in tensors.items()},
        {name: as_in_file(shape) for name, shape in expected.items()},
        str(path),
        hint=lambda: _explain_misfit(tensors, expected, config),
    )
    check_finite(tensors, str(path))
    tensors |= {name: np.asarray(variables[name].get_value()) for name in fresh}
    return tensors, metadata


def write_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Writes a checkpoint in the format of the path's suffix (see `Format`); without a known one, a folder.

    Raises:
        UserError: it exists, or cannot be written.
    """
    target = files.as_path(path)
    FILE_FORMATS.get(target.suffix.lower(), FOLDER).write(target, tensors, metadata)


def is_file_path(path: str | os.PathLike[str]) -> bool:
    """Whether `write_checkpoint` would write a file rather than a folder."""
    return files.as_path(path).suffix.lower() in FILE_FORMATS


def find_format(path: files.Path) -> Format:
    """The format of an existing checkpoint; PyTorch files have suffixes of all kinds."""
    with files.report_errors("read", path):
        exists, is_folder = files.retry(path.exists), files.retry(path.is_dir)
    if not exists:
        suffixes = " or ".join(FILE_FORMATS)
        raise UserError(f"there is no checkpoint {path}: expected a {suffixes} file, or a checkpoint folder")
    return FOLDER if is_folder else FILE_FORMATS.get(path.suffix.lower(), TORCH)


def fresh_names(names: Iterable[str], part: str) -> set[str]:
    """Those of a model's names that a start from `part` of a checkpoint leaves fresh."""
    if part == "backbone":
        return {name for name in names if not name.startswith(("backbone.tpm.", "backbone.trans."))}
    return {name for name in names if part == "all_but_classes" and name.startswith(CLASS_LAYERS)}


def check_state_dict(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], source: str, *, hint: Callable[[], str]
) -> None:
    """Checks that names and shapes are exactly the expected ones; `hint` says what to do if not.

    Raises:
        UserError: tensors are missing, unexpected or of the wrong shape; its details name one of each kind.
    """
    missing = [f"{name}  config {_describe(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [f"{name}  file {_describe(shape)}" for name, shape in found.items() if name not in expected]
    wrong_shape = [
        f"{name}  file {_describe(found[name])}, config {_describe(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if not (missing or unexpected or wrong_shape):
        return
    details = [
        f"  {kind:<11}  {lines[0]}" + (f" (and {len(lines) - 1} more)" if lines[1:] else "")
        for kind, lines in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong_shape))
        if lines
    ]
    raise UserError(
        f"{source} does not fit the config: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
        f"{len(wrong_shape)} of the wrong shape; {hint()}",
        details,
    )


def check_finite(tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Checks that no tensor holds NaN or infinity.

    Raises:
        UserError: some do; its details name the first.
    """
    counts = {name: tensor.size - np.isfinite(tensor).sum() for name, tensor in tensors.items()}
    broken = {name: count for name, count in counts.items() if count}
    if not broken:
        return
    details = [
        f"  {name}  {count} of {tensors[name].size} values are NaN or infinite"
        for name, count in list(broken.items())[:MOST_SHOWN]
    ]
    first = ", ".join(list(broken)[:2]) + (", ..." if len(broken) > 2 else "")
    raise UserError(
        f"{source} holds NaN or infinity in {len(broken)} of {len(tensors)} tensors ({first}): its training "
        "diverged, or the file is damaged; use an earlier checkpoint, or copy it again",
        details,
    )


def load_state_dict(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Assigns tensors to a model's variables of the same name, in the variables' dtypes, without a check."""
    variables = models.named_variables(model)
    for name, tensor in tensors.items():
        values = tensor.astype(variables[name].dtype, copy=False)
        # Not `jnp.asarray`, which compiles a program for each new shape.
        variables[name].set_value(jax.device_put(values, may_alias=False))


def describe_origin(model: nnx.Module, part: str, source: object) -> str:
    """Which of a model's modules come from `part` of a checkpoint, and which are fresh."""
    names = models.named_variables(model)
    fresh = fresh_names(names, part)
    taken, new = (
        ", ".join(
            dict.fromkeys(".".join(name.split(".")[:2]) for name in names if (name in fresh) == is_fresh)
        )
        for is_fresh in (False, True)
    )
    return f"from {source}: {taken}" + (f"; fresh: {new}" if new else "")


def _explain_misfit(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape], config: ConfigDict
) -> str:
    """Why a checkpoint most likely does not fit, from the shapes that give it away, and what to do."""
    known = {re.sub(r"\.\d+\.", ".N.", name) for name in expected}  # of a block of any number
    unknown = [name for name in tensors if re.sub(r"\.\d+\.", ".N.", name) not in known]
    if 2 * len(unknown) > len(tensors):
        return (
            f"it is of another network (names such as {unknown[0][:60]}): "
            f"{len(tensors) - len(unknown)} of its {len(tensors)} tensors have names of TopFormer's"
        )
    query = next((t for name, t in tensors.items() if name.endswith("blocks.0.attn.to_q.c.weight")), None)
    for name, variant in models.VARIANTS.items():
        if query is not None and sum(variant.channels) in query.shape and name != config.model.variant:
            return (
                f"it is of variant {name}, the config of {config.model.variant}: use a config of that variant"
            )
    if config.task == "segmentation" and "head.l.weight" in tensors:
        return (
            "it is an ImageNet classifier's: use an imagenet config, or start a segmenter from its backbone "
            "(convert --init-from-classifier, train --config.init_part=backbone)"
        )
    if config.task == "classification" and "decode_head.conv_seg.weight" in tensors:
        return "it is a segmenter's: use the config of its data set"
    parts = (name.partition("transformer_blocks.")[2].partition(".")[0] for name in tensors)
    depths = len({part for part in parts if part})
    if depths not in (0, config.model.depths):
        return f"it has {depths} transformer blocks, the config {config.model.depths}: --config.model.depths={depths}"
    classes = config.model.num_classes
    if any(name.startswith(CLASS_LAYERS) and classes not in t.shape for name, t in tensors.items()):
        return (
            f"it does not have the config's {classes} classes: use its own config, or a new last layer "
            "(convert --new-head, train --config.init_part=all_but_classes)"
        )
    if all(name in tensors and tensors[name].shape == shape for name, shape in expected.items()):
        return "no layer has a place for the unexpected: save the file without them, if they are not needed"
    return "use the config that it was made with"


def _describe(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
