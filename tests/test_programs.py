"""Programs kept on disk: found again, never stale, and whatever is wrong with a file, it is compiled anew."""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topformer_jax import programs, sharding
from topformer_jax.models import layers

ROOT = pathlib.Path(__file__).parents[1]
# Prints hsigmoid(1), and whether it was traced.
PROCESS = """
import pathlib, sys
import jax, numpy as np
from topformer_jax import programs, sharding
from topformer_jax.models import layers
traced = []
def call(x):
    traced.append(x)
    return layers.hsigmoid(x)
programs.keep_in(pathlib.Path(sys.argv[1]))
program = programs.KeptProgram(call, "hsigmoid", sharding.make_inference_mesh(jax.devices()))
print(float(program(np.float32(1))), len(traced))
"""


class Doubler:
    """A kept program that donates its argument, and how often it was traced."""

    def __init__(
        self, made_from: object = "double", factor: float = 2, devices: int = 1, compiler: Any = None
    ):
        self.traces = 0
        mesh = sharding.make_inference_mesh(jax.devices()[:devices])
        self.layout = sharding.batch_sharding(mesh)
        layout = {"in_shardings": self.layout, "out_shardings": self.layout}
        self.program = programs.KeptProgram(
            self._double, made_from, mesh, **layout, donate_argnums=0, compiler_options=compiler
        )
        self.factor = factor

    def _double(self, x: jax.Array) -> jax.Array:
        self.traces += 1
        return x * jnp.asarray(self.factor, x.dtype)

    def __call__(self, dtype: str = "float32", size: int = 8) -> np.ndarray:
        given = jax.device_put(np.arange(size, dtype=dtype), self.layout)
        result = self.program(given)
        assert given.is_deleted()
        assert result.sharding == self.layout
        return np.asarray(result)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    programs.keep_in(tmp_path / "programs")
    yield tmp_path / "programs"
    programs.keep_in(None)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_kept_program_is_not_traced_again(folder: pathlib.Path, devices: int) -> None:
    first, second = Doubler(devices=devices), Doubler(devices=devices)
    np.testing.assert_array_equal(first(), 2 * np.arange(8))
    assert folder.stat().st_mode & 0o777 == 0o700
    for _ in range(2):
        np.testing.assert_array_equal(second(), 2 * np.arange(8))
    assert (first.traces, second.traces) == (1, 0)


def test_arguments_devices_settings_and_what_it_is_made_from_make_other_programs(
    folder: pathlib.Path,
) -> None:
    Doubler()()
    for other, arguments in (
        (Doubler(), ("int32", 8)),
        (Doubler(), ("float32", 16)),
        (Doubler(devices=2), ()),
        (Doubler("triple", 3), ()),
        (Doubler(compiler={"xla_cpu_prefer_vector_width": 128}), ()),
    ):
        other(*arguments)
        assert other.traces == 1
    with jax.default_matmul_precision("float32"):
        other = Doubler()
        other()
        assert other.traces == 1


def test_an_equal_program_made_from_something_else_is_traced_but_not_compiled(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Doubler("log_every=1")()
    monkeypatch.setattr(programs, "_compile_anew", None)
    for traces in (1, 0):
        other = Doubler("log_every=2")
        np.testing.assert_array_equal(other(), 2 * np.arange(8))
        assert other.traces == traces


def test_a_changed_line_of_the_package_makes_another_program(tmp_path: pathlib.Path) -> None:
    package = shutil.copytree(ROOT / "topformer_jax", tmp_path / "topformer_jax")
    file = package / "models/layers.py"
    text = file.read_text()
    line = "return relu6(x + 3) / 6"
    assert text.count(line) == 1

    def run(text: str) -> list[float]:
        file.write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, tmp_path / "programs"],
            env=os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        return [float(word) for word in done.stdout.split()]

    assert run(text) == [pytest.approx(4 / 6), 1]
    assert run(text) == [pytest.approx(4 / 6), 0]
    assert run(text.replace(line, "return relu6(x + 3) / 5")) == [pytest.approx(4 / 5), 1]
    assert run(text) == [pytest.approx(4 / 6), 0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: b"another format" + data,
    ],
    ids=["empty", "byte missing", "half", "bit", "format"],
)
def test_a_damaged_file_is_ignored_and_replaced(
    folder: pathlib.Path, spoil: Callable[[bytes], bytes]
) -> None:
    Doubler()()
    for file in folder.iterdir():
        file.write_bytes(spoil(file.read_bytes()))
    for traces in (1, 0):
        again = Doubler()
        np.testing.assert_array_equal(again(), 2 * np.arange(8))
        assert again.traces == traces


def test_what_others_may_write_is_not_read(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def traces() -> int:
        again = Doubler()
        again()
        return again.traces

    assert (traces(), traces()) == (1, 0)
    for file in folder.iterdir():
        file.chmod(0o620)
    assert traces() == 1  # and written anew
    folder.chmod(0o770)
    assert (traces(), traces()) == (1, 1)
    folder.chmod(0o700)
    assert traces() == 0
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert traces() == 1


@pytest.mark.parametrize(
    "made_from", [Doubler, ("loss", test_a_kept_program_is_not_traced_again), lambda: 0, (x for x in [0])]
)
def test_programs_with_code_of_other_origin_are_not_kept(folder: pathlib.Path, made_from: Any) -> None:
    np.testing.assert_array_equal(Doubler(made_from)(), 2 * np.arange(8))
    assert not folder.exists()
    Doubler(("of the package", layers.hsigmoid, jax.nn.relu))()
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_made_and_calls_under_a_transformation(
    folder: pathlib.Path,
) -> None:
    double = Doubler()
    folder.write_text("a file")
    np.testing.assert_array_equal(double(), 2 * np.arange(8))
    folder.unlink()
    gradient = jax.grad(lambda x: Doubler().program(x).sum())(jnp.ones(8))
    np.testing.assert_array_equal(gradient, np.full(8, 2))
    assert not folder.exists()


def test_unused_and_too_many_files_are_deleted(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Doubler()()
    old = {file: file.stat() for file in folder.iterdir()}
    for file, status in old.items():
        os.utime(file, (status.st_atime, status.st_mtime - 29 * 86400))
    Doubler("triple", 3)()
    assert len(list(folder.iterdir())) == 4
    for file, status in old.items():
        os.utime(file, (status.st_atime, status.st_mtime - 31 * 86400))
    Doubler("quadruple", 4)()
    assert len(list(folder.iterdir())) == 4
    assert not old.keys() & set(folder.iterdir())
    monkeypatch.setattr(programs, "MAX_BYTES", 2.5 * next(folder.iterdir()).stat().st_size)
    Doubler("five", 5)()
    assert len(list(folder.iterdir())) == 2
    five = Doubler("five", 5)
    five()
    assert five.traces == 0


def test_nothing_is_kept_unless_a_command_says_where(tmp_path: pathlib.Path) -> None:
    np.testing.assert_array_equal(Doubler()(), 2 * np.arange(8))
    assert programs._folder is None


def test_unused_programs_are_deleted_and_nothing_else(folder: pathlib.Path) -> None:
    folder.mkdir(mode=0o700, parents=True)
    old = 1e9  # seconds since 1970
    files = {name: folder / name for name in ("unused.program", "notes.txt")}
    for file in files.values():
        file.write_bytes(b"x")
        os.utime(file, (old, old))
    Doubler()()
    assert not files["unused.program"].exists()
    assert files["notes.txt"].exists()
