"""The paper's figure, a file a box; and what turns a config into a model and a model into named tensors."""

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

from topformer_jax.errors import UserError
from topformer_jax.models.classifier import Classifier
from topformer_jax.models.injection import INJECTIONS
from topformer_jax.models.layers import DTypePolicy
from topformer_jax.models.topformer import VARIANTS, Segmenter
from topformer_jax.ops.depthwise import METHODS

DTYPES: dict[str, DTypeLike] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
PRECISIONS = ("highest", "high", "default")


def build(config: ConfigDict) -> Segmenter | Classifier:
    """The freshly initialised model of a config, in training mode; `config.seed` draws its weights.

    Raises:
        UserError: a setting of `config.model` has a value that does not exist.
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
        ("depthwise_impl", METHODS),
    ):
        _check_choice(f"model.{key}", settings[key], known)
    most = 255 if config.task == "segmentation" else 2**31  # labels are bytes, of which 255 is void
    for key, allowed, expected in (
        ("num_classes", 1 <= settings.num_classes <= most, f"1 to {most}"),
        (
            "head_channels",
            settings.head_channels is None or settings.head_channels >= 1,
            "1 or more, or none",
        ),
        ("drop_path_rate", 0 <= settings.drop_path_rate < 1, "a probability below 1"),
        ("dropout_ratio", 0 <= settings.dropout_ratio < 1, "a probability below 1"),
    ):
        if not allowed:
            raise UserError(f"model.{key} is {settings[key]}: expected {expected}")
    if config.seed < 0:
        raise UserError(f"seed is {config.seed}: expected 0 or more")
    if (
        "float64" in (settings.dtype, settings.param_dtype)
        and jax.dtypes.canonicalize_dtype(np.float64) != np.float64
    ):
        raise UserError("float64 was asked for, but JAX is in 32-bit mode: set JAX_ENABLE_X64=1")
    policy = DTypePolicy(
        DTYPES[settings.dtype], DTYPES[settings.param_dtype], settings.precision, settings.depthwise_impl
    )
    variant = VARIANTS[settings.variant]
    rng = np.random.default_rng(config.seed)
    if config.task == "classification":
        return Classifier(
            variant, settings.num_classes, drop_path_rate=settings.drop_path_rate, policy=policy, rng=rng
        )
    _check_choice("task", config.task, ("segmentation", "classification"))
    return Segmenter(
        variant,
        settings.num_classes,
        injection=settings.injection,
        head_channels=settings.head_channels,
        depthwise_head=settings.depthwise_head,
        drop_path_rate=settings.drop_path_rate,
        dropout_ratio=settings.dropout_ratio,
        policy=policy,
        rng=rng,
    )


def build_segmenter(config: ConfigDict) -> Segmenter:
    """`build` for what classifiers cannot do.

    Raises:
        UserError: the config is a classifier's, or a setting of `config.model` has a value that does not exist.
    """
    model = build(config)
    if not isinstance(model, Segmenter):
        raise UserError(f"{config.name} has task={config.task}: this command knows segmentation alone")
    return model


def named_variables(model: nnx.Module, *kinds: type[nnx.Variable]) -> dict[str, nnx.Variable]:
    """Every parameter and BatchNorm statistic of a model by its official name: `backbone.tpm.stem.0.c.weight`.

    Names are the official checkpoints'; layouts are ours (`[k, k, in / groups, out]`, `[in, out]`).
    """
    state = nnx.to_flat_state(nnx.state(model, kinds or (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def state_dict(model: nnx.Module, *kinds: type[nnx.Variable]) -> dict[str, Array]:
    """The values of `named_variables`."""
    return {name: variable.get_value() for name, variable in named_variables(model, *kinds).items()}


def merge_state_dict(graphdef: nnx.GraphDef, named: Mapping[str, Array]) -> Any:
    """The model of a graph definition with these values by official name: see `named_variables`; works under jit."""
    nested: dict[str | int, Any] = {}
    for name, value in named.items():
        *path, last = (int(part) if part.isdigit() else part for part in name.split("."))
        functools.reduce(lambda place, part: place.setdefault(part, {}), path, nested)[last] = value
    return nnx.merge(graphdef, nested, copy=True)


def _check_choice(key: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{key} is {value!r}: {hint}expected one of {', '.join(known)}")
