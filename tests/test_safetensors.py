"""safetensors files: official names and layout bitwise, without PyTorch; what is not one is refused."""

import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from tests.parity import same_states
from topformer_jax import checkpoints, config
from topformer_jax.checkpoints import safetensors_format, torch_format
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
States = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def path(states: States, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A file that PyTorch's side of the library wrote."""
    path = tmp_path_factory.mktemp("safetensors") / "official.safetensors"
    safetensors.torch.save_file(states, path)
    return path


def test_round_trip(path: pathlib.Path, states: States, tmp_path: pathlib.Path) -> None:
    """From this package's layout, whose transposed views are not contiguous; with metadata."""
    tensors, _ = safetensors_format.read(path)
    expected = {name: torch_format.from_torch(tensor.numpy()) for name, tensor in states.items()}
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].dtype == expected[name].dtype for name in expected)
    assert all((tensors[name] == expected[name]).all() for name in expected)
    assert not all(tensor.flags.c_contiguous for tensor in tensors.values())
    settings = config.ade20k("tiny")
    metadata = {"config": settings.to_dict(), "meta": {"CLASSES": ["wall"], "iter": 3, "best": float("nan")}}
    checkpoints.write_checkpoint(tmp_path / "back.safetensors", tensors, metadata)
    assert same_states(safetensors.torch.load_file(tmp_path / "back.safetensors"), states)
    again, found = safetensors_format.read(tmp_path / "back.safetensors")
    assert all((again[name] == tensors[name]).all() for name in tensors)
    assert found["meta"] == {"CLASSES": ["wall"], "iter": 3, "best": None}  # JSON has no NaN
    assert found["config"] == json.loads(settings.to_json())
    with pytest.raises(UserError, match="safetensors is there already: name another file"):
        checkpoints.write_checkpoint(tmp_path / "back.safetensors", tensors, {})


def test_commands_need_no_pytorch(path: pathlib.Path, states: States, tmp_path: pathlib.Path) -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "runpy.run_module('topformer_jax.convert', run_name='__main__')"
    )
    for words in (
        ["--config", "topformer_t_ade", "--checkpoint", path, "--output", tmp_path / "folder"],
        ["--checkpoint", tmp_path / "folder", "--output", tmp_path / "a.safetensors"],
        ["--checkpoint", tmp_path / "a.safetensors", "--output", tmp_path / "b.safetensors"],
    ):
        subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=ROOT, check=True)
    first, second = (safetensors_format.read(tmp_path / f"{name}.safetensors")[1] for name in "ab")
    assert first == second
    assert same_states(safetensors.torch.load_file(tmp_path / "b.safetensors"), states)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.uint8, np.bool_])
def test_dtypes(dtype: type, tmp_path: pathlib.Path) -> None:
    values: np.ndarray = np.array([[1, 0, 3], [0, 1, 2]]).astype(dtype)
    (tmp_path / "x.safetensors").write_bytes(safetensors.numpy.save({"x": values}))
    tensors, _ = safetensors_format.read(tmp_path / "x.safetensors")
    kind = np.dtype(dtype).kind
    assert tensors["x"].dtype == (np.int32 if kind in "iub" else np.float64 if dtype == np.float64 else np.float32)
    assert (torch_format.to_torch(tensors["x"]) == values.astype(np.float64)).all()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not a safetensors file, or a damaged one"),
        (b"PK" * 50, "is not a safetensors file, or a damaged one"),
        (None, "is not a safetensors file, or a damaged one"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        (
            safetensors.numpy.save({"x": np.zeros(2, np.complex64)}),
            "safetensors: x has dtype C64: expected one of F64, ",
        ),
    ],
)
def test_what_is_refused(path: pathlib.Path, tmp_path: pathlib.Path, content: bytes | None, expected: str) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=expected) as error:
        safetensors_format.read(bad)
    assert "\n" not in error.value.line


def test_without_the_library(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        UserError, match=r"safetensors files needs safetensors: .*; pip install 'topformer_jax\[export\]'"
    ):
        safetensors_format.read(files.as_path(path))
