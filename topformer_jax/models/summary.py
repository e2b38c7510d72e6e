"""Parameters and multiply-adds of each module of a model."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from topformer_jax.models import build, named_variables


def summary(config: ConfigDict, size: tuple[int, int]) -> list[tuple[str, ...]]:
    """The rows of a table: for each module its parameters, and its multiply-adds in millions for one image.

    Multiply-adds are those of convolutions and matrix products, as papers count them. The products that resize and
    pool have a column of their own: elsewhere they are interpolation, and not counted. BatchNorm's running statistics
    are not parameters.

    Args:
        config: of the model.
        size: (height, width) of the image, pixels.

    Raises:
        UserError: a setting has a value that is not allowed.
    """
    # The shifted depthwise convolution consists of multiplications; only the library's is counted as a convolution.
    config = config.copy_and_resolve_references()
    config.model.conv_impl = "library"
    model = build(config)
    model.eval()
    parameters: Counter[str] = Counter()
    for name, variable in named_variables(model).items():
        if isinstance(variable, nnx.Param):
            parameters[_module_name(name.removeprefix("backbone.").split("."))] += variable.size
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    program = jax.make_jaxpr(lambda state, images: nnx.merge(graphdef, state)(images))(state, images)
    network: Counter[str] = Counter()
    resampling: Counter[str] = Counter()
    for scopes, count in _multiply_adds(program.jaxpr, ()):
        (resampling if {"resize", "pool"} & set(scopes) else network)[_module_name(scopes)] += count

    rows: list[tuple[str, ...]] = [("module", "parameters", "multiply-adds M", "resampling M")]
    for module in [*dict.fromkeys([*network, *parameters, *resampling])]:
        rows.append(
            (
                module,
                f"{parameters[module]:,}",
                f"{network[module] / 1e6:,.1f}",
                f"{resampling[module] / 1e6:,.1f}",
            )
        )
    totals = [sum(counts.values()) for counts in (parameters, network, resampling)]
    rows.append(("total", f"{totals[0]:,}", f"{totals[1] / 1e6:,.1f}", f"{totals[2] / 1e6:,.1f}"))
    return rows


def _module_name(path: Any) -> str:
    """The row that a parameter's path or an operation's named scopes belong to."""
    return next(
        (part for part in path if part in ("tpm", "ppa", "trans", "SIM", "decode_head", "head")), "other"
    )


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
