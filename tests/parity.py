"""How the parity tests bring a PyTorch network and a JAX model together, and what they measure."""

import jax
import numpy as np
import torch
from flax import nnx
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from topformer_jax import checkpoint, config, convert, models

# As float32 rounds them: the reference's goldens in float64 were normalised with these.
MEAN = np.array((123.675, 116.28, 103.53), np.float32)
STD = np.array((58.395, 57.12, 57.375), np.float32)


def model_from(network: torch.nn.Module, settings: ConfigDict) -> models.Segmenter | models.Classifier:
    """A model of these settings with the network's weights, in inference mode."""
    model = models.build(settings)
    states = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    states = {name: convert.from_torch(tensor) for name, tensor in states.items()}
    places = {name: variable.shape for name, variable in models.named_variables(model).items()}
    checkpoint.check_state_dict(
        {name: tensor.shape for name, tensor in states.items()}, places, "the network"
    )
    checkpoint.load_state_dict(model, states)
    model.eval()
    return model


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


def normalised(image: np.ndarray) -> np.ndarray:
    """A uint8 image `[h, w, 3]` as a float32 batch of one."""
    return ((image.astype(np.float32) - MEAN) / STD)[None]


def distance(ours: ArrayLike, theirs: ArrayLike) -> float:
    """max |difference| / max |theirs|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
