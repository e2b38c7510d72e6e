"""Helpers of the parity tests: a JAX model with a PyTorch network's weights, layouts, relative errors."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from topformer_jax import checkpoints, config, models
from topformer_jax.checkpoints.torch_format import from_torch
from topformer_jax.training import step

INJECTIONS = ("multi_sum", "multi_sum_cbr", "fuse_sum", "fuse_multi", "none")
# Rounded to float32, as in the reference, also for its goldens in float64.
MEAN = np.array((123.675, 116.28, 103.53), np.float32)
STD = np.array((58.395, 57.12, 57.375), np.float32)


def model_from(network: torch.nn.Module, settings: ConfigDict) -> models.Segmenter | models.Classifier:
    """A model of these settings with the network's weights, in inference mode."""
    model = models.build(settings)
    states = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    states = {name: from_torch(tensor) for name, tensor in states.items()}
    places = {name: variable.shape for name, variable in models.named_variables(model).items()}
    assert {name: tensor.shape for name, tensor in states.items()} == places
    checkpoints.load_state_dict(model, states)
    model.eval()
    return model


def same_states(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have equal names, dtypes and bits."""
    return set(ours) == set(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


def settings_for(variant: str, **overrides: object) -> ConfigDict:
    """The ADE20K recipe of a variant with changed settings (underscores for dots: `model__dtype`)."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return config.load(config.ade20k(variant), changes)


def run(model: nnx.Module, images: ArrayLike) -> np.ndarray:
    """The model's output for a batch, compiled."""
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images))


def to_nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def to_nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def normalize(image: np.ndarray) -> np.ndarray:
    """Normalises a uint8 image `[h, w, 3]`, RGB, to a float32 batch `[1, h, w, 3]`."""
    return ((image.astype(np.float32) - MEAN) / STD)[None]


def distance(ours: ArrayLike, theirs: ArrayLike) -> float:
    """max |difference| / max |theirs|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def summed_bytes(state: step.TrainState, config: ConfigDict) -> int:
    """Bytes that the chips of a step with whole parameters must add up: the least that collectives can send.

    Gradients, in the dtype that the layer computes in; of each BatchNorm mean and variance, and in the backward pass
    the sum that both depend on; the loss and the counts of correct and of labelled pixels.
    """
    itemsize = jnp.dtype(models.DTYPES[config.model.dtype]).itemsize
    wide = max(itemsize, 4)  # BatchNorm and logits
    total = 3 * wide
    for name, value in state.params.items():
        is_wide = ".bn." in name or name.startswith("decode_head.conv_seg.")
        total += value.size * (wide if is_wide else itemsize)
    channels = sum(value.size for name, value in state.stats.items() if name.endswith(".running_mean"))
    return total + 3 * wide * channels
