"""Where does a training step's time go, and how near is each part to what the machine can do?

  python -m benchmarks.layers --config configs/topformer_b_ade.py --config.batch_size=4

Each part forward and backward by itself, in training mode, at the config's batch and crop, beside XLA's count of its
operations and of the bytes that they read and write. "bound" is the larger of two times: of the operations at the
rate of a matrix product, and of the bytes at the rate of a sum over large arrays; the first rows are these two. A
step is not the sum of its parts: XLA fuses over their borders.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from benchmarks import samples, timing
from benchmarks.timing import OURS, Row
from topformer_jax import config as config_lib, models
from topformer_jax.models.layers import sequential
from topformer_jax.ops import loss as loss_ops
from topformer_jax.runtime import cli, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.training import step

SIDE, LARGE = 2048, 1 << 26  # of the matrices, and numbers in the arrays whose rates are the bounds
Part = tuple[str, Any, Callable[..., Any], tuple[Any, ...]]  # name, module, how it is called, its inputs


def measure_rates(repeats: int) -> tuple[list[Row], float, float]:
    """The rows of a matrix product and of a sum, operations a second of the one and bytes a second of the other."""
    matrix, vector = jnp.ones((SIDE, SIDE)), jnp.ones(LARGE)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    rows = time_part("matrix product", product, (matrix,), repeats)
    rows += time_part("sum", jax.jit(lambda x: x + 1), (vector,), repeats)
    product_seconds, sum_seconds = (row["seconds"]["median"] for row in rows)
    return rows, rows[0]["operations"] / product_seconds, rows[1]["accessed_bytes"] / sum_seconds


def time_part(name: str, jitted: Any, arguments: tuple[Any, ...], repeats: int) -> list[Row]:
    """A row with the time of a jitted function and what XLA counts of it."""
    program = timing.start(name, lambda: jitted(*arguments))
    (row,) = timing.compare(name, {OURS: program}, repeats)
    counted = jitted.lower(*arguments).compile().cost_analysis()
    return [row | {"operations": counted["flops"], "accessed_bytes": counted["bytes accessed"]}]


def list_parts(model: models.Segmenter, images: Array) -> Iterator[Part]:
    """The network's parts in their order, each with the activations that it gets."""
    backbone = model.backbone
    pyramid, x, tokens = backbone.tpm, images, []
    yield "stem", pyramid.stem, sequential, (x,)
    x = sequential(pyramid.stem, x)
    for index in range(len(pyramid.strides)):
        layer = getattr(pyramid, f"layer{index + 1}")
        yield f"layer{index + 1}", layer, call, (x,)
        x = layer(x)
        tokens += [x] if index in pyramid.taps else []
    pooled = backbone.ppa(tokens)
    yield "trans", backbone.trans, call, (pooled, None)
    semantics = jnp.split(backbone.trans(pooled, None), np.cumsum(backbone.channels)[:-1], axis=-1)
    maps = []
    for index, (local, token) in enumerate(zip(tokens, semantics, strict=True)):
        if index:  # the tokens of stride 4 get no injection
            yield f"SIM {index}", backbone.SIM[index], call, (local, token)
            maps.append(backbone.SIM[index](local, token))
    yield "decode_head", model.decode_head, lambda head, *arrays: head(list(arrays)), tuple(maps)


def call(module: Any, *inputs: Array) -> Any:
    """A module's output."""
    return module(*inputs)


def make_backward(
    module: Any, apply: Callable[..., Any], inputs: tuple[Any, ...], *, of_inputs: bool
) -> tuple[Any, tuple[Any, ...]]:
    """A part forward and backward, with gradients of its parameters and, if asked for, of its inputs."""
    graphdef, *states = nnx.split(module, nnx.Param, ...)
    parameters, others = states

    def forward(parameters: Any, others: Any, inputs: tuple[Any, ...]) -> Array:
        output: Array = apply(nnx.merge(graphdef, parameters, others, copy=True), *inputs)
        return output

    shape = jax.eval_shape(forward, parameters, others, inputs)
    gradient = jax.random.normal(jax.random.key(1), shape.shape, shape.dtype)

    def backward(parameters: Any, others: Any, inputs: tuple[Any, ...], gradient: Array) -> Any:
        if of_inputs:
            out, pullback = jax.vjp(lambda p, x: forward(p, others, x), parameters, inputs)
        else:
            out, pullback = jax.vjp(lambda p: forward(p, others, inputs), parameters)
        return out, pullback(gradient)

    return jax.jit(backward), (parameters, others, inputs, gradient)


def main() -> None:
    """The command."""
    args, config = timing.parse(timing.make_parser(__doc__))
    if config.task != "segmentation":
        raise UserError(f"{config.name} is a classifier: the parts are those of a segmenter")
    rows, operations_rate, bytes_rate = measure_rates(args.repeats)
    rows += time_parts(config, args.repeats)
    for row in rows:
        row["bound_seconds"] = max(row["operations"] / operations_rate, row["accessed_bytes"] / bytes_rate)
    size = " x ".join(map(str, (config.batch_size, *config.data.crop_size)))
    notes = [f"{operations_rate / 1e9:.0f} GFLOP/s, {bytes_rate / 1e9:.1f} GB/s"]
    timing.report(f"layers: {timing.describe(config)}, {size}", rows, args, notes)


def time_parts(config: ConfigDict, repeats: int) -> list[Row]:
    """A row for each part, the loss, their sum, and the whole step."""
    plain = config_lib.load(config, {"model.dropout_ratio": 0.0, "model.drop_path_rate": 0.0})
    model = models.build(plain)
    assert isinstance(model, models.Segmenter)
    model.train()
    random, side = np.random.default_rng(0), config.data.crop_size
    images = jnp.asarray(random.standard_normal((config.batch_size, *side, 3), np.float32))
    rows = []
    for name, module, apply, inputs in list_parts(model, images):
        jitted, arguments = make_backward(module, apply, inputs, of_inputs=name != "stem")
        rows += time_part(name, jitted, arguments, repeats)
    cells = [-(-pixels // 8) for pixels in side]
    shape = (config.batch_size, *cells, config.model.num_classes)
    logits = jnp.asarray(random.standard_normal(shape, np.float32))
    labels = jnp.asarray(samples.labels(config.batch_size, side, config.model.num_classes), jnp.int32)
    loss = jax.jit(
        jax.value_and_grad(
            lambda logits, labels: (
                loss_ops.upsampled_cross_entropy(logits, labels, precision=config.model.precision).loss
            )
        )
    )
    rows += time_part("loss", loss, (logits, labels), repeats)
    total = {key: sum(row[key] for row in rows) for key in ("operations", "accessed_bytes")}
    seconds = [sum(row["seconds"]["median"] for row in rows)]
    mesh = sharding.make_train_mesh(config, jax.local_devices()[:1])
    state, train_step = step.init_training(config, mesh)
    batch = jax.device_put(samples.batch(config), sharding.batch_sharding(mesh))

    def make_step() -> object:
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics

    program = timing.start("whole step", make_step)
    (whole,) = timing.compare("whole step", {OURS: program}, repeats)
    compiled: Any = train_step
    counted = compiled.lower(state, batch).compile().cost_analysis()
    whole |= {"operations": counted["flops"], "accessed_bytes": counted["bytes accessed"]}
    return [*rows, timing.make_row("sum of the parts", OURS, seconds) | total, whole]


if __name__ == "__main__":
    cli.run(main)
