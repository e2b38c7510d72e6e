"""The network, one file for each box of the paper's figure; config to model; model to tensors by name and back."""

import copy
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array
from ml_collections import ConfigDict, FrozenConfigDict

from topformer_jax.models.classifier import Classifier
from topformer_jax.models.layers import BatchNorm, DTypePolicy
from topformer_jax.models.topformer import VARIANTS as VARIANTS, Segmenter
from topformer_jax.runtime.errors import UserError

DTYPES: dict[str, DTypeLike] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def build(config: ConfigDict) -> Segmenter | Classifier:
    """Builds the model of a config with freshly initialised weights, in training mode.

    `model.config` is a frozen copy of the config, so that a model is evaluated with the settings it was made for. For
    flax it is static: models of equal configs share compiled programs.

    Args:
        config: all settings, as `config.load` checks them.

    Raises:
        UserError: float64 was asked for, but JAX is in 32-bit mode.

    >>> from topformer_jax import config
    >>> model = build(config.pascal_context("tiny", classes=59))
    >>> model.config.evaluation.scale
    (520, 520)
    >>> model.eval()
    >>> images = jax.ShapeDtypeStruct((1, 480, 520, 3), "float32")
    >>> jax.eval_shape(model, images).shape
    (1, 60, 65, 59)
    """
    settings = config.model
    if settings.dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise UserError("float64 was asked for, but JAX is in 32-bit mode: set JAX_ENABLE_X64=1")
    policy = DTypePolicy(DTYPES[settings.dtype], settings.precision, settings.conv_impl)
    network = Classifier if config.task == "classification" else Segmenter
    model = network(settings, policy=policy, rng=np.random.default_rng(config.seed))
    model.config = FrozenConfigDict(config)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.momentum = settings.bn_momentum
    return model


def build_segmenter(config: ConfigDict) -> Segmenter:
    """`build`, for commands that need a segmenter.

    Raises:
        UserError: the config is a classifier's.
    """
    model = build(config)
    if not isinstance(model, Segmenter):
        raise UserError(f"{config.name} has task={config.task}: this command needs a segmenter")
    return model


def named_variables(model: nnx.Module, *types: type[nnx.Variable]) -> dict[str, nnx.Variable]:
    """The parameters and BatchNorm statistics of a model by official name: `backbone.tpm.stem.0.c.weight`.

    Layouts are flax's: kernels `[k, k, in / groups, out]`, the classifier's matrix `[in, out]`. The variables are the
    model's own, so `set_value` changes the model. `types` are `nnx.Param`, `nnx.BatchStat`, or none for both.
    """
    state = nnx.to_flat_state(nnx.state(model, types or (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def state_dict(model: nnx.Module, *types: type[nnx.Variable]) -> dict[str, Array]:
    """The values of `named_variables`, like `state_dict()` of a torch module.

    >>> from topformer_jax import config
    >>> tensors = state_dict(build(config.ade20k("tiny")))
    >>> tensors["decode_head.conv_seg.weight"].shape
    (1, 1, 128, 150)
    """
    return {name: variable.get_value() for name, variable in named_variables(model, *types).items()}


def merge_state_dict(graphdef: nnx.GraphDef, tensors: Mapping[str, Array]) -> Any:
    """A new model from a graph definition and what `state_dict` returns; works under `jit` and `grad`.

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
    """The graph definition without config and names, so that models that differ only in these share programs."""
    network = copy.copy(model)
    for name in {"config", "classes", "palette", "checkpoint_config"} & vars(network).keys():
        delattr(network, name)
    return nnx.graphdef(network)


def summary(config: ConfigDict, size: tuple[int, int]) -> list[tuple[str, ...]]:
    """The rows of a table: each module's parameters, and its multiply-adds in millions for one image.

    Multiply-adds are those of convolutions and matrix products, as papers count them; the products that resize and
    pool have their own column. `size` is (height, width) in pixels.
    """
    # Other forms of a convolution are multiplications, which are not counted.
    config = config.copy_and_resolve_references()
    config.model.conv_impl = "single_op"
    model = build(config)
    model.eval()
    parameters: Counter[str] = Counter()
    for name, variable in named_variables(model, nnx.Param).items():
        parameters[_module_name(name.removeprefix("backbone.").split("."))] += variable.size
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    program = jax.make_jaxpr(lambda state, images: nnx.merge(graphdef, state)(images))(state, images)
    network: Counter[str] = Counter()
    resampling: Counter[str] = Counter()
    for scopes, count in _multiply_adds(program.jaxpr, ()):
        (resampling if {"resize", "pool"} & set(scopes) else network)[_module_name(scopes)] += count
    columns = parameters, network, resampling
    names = list(dict.fromkeys([*network, *parameters, *resampling]))
    for counts in columns:
        counts["total"] = sum(counts.values())
    return [
        ("module", "parameters", "multiply-adds M", "resampling M"),
        *(
            (name, f"{parameters[name]:,}", f"{network[name] / 1e6:,.1f}", f"{resampling[name] / 1e6:,.1f}")
            for name in (*names, "total")
        ),
    ]


def _module_name(path: Sequence[str]) -> str:
    """The row that a parameter's path or an operation's named scopes belong to."""
    modules = "tpm", "ppa", "trans", "SIM", "decode_head", "head"
    return next((part for part in path if part in modules), "other")


def _multiply_adds(jaxpr: Any, scopes: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """The named scopes and the multiply-adds of every convolution and matrix product, in inner jaxprs too."""
    for equation in jaxpr.eqns:
        inner = scopes + tuple(str(equation.source_info.name_stack).split("/"))
        operands = [variable.aval.shape for variable in equation.invars]
        out = int(np.prod(equation.outvars[0].aval.shape)) if equation.outvars else 0
        if equation.primitive.name == "conv_general_dilated":
            yield inner, out * int(np.prod(operands[1][:3]))  # the kernel is [k, k, in / groups, out]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            yield inner, out * int(np.prod([operands[0][axis] for axis in contracted]))
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _multiply_adds(value.jaxpr, inner)
