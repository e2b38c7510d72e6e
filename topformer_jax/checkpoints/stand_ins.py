"""What PyTorch files hold beside tensors, without the classes of the programs that wrote them.

PyTorch's weights-only unpickler asks for each class and function that a file names. It gets one of these, never the
real one, so that nothing which the file names is imported or run. numpy's own unpickling trusts its input; numbers
of numpy are therefore read here.
"""

import argparse
import re
from collections import OrderedDict
from typing import Any

import numpy as np

MOST = 200  # a file that names more than this is refused: each costs a reading


class StandIn:
    """An object of an unknown class: it takes whatever its pickle gives to it, and keeps nothing.

    `container` is what the unpickler makes instead, where the class turns out to be a kind of dict or list.
    """

    container: type | None = None

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls) if cls.container is None else cls.container()

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass


class Dtype:
    """numpy's dtype, as far as numbers, booleans and strings need it."""

    def __init__(self, code: str, *_: Any):
        self._dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self._dtype = self._dtype.newbyteorder(state[1])

    def read(self, data: Any) -> np.ndarray | None:
        """An array `[n]` of the values in some bytes; None for dates, objects and records."""
        readable = isinstance(data, bytes) and self._dtype.kind in "biufcU" and self._dtype.itemsize
        return np.frombuffer(data, self._dtype) if readable else None


class Array:
    """numpy's array: `values` are None where they are no numbers, booleans or strings."""

    def __init__(self, *_: Any):
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        values = dtype.read(data)
        self.values = None if values is None else values.reshape(shape, order="F" if is_fortran else "C")

    @property
    def holds_real_numbers(self) -> bool:
        """Whether it can be a tensor."""
        return self.values is not None and self.values.dtype.kind in "biuf"


def read_scalar(dtype: Dtype, data: Any = None) -> Any:
    """numpy's scalar as a Python value."""
    values = dtype.read(data)
    return None if values is None else values[0].item()


def find_attribute(*_: Any) -> type[StandIn]:
    """What stands for the attributes of a class, such as a class inside another."""
    return StandIn


# By the names in a file: numpy 1 has `core` where numpy 2 has `_core`. timm keeps its arguments in a Namespace.
KNOWN: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "builtins.getattr": find_attribute,
    "builtins.object": StandIn,
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
} | {
    f"numpy.{core}.multiarray.{name}": stand_in
    for core in ("core", "_core")
    for name, stand_in in (("_reconstruct", Array), ("scalar", read_scalar))
}


def add_stand_in(stand_ins: dict[str, Any], message: str) -> bool:
    """Adds what an unpickler lacks, by its error's message, and returns whether it is worth to ask it again."""
    if asked := re.search(r"Unsupported global: GLOBAL (\S+)", message):
        name = asked[1] if "." in asked[1] else f"builtins.{asked[1]}"
        is_new = name not in stand_ins and len(stand_ins) < MOST
        stand_ins.setdefault(name, type(name, (StandIn,), {}))
        return is_new
    for name, stand_in in stand_ins.items():
        if name not in KNOWN and repr(stand_in) in message and stand_in.container is None:
            stand_in.container = OrderedDict if "SETITEM" in message else list
            return True
    return False
