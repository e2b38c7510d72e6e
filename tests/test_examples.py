"""The examples for devices, compiled and run: labels from logits in C++ and Kotlin, the C++ program as a whole."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import cv2
import jax
import numpy as np
import onnxruntime
import PIL.Image
import pytest

from tests.commands import LONGEST, command
from tests.test_export import FLAGS
from topformer_jax import checkpoints, config, export
from topformer_jax.data import shapes
from topformer_jax.exporters import litert_file, network

ROOT = pathlib.Path(__file__).parents[1]
NATIVE = ROOT / "tests" / "native"
CPP = ROOT / "examples" / "cpp"
KOTLIN = ROOT / "examples/android/app/src/main/java/topformer/example"
FindLabels = Callable[[np.ndarray, tuple[int, int], int], np.ndarray]


def compile_cpp(source: pathlib.Path, program: pathlib.Path, *flags: object) -> pathlib.Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    strict = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread"]
    words = [compiler, *strict, source, f"-I{CPP}", f"-I{NATIVE}", *flags, "-o", program]
    subprocess.run([str(word) for word in words], check=True, timeout=LONGEST)
    return program


def compile_kotlin(folder: pathlib.Path) -> list[str]:
    """Main.kt as a command: by kotlinc, or by the compiler in the package kotlin-jupyter-kernel."""
    java, kotlinc = shutil.which("java"), shutil.which("kotlinc")
    spec = importlib.util.find_spec("run_kotlin_kernel")
    if java is None or (kotlinc is None and spec is None):
        pytest.skip("there is no Kotlin compiler: pip install kotlin-jupyter-kernel brings one, for Java")
    sources = [str(KOTLIN / "Labels.kt"), str(KOTLIN / "Description.kt"), str(NATIVE / "Main.kt")]
    if kotlinc is not None:
        subprocess.run(
            [kotlinc, *sources, "-include-runtime", "-d", f"{folder}/labels.jar"], check=True, timeout=LONGEST
        )
        return [java, "-cp", f"{folder}/labels.jar", "MainKt"]
    assert spec is not None
    assert spec.origin is not None
    jars = [str(path) for path in (pathlib.Path(spec.origin).parent / "jars").glob("*.jar")]
    library = next(jar for jar in jars if "kotlin-stdlib" in jar)
    compiler = [java, "-cp", os.pathsep.join(jars), "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
    flags = ["-no-stdlib", "-no-reflect", "-Werror", "-cp", library, "-d", str(folder)]
    subprocess.run([*compiler, *flags, *sources], check=True, timeout=LONGEST)
    return [java, "-cp", os.pathsep.join([str(folder), library]), "MainKt"]


@pytest.fixture(scope="module")
def kotlin(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return compile_kotlin(tmp_path_factory.mktemp("kotlin"))


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(compile_cpp(NATIVE / "labels.cpp", tmp_path_factory.mktemp("cpp") / "labels"))]


@pytest.fixture(params=["cpp", "kotlin"])
def find_labels(request: pytest.FixtureRequest) -> FindLabels:
    program: list[str] = request.getfixturevalue(request.param)

    def run(logits: np.ndarray, size: tuple[int, int], threads: int) -> np.ndarray:
        numbers = map(str, (*logits.shape, *size, threads))
        data = np.ascontiguousarray(logits, "<f4").tobytes()
        done = subprocess.run([*program, *numbers], input=data, stdout=subprocess.PIPE, check=True, timeout=LONGEST)
        return np.frombuffer(done.stdout, np.uint8).reshape(size)

    return run


def upsampled(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A bilinear resize by its formula, in float64."""
    for axis, pixels in enumerate(size):
        length = logits.shape[axis]
        position = ((np.arange(pixels) + 0.5) * length / pixels - 0.5).clip(0, length - 1)
        lower = np.floor(position).astype(int)
        shape = [-1 if other == axis else 1 for other in range(3)]
        part = (position - lower).reshape(shape)
        upper = np.minimum(lower + 1, length - 1)
        logits = logits.take(lower, axis) * (1 - part) + logits.take(upper, axis) * part
    return logits


def regions(random: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Logits like a picture's: regions with one winner, several contenders and noise along their borders."""
    coarse = random.normal(size=(4, 5, shape[2])) * 3
    return (upsampled(coarse, shape[:2]) + random.normal(size=shape) * 0.3).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((64, 64, 150), (512, 512)),
        ((9, 5, 256), (72, 33)),
        ((20, 30, 11), (13, 17)),
        ((1, 8, 2), (5, 64)),
    ],
)
def test_labels_are_those_of_the_resized_logits(
    find_labels: FindLabels, shape: tuple[int, int, int], size: tuple[int, int]
) -> None:
    random = np.random.default_rng(0)
    for logits in (regions(random, shape), random.normal(size=shape).astype(np.float32)):
        scores = upsampled(logits.astype(np.float64), size)
        expected = scores.argmax(-1)
        assert len(np.unique(expected)) > 1 or shape[:2] == (1, 1)
        for threads in (1, 3):
            found = find_labels(logits, size, threads)
            # Equal, but where two classes are within the rounding of float32.
            margin = np.take_along_axis(scores, expected[..., None], -1) - np.take_along_axis(
                scores, found[..., None].astype(int), -1
            )
            assert margin.max() < 1e-5
            assert (found != expected).mean() <= 1e-4


def test_ties_go_to_the_first_class(find_labels: FindLabels) -> None:
    logits = np.zeros((4, 4, 5), np.float32)
    logits[:2, :, 3] = logits[:2, :, 1] = 1
    logits[2:, :, 2] = 1
    found = find_labels(logits, (32, 32), 2)
    assert set(np.unique(found)) == {1, 2}
    assert (found[:12] == 1).all()
    assert (found[20:] == 2).all()


def test_the_description_of_a_litert_file(kotlin: list[str]) -> None:
    facts = {"output": "logits", "palette": [[1, 2, 3], [255, 0, 9]]}
    data = litert_file._append_metadata(b"TFL3" * 1000, facts)
    done = subprocess.run(kotlin, input=data, stdout=subprocess.PIPE, check=True, timeout=LONGEST)
    assert json.loads(done.stdout) == facts


def test_the_cpp_program(shapes_weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    libraries = list((pathlib.Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("onnxruntime's package has no library for C here")
    (tmp_path / "libonnxruntime.so.1").symlink_to(libraries[0])  # by this name programs look for it
    link = [libraries[0], f"-Wl,-rpath,{tmp_path}"]
    program = compile_cpp(CPP / "segment.cpp", tmp_path / "segment", *link)
    file = tmp_path / "t.onnx"
    command(export.main, *FLAGS, "--checkpoint", shapes_weights, "--output", file, "--size", "any", "--logits")
    picture = cv2.resize(shapes.draw("validation", 1, 256)[0], (203, 150))
    cv2.imwrite(str(tmp_path / "a.ppm"), picture[..., ::-1])

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, timeout=LONGEST)

    said = run(file, tmp_path / "a.ppm", tmp_path / "a", 2, 3)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("203 x 150, 2 threads: network ")
    model = checkpoints.load_model(config.shapes(), str(shapes_weights))
    expected = np.asarray(jax.jit(network.make_function(model, "labels", fold=False))(picture[None]))[0]
    labels, overlay = (np.asarray(PIL.Image.open(tmp_path / f"a_{name}")) for name in ("labels.pgm", "overlay.ppm"))
    assert len(np.unique(expected)) > 1
    assert (labels != expected).mean() <= 1e-4
    palette = np.array(export.describe_model(config.shapes(), "", model)["palette"])
    assert np.array_equal(overlay, (picture + palette[labels] + 1) // 2)

    missing = run(tmp_path / "none.onnx", tmp_path / "a.ppm", tmp_path / "b")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: Load model from")
    other = run(file, file, tmp_path / "b")
    assert "is not a PPM picture of 8 bits" in other.stderr
    assert not list(tmp_path.glob("b*"))
