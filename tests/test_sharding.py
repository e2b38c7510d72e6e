"""Which device lies where on a mesh: slices outermost, processes in order, groups of `fsdp` inside a slice."""

from typing import Any

import jax
import pytest

from topformer_jax import config
from topformer_jax.runtime import sharding
from topformer_jax.runtime.errors import UserError


def _mesh(devices: Any = None, **changes: int) -> jax.sharding.Mesh:
    values = {"batch_size": 16} | {name.replace("__", "."): value for name, value in changes.items()}
    return sharding.make_train_mesh(config.load(config.ade20k("tiny"), values), devices)


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_slices_change_neither_the_mesh_nor_so_the_numbers(fsdp: int) -> None:
    """The same devices in the same order are the same program with the same batch."""
    mesh = _mesh(mesh__fsdp=fsdp, mesh__slices=2)
    assert mesh == _mesh(mesh__fsdp=fsdp)
    assert list(mesh.devices.flat) == jax.devices()
    for group in mesh.devices:  # one slice has devices 0 to 3, the other 4 to 7
        assert len({device.id // 4 for device in group}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__fsdp": 8, "mesh__slices": 2}, "does not divide the 4 devices of a slice"),
        ({"mesh__slices": 3}, "slices of 3 and 3 and 2 devices: all must have the same number"),
        ({"mesh__slices": 16}, "mesh.slices=16, but the 8 devices lie in 8"),
    ],
)
def test_slices_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _mesh(**changes)


def test_two_slices_of_a_tpu() -> None:
    """As its devices say, in the order of their processes, in whatever order they are given."""
    pytest.importorskip("libtpu")
    from benchmarks import compile as compile_lib

    devices = list(compile_lib.slice_devices("v5e:2x4*2"))
    mesh = _mesh(devices[::-1], mesh__fsdp=4)
    assert [{device.slice_index for device in group} for group in mesh.devices] == [{0}, {0}, {1}, {1}]
    processes = [device.process_index for device in mesh.devices.flat]
    assert processes == sorted(processes)
    in_order = sharding.make_inference_mesh(devices).devices
    assert [device.slice_index for device in in_order] == [0] * 8 + [1] * 8
    with pytest.raises(UserError, match="does not divide the 8 devices of a slice"):
        _mesh(devices, mesh__fsdp=16)
    with pytest.raises(UserError, match="but the 16 devices lie in 2"):
        _mesh(devices, mesh__slices=1)
    with pytest.raises(UserError, match="slices of 8 and 4 devices: all must"):
        _mesh(devices[:12])
