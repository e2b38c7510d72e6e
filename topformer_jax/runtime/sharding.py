"""The mesh of devices, and the shardings of arrays on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ml_collections import ConfigDict

from topformer_jax.runtime.errors import UserError

FSDP_MIN_SIZE = 4096  # numbers; a smaller array stays whole on every device, since gathering it costs more


def make_train_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` with axes `data` and `fsdp`, over all devices or those given.

    `data` is the outer axis and devices of a slice follow each other, so the devices of an `fsdp` group, which gather
    parameters, are in one slice. Only sums travel between slices: gradients and BatchNorm statistics.

    Raises:
        UserError: the slices do not fit `config.mesh`, or the devices do not divide the batch.
    """
    slices = _split_into_slices(jax.devices() if devices is None else devices, config.mesh.slices)
    count = sum(map(len, slices))
    fsdp = config.mesh.fsdp
    if len(slices[0]) % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide the {len(slices[0])} devices of a slice, which gather parameters: "
            "set it to a divisor of their number"
        )
    micro_batch, rest = divmod(config.batch_size, config.grad_accum_steps)
    if rest or micro_batch % count:
        raise UserError(
            f"a batch of {config.batch_size} images in {config.grad_accum_steps} micro-batches cannot be divided "
            f"evenly over {count} devices: set batch_size to a multiple of {config.grad_accum_steps * count}"
        )
    return _make_mesh((count // fsdp, fsdp), ("data", "fsdp"), slices)


def make_inference_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of an evaluation: one axis, `data`, over all devices, slice after slice."""
    return _make_mesh((len(devices),), ("data",), _split_into_slices(devices, 0))


def _split_into_slices(devices: Sequence[jax.Device], expected: int) -> list[list[jax.Device]]:
    """The devices of each slice, in the order of their processes; a UserError if there are not `expected` equal ones.

    0 is for the number that TPUs report; other devices are cut into equal parts. The loader of process p makes the
    p-th part of a batch, so the order of the batch does not depend on the slices.
    """
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    slices: dict[int, list[jax.Device]] = {}
    for index, device in enumerate(ordered):
        part = index * max(expected, 1) // len(ordered)
        name = getattr(device, "slice_index", 0) if device.platform == "tpu" else part
        slices.setdefault(name, []).append(device)
    sizes = [len(members) for members in slices.values()]
    if expected and len(sizes) != expected:
        raise UserError(
            f"mesh.slices={expected}, but the {len(ordered)} devices lie in {len(sizes)}: "
            "set mesh.slices=0 to use the slices of the devices"
        )
    if len(set(sizes)) > 1:
        raise UserError(f"slices of {' and '.join(map(str, sizes))} devices: all must have the same number")
    return list(slices.values())


def _make_mesh(shape: tuple[int, ...], axes: tuple[str, ...], slices: list[list[jax.Device]]) -> Mesh:
    # Automatic axes: JAX's default, explicit ones, would need a sharding at each reshape of the attention.
    devices = np.array([device for members in slices for device in members]).reshape(shape)
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples divided over all devices of any mesh."""
    return NamedSharding(mesh, P(mesh.axis_names))


def array_sharding(array: Any, mesh: Mesh) -> NamedSharding:
    """Divides an array over `fsdp` on its longest axis divisible by that size; a small array is replicated."""
    size = mesh.shape["fsdp"]
    axes = [axis for axis in range(array.ndim) if array.shape[axis] % size == 0]
    if size == 1 or not axes or array.size < FSDP_MIN_SIZE:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: array.shape[axis])
    return NamedSharding(mesh, P(*(("fsdp" if axis == longest else None) for axis in range(array.ndim))))


def to_host(tree: Any) -> Any:
    """Copies arrays to numpy, even if their parts are on devices of other processes.

    Every process must call it, in the same order: it may communicate.
    """

    def fetch(leaf: jax.Array) -> np.ndarray:
        if not leaf.is_fully_replicated:
            assert isinstance(leaf.sharding, NamedSharding)
            leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf)
        return np.asarray(leaf.addressable_data(0))

    return jax.tree.map(fetch, tree)
