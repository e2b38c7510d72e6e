"""The network, one file for each box of the paper's figure; config to model; model to tensors by name and back."""

import copy
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array
from ml_collections import ConfigDict, FrozenConfigDict

from topformer_jax.models.classifier import Classifier
from topformer_jax.models.injection import INJECTIONS
from topformer_jax.models.layers import DTypePolicy
from topformer_jax.models.topformer import Segmenter
from topformer_jax.models.variants import VARIANTS
from topformer_jax.ops.depthwise import METHODS
from topformer_jax.runtime.errors import UserError

DTYPES: dict[str, DTypeLike] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
PRECISIONS = ("highest", "high", "default")


def build(config: ConfigDict) -> Segmenter | Classifier:
    """Builds the model of a config with freshly initialised weights, in training mode.

    `model.config` is a frozen copy of the config, so that a model is evaluated with the settings it was made for.
    What `topformer_jax.load` returns carries it too. For flax it is static: models of equal configs have equal graph
    definitions and share compiled programs.

    Args:
        config: all settings; `config.task` decides between segmenter and classifier, `config.seed` draws the weights.

    Raises:
        UserError: the task, the variant or another choice does not exist. Ranges are checked by `config.load`.

    >>> from topformer_jax import config
    >>> model = build(config.pascal_context("tiny", classes=59))
    >>> model.config.evaluation.scale
    (520, 520)
    >>> model.eval()
    >>> images = jax.ShapeDtypeStruct((1, 480, 520, 3), "float32")
    >>> jax.eval_shape(model, images).shape
    (1, 60, 65, 59)
    """
    model = _build(config)
    model.config = FrozenConfigDict(config)
    return model


def _build(config: ConfigDict) -> Segmenter | Classifier:
    settings = config.model
    for key, known in (
        ("variant", VARIANTS),
        ("injection", INJECTIONS),
        ("dtype", DTYPES),
        ("param_dtype", ("float32", "float64")),
        ("precision", PRECISIONS),
        ("conv_impl", METHODS),
    ):
        _check_choice(f"model.{key}", settings[key], known)
    if (
        "float64" in (settings.dtype, settings.param_dtype)
        and jax.dtypes.canonicalize_dtype(np.float64) != np.float64
    ):
        raise UserError("float64 was asked for, but JAX is in 32-bit mode: set JAX_ENABLE_X64=1")
    policy = DTypePolicy(
        DTYPES[settings.dtype], DTYPES[settings.param_dtype], settings.precision, settings.conv_impl
    )
    variant = VARIANTS[settings.variant]
    rng = np.random.default_rng(config.seed)
    if config.task == "classification":
        return Classifier(
            variant,
            settings.num_classes,
            depths=settings.depths,
            drop_path_rate=settings.drop_path_rate,
            dropout_ratio=settings.dropout_ratio,
            policy=policy,
            rng=rng,
        )
    _check_choice("task", config.task, ("segmentation", "classification"))
    return Segmenter(
        variant,
        settings.num_classes,
        injection=settings.injection,
        head_channels=settings.head_channels,
        depthwise_head=settings.depthwise_head,
        depths=settings.depths,
        drop_path_rate=settings.drop_path_rate,
        dropout_ratio=settings.dropout_ratio,
        policy=policy,
        rng=rng,
    )


def build_segmenter(config: ConfigDict) -> Segmenter:
    """`build`, for commands that need a segmenter.

    Raises:
        UserError: the config is a classifier's, or a setting has a value that is not allowed.
    """
    model = build(config)
    if not isinstance(model, Segmenter):
        raise UserError(f"{config.name} has task={config.task}: this command knows segmentation alone")
    return model


def named_variables(model: nnx.Module, *types: type[nnx.Variable]) -> dict[str, nnx.Variable]:
    """The parameters and BatchNorm statistics of a model by official name: `backbone.tpm.stem.0.c.weight`.

    Names are the keys of the official checkpoints. Layouts are flax's: kernels `[k, k, in / groups, out]`, the
    classifier's matrix `[in, out]`. The variables are the model's own, so `set_value` changes the model.

    Args:
        model: a segmenter, a classifier, or a part of one (names are then relative to it).
        types: of the variables; both `nnx.Param` and `nnx.BatchStat` where there are none.
    """
    state = nnx.to_flat_state(nnx.state(model, types or (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def state_dict(model: nnx.Module, *types: type[nnx.Variable]) -> dict[str, Array]:
    """The values of `named_variables`: what `state_dict()` of a torch module is.

    >>> from topformer_jax import config
    >>> tensors = state_dict(build(config.ade20k("tiny")))
    >>> tensors["decode_head.conv_seg.weight"].shape
    (1, 1, 128, 150)
    """
    return {name: variable.get_value() for name, variable in named_variables(model, *types).items()}


def merge_state_dict(graphdef: nnx.GraphDef, tensors: Mapping[str, Array]) -> Any:
    """A new model from a graph definition and the values of all its variables; the inverse of `state_dict`.

    It works under `jit`, `grad` and the like, with tracers as values.

    Args:
        graphdef: of the model: `nnx.graphdef(model)`.
        tensors: parameters and BatchNorm statistics by official name, as `state_dict` returns them.

    >>> from topformer_jax import config
    >>> model = build(config.ade20k("tiny"))
    >>> again = merge_state_dict(nnx.graphdef(model), state_dict(model))
    >>> nnx.graphdef(again) == nnx.graphdef(model)
    True
    """
    nested: dict[str | int, Any] = {}
    for name, value in tensors.items():
        *path, last = (int(part) if part.isdigit() else part for part in name.split("."))
        functools.reduce(lambda branch, part: branch.setdefault(part, {}), path, nested)[last] = value
    return nnx.merge(graphdef, nested, copy=True)


def network_graphdef(model: Segmenter | Classifier) -> nnx.GraphDef:
    """The graph definition of a network alone, without settings and names: what is compiled depends on no others."""
    network = copy.copy(model)
    for name in {"config", "classes", "palette", "checkpoint_config"} & vars(network).keys():
        delattr(network, name)
    return nnx.graphdef(network)


def _check_choice(key: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{key} is {value!r}: {hint}expected one of {', '.join(known)}")
